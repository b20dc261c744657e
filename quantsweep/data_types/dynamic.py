"""Dynamic exponent (dynamic tree): the number of leading zero bits is a decimal exponent.

A sign bit, z zeros, a one, and the remaining k - 2 - z bits as a linear fraction.  As bitsandbytes
builds it (create_dynamic_map with max_exponent_bits = k - 1): for i = 0 … k - 2

    ± 10^(i - (k - 2)) · (the 2^i mid-points of [0.1, 1] cut into 2^i equal parts),   then 0 and +1

which are 2^k levels, from 5.5·10^-(k-1) to 1.  k = 3: ±.055, ±.325, ±.775, 0, 1.

There is a +1 and no -1: a block whose largest magnitude is negative loses 22.5 % of that element at
3 bits, 11 % at 4, 5.6 % at 5, 0.7 % at 8.  That is the format, and it is not idempotent there.

Sources: Dettmers & Zettlemoyer, arXiv:2212.09720, section 2; Dettmers, arXiv:1511.04561.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantsweep.data_types._base import CodebookDataType, Support, bit_width
from quantsweep.numerics.blocks import Blocks
from quantsweep.trial.specs import QuantizationSpec


@cache
def dynamic_levels(k: int) -> tuple[float, ...]:
    """The 2^k sorted levels in [-1, 1]."""
    levels = [0.0, 1.0]
    for i in range(k - 1):
        exponent = 10.0 ** (i - (k - 2))
        middles = [0.1 + 0.9 * (part + 0.5) / 2**i for part in range(2**i)]
        levels += [sign * exponent * middle for middle in middles for sign in (1, -1)]
    return tuple(sorted(levels))


class Dynamic(CodebookDataType):
    """Dynamic exponent; see the module."""

    name = "dynamic"
    support = Support(bit_widths=range(2, 9), options={})

    def levels(self, blocks: Blocks, spec: QuantizationSpec) -> Tensor:
        """2^k levels, with +1 and without -1."""
        return torch.tensor(dynamic_levels(bit_width(spec)), dtype=torch.float32, device=blocks.values_NB.device)


DATA_TYPE = Dynamic()
