"""Distribution centering: the mean of each block is taken off before it is quantized, and added again afterwards.

    Ŵ_b = stored(mean W_b) + Q(W_b - stored(mean W_b))

It costs one 16-bit number a block more than round to nearest.  The k-bit inference scaling laws tried it for weights
whose distributions are not centered at zero, and found no benefit (Dettmers & Zettlemoyer,
arXiv:2212.09720, appendix B); it is here so that the negative result can be repeated.
Means are rounded to float16 before they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.numerics.blocks import Blocks
from quantsweep.pipeline.interface import InputNeeds, Layer, LayerContext, Stored
from quantsweep.pipeline.ranges import check_data_type, quantize_blocks_in_range
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec

MEAN = "mean"
"""Name in `Stored.extras` of the means, (N,) float16."""


class Centering:
    """Round to nearest of centered blocks, layer by layer."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raises ConfigurationError where the data type cannot do it."""
        check_data_type(spec)

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """It looks at no text."""
        return None

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """The means of the blocks, and the codes of what is left."""
        blocks = Blocks.of(weight_OI, spec.block_size, spec.block_axis or "flat")
        mean_N = blocks.means().view(-1).to(torch.float16)
        centered = Blocks(values_NB=blocks.values_NB - mean_N[:, None].to(torch.float32), layout=blocks.layout)
        return Stored(quantized=quantize_blocks_in_range(centered, spec, context), extras={MEAN: mean_N})

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) from what is stored of it."""
        quantized = stored.blocks
        values_NB = data_type_of(spec).dequantize(quantized.codes_NB, quantized.qparams)
        values_NB.add_(stored.extras[MEAN][:, None].to(torch.float32))
        weight_OI: Tensor = quantized.layout.join(values_NB).to(dtype)
        return weight_OI


ROUNDING = Centering()
