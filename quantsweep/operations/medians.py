"""Seconds against size, read off between medians: a stalled file system is no property of a model, and an hour must not outweigh seconds.

sizes that ran    1e6          3e7                 1e9          measurements of about one size make one point, their medians
seconds           0.3 ──────── 0.9 ─────────────── 10.3 ──→     straight between two points, in proportion beyond the last
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SMALLEST_SPREAD = 0.05
"""Of log(measured / predicted): identical trials on one machine differ by some percent."""
SIZES_A_DECADE = 50
"""Sizes within 5 % are one."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Medians:
    """Median seconds at each size, sizes ascending."""

    sizes: Floats
    seconds: Floats

    def __call__(self, size: Any) -> Any:
        """Seconds at `size`; those of the smallest that ran for what is smaller still."""
        beyond = np.maximum(1.0, np.asarray(size) / max(self.sizes[-1], 1.0))
        return np.interp(size, self.sizes, self.seconds) * beyond


def medians(sizes: Floats, seconds: Floats) -> Medians:
    """The medians of some measurements, at least one."""
    groups = np.round(SIZES_A_DECADE * np.log10(np.maximum(sizes, 1.0)))
    found = [(np.median(sizes[groups == group]), np.median(seconds[groups == group])) for group in np.unique(groups)]
    return Medians(*(np.array(values, dtype=np.float64) for values in zip(*found, strict=True)))


def median_ratio(measured: Floats, predicted: Floats) -> float:
    """How many times as long as predicted things took, at the median."""
    return float(np.median(np.maximum(measured, 1e-9) / np.maximum(predicted, 1e-9)))


def spread(ratios: Iterable[float], few: float, *, least: int = 3) -> float:
    """The standard deviation of log(ratio) that the median of their distances from 1 implies; `few` for fewer than `least`."""
    logs = np.abs(np.log(np.fromiter(ratios, np.float64)))
    return max(SMALLEST_SPREAD, float(1.4826 * np.median(logs))) if logs.size >= least else few
