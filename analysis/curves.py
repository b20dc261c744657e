"""Scaling curves: a score against the bits of the whole model, one curve a configuration, over the sizes of a family.

The abscissa is x = log2(total model bits).  Between two sizes the curve is a straight line in x, and beyond the
smallest and the largest there is none (Dettmers & Zettlemoyer, arXiv:2212.09720: parametric fits were
worse).  A point of a curve is therefore a weighted sum of at most two trials,

    y(x) = (1 − t) y_0 + t y_1,     t = (x − x_0) / (x_1 − x_0),

and so is any difference of curves and any mean over x: `Scoreboard` knows their standard errors.
A model whose score is missing or not finite leaves a gap: the line does not pass over it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from analysis.scores import SIZES
from analysis.selection import BASELINE
from analysis.uncertainty import Scoreboard, Vector, Weights
from quantsweep.errors import ConfigurationError, did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One configuration over the models of a family, by size.

    bits: bit width (1.58 is one), 16 for the baseline.  x: log2 of total model bits, ascending.  y: the score, NaN at a gap.
    """

    family: str
    bits: float
    label: str
    block: str
    models: tuple[str, ...]
    trials: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]

    def at(self, x: float) -> Weights:
        """The trials between which x lies, with their weights; none outside the curve and in a gap."""
        if not self.x[0] <= x <= self.x[-1]:
            return {}
        right = int(np.searchsorted(self.x, x))
        if self.x[right] == x:
            weights = {right: 1.0}
        else:
            t = (x - self.x[right - 1]) / (self.x[right] - self.x[right - 1])
            weights = {right - 1: 1.0 - t, right: t}
        return {} if any(math.isnan(self.y[i]) for i in weights) else {self.trials[i]: weight for i, weight in weights.items()}


def curves(board: Scoreboard, *, size: str = SIZES[0]) -> list[Curve]:
    """One curve a family, bit width, label and block size, in this order.

    size: `total_model_bits` or `total_model_bits_without_embeddings`.
    Raises ConfigurationError where two models of one curve have the same size.
    """
    if size not in SIZES:
        raise ConfigurationError(did_you_mean("size", size, SIZES))
    table = board.table.assign(x=np.log2(board.table[size]), y=[board.value({trial: 1.0}) for trial in board.table.index])
    found = []
    for key, rows in table.groupby(["family", "bits", "label", "block"]):
        family, bits, label, block = cast("tuple[str, float, str, str]", key)
        rows = rows.sort_values("x")
        if rows["x"].duplicated().any():
            twins = rows.loc[rows["x"].duplicated(keep=False), "model"].iloc[:2]
            raise ConfigurationError(
                f"models {' and '.join(twins)} of family '{family}' have the same size, so no curve runs through them. "
                "Keep one of them: results[results.model != …]"
            )
        points = {name: tuple(rows[name]) for name in ("x", "y")}
        found.append(
            Curve(
                family=family, bits=whole(bits), label=label, block=block, models=tuple(rows["model"]), trials=tuple(rows.index), **points
            )
        )
    return found


def interpolate(curve: Curve, x: Iterable[float], board: Scoreboard) -> tuple[Vector, Vector]:
    """The score of `curve` and its standard error at each x (log2 bits); NaN outside the curve's range and in gaps."""
    points = [curve.at(value) for value in x]
    values = [board.value(weights) if weights else math.nan for weights in points]
    stderrs = [board.stderr(weights) if weights else math.nan for weights in points]
    return np.asarray(values, float), np.asarray(stderrs, float)


def plain_curves(found: Iterable[Curve]) -> list[Curve]:
    """The baseline's, and those of data types with default options rounded to nearest: a label's further words say what is unusual."""
    return [curve for curve in found if " " not in curve.label]


def contenders(
    found: Sequence[Curve], sign: float, *, family: str, block: str | None = "64", label: str | None = None
) -> dict[float, Curve]:
    """The curve of each bit width: that of `block` and `label`, or the best of them where that is None.

    sign: of the score, `Scoreboard.sign`.
    The best has the best mean score, of the curves with the most models, over the models that all of these have.  It is chosen
    on the examples that then judge it, which flatters each bit width a little; widths are chosen alike.  Widths without such
    a curve are left out.
    """
    by_bits: dict[float, list[Curve]] = defaultdict(list)
    for curve in found:
        if curve.family == family and (curve.label == BASELINE or (block in (None, curve.block) and label in (None, curve.label))):
            by_bits[curve.bits].append(curve)
    best = {bits: _best(candidates, sign) for bits, candidates in sorted(by_bits.items())}
    return {bits: curve for bits, curve in best.items() if curve is not None}


def _best(candidates: Sequence[Curve], sign: float) -> Curve | None:
    values = [{model: y for model, y in zip(curve.models, curve.y, strict=True) if not math.isnan(y)} for curve in candidates]
    most = max(map(len, values))
    whole = [(curve, value) for curve, value in zip(candidates, values, strict=True) if len(value) == most]
    shared = sorted(set.intersection(*(set(value) for _, value in whole)))
    if not shared:
        return None
    means = [sign * math.fsum(value[model] for model in shared) for _, value in whole]
    return whole[means.index(max(means))][0]


def common_grid(compared: Iterable[Curve], points: int) -> Vector:
    """`points` equally spaced x over the range that all curves have; empty where there is none."""
    compared = list(compared)
    low, high = max(curve.x[0] for curve in compared), min(curve.x[-1] for curve in compared)
    return np.linspace(low, high, points) if low < high else np.empty(0)


def mean_lead(curve: Curve, over: Curve, points: int) -> Weights:
    """Mean of (curve − over) over their common range, as weights of trials; empty where they share no size.

    Positions where one of them has a gap are left out.
    """
    differences = []
    for x in common_grid((curve, over), points):
        a, b = curve.at(x), over.at(x)
        if a and b:
            differences.append(combine((a, 1.0), (b, -1.0)))
    return combine(*((difference, 1.0 / len(differences)) for difference in differences))


def whole(bits: float) -> float:
    """A number of bits as an int where it is one."""
    return int(bits) if bits == int(bits) else float(bits)


def combine(*terms: tuple[Weights, float]) -> Weights:
    """The weighted sum of weighted sums."""
    total: dict[str, float] = defaultdict(float)
    for weights, factor in terms:
        for trial, weight in weights.items():
            total[trial] += factor * weight
    return dict(total)
