"""Weights to codes, within the range that a trial's clipping chooses.

    scales and zero points    from the values of each block, clamped to its limits
    codes                     of the clamped values too, where a weight is rounded as a whole (GPTQ encodes what a weight has become
                              by then, and what lies beyond the outermost level becomes it)

Without a clipping the limits are the extremes of the block, which change nothing.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quantsweep.data_types._base import DataType, QParams, Quantized
from quantsweep.numerics.blocks import Blocks
from quantsweep.pipeline.interface import LayerContext
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec


def check_data_type(spec: QuantizationSpec) -> None:
    """Raise ConfigurationError where `spec` has no data type, or one that cannot do what it asks."""
    data_type: DataType = data_type_of(spec)
    data_type.check_spec(spec)


def quantize_in_range(weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext, columns_J: Tensor | None = None) -> Quantized:
    """Cut a weight (O, I) as `spec` says, choose parameters within the range and encode.

    columns_J: which input columns of the layer these are, (J,) int64; None for all.
    """
    return quantize_blocks_in_range(Blocks.of(weight_OI, spec.block_size, spec.block_axis or "flat"), spec, context, columns_J)


def quantize_blocks_in_range(blocks: Blocks, spec: QuantizationSpec, context: LayerContext, columns_J: Tensor | None = None) -> Quantized:
    """The same for a weight that is cut already."""
    data_type: DataType = data_type_of(spec)
    within = _within_range(blocks, context, columns_J)
    qparams = data_type.choose_qparams(within, spec)
    return Quantized(codes_NB=data_type.quantize(within.values_NB, qparams), qparams=qparams, layout=blocks.layout)


def qparams_in_range(blocks: Blocks, spec: QuantizationSpec, context: LayerContext, columns_J: Tensor | None = None) -> QParams:
    """Scales (and zero points, codebook) of the blocks, (N, 1), from their values within the range."""
    data_type: DataType = data_type_of(spec)
    return data_type.choose_qparams(_within_range(blocks, context, columns_J), spec)


def _within_range(blocks: Blocks, context: LayerContext, columns_J: Tensor | None) -> Blocks:
    if context.clipping is None:
        return blocks
    low_N, high_N = context.clipping(blocks, columns_J)
    return replace(blocks, values_NB=blocks.values_NB.clamp(low_N[:, None], high_N[:, None]))
