"""Clipping by mean squared error: each block's range is shrunk as far as its own weights like it.

    p_i = 1 - i / 100,   i = 0 … 79;      limits = p_i · min(T_b, 0),  p_i · max(T_b, 0);      keep the p with the least Σ |ŵ - w|^2.4

The range of one block must not change the levels of others: formats with levels or a scale of the whole tensor (`quantile`, `nvfp4`)
are refused.

Both ends move with their signs.  p = 1 is tried first and kept in a tie, so that the error is never above that of the whole
range.  An exponent above 2 weighs the clipped weights, which are few and far off, a little more.  The error is that of the
weights alone, not of the layer's output; with error feedback, which moves the weights that come later, a range that suits the
weights as they were may be too small for them (the published code does the same).

Source: `Quantizer.find_params(mse=True)` of IST-DASLab/gptq, quant.py (norm 2.4, grid 100, maxshrink .8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.clipping._parts import OF_WHOLE_TENSOR, clipping_of, limits_of_parts
from quantsweep.data_types._base import DataType
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.blocks import Blocks
from quantsweep.pipeline.interface import InputNeeds, Layer, LayerContext
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec


class MeanSquaredError:
    """The best of 80 ranges; see the module."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raises ConfigurationError for formats whose levels all blocks share."""
        if spec.data_type in OF_WHOLE_TENSOR:
            raise ConfigurationError(
                f"clipping 'mse' tries the range of each block by itself; of data_type {spec.data_type!r} the levels, or a scale, "
                "are of the whole tensor, so that one block's range changes the others: use clipping=percentile or absmax"
            )

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """It looks at no text."""
        return None

    def limits(
        self, layer: Layer, blocks: Blocks, spec: QuantizationSpec, context: LayerContext, columns_J: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(N,) each."""
        step = clipping_of(spec)
        exponent, grid, least = (step.number(name) for name in ("exponent", "grid", "least"))
        data_type: DataType = data_type_of(spec)

        def limits(values_NB: Tensor) -> tuple[Tensor, Tensor]:
            context.help.progress()
            return shrunk_limits(values_NB, spec, data_type, exponent=exponent, grid=int(grid), least=least)

        return limits_of_parts(blocks, limits)


def shrunk_limits(
    values_NB: Tensor, spec: QuantizationSpec, data_type: DataType, *, exponent: float = 2.4, grid: int = 100, least: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Limits (N, 1) each of blocks (N, B) without padding.

    exponent: of the error.  grid: steps between 0 and the whole range, of which those above `least` are tried.
    """
    low_N1, high_N1 = values_NB.amin(dim=1, keepdim=True).clamp(max=0), values_NB.amax(dim=1, keepdim=True).clamp(min=0)
    best_N1, share_N1 = torch.full_like(low_N1, torch.inf), torch.ones_like(low_N1)
    for step in range(round((1 - least) * grid)):
        share = 1 - step / grid
        error_N1 = _error(values_NB, values_NB.clamp(share * low_N1, share * high_N1), spec, data_type, exponent)
        share_N1 = torch.where(error_N1 < best_N1, share, share_N1)
        best_N1 = torch.minimum(error_N1, best_N1)
    return share_N1 * low_N1, share_N1 * high_N1


def _error(values_NB: Tensor, limited_NB: Tensor, spec: QuantizationSpec, data_type: DataType, exponent: float) -> Tensor:
    """Σ |ŵ - w|^exponent of each block, (N, 1), where scales are made from the limited values."""
    qparams = data_type.choose_qparams(Blocks.of(limited_NB, None, "input"), spec)
    decoded_NB = data_type.dequantize(data_type.quantize(values_NB, qparams), qparams)
    return (decoded_NB - values_NB).abs_().pow_(exponent).sum(dim=1, keepdim=True)


CLIPPING = MeanSquaredError()
