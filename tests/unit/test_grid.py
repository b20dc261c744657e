"""Axes to candidates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quantsweep.planning.grid import Axis, Grid, refine


def grid(**axes: list[object]) -> Grid:
    return Grid(axes=tuple(Axis(key=k, values=tuple(v)) for k, v in axes.items()), origin="test")


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.lists(st.integers(), min_size=1, max_size=4, unique=True), max_size=4))
def test_a_grid_is_the_product_of_its_axes(axes: dict[str, list[int]]) -> None:
    g = grid(**axes)
    candidates = list(g.candidates())
    assert len(candidates) == g.size
    assert len({tuple(c.items()) for c in candidates}) == g.size
    for key, values in axes.items():
        assert {c[key] for c in candidates} == set(values)


def test_an_axis_of_the_study_is_replaced_where_it_is_and_added_nowhere_else() -> None:
    quantized, baseline = refine(
        (grid(model=["a"], bit_width=[3, 4]), grid(model=["a"], method=["none"])), [Axis(key="bit_width", values=(8,))]
    )
    assert [c["bit_width"] for c in quantized.candidates()] == [8]
    assert "bit_width" not in baseline.keys


def test_a_new_key_is_an_axis_of_every_grid() -> None:
    grids = refine((grid(model=["a"]), grid(model=["b"])), [Axis(key="seed", values=(0, 1))])
    assert [g.size for g in grids] == [2, 2]
