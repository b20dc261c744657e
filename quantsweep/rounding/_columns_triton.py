"""The chunk of `_columns.py` as one kernel, for equally spaced levels on a GPU.

A column of the loop costs many small kernels, and their latency is most of GPTQ's time (`tests/benchmarks/gptq_cost.py`).
Rows are independent: here a program keeps all columns of a few rows in registers, walks the columns, and starts once a
chunk.  What it computes is what the loop computes, in float32; sums and products may round in another order, so codes differ
where a weight lies on the edge between two levels (`tests/gpu/test_gptq_cuda.py`).

Triton comes with PyTorch's CUDA builds; elsewhere nothing here is imported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantsweep.data_types._base import QParams

MOST_COLUMNS = 256
"""Columns of a chunk that a program keeps; more would not fit into registers."""
_ROWS = 4
_TO_INTEGER = 12582912.0
"""1.5 · 2²³: a float32 of at most 2²² that is added to it and taken off again is rounded to nearest, ties to even."""
_FAR = 1048576.0
"""Steps beyond this saturate whatever the zero point, and are still rounded rightly."""


def round_chunk(chunk_CO: Tensor, upper_CC: Tensor, params: Sequence[QParams]) -> tuple[Tensor, Tensor]:
    """Codes (C, O) uint8 and errors (C, O) of a chunk (C, O), float32, contiguous; params: of each column, equally spaced levels."""
    num_columns, num_rows = chunk_CO.shape
    upper_CC = upper_CC.contiguous()  # a factor of Cholesky's lies column by column
    codes_CO, errors_CO = torch.empty_like(chunk_CO, dtype=torch.uint8), torch.empty_like(chunk_CO)
    scale_CO = _of_columns([one.scale_N1 for one in params], num_rows)
    zero_CO = _of_columns([one.zero_N1 for one in params if one.zero_N1 is not None], num_rows)
    grid = (triton.cdiv(num_rows, _ROWS),)
    with torch.cuda.device(chunk_CO.device):
        _round_chunk[grid](
            chunk_CO, upper_CC, scale_CO, zero_CO, codes_CO, errors_CO,
            num_columns, num_rows,
            float(params[0].lowest_code), float((1 << params[0].bit_width) - 1), float(params[0].divisor),
            COLUMNS=triton.next_power_of_2(num_columns), ROWS=_ROWS, TO_INTEGER=_TO_INTEGER, FAR=_FAR,
        )  # fmt: skip
    return codes_CO, errors_CO


def _of_columns(values: Sequence[Tensor], num_rows: int) -> Tensor:
    """(N, 1) of each column, N rows or one for all of them -> (C, O)."""
    return torch.stack([value.view(-1).expand(num_rows) for value in values])


@triton.jit  # type: ignore[untyped-decorator]
def _round_chunk(  # type: ignore[no-untyped-def]  # noqa: ANN202
    chunk, upper, scale, zero, codes, errors,  # noqa: ANN001
    num_columns, num_rows, lowest, largest, divisor,  # noqa: ANN001
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, TO_INTEGER: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_row = rows < num_rows
    there = (columns < num_columns)[:, None] & is_row[None, :]
    weights = tl.load(chunk + columns[:, None] * num_rows + rows[None, :], mask=there, other=0.0)
    for i in range(num_columns):
        place = i * num_rows + rows
        weight = tl.sum(tl.where((columns == i)[:, None], weights, 0.0), axis=0)
        step = tl.load(scale + place, mask=is_row, other=1.0)
        offset = tl.load(zero + place, mask=is_row, other=0.0)
        steps = tl.div_rn(weight, tl.where(step == 0, 1.0, step)) * divisor
        steps = tl.minimum(tl.maximum(steps, -FAR), FAR)
        code = (steps + TO_INTEGER) - TO_INTEGER + offset
        code = tl.minimum(tl.maximum(code, lowest), largest)
        value = tl.div_rn(code - offset, divisor + tl.zeros_like(code)) * step
        error = tl.div_rn(weight - value, tl.load(upper + i * num_columns + i) + tl.zeros_like(code))
        tl.store(codes + place, code.to(tl.uint8), mask=is_row)
        tl.store(errors + place, error, mask=is_row)
        later = tl.load(upper + i * num_columns + columns, mask=(columns > i) & (columns < num_columns), other=0.0)
        weights -= later[:, None] * error[None, :]
