"""The statistics of two arms that answered the same examples: difference, interval, test, power.

Every score here is a ratio r = Σ x / Σ w over examples: an accuracy (x: right or wrong, w = 1), a loss a byte (x: −log-likelihood,
w: bytes).  Both arms share w, so their difference is such a ratio too, of x = x_A − x_B.  Examples that belong together (questions
about one text, windows of one page) are one *cluster*, and x and w are its sums: clusters are what another sample would draw anew.
*Units* (models, or seeds of one model) answer the same clusters; x_UK has a row a unit and a column a cluster.  With shares s_u and

    e_uk = s_u (x_uk − r_u w_uk) / Σ_k w_uk                            what cluster k moves the difference of unit u by
    V_K  = K/(K−1) Σ_k (Σ_u e_uk)²                                     over clusters, these units
    V_U  = U/(U−1) Σ_u s_u² (r_u − Σ s r)²                             over units, these clusters
    V_UK = Σ_uk (e_uk − its row's and its column's part)² · UK/((U−1)(K−1))        counted in both

the variance over clusters *and* units is V_K + V_U − V_UK, but at least the greater of the two (Cameron, Gelbach & Miller 2011, with
the interaction in place of the intersection).  An interval is one of three, each where it covered best in simulation:

    accuracies, single examples     Tango's score interval of paired proportions (Statistics in Medicine 17, 1998): also where few or no
                                    answers differ.  The test is McNemar's, exact.
    losses of one unit              as far as Student's t reaches, and as far as the studentized bootstrap of clusters does (Efron &
                                    Tibshirani 1993, §12.5): heavy tails need the one, skew losses the other.  It covered, 2,000 times, of
                                    20 and of 60 documents with normal losses 95.0 and 95.8 %, exponential 95.6 and 95.9 %, Student's
                                    with 3 degrees 96.5 and 96.7 %, log-normal 92.5 and 94.3 %
    all else                        Student's t, degrees of freedom after Satterthwaite (`analysis.uncertainty`)

McNemar's exact test is the sign-flip test of single examples: which arm is right is tossed for each example that differs.  With clusters
whole clusters are tossed; the distribution of the sum is computed exactly, by convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from analysis.uncertainty import LEVEL, degrees_of_freedom, half_width

Vector = npt.NDArray[np.float64]
Interval = tuple[float, float]
OnProgress = Callable[[float], None]
"""Called now and then with the share that is done."""
POWER = 0.80
LEAST_CLUSTERS = 10
"""For the bootstrap: of fewer, too many samples are one cluster over and over."""
NUM_RESAMPLES = 9_999
_SEED = 14
_CHUNK = 4_000_000
"""Drawn numbers that are held at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A difference with its uncertainty.

    low, high: of LEVEL.  low_inner, high_inner: of 1 − 2·(1 − LEVEL), which two one-sided tests look at.  p: two-sided, of no difference.
    stderr, degrees: of the difference; stderr_examples: the part of it that more examples would make smaller.
    low_these, high_these: of LEVEL over examples alone: these units on other examples.
    interval, test: how they were made, in words.  NaN where there is no answer.
    """

    difference: float
    low: float
    high: float
    low_inner: float
    high_inner: float
    p: float
    stderr: float
    stderr_examples: float
    degrees: float
    low_these: float
    high_these: float
    interval: str
    test: str


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Sums of differences: x_UK over w_UK, one row a unit, one column a cluster; share_U sums to 1.

    is_count: x_UK counts answers that differ (accuracies).  is_single: every cluster is one example.  num_pairs: of trials, of all
    units.  unit: what a unit is.
    """

    x_UK: Vector
    w_UK: Vector
    share_U: Vector
    is_count: bool
    is_single: bool
    num_pairs: int = 1
    unit: str = "model"

    @cached_property
    def ratio_U(self) -> Vector:
        """The difference of each unit."""
        return np.asarray(self.x_UK.sum(axis=1) / self.w_UK.sum(axis=1))

    @property
    def difference(self) -> float:
        """Σ s_u r_u."""
        return float(self.share_U @ self.ratio_U)

    @cached_property
    def moves_UK(self) -> Vector:
        """What a cluster moves the difference by, through each unit (e_uk)."""
        residual = self.x_UK - self.ratio_U[:, None] * self.w_UK
        return np.asarray(self.share_U[:, None] * residual / self.w_UK.sum(axis=1, keepdims=True))

    @cached_property
    def moves_K(self) -> Vector:
        """The same through all units, scaled so that Σ m² is the variance over clusters; NaN for a single cluster."""
        number = self.x_UK.shape[1]
        return np.asarray(self.moves_UK.sum(axis=0) * (math.sqrt(number / (number - 1)) if number > 1 else math.nan))

    @property
    def is_exact(self) -> bool:
        """True where single answers of one trial are set against those of another: McNemar's case."""
        return self.is_count and self.is_single and self.num_pairs == 1


