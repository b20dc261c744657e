"""What a fitted law hangs on: the largest model, a few points, and the range that it was fitted on.

largest_out   fitted without the largest model, does it foretell that one?  (A fit's own error says nothing of it.)
influence     which points move a constant, and where is it without the five that move it most?
predict       values with intervals, and in words where they lie outside of what was seen
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.laws.fitting import Fit, Vector, columns, follow, interval, refuse_degenerate, residuals
from quantsweep.errors import ConfigurationError, did_you_mean

WORST = 5
"""Points that are left out together."""
CANDIDATES = 10
"""Of each kind, from which the next is chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestOut:
    """How a law does on the largest model when fitted to the others.

    error: mean of ln y − ln ŷ over its n points (above 0: it is worse than foretold).  inside: median of |ln y − ln ŷ| over the
    n_inside points of the others.
    """

    model: str
    n: int
    error: float
    n_inside: int
    inside: float


def largest_out(found: Fit) -> LargestOut:
    """Fit without the largest model, and foretell it.  Raises ConfigurationError where the others cannot determine the law."""
    points = found.points
    model = str(points["model"].iloc[int(points["parameters"].to_numpy().argmax())])
    held, rest = points[points["model"] == model], points[points["model"] != model]
    rest.attrs = points.attrs
    refuse_degenerate(found.law, rest)
    _, constants = follow(found.law, rest, found.constants)
    return LargestOut(
        model=model,
        n=len(held),
        error=float(-residuals(found.law, held, constants).mean()),
        n_inside=len(rest),
        inside=float(np.median(np.abs(residuals(found.law, rest, constants)))),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Influence:
    """What a constant hangs on.

    value: with all n points.  without: without the `worst` ones.  moves: one row a point, by how far leaving it out alone moves the
    constant, with its residual ln y − ln ŷ.
    """

    constant: str
    n: int
    value: float
    without: float
    worst: tuple[str, ...]
    moves: pd.DataFrame


def influence(found: Fit, constant: str, *, worst: int = WORST) -> Influence:
    """Leave out each point alone, then those `worst` together that move the constant most.

    Points that mask each other are found one after the other: after the first is out, the next is sought among those that moved the
    constant most, and those that are now furthest off.
    Raises ConfigurationError for an unknown constant.
    """
    law = found.law
    if constant not in law.names:
        raise ConfigurationError(did_you_mean(f"constant of {law.formula}", constant, law.names))
    place = law.names.index(constant)

    def fitted(rows: pd.DataFrame, start: Vector) -> Vector:
        return follow(law, rows, start)[1]

    def reported(constants: Vector) -> float:
        return float(law.reported(constants)[place])

    points = found.points.reset_index(drop=True)
    alone = [reported(fitted(points.drop(index), found.constants)) for index in points.index]
    moves = points.assign(moves=np.array(alone) - found.value(constant), residual=-residuals(law, points, found.constants))
    order = moves["moves"].abs().sort_values(ascending=False).index
    rest, constants, out = points, found.constants, []
    for _ in range(worst):
        off = pd.Series(np.abs(residuals(law, rest, constants)), index=rest.index).nlargest(CANDIDATES).index
        candidates = [*order[:CANDIDATES].intersection(rest.index), *off.difference(order[:CANDIDATES])]
        after = {index: fitted(rest.drop(index), constants) for index in candidates}
        chosen = max(after, key=lambda index: abs(reported(after[index]) - found.value(constant)))
        out.append(str(rest["trial"][chosen]))
        rest, constants = rest.drop(chosen), after[chosen]
    return Influence(
        constant=constant,
        n=len(points),
        value=found.value(constant),
        without=reported(constants),
        worst=tuple(out),
        moves=moves.loc[order].reset_index(drop=True),
    )


def predict(found: Fit, at: pd.DataFrame) -> pd.DataFrame:
    """The law's response at rows with the columns that it needs (parameters, tokens, bits): `at` with value, low, high and extrapolated.

    low, high: 95 %, over models; they know nothing of whether the law holds where nothing was seen.  extrapolated: in words what lies
    outside of the points ("parameters above 6e9"), empty where nothing does.
    """
    lacking = [column for column in found.law.least if column not in at]
    if lacking:
        raise ConfigurationError(f"{found.law.formula} needs the columns {', '.join(found.law.least)}; missing: {', '.join(lacking)}")
    seen = columns(found.law, at)
    value = np.exp(found.law.predict(found.constants, seen))
    low, high = np.full(len(at), math.nan), np.full(len(at), math.nan)
    if len(found.draws):
        low, high = interval(np.exp(np.stack([found.law.predict(constants, seen) for constants in found.draws])), found.models)
    words = zip(*([_beyond(found.points, column, number) for number in at[column]] for column in found.law.least), strict=True)
    return at.assign(value=value, low=low, high=high, extrapolated=[", ".join(filter(None, row)) for row in words])


def _beyond(points: pd.DataFrame, column: str, number: float) -> str:
    low, high = float(points[column].min()), float(points[column].max())
    return f"{column} below {low:.3g}" if number < low else f"{column} above {high:.3g}" if number > high else ""
