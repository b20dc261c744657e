"""The range that a scale is made from: extremes of what shares it, or percentiles of it.

    clip_percentile p    symmetric:    the p-th percentile of |x|, and no more than the extremes
                         asymmetric:   from the (100 - p)-th to the p-th percentile of x

Percentiles are by nearest rank: one of the values, no mean of two.  Padding is not looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Extremes(nn.Module):
    """Range over the last dimension.

    clip_percentile: above 0, at most 100; None for the extremes themselves.
    """

    share: Tensor

    def __init__(self, clip_percentile: float | None, *, symmetric: bool) -> None:
        super().__init__()
        self._is_clipped = clip_percentile is not None
        self._symmetric = symmetric
        self.register_buffer("share", torch.tensor((clip_percentile or 100) / 100, dtype=torch.float64))

    def forward(self, values: Tensor, is_counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Low and high, (…, 1) each, of values (…, N); is_counted: bool, of the same shape, at least one of N; None for all."""
        low, high = _extremes(values, is_counted)
        if not self._is_clipped:
            return low, high
        if self._symmetric:
            magnitude = self._ranked(values.abs(), is_counted, self.share)
            return torch.maximum(low, -magnitude), torch.minimum(high, magnitude)
        return -self._ranked(-values, is_counted, self.share), self._ranked(values, is_counted, self.share)

    def _ranked(self, values: Tensor, is_counted: Tensor | None, share: Tensor) -> Tensor:
        """The value below or at which this share of them lies, (…, 1)."""
        if is_counted is None:
            ordered, number = values.sort(dim=-1).values, share.new_full((*values.shape[:-1], 1), values.shape[-1])
        else:
            ordered, number = torch.where(is_counted, values, torch.inf).sort(dim=-1).values, is_counted.sum(dim=-1, keepdim=True)
        return ordered.gather(-1, (number * share).ceil().long().sub(1).clamp(min=0))


def _extremes(values: Tensor, is_counted: Tensor | None) -> tuple[Tensor, Tensor]:
    if is_counted is None:
        return values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    low = torch.where(is_counted, values, torch.inf).amin(dim=-1, keepdim=True)
    return low, torch.where(is_counted, values, -torch.inf).amax(dim=-1, keepdim=True)
