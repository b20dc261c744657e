"""Round to nearest: every weight becomes the nearest level of its block, with no look at data.

The "zero-shot" quantization of the k-bit inference scaling laws (Dettmers & Zettlemoyer,
arXiv:2212.09720, section 2), and the RTN baseline of the calibrated methods (GPTQ, arXiv:2210.17323,
section 4).  Deterministic; layers are independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantsweep.data_types._base import dequantize_weight, quantize_weight
from quantsweep.methods._base import Encoded, Layer, LayerRecord, checked_data_type, encode_each
from quantsweep.specs import QuantizationSpec


class RoundToNearest:
    """Nearest level, layer by layer."""

    def quantize(
        self, layers: Mapping[str, Layer], spec: QuantizationSpec, *, calibration: object | None = None, seed: int | None = None
    ) -> tuple[LayerRecord, ...]:
        """Quantize each layer with the data type of `spec`; calibration and seed are not looked at."""
        data_type = checked_data_type(spec)

        def encode(_name: str, weight_OI: Tensor, dtype: torch.dtype) -> Encoded:
            quantized = quantize_weight(data_type, weight_OI, spec)
            return Encoded(values_OI=dequantize_weight(data_type, quantized, dtype), bits=quantized.stored_bits)

        return encode_each(layers, encode)


METHOD = RoundToNearest()
