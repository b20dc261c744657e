"""Standard errors of lm-eval's aggregates, in closed form.

lm-eval bootstraps some of them (100,000 resamples a metric, minutes of CPU) and gives none for the
others.  Every aggregate of interest is a smooth function of one or two sample means, so the first-order
(delta-method) error is available at once.  With n examples and s² the variance with n−1 in the denominator:

    mean                 x̄                       s_x / √n
    perplexity           exp(−x̄)                 value · s_x / √n
    weighted mean        r = Σ x_i / Σ w_i       √( n/(n−1) · Σ e_i² ) / Σ w_i   with  e_i = x_i − r·w_i
    weighted_perplexity  exp(−r)                 value · (the weighted mean's)
    bits_per_byte        −r / ln 2               (the weighted mean's) / ln 2

x_i is the log-likelihood of example i (or its 0/1 outcome), w_i its bytes or words.  The weighted
mean is a ratio of two random sums, and e_i is its linearised residual (Cochran, Sampling
Techniques, §2.11; Σ e_i = 0 by construction).

With fewer than two examples, or an aggregate not in this table (F1, Matthews correlation, …), the
standard error is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Items = Sequence[Any]
"""What lm-eval collects for one metric: a number an example, or for ratios a pair (log-likelihood, weight)."""

_LN_2 = math.log(2)


def aggregate(function: Callable[[Items], Any], items: Items) -> float:
    """lm-eval's aggregate of `items`; inf where the exponential of a broken model's loss overflows."""
    try:
        return float(function(items))
    except OverflowError:
        return math.inf


def standard_error(aggregation: str, items: Items, value: float) -> float:
    """Standard error of `value`, the aggregate of `items`; `aggregation` is the name of lm-eval's function.

    >>> standard_error("mean", [1.0, 0.0, 1.0, 0.0], 0.5)
    0.2886751345948129
    """
    formula = _FORMULAS.get(aggregation)
    if formula is None or len(items) < 2:
        return math.nan
    with np.errstate(all="ignore"):
        return float(formula(np.asarray(items, dtype=np.float64), value))


def _mean(items: npt.NDArray[np.float64], _value: float) -> float:
    return float(items.std(ddof=1) / math.sqrt(len(items)))


def _perplexity(items: npt.NDArray[np.float64], value: float) -> float:
    return value * _mean(items, value)


def _weighted_mean(items: npt.NDArray[np.float64], _value: float) -> float:
    """items: n × 2, log-likelihoods and weights."""
    x, w = items.T
    n = len(x)
    residuals = x - x.sum() / w.sum() * w
    return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / w.sum())


def _weighted_perplexity(items: npt.NDArray[np.float64], value: float) -> float:
    return value * _weighted_mean(items, value)


def _bits_per_byte(items: npt.NDArray[np.float64], value: float) -> float:
    return _weighted_mean(items, value) / _LN_2


_FORMULAS: dict[str, Callable[[npt.NDArray[np.float64], float], float]] = {
    "mean": _mean,
    "perplexity": _perplexity,
    "weighted_perplexity": _weighted_perplexity,
    "bits_per_byte": _bits_per_byte,
}
