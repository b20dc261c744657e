"""The k-bit inference study: which bit width, data type and block size is best at equal total model bits?

After Dettmers & Zettlemoyer 2022, "The case for 4-bit precision: k-bit inference scaling laws" (arXiv:2212.09720):
the best bit width is that whose scaling curve is on top at equal bits (`best_bit_width`, `shares`), and the effect of
block size and of data type is a difference at equal bit width, paired over models (`effects`), beside what it costs
in bits a weight.  The curves are in `analysis.curves`, the standard errors in `analysis.uncertainty`, the paper's
claims in `analysis.k_bit_claims`.

    board = Scoreboard(scores(results, samples), "accuracy", samples)
    best_bit_width(curves(board), board)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd

from analysis.curves import Curve, combine, common_grid, contenders
from analysis.scores import ACCURACY, SIGN
from analysis.selection import BASELINE, block_order, one_variant
from analysis.uncertainty import Scoreboard, Weights, half_width

LEAST_MODELS = 4
"""Fewer models tell nothing about other models."""
GRID_POINTS = 101
"""Positions at which curves are compared, so that shares are known to a hundredth."""


def best_bit_width(found: Sequence[Curve], board: Scoreboard, *, block: str | None = "64", label: str | None = None) -> pd.DataFrame:
    """Which bit width's curve is on top at equal total bits: one row a family and position.

    found: `curves(board)`.  block, label: the configuration of each bit width; None for its best (`contenders`).
    Columns: family, x (log2 bits), bits, label, block, value, second_bits, lead (over the second, positive in either
    direction of the score), lead_stderr, lead_margin (half a 95 % interval).  Positions where one of the family's widths has a
    gap have no winner (NaN); a family whose widths share no range, or with one width only, has no rows.
    """
    rows = []
    for family in sorted({curve.family for curve in found}):
        compared = contenders(found, board.score, family=family, block=block, label=label)
        if len(compared) > 1:
            rows += [_winner(family, x, list(compared.values()), board) for x in common_grid(compared.values(), GRID_POINTS)]
    columns = ["family", "x", "bits", "label", "block", "value", "second_bits", "lead", "lead_stderr", "lead_margin"]
    return pd.DataFrame(rows, columns=columns)


def _winner(family: str, x: float, compared: Sequence[Curve], board: Scoreboard) -> dict[str, object]:
    at = {curve.bits: curve.at(x) for curve in compared}
    if not all(at.values()):
        return {"family": family, "x": x}
    sign = SIGN[board.score]
    first, second, *_ = sorted(compared, key=lambda curve: -sign * board.value(at[curve.bits]))
    lead = combine((at[first.bits], 1.0), (at[second.bits], -1.0))
    return {
        "family": family,
        "x": x,
        "bits": first.bits,
        "label": first.label,
        "block": first.block,
        "value": board.value(at[first.bits]),
        "second_bits": second.bits,
        "lead": sign * board.value(lead),
        "lead_stderr": board.stderr(lead),
        "lead_margin": board.margin(lead),
    }


def shares(best: pd.DataFrame) -> pd.DataFrame:
    """How much of a family's common range each bit width wins: one row a family and winning width.

    best: from `best_bit_width`.  Columns: family, bits, share (of the positions), distinguishable (share where the lead is
    more than its margin), mean_lead, low and high (log2 bits between which it wins).  Positions without a winner
    count in the denominator, so shares may add up to less than 1.
    """
    rows = []
    for key, won in best.dropna(subset="bits").groupby(["family", "bits"]):
        family, bits = cast("tuple[str, float]", key)
        positions = int((best["family"] == family).sum())
        rows.append(
            {
                "family": family,
                "bits": int(bits),
                "share": len(won) / positions,
                "distinguishable": int((won["lead"] > won["lead_margin"]).sum()) / positions,
                "mean_lead": float(won["lead"].mean()),
                "low": float(won["x"].min()),
                "high": float(won["x"].max()),
            }
        )
    return pd.DataFrame(rows, columns=["family", "bits", "share", "distinguishable", "mean_lead", "low", "high"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A configuration without its model."""

    bits: int
    label: str
    block: str


def paired(board: Scoreboard, of: Setting, against: Setting) -> Weights:
    """Mean over models of score(of) − score(against), as weights of trials; over the models that have a number for both.

    Empty where no model has both.
    """
    return contrast(board, (of, 1.0), (against, -1.0))


def contrast(board: Scoreboard, *terms: tuple[Setting, float]) -> Weights:
    """Mean over models of Σ factor · score(setting), as weights of trials; over the models that have a number for every setting."""
    found = [(_by_model(board, setting), factor) for setting, factor in terms]
    models = [model for model in found[0][0] if all(model in trials for trials, _ in found)]
    return combine(*(({trials[model]: 1.0}, factor / len(models)) for model in models for trials, factor in found))


