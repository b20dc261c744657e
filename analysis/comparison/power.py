"""What a comparison could have found, and how many examples would decide it.

    smallest difference found with 80 % power     δ = (t.975 + t.80) · se                      by the t of its degrees of freedom
    examples that would show the difference d     n · ((z.975 + z.80) · se / d)²
    examples that would show |difference| < m     n · ((z.95 + z.90) · se / (m − |d|))²        two one-sided tests, 80 % power at d = 0

Of single answers the standard error depends on the difference itself (Connor, Biometrics 43, 1987): with a share ψ of answers that differ,

    z.975 √ψ + z.80 √(ψ − δ²) = δ √n

Half an answer is added to each cell of the table before (Agresti & Min 2005): that no answer differed does not mean that none ever will.
Where units (models) vary too, only a part of the variance gets smaller with more examples; the rest needs more models, and quantiles
are Student's of their number less one.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from analysis.comparison.paired import POWER, Estimate, Paired
from analysis.uncertainty import LEVEL

_TWO_SIDED = (1 + LEVEL) / 2


def detectable(paired: Paired, found: Estimate) -> float:
    """The smallest true difference that this comparison would have found with a probability of POWER; NaN where nothing can be said."""
    if paired.is_exact:
        number = paired.x_UK.shape[1]
        share = (float(np.abs(paired.x_UK).sum()) + 1) / (number + 2)
        return min(1.0, _connor_difference(share, number))
    if not found.stderr > 0:
        return math.nan
    return found.stderr * float(stats.t.ppf(_TWO_SIDED, found.degrees) + stats.t.ppf(POWER, found.degrees))


def examples_needed(paired: Paired, found: Estimate, num_examples: int, margin: float | None) -> float:
    """How many examples like these would decide with a probability of POWER, were the difference what it seems.

    Infinite where none would (the difference seems to be nothing and no margin was given, or units differ too much among themselves);
    NaN where nothing can be said.
    """
    if math.isnan(found.stderr):
        return math.nan
    size = abs(found.difference)
    if paired.is_exact:
        to_differ = _connor_number(float(np.abs(paired.x_UK).sum()) / paired.x_UK.shape[1], size)
    else:
        to_differ = _number(paired, found, num_examples, (_TWO_SIDED, POWER), size)
    if margin is None or size >= margin:
        return to_differ
    return min(to_differ, _number(paired, found, num_examples, (LEVEL, (1 + POWER) / 2), margin - size))


def _number(paired: Paired, found: Estimate, num_examples: int, levels: tuple[float, float], size: float) -> float:
    """n at which the quantiles' sum of standard errors is `size`: the part over examples falls with 1/n, the rest stays."""
    degrees = math.inf if len(paired.share_U) == 1 else len(paired.share_U) - 1
    rest = max(found.stderr**2 - found.stderr_examples**2, 0.0)
    room = (size / float(np.sum(stats.t.ppf(levels, degrees)))) ** 2 - rest
    return math.ceil(num_examples * found.stderr_examples**2 / room) if room > 0 else math.inf


def _connor_difference(share: float, number: int) -> float:
    a, b = _quantile(_TWO_SIDED), _quantile(POWER)
    inside = b * b * (number + b * b - a * a) * share
    return (a * math.sqrt(number * share) + math.sqrt(max(inside, 0.0))) / (number + b * b)


def _connor_number(share: float, size: float) -> float:
    if size == 0:
        return math.inf
    spread = _quantile(_TWO_SIDED) * math.sqrt(share) + _quantile(POWER) * math.sqrt(max(share - size * size, 0.0))
    return math.ceil((spread / size) ** 2)


def _quantile(level: float) -> float:
    return float(stats.norm.ppf(level))
