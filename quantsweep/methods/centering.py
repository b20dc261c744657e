"""Distribution centering: the mean of each block is taken off before it is quantized, and added again afterwards.

    Ŵ_b = stored(mean W_b) + Q(W_b - stored(mean W_b))

It costs one 16-bit number a block more than round to nearest.  The k-bit inference scaling laws tried it for weights
whose distributions are not centered at zero, and found no benefit (Dettmers & Zettlemoyer,
arXiv:2212.09720, appendix B); it is here so that the negative result can be repeated.
Means are rounded to float16 before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from quantsweep.data_types._base import DataType, quantize_blocks
from quantsweep.methods._base import Layer, LayerRecord, Stored, checked_data_type, encode_each
from quantsweep.numerics.blocks import Blocks
from quantsweep.trial.specs import QuantizationSpec

MEAN = "mean"
"""Name in `Stored.extras` of the means, (N,) float16."""


class Centering:
    """Round to nearest of centered blocks, layer by layer."""

    def quantize(
        self, layers: Mapping[str, Layer], spec: QuantizationSpec, *, calibration: object | None = None, seed: int | None = None
    ) -> tuple[LayerRecord, ...]:
        """Quantize each layer with the data type of `spec`; calibration and seed are not looked at."""
        data_type = checked_data_type(spec)

        def encode(_name: str, weight_OI: Tensor, _dtype: torch.dtype) -> Stored:
            blocks = Blocks.of(weight_OI, spec.block_size, spec.block_axis or "flat")
            mean_N = blocks.means().view(-1).to(torch.float16)
            centered = Blocks(values_NB=blocks.values_NB - mean_N[:, None].to(torch.float32), layout=blocks.layout)
            return Stored(quantized=quantize_blocks(data_type, centered, spec), extras={MEAN: mean_N})

        return encode_each(layers, encode, partial(decode, data_type))


def decode(data_type: DataType, stored: Stored, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) from what is stored of it."""
    quantized = stored.quantized
    values_NB = data_type.dequantize(quantized.codes_NB, quantized.qparams).add_(stored.extras[MEAN][:, None].to(torch.float32))
    return quantized.layout.join(values_NB).to(dtype)


METHOD = Centering()
