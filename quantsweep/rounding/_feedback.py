"""GPTQ of one weight: from a Hessian to what is stored.

    order      columns as they are, or by falling diag H ("activation order": what matters most is rounded first)
    groups     chosen when the loop meets them, or all beforehand (`static_groups`); see `_columns.py`
    stored     codes, scales, zero points; and where groups were chosen in another order than that of the columns,
               that order: 16 bits a column (32 beyond 65,536 columns), counted

With fixed parameters the codes go back to the places of their columns, and no order is stored.  Otherwise block n of the
stored layout is of columns that lie apart in the weight, and decoding puts them back.

One scale an output channel (or for the tensor) is chosen on the weight as it is; groups do not see dead columns' weights, which
are 0 by then.  Both are the published code's.

Source: Frantar et al., arXiv:2210.17323 (GPTQ); activation order and static groups as in IST-DASLab/gptq.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantsweep.data_types._base import DataType, Quantized, dequantize_weight
from quantsweep.numerics.blocks import BlockLayout, Blocks
from quantsweep.rounding._columns import ChooseQParams, FixedGrid, Grid, RefitGrid, round_columns
from quantsweep.rounding._inverse import InverseFactor, dead_columns, inverse_factor, with_dead_columns_alive
from quantsweep.trial.specs import QuantizationSpec

_SHORT_INDEX = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackOptions:
    """damping: λ of `_inverse.py`.  refit: `stale` or `eager`, see `_columns.py`.  update_columns: columns of one far update.

    dtype: what the loop computes in; the factor is made in float64 and cast once.
    """

    damping: float = 0.01
    activation_order: bool = False
    static_groups: bool = False
    refit: str = "stale"
    update_columns: int = 128
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """What the loop made of a weight.

    quantized: codes in the order of `order_I`, or of the columns where that is None.  order_I: (I,) uint16 or int32, as stored:
    the column that stands at each place.  factor: its damping; num_dead: input columns that were always 0.
    """

    quantized: Quantized
    order_I: Tensor | None
    factor: InverseFactor
    num_dead: int


def quantize_with_feedback(
    weight_OI: Tensor,
    hessian_II: Tensor,
    spec: QuantizationSpec,
    options: FeedbackOptions,
    data_type: DataType,
    choose: ChooseQParams,
) -> Feedback:
    """Round a weight (O, I) float32 column by column.  hessian_II: 2/n Σ x xᵀ of its inputs, on its device.

    choose: parameters for blocks, clipped or not.  spec: block_axis=input, or one block.
    """
    dead_I, hessian_II = dead_columns(hessian_II), with_dead_columns_alive(hessian_II)
    alive_OI = weight_OI.masked_fill(dead_I, 0)
    layout = BlockLayout(
        out_features=weight_OI.shape[0], in_features=weight_OI.shape[1], block_size=spec.block_size, block_axis=spec.block_axis or "input"
    )
    order_I = _order(hessian_II, options)
    grid, is_fixed = _grid(weight_OI, alive_OI, layout, options, choose, order_I)
    factor = inverse_factor(hessian_II if order_I is None else hessian_II[order_I][:, order_I], options.damping)
    visited_OI = alive_OI if order_I is None else alive_OI[:, order_I]
    rounded = round_columns(visited_OI, factor.upper_II.to(options.dtype), grid, data_type, options.update_columns)
    codes_OI = rounded.codes_OI
    if order_I is not None and is_fixed:
        codes_OI, order_I = codes_OI[:, order_I.argsort()], None
    return Feedback(
        quantized=Quantized(codes_NB=layout.split(codes_OI), qparams=rounded.qparams, layout=layout),
        order_I=None if order_I is None else _stored_order(order_I),
        factor=factor,
        num_dead=int(dead_I.sum()),
    )


def decode_in_order(data_type: DataType, quantized: Quantized, order_I: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight (O, I), each column in its place."""
    values_OI = dequantize_weight(data_type, quantized, dtype)
    return values_OI if order_I is None else values_OI[:, order_I.to(torch.int64).argsort()]


def _order(hessian_II: Tensor, options: FeedbackOptions) -> Tensor | None:
    """Columns by falling diagonal, equal ones in their order; None: as they are."""
    return hessian_II.diagonal().argsort(descending=True, stable=True) if options.activation_order else None


def _grid(
    weight_OI: Tensor,
    alive_OI: Tensor,
    layout: BlockLayout,
    options: FeedbackOptions,
    choose: ChooseQParams,
    order_I: Tensor | None,
) -> tuple[Grid, bool]:
    """The levels, and whether they were chosen before the loop."""
    if layout.blocks_per_run == 1:
        return FixedGrid(choose(Blocks(values_NB=layout.split(weight_OI), layout=layout), None), 1, None), True
    columns_I = torch.arange(layout.in_features, device=weight_OI.device) if order_I is None else order_I
    if not options.static_groups:
        return RefitGrid(choose, layout.width, columns_I, eager=options.refit == "eager"), False
    qparams = choose(Blocks(values_NB=layout.split(alive_OI), layout=layout), None)
    return FixedGrid(qparams, layout.blocks_per_run, (columns_I // layout.width).tolist()), True


def _stored_order(order_I: Tensor) -> Tensor:
    return order_I.to(torch.uint16 if order_I.numel() <= _SHORT_INDEX else torch.int32)
