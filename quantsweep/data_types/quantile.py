"""Quantile: levels that follow the weights of the tensor, so that codes are used about equally often.

As bitsandbytes' create_quantile_map builds it, with n = 2^k - 1 and d = 1 / (2n):

    256 empirical quantiles of the entire tensor at probabilities d … 1 - d, equally spaced,
    of them those with index floor(255·i / (n - 1)), i = 0 … n - 1; then 0;
    all divided by the largest magnitude and sorted: 2^k levels

Quantiles are exact here (bitsandbytes estimates them), with linear interpolation.  Blocks are then
scaled by their absolute maximum as in every other format.  The levels are stored with the tensor:
rounded to the scales' type before use, and counted (2^k · 16 bits).

The formula printed in the paper (section 2.2, mid-points of 2^k + 1 quantiles) is not offered: taken literally, its
mean squared error on N(0, 1) at k = 4 in blocks of 64 is 0.071, that of the levels above 0.0095 (7.5 times less).  It
counts the tensor's minimum as a quantile, so the figure grows with the tensor: 0.04 at 2^12 weights, 0.08 at 2^20.
The codebook reaches 1 at one end only unless the tensor is symmetric: a block whose largest magnitude
has the other sign does not keep it.
In small blocks, whose largest magnitudes are far below the tensor's, more than 6 bits gain little:
the levels stay where the tensor's weights are many, and the block's scaled weights are elsewhere.
A tensor that is almost all zeros gets levels that are all 0, and decodes to zeros.

Needs at least 256 weights.  Source: Dettmers & Zettlemoyer, arXiv:2212.09720, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.data_types._base import CodebookDataType, Support, bit_width, scale_dtype
from quantsweep.errors import QuantizationError
from quantsweep.numerics.blocks import Blocks
from quantsweep.numerics.order import quantiles
from quantsweep.numerics.scales import storage_bits, to_storage
from quantsweep.trial.specs import QuantizationSpec

_ESTIMATES = 256


def probabilities(k: int) -> tuple[float, ...]:
    """The 2^k - 1 probabilities at which quantiles are taken: `probabilities(2) == (1/6, …, 5/6)`."""
    count = 2**k - 1
    offset = 1 / (2 * count)
    indices = [(_ESTIMATES - 1) * i // (count - 1) for i in range(count)]
    return tuple(offset + (1 - 2 * offset) * index / (_ESTIMATES - 1) for index in indices)


class Quantile(CodebookDataType):
    """Empirical quantiles of the tensor; see the module."""

    name = "quantile"
    support = Support(bit_widths=range(2, 9), options={})

    def levels(self, blocks: Blocks, spec: QuantizationSpec) -> Tensor:
        """2^k levels of which some may coincide (0 and the median do nearly)."""
        elements = blocks.elements()
        if elements.numel() < _ESTIMATES:
            raise QuantizationError(f"data_type 'quantile' needs at least {_ESTIMATES} weights, got {elements.numel()}")
        values = [*quantiles(elements, probabilities(bit_width(spec))), 0.0]
        largest = max(abs(value) for value in values)
        levels = sorted(value / (largest or 1.0) for value in values)
        return to_storage(torch.tensor(levels, dtype=torch.float32, device=elements.device), scale_dtype(spec))

    def codebook_bits(self, spec: QuantizationSpec) -> int:
        """2^k levels at the width of the scales."""
        return (1 << bit_width(spec)) * storage_bits(scale_dtype(spec))


DATA_TYPE = Quantile()