def _by_model(board: Scoreboard, setting: Setting) -> dict[str, str]:
    table = board.table
    rows = table[(table["bits"] == setting.bits) & (table["label"] == setting.label) & (table["block"] == setting.block)]
    return {model: trial for trial, model in rows["model"].items() if not math.isnan(board.value({str(trial): 1.0}))}  # type: ignore[misc]


def block_size_effects(board: Scoreboard) -> pd.DataFrame:
    """What smaller blocks change: each block size against the largest, one row a bit width, label and smaller block.

    Columns: bits, label, block, against, then those of `_effect`.
    Raises ConfigurationError where planted and plain models are mixed.
    """
    one_variant(board.table)
    rows = []
    for key, same in _quantized(board).groupby(["bits", "label"]):
        bits, label = cast("tuple[int, str]", key)
        *smaller, largest = sorted(set(same["block"]), key=block_order)
        for block in smaller:
            of, against = (Setting(bits=int(bits), label=label, block=name) for name in (block, largest))
            rows.append({"bits": int(bits), "label": label, "block": block, "against": largest} | _effect(board, of, against))
    return pd.DataFrame(rows, columns=["bits", "label", "block", "against", *_EFFECT])


def data_type_effects(board: Scoreboard, *, against: str = "int") -> pd.DataFrame:
    """What another data type changes: each label against `against`, one row a bit width, block size and label.

    Columns: bits, block, label, against, then those of `_effect`.
    Raises ConfigurationError where planted and plain models are mixed.
    """
    one_variant(board.table)
    rows = []
    for key, same in _quantized(board).groupby(["bits", "block"]):
        bits, block = cast("tuple[int, str]", key)
        for label in sorted(set(same["label"]) - {against}) if against in set(same["label"]) else []:
            of, reference = (Setting(bits=int(bits), label=name, block=block) for name in (label, against))
            rows.append({"bits": int(bits), "block": block, "label": label, "against": against} | _effect(board, of, reference))
    table = pd.DataFrame(rows, columns=["bits", "block", "label", "against", *_EFFECT])
    return table.sort_values(["bits", "block", "label"], key=_ordered, kind="stable", ignore_index=True)


_EFFECT = ("difference", "stderr", "margin", "extra_bits", "models")


def _effect(board: Scoreboard, of: Setting, against: Setting) -> dict[str, object]:
    """difference: mean over models, in the score's own direction; stderr: paired; margin: half a 95 % interval; extra_bits: a weight.

    models: how many.
    """
    weights = paired(board, of, against)
    if not weights:
        return {**dict.fromkeys(_EFFECT, math.nan), "models": 0}
    bits_per_weight = board.table["bits_per_weight"]
    return {
        "difference": board.value(weights),
        "stderr": board.stderr(weights),
        "margin": board.margin(weights),
        "extra_bits": math.fsum(weight * bits_per_weight[trial] for trial, weight in weights.items()),
        "models": int(board.table.loc[list(weights), "model"].nunique()),
    }


def _quantized(board: Scoreboard) -> pd.DataFrame:
    return board.table[board.table["label"] != BASELINE]


def _ordered(column: pd.Series[str]) -> pd.Series[int]:
    return column.map(lambda block: 10**9 * block_order(block)[0] + block_order(block)[1]) if column.name == "block" else column  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlation:
    """Pearson's r of n trials with its 95 % interval; NaN where it has none."""

    r: float
    low: float
    high: float
    n: int


def correlation(table: pd.DataFrame) -> Correlation:
    """Pearson's r of the capped cross entropy and the mean accuracy over trials (`scores`), with a jackknife interval over models.

    Trials of one model are versions of it and no independent draws, so whole models are left out, one after the other.  With
    z = artanh r (Fisher), G models, and z_g without model g, the pseudovalues G z − (G − 1) z_g have the variance s², and the interval is
    tanh(z ± t s / √G) with G − 1 degrees of freedom.  (A percentile bootstrap over models covers too little with few of them:
    `tests/unit/test_analysis_k_bit.py` counts.)  Trials that lack one of the two are left out; with fewer than `LEAST_MODELS`
    models, or where one of the two does not vary, there is no interval.
    Raises ConfigurationError where planted and plain models are mixed.
    """
    one_variant(table)
    both = table[["model", "cross_entropy", ACCURACY]].dropna()
    n, models = len(both), int(both["model"].nunique())
    if n < 2 or (both[["cross_entropy", ACCURACY]].nunique() < 2).any():
        return Correlation(r=math.nan, low=math.nan, high=math.nan, n=n)
    x, y = both["cross_entropy"] - both["cross_entropy"].mean(), both[ACCURACY] - both[ACCURACY].mean()
    moments = pd.DataFrame({"n": 1.0, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}).groupby(both["model"]).sum().to_numpy()
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
