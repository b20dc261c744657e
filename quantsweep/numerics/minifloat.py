"""Floating-point numbers of 4 to 8 bits: every code is a bit pattern of sign, exponent and mantissa.

    normal     (e > 0)   ± (1 + m / 2^M) · 2^(e - bias)         bias = 2^(E-1) - 1
    subnormal  (e = 0)   ±      m / 2^M  · 2^(1 - bias)

    element   bits   bias   subnormal step   smallest normal   largest             not numbers
    E2M1      4      1      0.5              1                 6                   -
    E2M3      6      1      0.125            1                 7.5                 -
    E3M2      6      3      0.0625           0.25              28                  -
    E4M3      8      7      2^-9             2^-6              448                 S.1111.111
    E5M2      8      15     2^-16            2^-14             57344               S.11111.mm

Encoding rounds to nearest, ties to even, and saturates: what is beyond the largest number becomes it,
and no finite number becomes infinite or NaN.  Counted from the smallest normal binade upwards, positive
patterns are in the order of their values, so with x = s · 2^e and e at least 1 - bias

    code(|x|) = (e - (1 - bias)) · 2^M + round(|x| · 2^(M - e))

which is exact: the factor is a power of two, a mantissa that rounds up carries into the exponent, and
subnormal numbers are those whose e was raised to 1 - bias.

Sources: OCP Microscaling Formats (MX) specification 1.0, section 5; FP8: Micikevicius et al., arXiv:2209.05433.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantsweep.numerics import codebook
from quantsweep.numerics.blocks import tiles_of
from quantsweep.numerics.scales import without_zeros

_BIAS_32, _MANTISSA_32, _FIELD_32 = 127, 23, 0xFF  # of float32


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniFloat:
    """An element format.  largest_code: the positive pattern of the largest number; those above it are no numbers."""

    exponent_bits: int
    mantissa_bits: int
    largest_code: int

    @property
    def bits(self) -> int:
        """k: sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def largest(self) -> float:
        """The largest number: `E2M1.largest == 6`."""
        return self._magnitude(self.largest_code)

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest)), the specification's emax: `E4M3.largest_exponent == 8`."""
        return math.frexp(self.largest)[1] - 1

    def values(self) -> tuple[float, ...]:
        """The value of each of the 2^k codes, positive ones first; NaN where a code is no finite number."""
        positive = [self._magnitude(code) if code <= self.largest_code else math.nan for code in range(1 << (self.bits - 1))]
        return (*positive, *(-value for value in positive))

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        fraction = mantissa / (1 << self.mantissa_bits) + (exponent > 0)
        return math.ldexp(fraction, max(exponent, 1) - self.bias)


E2M1 = MiniFloat(exponent_bits=2, mantissa_bits=1, largest_code=0b11_1)
E2M3 = MiniFloat(exponent_bits=2, mantissa_bits=3, largest_code=0b11_111)
E3M2 = MiniFloat(exponent_bits=3, mantissa_bits=2, largest_code=0b111_11)
E4M3 = MiniFloat(exponent_bits=4, mantissa_bits=3, largest_code=0b1111_110)
E5M2 = MiniFloat(exponent_bits=5, mantissa_bits=2, largest_code=0b11110_11)


def encode(values_NB: Tensor, scale_N1: Tensor, element: MiniFloat) -> Tensor:
    """Codes (N, B) uint8 of the numbers nearest to values / scale; both float32 and finite."""
    divisor_N1 = without_zeros(scale_N1)
    codes_NB = torch.empty(values_NB.shape, dtype=torch.uint8, device=values_NB.device)
    for rows, columns in tiles_of(values_NB):
        codes_NB[rows, columns] = _codes(values_NB[rows, columns] / divisor_N1[rows], element)
    return codes_NB


def decode(codes_NB: Tensor, scale_N1: Tensor, element: MiniFloat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values times scale: (N, B) uint8 -> (N, B), computed in float32 and cast to `dtype`."""
    return codebook.decode(codes_NB, scale_N1, _table(element, codes_NB.device), dtype)


def nearest(values: Tensor, element: MiniFloat) -> Tensor:
    """The numbers of `element` nearest to float32 values, ties to even, saturating; same shape, float32."""
    exponent = exponent_of(values).clamp_(1 - element.bias, element.largest_exponent)
    step = power_of_two(exponent - element.mantissa_bits)
    return (values / step).round_().mul_(step).clamp_(-element.largest, element.largest)


def exponent_of(values: Tensor) -> Tensor:
    """floor(log2 |x|) as int32, exact, same shape; -127 for zeros and float32's subnormal numbers."""
    return _pattern(values).bitwise_right_shift(_MANTISSA_32).bitwise_and_(_FIELD_32).sub_(_BIAS_32)


def power_of_two(exponents: Tensor) -> Tensor:
    """2^n as float32, exact, same shape; n int32 within -127 … 127 (2^-127 is a subnormal number)."""
    subnormal = exponents == -_BIAS_32
    pattern = torch.where(subnormal, 1 << (_MANTISSA_32 - 1), (exponents + _BIAS_32) << _MANTISSA_32)
    return pattern.to(torch.int32).view(torch.float32)


def _codes(units: Tensor, element: MiniFloat) -> Tensor:
    lowest = 1 - element.bias
    exponent = exponent_of(units).clamp_(lowest, element.largest_exponent + 1)  # (what is above saturates anyway)
    steps = units.abs().mul_(power_of_two(element.mantissa_bits - exponent)).clamp_(max=float(2 << element.mantissa_bits)).round_()
    code = ((exponent - lowest) << element.mantissa_bits).add_(steps.to(torch.int32)).clamp_(max=element.largest_code)
    negative = _pattern(units) < 0
    return code.bitwise_or_(negative.to(torch.int32) << (element.bits - 1)).to(torch.uint8)


def _pattern(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


@lru_cache(maxsize=32)
def _table(element: MiniFloat, device: torch.device) -> Tensor:
    return torch.tensor(element.values(), dtype=torch.float32, device=device)
