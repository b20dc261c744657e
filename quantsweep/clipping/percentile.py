"""Clipping at a percentile: a given share of each block's weights lies within the range that its scale is made from.

    symmetric      limits = ∓ Q_P(|T_b|)
    asymmetric     limits = Q_(100-P)(T_b),  Q_P(T_b)

with Q the empirical percentile, interpolated linearly between order statistics.  P = 100 clips nothing.  It needs no text and no
search, and knows nothing of what clipping costs: P must suit the blocks' size (of 64 weights the largest is 1.6 %).

Source: the usual percentile calibration, as in Wu et al., arXiv:2004.09602, section 3 (99.9 … 99.9999 % there, of whole tensors).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantsweep.clipping._parts import clipping_of, limits_of_parts
from quantsweep.numerics.blocks import Blocks, tile_size
from quantsweep.pipeline.interface import InputNeeds, Layer, LayerContext
from quantsweep.trial.specs import QuantizationSpec


class Percentile:
    """Both ends at a percentile; see the module."""

    def check(self, spec: QuantizationSpec) -> None:
        """Every format can be clipped so."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """It looks at no text."""
        return None

    def limits(
        self, layer: Layer, blocks: Blocks, spec: QuantizationSpec, context: LayerContext, columns_J: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(N,) each."""
        percentile = clipping_of(spec).number("percentile")
        return limits_of_parts(blocks, lambda values_NB: percentile_limits(values_NB, percentile, symmetric=spec.symmetric is not False))


def percentile_limits(values_NB: Tensor, percentile: float, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Limits (N, 1) each of blocks (N, B) without padding.  percentile: above 50, up to 100."""
    rows = max(1, tile_size(values_NB.device) // values_NB.shape[1])
    parts = [_limits(part_NB, percentile / 100, symmetric) for part_NB in torch.split(values_NB, rows)]
    return torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts])


def _limits(values_NB: Tensor, share: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        high_N1 = _quantile(values_NB.abs().sort(dim=1).values, share)
        return -high_N1, high_N1
    sorted_NB = values_NB.sort(dim=1).values
    return _quantile(sorted_NB, 1 - share), _quantile(sorted_NB, share)


def _quantile(sorted_NB: Tensor, share: float) -> Tensor:
    """(N, 1), between two order statistics."""
    position = share * (sorted_NB.shape[1] - 1)
    below, above = sorted_NB[:, math.floor(position), None], sorted_NB[:, math.ceil(position), None]
    return below + (position - math.floor(position)) * (above - below)


CLIPPING = Percentile()
