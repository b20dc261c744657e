"""What the formats have in common whose codes are bit patterns of a small floating-point number.

    code = E(x / s),   decoded = value(code) · s,   s = scale_N1, times tensor_scale where there is one

with E to nearest, ties to even, saturating (`quantsweep.numerics.minifloat`).  Formats differ in the
element and in how they choose s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.data_types._base import QParams, Support
from quantsweep.numerics import minifloat
from quantsweep.numerics.minifloat import MiniFloat
from quantsweep.trial.specs import QuantizationSpec


class MiniFloatDataType:
    """Encoding and decoding; a subclass gives its name, what it supports, and `choose_qparams`."""

    name: str
    support: Support

    def check_spec(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where the format cannot do what `spec` asks."""
        self.support.check(self.name, spec)

    def quantize(self, values_NB: Tensor, qparams: QParams) -> Tensor:
        """Bit patterns (N, B) uint8."""
        return minifloat.encode(values_NB, _scale(qparams), _element(qparams))

    def dequantize(self, codes_NB: Tensor, qparams: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers times scale, (N, B), computed in float32 and cast to `dtype`."""
        return minifloat.decode(codes_NB, _scale(qparams), _element(qparams), dtype)


def _scale(qparams: QParams) -> Tensor:
    return qparams.scale_N1 if qparams.tensor_scale is None else qparams.scale_N1 * qparams.tensor_scale


def _element(qparams: QParams) -> MiniFloat:
    if qparams.element is None:
        raise TypeError("these parameters belong to a format whose codes are no bit patterns")
    return qparams.element
