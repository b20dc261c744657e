"""FP8: the 8-bit floating-point numbers of hardware and of `torch.float8_*`, with a scale a block.

    s_b = stored(max |T_b| / largest),    code = E(x / s_b),    decoded = value(code) · s_b

    format   largest   mantissa   torch
    e4m3     448       3 bits     float8_e4m3fn     no infinities, one NaN a sign
    e5m2     57344     2 bits     float8_e5m2       infinities and NaN as in IEEE 754

E rounds to nearest, ties to even, and saturates, so that a scale that was rounded down costs no NaN.
Codes are the bit patterns.  `fp` at 8 bits is another format: no code of it is lost to infinities and
NaN, and its levels are divided by the largest.

Scales are float32 unless asked otherwise: 1/57344 of an ordinary weight is a subnormal float16, of
which few bits are left.

Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.
"""

from __future__ import annotations

from typing import Any

from quantsweep.data_types._base import QParams, Support, scale_dtype
from quantsweep.data_types._minifloat import MiniFloatDataType
from quantsweep.numerics.blocks import Blocks
from quantsweep.numerics.minifloat import E4M3, E5M2, MiniFloat
from quantsweep.numerics.scales import absmax, divide, round_scale, storage_bits
from quantsweep.trial.specs import QuantizationSpec

ELEMENTS: dict[Any, MiniFloat] = {"e4m3": E4M3, "e5m2": E5M2}


class Float8(MiniFloatDataType):
    """E4M3 or E5M2 with the absolute maximum at the largest number; see the module."""

    name = "fp8"
    support = Support(bit_widths=(8,), options={"format": tuple(ELEMENTS)})

    def choose_qparams(self, blocks: Blocks, spec: QuantizationSpec) -> QParams:
        """Scales (N, 1)."""
        element = ELEMENTS[self.support.check(self.name, spec)["format"]]
        dtype = scale_dtype(spec)
        return QParams(
            bit_width=element.bits,
            scale_N1=round_scale(divide(absmax(blocks.values_NB), element.largest), dtype),
            scale_bits=storage_bits(dtype),
            element=element,
        )


DATA_TYPE = Float8()
