"""Robust fits of laws: Huber's loss on logarithms, many starts, and intervals from a bootstrap over models.

    minimize over θ   Σ_i huber(ln y_i − ln ŷ_i(θ)),     quadratic up to `HUBER`, linear beyond (Hoffmann et al. 2022: 10⁻³)

so that a point that is far off pulls no harder than one that is a little off.  Such sums have several minima: the best of a grid of
starts are all followed, and the fit says how many ended in the one that it took.  Points of one model are no independent draws: whole
models are drawn with replacement.  What the data cannot tell apart is refused, with its name: constants that may
move together without changing a prediction have no values.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from scipy.optimize import least_squares

from analysis.correlation import LEAST_MODELS
from analysis.laws.forms import Law, Numbers
from analysis.uncertainty import LEVEL
from quantsweep.errors import ConfigurationError
from quantsweep.words import count

Vector = npt.NDArray[np.float64]
HUBER = 1e-3
TRIED, FOLLOWED = 32, 8
"""Starts of the grid that are looked at: the best by their errors, some steps each; of these the best are followed to their end."""
STEPS = 60
WIDE = 0.1
"""Where Huber's loss first turns linear on the way from a start: wide, so that what is far off pulls as well."""
SAME = 1e-3
"""Two minima are one where no constant differs by more than this part (or this much, below 1)."""
IDLE = 1e-9
"""A constant that moves predictions by less than this has no part in them."""
SINGULAR = 1e-7
"""A direction whose change moves predictions by less than this part of the largest is not told by the data."""
EDGE = 1e-4
"""A constant that is so near to its bound lies at it."""
FAILED = 0.1
"""More resamples than this part that tell nothing, and there is no interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A law with the constants that the points gave it.

    constants: as fitted (logarithms where the law says so).  draws: (resamples, constants) of the bootstrap, none without intervals.
    estimates: one row a constant, as reported: value, low, high (95 %, over models; NaN for fewer than `LEAST_MODELS`).
    starts, agreeing: minima that were followed, and how many of them are the one taken.  error: median of |ln y − ln ŷ|.
    """

    law: Law
    points: pd.DataFrame
    constants: Vector
    draws: Vector
    estimates: pd.DataFrame
    starts: int
    agreeing: int
    objective: float
    error: float

    @property
    def models(self) -> int:
        """How many stand behind it."""
        return int(self.points["model"].nunique())

    def value(self, name: str) -> float:
        """A constant, as reported."""
        return float(self.estimates["value"][name])


def fit(law: Law, points: pd.DataFrame, *, resamples: int = 200, seed: int = 0) -> Fit:
    """The law's constants at these points (`analysis.laws.points`).

    resamples: of the bootstrap; 0 for none.
    Raises ConfigurationError where the points are of another response, lack a column, are too few or too alike, or do not tell
    constants apart.
    """
    refuse_degenerate(law, points)
    near = sorted((follow(law, points, start, scale=WIDE, steps=STEPS) for start in _best_starts(law, points)), key=lambda end: end[0])
    ends = [follow(law, points, start, tolerance=1e-12) for _, start in near[:FOLLOWED]]
    objective, constants = min(ends, key=lambda end: end[0])
    agreeing = sum(bool(np.all(np.abs(other - constants) <= SAME * np.maximum(np.abs(constants), 1.0))) for _, other in ends)
    _refuse_unidentified(law, points, constants)
    draws = _bootstrap(law, points, constants, resamples, seed) if points["model"].nunique() >= LEAST_MODELS else _none(law)
    return Fit(
        law=law,
        points=points,
        constants=constants,
        draws=draws,
        estimates=_estimates(law, constants, draws, points["model"].nunique()),
        starts=len(ends),
        agreeing=agreeing,
        objective=objective,
        error=float(np.median(np.abs(residuals(law, points, constants)))),
    )


def residuals(law: Law, points: pd.DataFrame, constants: Numbers) -> Any:
    """ln ŷ − ln y, one a point."""
    return law.predict(constants, columns(law, points)) - np.log(points["response"].to_numpy(float))


def columns(law: Law, points: pd.DataFrame) -> dict[str, Vector]:
    """What the law looks at, as plain arrays."""
    return {name: points[name].to_numpy(float) for name in law.least}


def follow(
    law: Law, points: pd.DataFrame, start: Vector, *, scale: float = HUBER, tolerance: float = 1e-9, steps: int = 400
) -> tuple[float, Vector]:
    """The minimum that a start leads to: its objective and its constants.  scale: where Huber's loss turns linear."""
    seen, observed = columns(law, points), np.log(points["response"].to_numpy(float))
    low, high = np.array(law.bounds).T

    def minimum(bounds: tuple[Any, Any]) -> Any:
        return least_squares(
            lambda constants: law.predict(constants, seen) - observed,
            start,
            jac="cs",
            bounds=bounds,
            loss="huber",
            f_scale=scale,
            x_scale="jac",
            ftol=tolerance,
            xtol=tolerance,
            gtol=1e-15,
            max_nfev=steps,
        )

    with np.errstate(all="ignore"):  # a step too far overflows, and is taken back
        found = minimum((-np.inf, np.inf))
        if not ((low < found.x) & (found.x < high)).all():  # few do; to mind bounds all the way takes five times as long
            found = minimum((low, high))
    return float(found.cost), np.asarray(found.x, float)


