"""MXFP: microscaling floating point, an 8-bit power of two for each block of 4, 6 or 8-bit numbers.

    X_b = 2^S,   code = E(x / X_b),   decoded = value(code) · X_b

    k   element (option exponent_bits)       largest    emax
    4   E2M1                                 6          2
    6   E2M3 (2, the default) or E3M2 (3)    7.5, 28    2, 4
    8   E4M3 (4, the default) or E5M2 (5)    448, 57344 8, 15

The option `scale_mode` says how S follows from m = max |T_b|; the specification leaves it open beyond `floor`:

    floor   floor(log2 m) - emax            the specification's; up to 2^(emax+1) · X_b saturates at the largest number
    rceil   ceil(log2(m / largest))         NVIDIA's; nothing saturates
    ceil    ceil(log2 m) - emax             nothing saturates; numbers above 2^emax are left unused
    even    floor(log2 of m rounded to the element's mantissa) - emax      saturates less than floor

S is clamped to -127 … 127 and stored as E8M0, 8 bits that hold S + 127 and have no zero: an all-zero
block has X_b = 2^-127 and codes 0.  E rounds to nearest, ties to even, and saturates (the specification
asks for no more than nearest).  Blocks are of 32 along the input, the direction of the dot product, by
default; other sizes are no MX formats, and the row's block size says so.

A weight times 2^n gets the same codes.  With `floor`, a block's maximum just below a power of two is up to
25 % off at 4 bits: 8 becomes 6.  At 8 bits the same clipping (512 to 448) gives E4M3 a larger error on normal
weights than E2M3 has at 6, whose mantissa is as long.

Sources: OCP Microscaling Formats (MX) specification 1.0, sections 5 and 6.3; Rouhani et al.,
arXiv:2310.10537; the other scale modes as torchao's ScaleCalculationMode names them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.data_types._base import QParams, Support, bit_width
from quantsweep.data_types._minifloat import MiniFloatDataType
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.blocks import Blocks
from quantsweep.numerics.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, MiniFloat, exponent_of, power_of_two
from quantsweep.numerics.scales import absmax, divide
from quantsweep.trial.specs import QuantizationSpec

ELEMENTS = {4: {2: E2M1}, 6: {2: E2M3, 3: E3M2}, 8: {4: E4M3, 5: E5M2}}
"""Bit width -> exponent bits -> element; the first is the default."""

_SCALE_BITS = 8
LARGEST_SCALE_EXPONENT = 127
_MANTISSA_32 = 23


class MicroscalingFloat(MiniFloatDataType):
    """OCP MX with floating-point elements; see the module."""

    name = "mxfp"
    support = Support(
        bit_widths=tuple(ELEMENTS),
        options={"exponent_bits": (None, 2, 3, 4, 5), "scale_mode": ("floor", "rceil", "ceil", "even")},
        scale_dtypes=("e8m0",),
    )

    def check_spec(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where there is no such element."""
        self._element_and_mode(spec)

    def _element_and_mode(self, spec: QuantizationSpec) -> tuple[MiniFloat, str]:
        options, k = self.support.check(self.name, spec), bit_width(spec)
        elements = ELEMENTS[k]
        exponent_bits = options["exponent_bits"] or next(iter(elements))
        if exponent_bits not in elements:
            able = " or ".join(map(str, elements))
            raise ConfigurationError(f"data_type 'mxfp' with {k} bits has elements of {able} exponent bits, got {exponent_bits}")
        return elements[exponent_bits], options["scale_mode"]

    def choose_qparams(self, blocks: Blocks, spec: QuantizationSpec) -> QParams:
        """Scales (N, 1), powers of two."""
        element, mode = self._element_and_mode(spec)
        exponent_N1 = scale_exponent(absmax(blocks.values_NB), element, mode)
        scale_N1 = power_of_two(exponent_N1.clamp(-LARGEST_SCALE_EXPONENT, LARGEST_SCALE_EXPONENT))
        return QParams(bit_width=element.bits, scale_N1=scale_N1, scale_bits=_SCALE_BITS, element=element)


def scale_exponent(absmax_N1: Tensor, element: MiniFloat, mode: str) -> Tensor:
    """S before clamping, (N, 1) int32."""
    if mode == "rceil":
        return _ceil_log2(divide(absmax_N1, element.largest))
    if mode == "ceil":
        return _ceil_log2(absmax_N1) - element.largest_exponent
    if mode == "even":
        absmax_N1 = _half_a_step_up(absmax_N1, element.mantissa_bits)
    return exponent_of(absmax_N1) - element.largest_exponent


def _ceil_log2(values: Tensor) -> Tensor:
    exponent = exponent_of(values)
    return exponent + (values > power_of_two(exponent))


def _half_a_step_up(values: Tensor, mantissa_bits: int) -> Tensor:
    """Add half a unit of the last of `mantissa_bits` to positive float32 numbers: the exponent is then that of the rounded number."""
    return (values.view(torch.int32) + (1 << (_MANTISSA_32 - mantissa_bits - 1))).view(torch.float32)


DATA_TYPE = MicroscalingFloat()
