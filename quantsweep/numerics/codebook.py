"""Encode numbers as the index of the nearest of L sorted levels, and decode them again.

    code(x) = #{ j : m_j < x },    m_j = (c_j + c_{j+1}) / 2        (a number on a mid-point goes down)

Values below the first or above the last level take that level.  Searching the L-1 mid-points for
every element costs log2 L mispredicted branches; large tensors therefore use the upper 16 bits of
the float32 pattern (sign, exponent, 7 mantissa bits) as an index into a table of 65,536 cells.  A
cell with at most one mid-point in it needs one comparison, and the result is the same bit for bit;
codebooks that put two mid-points into a cell are searched.  Codebooks have two levels at least.

Temporaries are bounded by a tile (`blocks.tile_size` elements), whatever the size of the tensor.
NaN has no nearest level: callers refuse it first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantsweep.numerics.blocks import tiles_of
from quantsweep.numerics.scales import without_zeros

_CELLS = 1 << 16
_SMALL = 1 << 15  # elements below which searching is faster than making a table


@dataclass(frozen=True, slots=True)
class _CellTable:
    """code(x) = first[cell(x)] + (x > threshold[cell(x)])."""

    first: Tensor  # (65536,) uint8
    threshold: Tensor  # (65536,) float32


def mid_points(levels_L: Tensor) -> Tensor:
    """Boundaries between neighbouring levels: (L,) sorted -> (L - 1,)."""
    return (levels_L[:-1] + levels_L[1:]) / 2


def encode(values_NB: Tensor, scale_N1: Tensor, levels_L: Tensor) -> Tensor:
    """Codes (N, B) uint8 of the levels nearest to values / scale.  levels_L: sorted, at most 256."""
    middle = mid_points(levels_L)
    table = _cached_table(tuple(middle.tolist()), middle.device) if values_NB.numel() > _SMALL else None
    divisor_N1 = without_zeros(scale_N1)
    codes_NB = torch.empty(values_NB.shape, dtype=torch.uint8, device=values_NB.device)
    for rows, columns in tiles_of(values_NB):
        unit = values_NB[rows, columns] / divisor_N1[rows]
        codes_NB[rows, columns] = torch.bucketize(unit, middle, out_int32=True) if table is None else _look_up(unit, table)
    return codes_NB


def decode(codes_NB: Tensor, scale_N1: Tensor, levels_L: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """levels[codes] · scale: (N, B) uint8 -> (N, B), computed in float32 and cast to `dtype`."""
    values_NB = torch.empty(codes_NB.shape, dtype=dtype, device=codes_NB.device)
    for rows, columns in tiles_of(codes_NB):
        codes = codes_NB[rows, columns]
        units = levels_L.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
        torch.mul(units, scale_N1[rows], out=values_NB[rows, columns])
    return values_NB


def _look_up(unit: Tensor, table: _CellTable) -> Tensor:
    cell = unit.reshape(-1).view(torch.int32).bitwise_right_shift(16).bitwise_and_(_CELLS - 1)
    above = unit.reshape(-1) > table.threshold.index_select(0, cell)
    return table.first.index_select(0, cell).add_(above).view(unit.shape)


@lru_cache(maxsize=32)
def _cached_table(middle: tuple[float, ...], device: torch.device) -> _CellTable | None:
    """Formats with fixed levels use one table for all layers and trials (320 kB each)."""
    return _cell_table(torch.tensor(middle, dtype=torch.float32, device=device))


def _cell_table(middle: Tensor) -> _CellTable | None:
    """The table for these mid-points, or None where some cell holds two of them."""
    pattern = torch.arange(_CELLS, dtype=torch.int32, device=middle.device).bitwise_left_shift(16)
    near_zero, far = pattern.view(torch.float32), pattern.bitwise_or(_CELLS - 1).view(torch.float32)
    far = torch.where(far.isnan(), near_zero, far)  # the cells of ±infinity hold nothing else that is a number
    first = torch.bucketize(torch.minimum(near_zero, far).nan_to_num(), middle)
    last = torch.bucketize(torch.maximum(near_zero, far).nan_to_num(), middle)
    if int((last - first).max()) > 1:
        return None
    threshold = torch.cat([middle, middle.new_full((1,), torch.inf)])[first]
    return _CellTable(first=first.to(torch.uint8), threshold=threshold)