def estimate(paired: Paired, on_progress: OnProgress | None = None) -> Estimate:
    """The difference with interval and test, chosen as the module's page says."""
    stderr, degrees = standard_error(paired)
    examples = float(np.linalg.norm(paired.moves_K))
    num_units, num_clusters = paired.x_UK.shape
    if paired.is_exact:
        return _of_counts(paired, stderr, degrees)
    if math.isnan(stderr) or stderr == 0:
        return _without_spread(paired, stderr, degrees)
    interval, inner, p = _students(paired.difference, stderr, degrees)
    made, test = f"t over {_over(paired)}", "t"
    if num_units == 1 and paired.is_count:
        p, test = sign_flip(np.rint(paired.x_UK[0]).astype(np.int64)), "exact sign flips of whole clusters"
    elif num_units == 1 and num_clusters >= LEAST_CLUSTERS:
        drawn = studentized(paired.x_UK[0], paired.w_UK[0], on_progress=on_progress)
        interval = _wider(interval, _bootstrap(paired.difference, stderr, drawn, LEVEL))
        inner = _wider(inner, _bootstrap(paired.difference, stderr, drawn, _inner(LEVEL)))
        seen = paired.difference / stderr
        rarer = 1 + min(np.sum(drawn >= seen), np.sum(drawn <= seen))
        p = max(p, min(1.0, 2 * float(rarer) / (len(drawn) + 1)))
        made, test = f"the wider of t and bootstrap over {_over(paired)}", "the less sure of t and bootstrap"
    these = _students(paired.difference, examples, degrees_of_freedom(paired.moves_K))[0] if num_units > 1 else interval
    return Estimate(
        difference=paired.difference,
        low=interval[0],
        high=interval[1],
        low_inner=inner[0],
        high_inner=inner[1],
        p=p,
        stderr=stderr,
        stderr_examples=examples,
        degrees=degrees,
        low_these=these[0],
        high_these=these[1],
        interval=made,
        test=test,
    )


def _students(difference: float, stderr: float, degrees: float) -> tuple[Interval, Interval, float]:
    """(interval of LEVEL, the inner one, two-sided p) of Student's t."""
    half, inner = half_width(stderr, degrees), half_width(stderr, degrees, _inner(LEVEL))
    p = 2 * float(stats.t.sf(abs(difference) / stderr, degrees))
    return (difference - half, difference + half), (difference - inner, difference + inner), p


def _bootstrap(difference: float, stderr: float, drawn: Vector, level: float) -> Interval:
    high, low = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(difference - stderr * low), float(difference - stderr * high)


def _wider(one: Interval, other: Interval) -> Interval:
    return min(one[0], other[0]), max(one[1], other[1])


def standard_error(paired: Paired) -> tuple[float, float]:
    """(standard error of the difference over clusters, and over units where there are several; its degrees of freedom)."""
    over_clusters = float((paired.moves_K**2).sum())
    degrees = degrees_of_freedom(paired.moves_K) if paired.x_UK.shape[1] > 1 else math.nan
    num_units, num_clusters = paired.x_UK.shape
    if num_units == 1 or num_clusters == 1:
        return math.sqrt(over_clusters), degrees
    deviation_U = paired.share_U * (paired.ratio_U - paired.difference)
    over_units = num_units / (num_units - 1) * float((deviation_U**2).sum())
    rest_UK = paired.moves_UK - paired.share_U[:, None] * paired.moves_UK.sum(axis=0)
    in_both = float((rest_UK**2).sum()) * num_units * num_clusters / ((num_units - 1) * (num_clusters - 1))
    variance = max(over_clusters + over_units - in_both, over_clusters, over_units)
    spread = over_units**2 / (num_units - 1) + over_clusters**2 / degrees
    return math.sqrt(variance), max(variance**2 / spread, 1.0) if spread else degrees


