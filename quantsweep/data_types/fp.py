"""Float: a sign, E exponent bits and M = k - 1 - E mantissa bits, without infinities and NaN.

With exponent field e in 0 … 2^E - 1 and mantissa fraction f in {0, 1/2^M, …}, up to a common factor

    normal     (e > 0)   (1 + f) · 2^(bias + 1 - e)
    subnormal  (e = 0)         f · 2^(lowest)

and everything is divided by the largest level.  The paper's exponent field counts downwards (a
larger field is a smaller number); only the resulting set matters.  Three statements of where the
subnormal numbers lie (option `subnormal`; without mantissa bits they are all 0 and the same):

    appendix   lowest = -bias,  bias = 2^(E-1) + 1     E2M1: ±{0, .0052, .1667, .25, .3333, .5, .6667, 1}, bitsandbytes' FP4
    body       lowest = -bias,  bias = 2^(E-1)         E2M1: .0208 instead of .0052, bitsandbytes' create_fp8_map
    ieee       lowest = exponent of the smallest normal, as in IEEE 754 and OCP E2M1: .0833 instead of .0052

There are 2^k - 1 distinct levels (+0 and -0 are one).  E defaults to about half of the bits, as found
best in appendix C.4: 2, 2, 3, 3, 4, 4 for k = 3 … 8.  The paper's main runs had E = 3 at 4 to 8 bits;
at 4 bits that is E3M0, powers of two, three times the error of `int` on normal weights.

Source: Dettmers & Zettlemoyer, arXiv:2212.09720, section 2 and appendices A, C.4.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantsweep.data_types._base import CodebookDataType, Support, bit_width
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.blocks import Blocks
from quantsweep.trial.specs import QuantizationSpec

_EXPONENT_BITS = {3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}


@cache
def positive_levels(k: int, exponent_bits: int, subnormal: str) -> tuple[float, ...]:
    """Sorted levels in [0, 1], exact in float64 up to the last division: `positive_levels(3, 2, "ieee") == (0, .25, .5, 1)`."""
    mantissa_bits = k - 1 - exponent_bits
    fractions = [i / 2**mantissa_bits for i in range(2**mantissa_bits)]
    bias = 2 ** (exponent_bits - 1) + (0 if subnormal == "body" else 1)
    exponents = [bias + 1 - e for e in range(1, 2**exponent_bits)]
    lowest = exponents[-1] if subnormal == "ieee" else -bias
    levels = {f * 2.0**lowest for f in fractions} | {(1 + f) * 2.0**e for e in exponents for f in fractions}
    return tuple(level / max(levels) for level in sorted(levels))


class Float(CodebookDataType):
    """Sign, exponent and mantissa; see the module."""

    name = "fp"
    support = Support(
        bit_widths=range(3, 9),
        options={"exponent_bits": (None, *range(1, 8)), "subnormal": ("appendix", "body", "ieee")},
    )

    def check_spec(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where k bits have no such split, or the option would change nothing."""
        options, k = self.support.check(self.name, spec), bit_width(spec)
        exponent_bits = options["exponent_bits"] or _EXPONENT_BITS[k]
        if exponent_bits > k - 1:
            raise ConfigurationError(f"data_type 'fp' with {k} bits has room for 1 to {k - 1} exponent bits, got {exponent_bits}")
        if exponent_bits == k - 1 and options["subnormal"] != "appendix":
            raise ConfigurationError(
                f"data_type 'fp' E{exponent_bits}M0 has no subnormal numbers: subnormal={options['subnormal']!r} would repeat 'appendix'"
            )

    def levels(self, blocks: Blocks, spec: QuantizationSpec) -> Tensor:
        """2^k - 1 levels, symmetric about 0."""
        options, k = self.support.check(self.name, spec), bit_width(spec)
        positive = positive_levels(k, options["exponent_bits"] or _EXPONENT_BITS[k], options["subnormal"])
        both = [-level for level in reversed(positive[1:])] + list(positive)
        return torch.tensor(both, dtype=torch.float32, device=blocks.values_NB.device)


DATA_TYPE = Float()
