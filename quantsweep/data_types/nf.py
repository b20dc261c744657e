"""NormalFloat: levels at quantiles of the normal distribution, so that normal weights use codes about equally often.

With h = 2^(k-1), p = 0.9677083 = 1 - (1/30 + 1/32) / 2 and Q the quantile function of N(0, 1)

    positive   Q(p + (0.5 - p)·i / h),           i = 0 … h - 1
    negative   -Q(p + (0.5 - p)·i / (h - 1)),    i = 0 … h - 2
    then 0;    all divided by Q(p):              2^k levels from -1 to 1

k = 3: -1, -.479, -.217, 0, .161, .338, .563, 1.  This is bitsandbytes' create_normal_map with h in place
of its 8 and the same p at every k.  Probabilities and quantiles are rounded to float32 as there: k = 4
is NF4, bit for bit.  The positive side has one level more than the negative one.

Source: Dettmers et al., arXiv:2305.14314 (QLoRA), section 3; generalised to k bits by us.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from quantsweep.data_types._base import CodebookDataType, Support, bit_width
from quantsweep.numerics.blocks import Blocks
from quantsweep.trial.specs import QuantizationSpec

_OUTERMOST = 0.9677083


@cache
def normal_levels(k: int) -> tuple[float, ...]:
    """The 2^k sorted levels in [-1, 1], each a float32 number."""
    half = 1 << (k - 1)
    levels = torch.cat([_quantiles(half), -_quantiles(half - 1), torch.zeros(1)]).sort().values
    return tuple((levels / levels[-1]).tolist())


def _quantiles(count: int) -> Tensor:
    """Quantiles of N(0, 1) at `count` probabilities, equally spaced from the outermost towards 0.5, which is left out."""
    probabilities = torch.linspace(_OUTERMOST, 0.5, count + 1)[:-1]
    return torch.tensor([NormalDist().inv_cdf(p) for p in probabilities.tolist()], dtype=torch.float32)


class NormalFloat(CodebookDataType):
    """Quantiles of the normal distribution; see the module."""

    name = "nf"
    support = Support(bit_widths=range(2, 9), options={})

    def levels(self, blocks: Blocks, spec: QuantizationSpec) -> Tensor:
        """2^k levels from -1 to 1."""
        return torch.tensor(normal_levels(bit_width(spec)), dtype=torch.float32, device=blocks.values_NB.device)


DATA_TYPE = NormalFloat()
