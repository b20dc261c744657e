"""Fast paths against the obvious way: table look-up against search, radix selection against sorting, errors against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsweep.numerics import codebook
from quantsweep.numerics.blocks import TILE
from quantsweep.numerics.error import weight_error
from quantsweep.numerics.order import order_statistics, quantiles

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=2, max_size=64), st.integers(0, 2**31))
def test_cell_table_equals_search(levels: list[float], seed: int) -> None:
    """Bit for bit, on levels, on mid-points and their neighbours, on random numbers, and far outside."""
    middle = codebook.mid_points(torch.tensor(sorted(levels)))
    table = codebook._cell_table(middle)
    if table is None:
        return
    generator = torch.Generator().manual_seed(seed)
    around = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), torch.tensor(levels)])
    values = torch.cat(
        [around, torch.randn(500, generator=generator), torch.tensor([0.0, -0.0, 1e-45, 3e38, -3e38, torch.inf, -torch.inf])]
    )
    assert torch.equal(codebook._look_up(values, table).long(), torch.bucketize(values, middle))


def test_crowded_cells_are_searched() -> None:
    """Two mid-points closer than a cell: no table, and still the right codes in a large tensor."""
    levels = torch.tensor([-1.0, 0.5, 0.5001, 0.5002, 1.0])
    assert codebook._cell_table(codebook.mid_points(levels)) is None
    values = torch.rand(2, TILE, generator=torch.Generator().manual_seed(0))
    codes = codebook.encode(values, torch.ones(2, 1), levels)
    assert torch.equal(codes.long(), torch.bucketize(values, codebook.mid_points(levels)))


@pytest.mark.parametrize("shape", [(1, 2 * TILE + 3), (3, TILE - 1), (TILE // 8, 17)])
def test_tiling_does_not_show(shape: tuple[int, int]) -> None:
    """Long rows and many rows, with a scale a row: the same as in one go."""
    generator = torch.Generator().manual_seed(0)
    values, scale = torch.randn(shape, generator=generator), torch.rand(shape[0], 1, generator=generator) + 0.5
    levels = torch.linspace(-1, 1, 15)
    codes = codebook.encode(values, scale, levels)
    assert torch.equal(codes.long(), torch.bucketize(values / scale, codebook.mid_points(levels)))
    assert torch.equal(codebook.decode(codes, scale, levels), levels[codes.long()] * scale)


@settings(max_examples=40, deadline=None)
@given(st.lists(finite, min_size=1, max_size=300))
def test_order_statistics_are_those_of_sorting(values: list[float]) -> None:
    """All ranks, with negative numbers, zeros of both signs, repetitions and subnormal numbers."""
    found = order_statistics(torch.tensor(values), range(len(values)))
    assert [found[rank] for rank in range(len(values))] == torch.tensor(values).sort().values.tolist()


def test_order_statistics_of_a_large_tensor() -> None:
    """Several chunks, few distinct values (as of 16-bit checkpoints) and many."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2 * TILE + 7, generator=generator)
    for tensor in (values, values.half().float(), (values * 3).round()):
        ranks = [0, 1, 1000, TILE, tensor.numel() - 1]
        expected = tensor.sort().values
        assert order_statistics(tensor, ranks) == {rank: float(expected[rank]) for rank in ranks}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_quantiles_are_numpys(values: list[float], probabilities: list[float]) -> None:
    """Linear interpolation in float64."""
    expected = np.quantile(np.array(values, dtype=np.float64), probabilities)
    assert quantiles(torch.tensor(values, dtype=torch.float32), probabilities) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32)), min_size=1, max_size=50))
def test_weight_error_is_numpys(pairs: list[tuple[float, float]]) -> None:
    """Relative squared error and the largest error."""
    original, quantized = np.array(pairs, dtype=np.float32).T.astype(np.float64)
    error = weight_error(torch.tensor(original, dtype=torch.float32)[None], torch.tensor(quantized, dtype=torch.float32)[None])
    assert error.max_abs == pytest.approx(np.abs(original - quantized).max(), rel=1e-6, abs=1e-30)
    if (norm := (original**2).sum()) > 1e-30:
        assert error.relative == pytest.approx(((original - quantized) ** 2).sum() / norm, rel=1e-5, abs=1e-12)


def test_weight_error_of_zeros() -> None:
    """Zeros kept are no error; zeros that became something are an infinite one."""
    zeros = torch.zeros(2, 3)
    assert weight_error(zeros, zeros).relative == 0
    assert weight_error(zeros, zeros + 1).relative == float("inf")
