"""Round to nearest: every weight becomes the nearest level of its block, with no look at data.

The "zero-shot" quantization of the k-bit inference scaling laws (Dettmers & Zettlemoyer,
arXiv:2212.09720, section 2), and the RTN baseline of the calibrated methods (GPTQ, arXiv:2210.17323,
section 4).  Deterministic; layers are independent of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.data_types._base import dequantize_weight
from quantsweep.pipeline.interface import InputNeeds, Layer, LayerContext, Stored
from quantsweep.pipeline.ranges import check_data_type, quantize_in_range
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec


class RoundToNearest:
    """Nearest level, layer by layer."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raises ConfigurationError where the data type cannot do it."""
        check_data_type(spec)

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """It looks at no text."""
        return None

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """The codes of the data type of `spec`."""
        return Stored(quantized=quantize_in_range(weight_OI, spec, context))

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) from what is stored of it."""
        return dequantize_weight(data_type_of(spec), stored.blocks, dtype)


ROUNDING = RoundToNearest()
