"""Error feedback, column by column: each column is rounded, and those after it make up for its error.

    q_j = Q(w_j),    e_j = (w_j - q_j) / U_jj,    W[:, j:] -= e_j · U[j, j:]          for j = 0 … I - 1

with U of `_inverse.py`.  The update of far columns is put off (it is one product for `update_columns` columns at a time), which
changes nothing but the order of the additions.  Rows are independent: a column (O,) is one step for all of them.

Q is any of our data types: parameters are chosen for groups of columns, codes and values come from the format itself.  Where
the parameters come from is the `Grid`:

    FixedGrid    chosen before the loop on the weight as it was: one scale an output channel, one for the tensor, or all groups
                 of a weight at once ("static groups": column j belongs to group j // g in the original order)
    RefitGrid    chosen for each group when the loop meets it, on its columns as they are then, errors of earlier ones
                 included.  Groups are of consecutive columns in the order of the loop

`refit="stale"` is the published code's habit: the columns of a group are taken as of the last finished chunk of
`update_columns`, so that groups smaller than a chunk miss the updates within it.  `"eager"` ends a chunk at each group.  The
two are the same where g is a multiple of `update_columns`.

A format whose levels or second scale belong to the whole tensor (`quantile`, `nvfp4`) cannot choose them for a
group: with it groups must be fixed.

Source: Frantar et al., arXiv:2210.17323 (GPTQ), algorithm 1; groups and their order as in IST-DASLab/gptq.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quantsweep.data_types._base import DataType, QParams
from quantsweep.data_types.int import Integer
from quantsweep.errors import QuantizationError
from quantsweep.numerics.blocks import Blocks

_HAS_TRITON = importlib.util.find_spec("triton") is not None
ChooseQParams = Callable[[Blocks, Tensor | None], QParams]
"""Parameters for blocks, and which input columns they are (None: all, in order): the format's own, of values that clipping has limited."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """codes_OI: uint8, in the order of the loop.  qparams: of all blocks, in the order of their layout."""

    codes_OI: Tensor
    qparams: QParams


class Grid(Protocol):
    """The levels that each column is rounded to."""

    def starts(self) -> range:
        """Columns before which a chunk must end, so that the grid sees them as they are."""

    def at(self, column: int, current_OI: Tensor) -> QParams:
        """Parameters of a column of the loop, given all columns as of the last finished chunk."""

    def qparams(self) -> QParams:
        """Those of all blocks, once every column was visited."""


class FixedGrid:
    """Parameters chosen beforehand.  group_of_column: for each column of the loop its group; None: all have the same."""

    def __init__(self, qparams: QParams, num_groups: int, group_of_column: Sequence[int] | None) -> None:
        self._qparams = qparams
        self._groups = [_group(qparams, group, num_groups) for group in range(num_groups)]
        self._group_of_column = group_of_column

    def starts(self) -> range:
        """Nothing is chosen on the way."""
        return range(0)

    def at(self, column: int, current_OI: Tensor) -> QParams:
        """Those of its group."""
        return self._groups[0 if self._group_of_column is None else self._group_of_column[column]]

    def qparams(self) -> QParams:
        """As they were chosen."""
        return self._qparams


class RefitGrid:
    """Parameters chosen when the loop meets a group of `width` columns.  order_I: which input column stands at each place."""

    def __init__(self, choose: ChooseQParams, width: int, order_I: Tensor, *, eager: bool) -> None:
        self._choose = choose
        self._width = width
        self._order_I = order_I
        self._eager = eager
        self._groups: list[QParams] = []

    def starts(self) -> range:
        """Groups begin here; where they are taken as they stand, chunks need not end there."""
        return range(0, len(self._order_I), self._width) if self._eager else range(0)

    def at(self, column: int, current_OI: Tensor) -> QParams:
        """Those of its group, chosen at the group's first column."""
        if column % self._width == 0:
            places = slice(column, column + self._width)
            qparams = self._choose(Blocks.of(current_OI[:, places].to(torch.float32), None, "input"), self._order_I[places])
            if _is_of_whole_tensor(qparams):
                raise QuantizationError(WHOLE_TENSOR)
            self._groups.append(qparams)
        return self._groups[-1]

    def qparams(self) -> QParams:
        """All groups', a row's groups next to each other."""
        zeros = [group.zero_N1 for group in self._groups if group.zero_N1 is not None]
        return replace(
            self._groups[0],
            scale_N1=_side_by_side([group.scale_N1 for group in self._groups]),
            zero_N1=_side_by_side(zeros) if zeros else None,
        )


