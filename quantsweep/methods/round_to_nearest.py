"""Round to nearest: every weight becomes the nearest level of its block, with no look at data.

The "zero-shot" quantization of the k-bit inference scaling laws (Dettmers & Zettlemoyer,
arXiv:2212.09720, section 2), and the RTN baseline of the calibrated methods (GPTQ, arXiv:2210.17323,
section 4).  Deterministic; layers are independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from quantsweep.data_types._base import DataType, dequantize_weight, quantize_weight
from quantsweep.methods._base import Layer, LayerRecord, Stored, checked_data_type, encode_each
from quantsweep.trial.specs import QuantizationSpec


class RoundToNearest:
    """Nearest level, layer by layer."""

    def quantize(
        self, layers: Mapping[str, Layer], spec: QuantizationSpec, *, calibration: object | None = None, seed: int | None = None
    ) -> tuple[LayerRecord, ...]:
        """Quantize each layer with the data type of `spec`; calibration and seed are not looked at."""
        data_type = checked_data_type(spec)

        def encode(_name: str, weight_OI: Tensor, _dtype: torch.dtype) -> Stored:
            return Stored(quantized=quantize_weight(data_type, weight_OI, spec))

        return encode_each(layers, encode, partial(decode, data_type))


def decode(data_type: DataType, stored: Stored, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) from what is stored of it."""
    return dequantize_weight(data_type, stored.quantized, dtype)


METHOD = RoundToNearest()
