"""Weights to codes, within the range that a trial's clipping chooses.

    scales and zero points    from the values of each block, clamped to its limits
    codes                     of the values as they are: those beyond the limits become the outermost levels

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
    qparams = qparams_in_range(blocks, spec, context, columns_J)
    return Quantized(codes_NB=data_type.quantize(blocks.values_NB, qparams), qparams=qparams, layout=blocks.layout)


def qparams_in_range(blocks: Blocks, spec: QuantizationSpec, context: LayerContext, columns_J: Tensor | None = None) -> QParams:
    """Scales (and zero points, codebook) of the blocks, (N, 1), from their values within the range."""
    data_type: DataType = data_type_of(spec)
    if context.clipping is None:
        return data_type.choose_qparams(blocks, spec)
    low_N, high_N = context.clipping(blocks, columns_J)
    clamped_NB = blocks.values_NB.clamp(low_N[:, None], high_N[:, None])
    return data_type.choose_qparams(replace(blocks, values_NB=clamped_NB), spec)
