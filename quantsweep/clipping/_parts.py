"""What the clippings share: blocks without the padding of short ones, and the step that was chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantsweep.numerics.blocks import Blocks
from quantsweep.trial.specs import QuantizationSpec, StepSpec

OF_WHOLE_TENSOR = ("quantile", "nvfp4")
"""Formats whose levels, or a second scale, are made from the whole tensor: the range of one block changes what others become."""


def limits_of_parts(blocks: Blocks, limits: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Limits (N,) each.  limits: (n, B) -> (n, 1) each, called for full blocks and, without their padding, for short ones."""
    values_NB, layout = blocks.values_NB, blocks.layout
    if not layout.padding:
        low_N1, high_N1 = limits(values_NB)
        return low_N1.view(-1), high_N1.view(-1)
    is_short_N = torch.arange(layout.num_blocks, device=values_NB.device) % layout.blocks_per_run == layout.blocks_per_run - 1
    low_N, high_N = values_NB.new_empty(2, layout.num_blocks).unbind()
    for rows_N, width in ((~is_short_N, layout.width), (is_short_N, layout.width - layout.padding)):
        low_n1, high_n1 = limits(values_NB[rows_N, :width])
        low_N[rows_N], high_N[rows_N] = low_n1.view(-1), high_n1.view(-1)
    return low_N, high_N


def clipping_of(spec: QuantizationSpec) -> StepSpec:
    """The clipping that was chosen, when it runs."""
    if spec.clipping is None:
        raise TypeError("a clipping runs where one was chosen")
    return spec.clipping
