"""Exact order statistics and quantiles of a large tensor, in bounded memory.

    Q(p) = x_(f) + (r - f)·(x_(f+1) - x_(f)),   r = p·(n - 1),  f = floor(r),  x_(i) the i-th smallest

(linear interpolation, as numpy's and torch's default).  `torch.quantile` refuses more than 16
million elements and `torch.sort` allocates 12 bytes an element; here the float32 patterns are mapped
to integers of the same order, and the wanted ranks are narrowed down digit by digit with histograms
(radix selection: 16, then 8, then 8 bits).  The digits that hold wanted ranks form a tree whose
nodes at one depth are the rows of the next histogram.  Numbers outside them are dropped after the first
histogram (at worst none are: one copy of the tensor); after the second they fall into one row more, the sink.
Counts are integers: the result is exact, and the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantsweep.numerics.blocks import tile_size

_WIDTHS = (16, 8, 8)


def quantiles(values_n: Tensor, probabilities: Sequence[float]) -> list[float]:
    """Empirical quantiles of a 1-D float32 tensor without NaN, one for each probability in [0, 1]."""
    positions = [p * (values_n.numel() - 1) for p in probabilities]
    below = [math.floor(r) for r in positions]
    above = [math.ceil(r) for r in positions]
    value_at = order_statistics(values_n, sorted({*below, *above}))
    return [value_at[f] + (r - f) * (value_at[c] - value_at[f]) for r, f, c in zip(positions, below, above, strict=True)]


def order_statistics(values_n: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """{rank: value} for 0-based ranks: rank 0 is the minimum, rank n - 1 the maximum."""
    remaining = torch.tensor(ranks, dtype=torch.int64, device=values_n.device)
    key, row = torch.zeros_like(remaining), torch.zeros_like(remaining)
    next_rows: list[Tensor] = []
    num_rows = 1
    for width in _WIDTHS:
        counts = _histogram(values_n, next_rows, num_rows, width)
        cumulative = counts.cumsum(0)
        first = row << width
        start = cumulative[first] - counts[first]
        index = torch.searchsorted(cumulative, start + remaining, right=True)
        remaining += start - (cumulative[index] - counts[index])
        key = (key << width) | (index - first)
        nodes, row = torch.unique(index, return_inverse=True)
        next_rows.append(_transitions(nodes, counts.numel()))
        num_rows = nodes.numel()
        if len(next_rows) == 1:
            values_n = _within(values_n, next_rows[0], sink=num_rows)
    return dict(zip(ranks, _from_keys(key).tolist(), strict=True))


def _histogram(values_n: Tensor, next_rows: list[Tensor], num_rows: int, width: int) -> Tensor:
    """Counts of (row, next digit), flattened: ((num_rows + 1)·2^width,), the last row being the sink."""
    counts = torch.zeros((num_rows + 1) << width, dtype=torch.int64, device=values_n.device)
    for chunk in torch.split(values_n, tile_size(values_n.device)):
        ordered = _ordered(chunk)
        cell = _first_digit(ordered)
        for next_row, shift in zip(next_rows, (8, 0), strict=False):
            digit = (ordered >> shift).bitwise_and_(0xFF)
            cell = next_row.index_select(0, cell).bitwise_left_shift_(8).add_(digit)
        counts += torch.bincount(cell, minlength=counts.numel())
    return counts


def _within(values_n: Tensor, next_row: Tensor, sink: int) -> Tensor:
    """The numbers whose first digit is a node."""
    chunks = torch.split(values_n, tile_size(values_n.device))
    return torch.cat([chunk[next_row.index_select(0, _first_digit(_ordered(chunk))) != sink] for chunk in chunks])


def _first_digit(ordered: Tensor) -> Tensor:
    return (ordered >> 16).add_(0x8000)


def _transitions(nodes: Tensor, num_cells: int) -> Tensor:
    """For each cell of a histogram the row of the next one: its own if it is a node, else the sink."""
    next_row = torch.full((num_cells,), nodes.numel(), dtype=torch.int32, device=nodes.device)
    next_row[nodes] = torch.arange(nodes.numel(), dtype=torch.int32, device=nodes.device)
    return next_row


def _ordered(values: Tensor) -> Tensor:
    """Signed integers (int32) in the order of the float32 values: negative patterns are reversed."""
    pattern = values.contiguous().view(torch.int32)
    return (pattern >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(pattern)


def _from_keys(key: Tensor) -> Tensor:
    """Undo `_ordered`: keys (int64, 0 … 2^32 - 1, the digits one after the other) -> float32."""
    ordered = (key - 0x80000000).to(torch.int32)
    return _ordered(ordered.view(torch.float32)).view(torch.float32)