WHOLE_TENSOR = (
    "the data type takes its levels or a second scale from the whole tensor, and these groups are chosen one after the other; "
    "use rounding.options.static_groups=true"
)
"""Why a format with parameters of the whole tensor is refused."""


def round_columns(weight_OI: Tensor, upper_II: Tensor, grid: Grid, data_type: DataType, update_columns: int) -> Rounded:
    """Codes of a weight (O, I), its columns in the order of the loop.  Runs in the type of `upper_II`; the weight is left alone."""
    current_OI = weight_OI.to(upper_II.dtype, copy=True)
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight_OI.device)
    for start, end in _chunks(weight_OI.shape[1], update_columns, grid.starts()):
        chunk_CO = current_OI[:, start:end].T.contiguous()  # a column of the weight lies in one piece
        params = [grid.at(column, current_OI) for column in range(start, end)]
        codes_CO, errors_CO = _round_chunk(chunk_CO, upper_II[start:end, start:end], params, data_type)
        codes_OI[:, start:end] = codes_CO.T
        current_OI[:, end:].addmm_(errors_CO.T, upper_II[start:end, end:], alpha=-1)
    return Rounded(codes_OI=codes_OI, qparams=grid.qparams())


def _round_chunk(chunk_CO: Tensor, upper_CC: Tensor, params: Sequence[QParams], data_type: DataType) -> tuple[Tensor, Tensor]:
    """Codes (C, O) uint8 and errors (C, O) of a chunk, which is written over; by one kernel where there is one."""
    if chunk_CO.is_cuda and chunk_CO.dtype == torch.float32 and isinstance(data_type, Integer) and _HAS_TRITON:
        from quantsweep.rounding import _columns_triton

        if len(chunk_CO) <= _columns_triton.MOST_COLUMNS:
            return _columns_triton.round_chunk(chunk_CO, upper_CC, params)
    return round_chunk(chunk_CO, upper_CC, params, data_type)


def round_chunk(chunk_CO: Tensor, upper_CC: Tensor, params: Sequence[QParams], data_type: DataType) -> tuple[Tensor, Tensor]:
    """The same by PyTorch, in any type and for any format."""
    errors_CO, codes_CO = torch.empty_like(chunk_CO), torch.empty_like(chunk_CO, dtype=torch.uint8)
    for i, qparams in enumerate(params):
        codes_CO[i], value_O = _nearest(chunk_CO[i], qparams, data_type)
        torch.div(chunk_CO[i] - value_O, upper_CC[i, i], out=errors_CO[i])
        chunk_CO[i + 1 :].addr_(upper_CC[i, i + 1 :], errors_CO[i], alpha=-1)
    return codes_CO, errors_CO


def _nearest(column_O: Tensor, qparams: QParams, data_type: DataType) -> tuple[Tensor, Tensor]:
    """Codes (O,) and the values that they stand for, in the column's type."""
    values_NB = column_O.to(torch.float32).view(qparams.scale_N1.shape[0], -1)
    codes_NB = data_type.quantize(values_NB, qparams)
    return codes_NB.view(-1), data_type.dequantize(codes_NB, qparams).view(-1).to(column_O.dtype)


def _chunks(num_columns: int, update_columns: int, starts: range) -> Iterator[tuple[int, int]]:
    """Consecutive chunks of at most `update_columns` columns, none of which reaches over one of `starts`."""
    bounds = sorted({*range(0, num_columns, update_columns), *starts, num_columns})
    yield from itertools.pairwise(bounds)


def _group(qparams: QParams, group: int, num_groups: int) -> QParams:
    """The parameters of one group of columns, for every row: blocks of a row lie next to each other."""
    zero_N1 = None if qparams.zero_N1 is None else qparams.zero_N1[group::num_groups]
    return replace(qparams, scale_N1=qparams.scale_N1[group::num_groups], zero_N1=zero_N1)


def _side_by_side(groups_O1: Sequence[Tensor]) -> Tensor:
    """(O, 1) of each group -> (N, 1)."""
    return torch.cat(list(groups_O1), dim=1).view(-1, 1)


def _is_of_whole_tensor(qparams: QParams) -> bool:
    return qparams.tensor_scale is not None or qparams.codebook_bits > 0
