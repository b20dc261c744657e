"""How closely two scores go together over trials, with an interval that knows that trials of one model are no independent draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.scores import ACCURACY
from analysis.selection import one_variant
from analysis.uncertainty import half_width

LEAST_MODELS = 4
"""Fewer models tell nothing about other models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlation:
    """Pearson's r of n trials with its 95 % interval; NaN where it has none."""

    r: float
    low: float
    high: float
    n: int


def correlation(table: pd.DataFrame, x: str = "cross_entropy", y: str = ACCURACY) -> Correlation:
    """Pearson's r of two columns over trials, with a jackknife interval over models.

    table: one row a trial, with its `model`; x, y: by default the capped cross entropy and the mean accuracy of `analysis.scores.scores`.

    Trials of one model are versions of it and no independent draws, so whole models are left out, one after the other.  With
    z = artanh r (Fisher), G models, and z_g without model g, the pseudovalues G z − (G − 1) z_g have the variance s², and the interval is
    tanh(z ± t s / √G) with G − 1 degrees of freedom.  (A percentile bootstrap over models covers too little with few of them:
    `tests/unit/test_analysis_k_bit.py` counts.)  Trials that lack one of the two, or where one is infinite, are left out;
    with fewer than `LEAST_MODELS` models, or where one of the two does not vary, there is no interval.
    Raises ConfigurationError where planted and plain models are mixed.
    """
    one_variant(table)
    both = table[["model", x, y]].replace([np.inf, -np.inf], np.nan).dropna()
    n, models = len(both), int(both["model"].nunique())
    if n < 2 or (both[[x, y]].nunique() < 2).any():
        return Correlation(r=math.nan, low=math.nan, high=math.nan, n=n)
    dx, dy = both[x] - both[x].mean(), both[y] - both[y].mean()
    moments = (
        pd.DataFrame({"n": 1.0, "x": dx, "y": dy, "xx": dx * dx, "yy": dy * dy, "xy": dx * dy}).groupby(both["model"]).sum().to_numpy()
    )
    r, without = float(_pearson(moments.sum(axis=0))), _pearson(moments.sum(axis=0) - moments)
    if models < LEAST_MODELS or not np.isfinite(without).all():
        return Correlation(r=r, low=math.nan, high=math.nan, n=n)
    low, high = _jackknifed(r, without)
    return Correlation(r=r, low=low, high=high, n=n)


def _jackknifed(r: float, without: np.typing.NDArray[np.float64]) -> tuple[float, float]:
    """The interval of r from the r without each model, on Fisher's scale; a perfect r is its own interval."""
    models, most = len(without), 1 - 1e-12  # r of points on a line is 1, or a rounding error away from it
    if abs(r) > most:
        return r, r
    z, z_without = math.atanh(r), np.arctanh(np.clip(without, -most, most))
    spread = float(np.std((models - 1) * z_without, ddof=1))
    half = half_width(spread / math.sqrt(models), models - 1)
    return math.tanh(z - half), math.tanh(z + half)


def _pearson(moments: np.typing.NDArray[np.float64]) -> np.typing.NDArray[np.float64]:
    """r from sums (…, 6): count, x, y, x², y², xy; NaN where one of the two does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(moments, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))  # type: ignore[no-any-return]
