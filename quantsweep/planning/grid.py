"""Axes to candidates: unions of products, in order, and nothing else.

A study is a union of grids; a grid is a product of axes.  This module knows nothing of models or
bits: an axis is a key and its values, a candidate is one value for each key.  What a candidate
means (or that it means nothing) is decided later, by `quantsweep.planning.schema` and `quantsweep.planning.plan`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from quantsweep.checks import shown
from quantsweep.planning.conditions import Exclusion

MAX_SHOWN = 6
"""Values of an axis that are said one by one."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One key (a group such as `model`, or a dotted key such as `data_type.options.exponent_bits`) and its values."""

    key: str
    values: tuple[Any, ...]
    is_found: bool = False
    """Its values are whatever a glob found: nobody asked for each of them, and those that mean nothing here are no mistakes."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A product of axes.

    origin: tells people where it was written: "sweeps/quickstart.yaml, grid 2".
    typed: keys of a study's grid whose values were typed on the command line instead; changes: the same in words.
    exclusions: which of its trials its author leaves out.
    """

    axes: tuple[Axis, ...]
    origin: str
    typed: frozenset[str] = frozenset()
    changes: tuple[str, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()

    @property
    def size(self) -> int:
        """How many candidates the grid has."""
        return prod(len(axis.values) for axis in self.axes)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the axes, in order."""
        return tuple(axis.key for axis in self.axes)

    def with_axis(self, new: Axis) -> Grid:
        """The grid with a typed axis in place of its own one of that key, or beside the others."""
        old = next((axis for axis in self.axes if axis.key == new.key), None)
        if old == new:
            return replace(self, typed=self.typed | {new.key})
        axes = tuple(new if axis is old else axis for axis in self.axes) if old else (*self.axes, new)
        instead = f" in place of {_listed(old.values)}" if old else ""
        change = f"{new.key}={_listed(new.values)}{instead}"
        return replace(self, axes=axes, typed=self.typed | {new.key}, changes=(*self.changes, change))

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Every combination, the last axis fastest.

        >>> grid = Grid(axes=(Axis(key="a", values=(1, 2)), Axis(key="b", values=("x", "y"))), origin="here")
        >>> [c["a"] for c in grid.candidates()], [c["b"] for c in grid.candidates()]
        ([1, 1, 2, 2], ['x', 'y', 'x', 'y'])
        """
        keys = self.keys
        for values in itertools.product(*(axis.values for axis in self.axes)):
            yield dict(zip(keys, values, strict=True))


def refine(grids: tuple[Grid, ...], overrides: Iterable[Axis]) -> tuple[Grid, ...]:
    """Apply what was typed on the command line to a study's grids.

    A key that is an axis somewhere *replaces* that axis in every grid that has it and leaves the
    other grids alone (a baseline grid has no `bit_width`).  A key that is an axis nowhere is a new
    axis of every grid.
    """
    for axis in overrides:
        if any(axis.key in grid.keys for grid in grids):
            grids = tuple(grid.with_axis(axis) if axis.key in grid.keys else grid for grid in grids)
        else:
            grids = tuple(grid.with_axis(axis) for grid in grids)
    return grids


def _listed(values: Sequence[Any]) -> str:
    """Values as they are typed; of many the first and their number."""
    words = [shown(value).strip("'") for value in values[:MAX_SHOWN]]
    return ",".join(words) + (f",… ({len(values)} values)" if len(values) > MAX_SHOWN else "")