def studentized(x_K: Vector, w_K: Vector, *, on_progress: OnProgress | None = None) -> Vector:
    """(r* − r) / se* of NUM_RESAMPLES samples of the clusters with replacement; always the same ones.

    A sample that has no spread of its own counts as infinitely far off.
    """
    number = len(x_K)
    ratio = x_K.sum() / w_K.sum()
    random = np.random.default_rng(_SEED)
    drawn: list[Vector] = []
    step = max(1, _CHUNK // number)
    for begin in range(0, NUM_RESAMPLES, step):
        chosen = random.integers(number, size=(min(step, NUM_RESAMPLES - begin), number))
        x, w = x_K[chosen], w_K[chosen]
        total = w.sum(axis=1)
        ratios = x.sum(axis=1) / total
        stderr = np.sqrt(number / (number - 1) * np.square(x - ratios[:, None] * w).sum(axis=1)) / total
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append(np.nan_to_num((ratios - ratio) / stderr, nan=0.0, posinf=np.inf, neginf=-np.inf))
        if on_progress is not None:
            on_progress((begin + len(chosen)) / NUM_RESAMPLES)
    return np.concatenate(drawn)


def sign_flip(counts_K: npt.NDArray[np.int64]) -> float:
    """Two-sided p of Σ counts, were each cluster's sign tossed: exact.  counts_K: answers that only A has right less those only B has.

    With counts of ±1 it is McNemar's exact test.

    >>> sign_flip(np.array([1, 1, 1, 1, 1, -1])), stats.binomtest(1, 6).pvalue
    (0.21875, 0.21875)
    """
    sizes, numbers = np.unique(np.abs(counts_K[counts_K != 0]), return_counts=True)
    law = np.ones(1)  # of the sum, −n … n
    for size, number in zip(sizes, numbers, strict=True):
        tosses = np.zeros(2 * int(size) * int(number) + 1)
        tosses[:: 2 * int(size)] = stats.binom.pmf(np.arange(number + 1), number, 0.5)
        law = np.convolve(law, tosses)
    sums = np.arange(len(law)) - len(law) // 2
    return min(1.0, float(law[np.abs(sums) >= abs(int(counts_K.sum()))].sum()))


def score_interval(gained: int, lost: int, number: int, level: float = LEVEL) -> tuple[float, float]:
    """Tango's interval of (gained − lost) / number: the differences that a score test at `level` would not reject.

    gained, lost: of `number` examples, those that only A, only B has right.
    """
    z = float(stats.norm.ppf((1 + level) / 2))

    def excess(delta: float) -> float:
        """How much the score of `delta` exceeds z; the share of answers that only B has right is the likeliest given `delta`."""
        b = (2 * number - gained + lost) * delta - gained - lost
        root = math.sqrt(max(b * b + 8 * number * lost * delta * (1 - delta), 0.0))
        variance = number * ((root - b) / (2 * number) + delta * (1 - delta))
        off = abs(gained - lost - number * delta)
        return off / math.sqrt(variance) - z if variance > 0 else (math.inf if off > 0 else -z)

    middle = (gained - lost) / number

    def end(limit: float) -> float:
        within = limit * (1 - 1e-9)
        if middle * limit >= 1 - 1e-9 or excess(within) <= 0:
            return limit
        return float(optimize.brentq(excess, middle, within))

    return end(-1.0), end(1.0)


def _of_counts(paired: Paired, stderr: float, degrees: float) -> Estimate:
    answers = np.rint(paired.x_UK[0]).astype(np.int64)
    gained, lost, number = int((answers > 0).sum()), int((answers < 0).sum()), len(answers)
    both = score_interval(gained, lost, number), score_interval(gained, lost, number, _inner(LEVEL))
    return _over_examples(paired, stderr, degrees, both, sign_flip(answers), "Tango's score interval", "exact McNemar")


def _without_spread(paired: Paired, stderr: float, degrees: float) -> Estimate:
    """A single cluster says nothing; where no answer differs, how rarely one would is bounded by the number of clusters."""
    number = paired.x_UK.shape[1]
    if math.isnan(stderr):
        both, p, interval = ((math.nan, math.nan),) * 2, math.nan, "none: one cluster"
    elif paired.is_count:
        both = score_interval(0, 0, number), score_interval(0, 0, number, _inner(LEVEL))
        p, interval = 1.0, f"Tango's score interval of {number:,} clusters, of which none differs"
    else:
        both, p = ((paired.difference, paired.difference),) * 2, float(paired.difference == 0)
        interval = "none: all examples differ alike"
    return _over_examples(paired, stderr, degrees, both, p, interval, "none")


def _over_examples(
    paired: Paired, stderr: float, degrees: float, both: tuple[Interval, Interval], p: float, interval: str, test: str
) -> Estimate:
    """Of one unit, or of units that say nothing of others: all uncertainty is over examples.  both: the interval and the inner one."""
    (low, high), (low_inner, high_inner) = both
    return Estimate(
        difference=paired.difference,
        low=low,
        high=high,
        low_inner=low_inner,
        high_inner=high_inner,
        p=p,
        stderr=stderr,
        stderr_examples=stderr,
        degrees=degrees,
        low_these=low,
        high_these=high,
        interval=interval,
        test=test,
    )


def _inner(level: float) -> float:
    """The level of the interval that two one-sided tests, each of the error 1 − level, look at."""
    return 2 * level - 1


def _clusters(paired: Paired) -> str:
    return "examples" if paired.is_single else "clusters"


def _over(paired: Paired) -> str:
    return _clusters(paired) if len(paired.share_U) == 1 else f"{_clusters(paired)} and {paired.unit}s"