def refuse_degenerate(law: Law, points: pd.DataFrame) -> None:
    """Raise ConfigurationError where these points cannot determine the law, in words."""
    response = points.attrs.get("response", law.response)
    if response != law.response:
        raise ConfigurationError(
            f"the law of {law.name} is of a {law.response}, and these points are of a {response}: use {law.response}_points"
        )
    problems = []
    for column, least in law.least.items():
        if points[column].isna().any():
            problems.append(f"{count(int(points[column].isna().sum()), 'point')} have no {column}")
        elif points[column].nunique() < least:
            problems.append(f"there is {count(points[column].nunique(), 'value')} of {column} where {least} or more are needed")
    if not problems and len(points) <= len(law.constants):
        problems.append(f"{count(len(points), 'point')} cannot determine {count(len(law.constants), 'constant')} and show an error")
    if problems:
        told = "; ".join([*problems, *(f"left out: {why}" for why in points.attrs.get("left_out", ()))])
        raise ConfigurationError(f"{law.formula} cannot be fitted: {told}")


def _best_starts(law: Law, points: pd.DataFrame) -> list[Vector]:
    grid = np.array(list(itertools.product(*law.starts)), float)
    with np.errstate(all="ignore"):
        off = [np.abs(residuals(law, points, start)) for start in grid]
    costs = np.nan_to_num([float(r.sum()) for r in off], nan=np.inf)
    return list(grid[np.argsort(costs, kind="stable")[:TRIED]])


def _refuse_unidentified(law: Law, points: pd.DataFrame, constants: Vector) -> None:
    low, high = np.array(law.bounds).T
    near = np.minimum(constants - low, high - constants) < EDGE
    ends = [name for name, at_bound in zip(law.names, near, strict=True) if at_bound]
    if ends:
        raise ConfigurationError(
            f"{law.formula}: the best values of {', '.join(ends)} lie at the end of what is looked at, so the points do not bear this law. "
            "Take another law, or points over more sizes and bits"
        )
    slopes = _slopes(law, points, constants)
    lengths = np.linalg.norm(slopes, axis=0)
    idle = [name for name, length in zip(law.names, lengths, strict=True) if length < IDLE]
    if idle:
        raise ConfigurationError(f"{law.formula}: {', '.join(idle)} changes no prediction here, so these points cannot tell its value")
    _, singular, directions = np.linalg.svd(slopes / lengths, full_matrices=False)
    if singular[-1] < SINGULAR * singular[0]:
        together = [name for name, part in zip(law.names, directions[-1], strict=True) if abs(part) > 0.1]
        raise ConfigurationError(
            f"{law.formula}: these points do not tell {', '.join(together)} apart: they may move together without changing a prediction. "
            "Add points whose sizes, tokens and bits do not move together, or take a law without one of them"
        )


def _slopes(law: Law, points: pd.DataFrame, constants: Vector) -> Vector:
    """∂ ln ŷ / ∂ constant, (points, constants), by a complex step."""
    step = 1e-30
    seen = columns(law, points)
    return np.stack([law.predict(constants + 1j * step * unit, seen).imag / step for unit in np.eye(len(constants))], axis=1)


def _bootstrap(law: Law, points: pd.DataFrame, constants: Vector, resamples: int, seed: int) -> Vector:
    """(resamples, constants): fits to models drawn with replacement; none where too many resamples are degenerate."""
    rng = np.random.default_rng(seed)
    places = [np.asarray(rows) for rows in points.groupby("model").indices.values()]
    draws = []
    for _ in range(resamples):
        drawn = points.iloc[np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))])]
        try:
            refuse_degenerate(law, drawn)
        except ConfigurationError:
            continue
        draws.append(follow(law, drawn, constants)[1])
    return np.array(draws) if draws and len(draws) >= (1 - FAILED) * resamples else _none(law)


def _none(law: Law) -> Vector:
    return np.empty((0, len(law.constants)))


def _estimates(law: Law, constants: Vector, draws: Vector, models: int) -> pd.DataFrame:
    low, high = interval(law.reported(draws), models) if len(draws) else (np.full(len(constants), np.nan),) * 2
    return pd.DataFrame({"value": law.reported(constants), "low": low, "high": high}, index=pd.Index(law.names, name="constant"))


def interval(draws: Numbers, models: int) -> tuple[Vector, Vector]:
    """The 95 % interval of draws (resamples, …), each over so many models drawn.

    Expanded percentiles (Hesterberg 2015, arXiv:1411.5279): the middle 95 % of draws is too narrow for few models, as a normal
    interval is where Student's t is due; so the shares that are cut off are those of Φ(−√(G / (G − 1)) t), with G models.
    """
    t = float(stats.t.ppf((1 + LEVEL) / 2, models - 1))
    cut = float(stats.norm.cdf(-math.sqrt(models / (models - 1)) * t))
    low, high = np.quantile(draws, [cut, 1 - cut], axis=0)
    return low, high
