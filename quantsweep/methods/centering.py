"""Distribution centering: the mean of each block is taken off before it is quantized, and added again afterwards.

    Ŵ_b = stored(mean W_b) + Q(W_b - stored(mean W_b))

It costs one 16-bit number a block more than round to nearest.  The k-bit inference scaling laws tried it for weights
whose distributions are not centered at zero, and found no benefit (Dettmers & Zettlemoyer,
arXiv:2212.09720, appendix B); it is here so that the negative result can be repeated.
Means are rounded to float16 before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantsweep.data_types._base import quantize_blocks
from quantsweep.methods._base import Encoded, Layer, LayerRecord, checked_data_type, encode_each
from quantsweep.numerics.blocks import Blocks
from quantsweep.numerics.scales import storage_bits, to_storage
from quantsweep.specs import QuantizationSpec

MEAN_DTYPE = "float16"


class Centering:
    """Round to nearest of centered blocks, layer by layer."""

    def quantize(
        self, layers: Mapping[str, Layer], spec: QuantizationSpec, *, calibration: object | None = None, seed: int | None = None
    ) -> tuple[LayerRecord, ...]:
        """Quantize each layer with the data type of `spec`; calibration and seed are not looked at."""
        data_type = checked_data_type(spec)

        def encode(_name: str, weight_OI: Tensor, dtype: torch.dtype) -> Encoded:
            blocks = Blocks.of(weight_OI, spec.block_size, spec.block_axis or "flat")
            mean_N1 = to_storage(blocks.means(), MEAN_DTYPE)
            centered = Blocks(values_NB=blocks.values_NB - mean_N1, layout=blocks.layout)
            quantized = quantize_blocks(data_type, centered, spec)
            values_NB = data_type.dequantize(quantized.codes_NB, quantized.qparams).add_(mean_N1)
            bits = quantized.stored_bits + storage_bits(MEAN_DTYPE) * blocks.layout.num_blocks
            return Encoded(values_OI=blocks.layout.join(values_NB).to(dtype), bits=bits)

        return encode_each(layers, encode)


METHOD = Centering()
