"""GPTQ: columns are rounded one after the other, and those that come later make up for the errors of those before.

    per layer      min ‖(W - Ŵ) X‖²  column by column, with H = 2/n Σ x xᵀ of its inputs     (`_feedback.py`, `_columns.py`, `_inverse.py`)
    per model      block by block: a layer's inputs come from what the blocks before it have become

Options, and what the published code does:

    damping            .01 of the mean diagonal; raised tenfold where H is not positive definite, and recorded
    activation_order   columns by falling diag H: `--act-order`, off
    static_groups      all groups chosen beforehand: `--static-groups`, off; with it activation order costs no stored indices
    group_refit        `stale`, its habit with groups smaller than `update_columns`; or `eager`
    update_columns     128; changes numbers only through `stale`, and by the rounding of sums
    stream             `weights`: inputs of the model whose weights before this layer are quantized; or `original`, or `activations`
    granularity        `block`: the Hessians of a block are taken at once; `group` is its `--true-sequential`

A layer that no calibration token reached (an expert), or whose inputs are all 0, has no Hessian: it is rounded to nearest,
and its record says so.

Source: Frantar et al., arXiv:2210.17323; IST-DASLab/gptq (gptq.py, opt.py, llama.py).
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from quantsweep.calibration.streams import Stream
from quantsweep.data_types._base import DataType, QParams
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.blocks import Blocks
from quantsweep.pipeline.interface import InputNeeds, Layer, LayerContext, Stored
from quantsweep.pipeline.ranges import check_data_type, qparams_in_range, quantize_in_range
from quantsweep.rounding._feedback import Feedback, FeedbackOptions, decode_in_order, quantize_with_feedback
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec

Granularity = Literal["group", "block"]
ORDER = "column_order"
"""Name in `Stored.extras` of the order of the columns, (I,) uint16 or int32."""
NEAREST = "its inputs are all 0 on the calibration text: rounded to nearest"


class GPTQ:
    """Rounding with error feedback; see the module."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raises ConfigurationError where the data type cannot do it, or blocks lie across columns."""
        check_data_type(spec)
        if spec.block_axis != "input":
            raise ConfigurationError(f"rounding 'gptq' goes column by column and needs block_axis=input, got {spec.block_axis}")

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """Hessians."""
        step = spec.rounding
        stream, granularity = cast(Stream, step.option("stream")), cast(Granularity, step.option("granularity"))
        return InputNeeds(hessian=torch.float32, stream=stream, granularity=granularity)

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """Codes with error feedback; to nearest where there is nothing to feed back."""
        inputs = context.inputs
        if inputs is None or inputs.hessian_II is None:
            raise TypeError("the pipeline gives the inputs that `needs` asks for")
        if not bool(inputs.hessian_II.any()):
            return Stored(quantized=quantize_in_range(weight_OI, spec, context), fallbacks=(NEAREST,))

        def choose(blocks: Blocks, columns_J: Tensor | None) -> QParams:
            return qparams_in_range(blocks, spec, context, columns_J)

        feedback = quantize_with_feedback(weight_OI, inputs.hessian_II, spec, _options(spec), data_type_of(spec), choose)
        extras = {} if feedback.order_I is None else {ORDER: feedback.order_I}
        return Stored(quantized=feedback.quantized, extras=extras, fallbacks=_fallbacks(feedback))

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """The weight (O, I), its columns in their places."""
        data_type: DataType = data_type_of(spec)
        return decode_in_order(data_type, stored.blocks, stored.extras.get(ORDER), dtype)


def _options(spec: QuantizationSpec) -> FeedbackOptions:
    step = spec.rounding
    return FeedbackOptions(
        damping=step.number("damping"),
        activation_order=bool(step.option("activation_order")),
        static_groups=bool(step.option("static_groups")),
        refit=str(step.option("group_refit")),
        update_columns=int(step.number("update_columns")),
    )


def _fallbacks(feedback: Feedback) -> tuple[str, ...]:
    return (f"damping raised to {feedback.factor.damping:g}",) if feedback.factor.raises else ()


ROUNDING = GPTQ()
