"""Lines through times: the smallest relative errors, with the say of outliers bounded, never negative.

A stalled file system is no property of a model; and a trial of an hour must not outweigh a thousand of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SMALLEST_SPREAD = 0.05
"""Of log(measured / predicted): identical trials on one machine differ by some percent."""
_STEPS = 8
_OUTLIER = 2.0
"""Residuals beyond so many robust standard deviations are weighted down."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Line:
    """seconds = at_zero + slope · x, neither below 0."""

    at_zero: float
    slope: float

    def __call__(self, x: Any) -> Any:
        """Seconds at `x`."""
        return self.at_zero + self.slope * x


def robust_deviation(residuals: Floats) -> float:
    """The standard deviation that the median of |residuals| implies for a normal distribution."""
    return float(1.4826 * np.median(np.abs(residuals))) if residuals.size else 0.0


def fit(x: Floats, y: Floats) -> Line:
    """The line with the smallest relative errors, outliers weighted down; proportional where all x are the same."""
    if x.size == 0:
        return Line(0.0, 0.0)
    y = np.maximum(y, 1e-6)
    scale = float(x.max()) or 1.0
    x = x / scale
    weights = 1 / y**2
    line = _weighted(x, y, weights)
    for _ in range(_STEPS):
        predicted = np.maximum(line(x), 1e-9)
        residuals = np.log(y / predicted)
        limit = _OUTLIER * max(SMALLEST_SPREAD, robust_deviation(residuals))
        weights = np.minimum(1.0, limit / np.maximum(np.abs(residuals), 1e-12)) / predicted**2
        line = _weighted(x, y, weights)
    return Line(line.at_zero, line.slope / scale)


def _weighted(x: Floats, y: Floats, weights: Floats) -> Line:
    """Weighted least squares with neither coefficient below 0."""
    total, mean_x, mean_y = weights.sum(), np.average(x, weights=weights), np.average(y, weights=weights)
    spread = float((weights * (x - mean_x) ** 2).sum())
    through_zero = Line(0.0, float((weights * x * y).sum() / max((weights * x * x).sum(), 1e-300)))
    if spread <= 1e-12 * total:
        return through_zero
    slope = float((weights * (x - mean_x) * (y - mean_y)).sum() / spread)
    at_zero = float(mean_y - slope * mean_x)
    if slope < 0:
        return Line(float(mean_y), 0.0)
    return through_zero if at_zero < 0 else Line(at_zero, slope)
