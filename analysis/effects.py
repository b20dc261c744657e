"""What one factor changes while everything else stays: block size, data type, transform, rounding, correction, compensation.

The effect of a level of a factor against another is a mean over models of the difference of two trials of the same model that are
equal in everything else, bit width included.  So nothing but the factor can have made it.  Where two
factors move together (all `fp` trials have blocks of 64, all `int` trials have none), no such pair is there, and the question is
refused with the names of both: no arithmetic takes them apart, only more trials do.

Two intervals stand beside a mean.  `margin` is over examples, for these models (`analysis.uncertainty`); `low` and `high` are over models
(Student's t of the differences), for other models of the kind.  Each is NaN where the table has nothing to know it from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.curves import combine
from analysis.selection import BASELINE, one_variant
from analysis.uncertainty import Scoreboard, Weights, half_width
from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.words import count


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A configuration without its model."""

    bits: float
    label: str
    block: str


def paired(board: Scoreboard, of: Setting, against: Setting) -> Weights:
    """Mean over models of score(of) − score(against), as weights of trials; over the models that have a number for both.

    Empty where no model has both.
    """
    return contrast(board, (of, 1.0), (against, -1.0))


def contrast(board: Scoreboard, *terms: tuple[Setting, float]) -> Weights:
    """Mean over models of Σ factor · score(setting), as weights of trials; over the models that have a number for every setting."""
    found = [(_at(board, setting), factor) for setting, factor in terms]
    models = [model for model in found[0][0] if all(model in trials for trials, _ in found)]
    return combine(*(({trials[model]: 1.0}, factor / len(models)) for model in models for trials, factor in found))


def _at(board: Scoreboard, setting: Setting) -> dict[str, str]:
    table = board.table
    return _by_model(board, table[(table["bits"] == setting.bits) & (table["label"] == setting.label) & (table["block"] == setting.block)])


def _by_model(board: Scoreboard, rows: pd.DataFrame) -> dict[str, str]:
    """The trial of each model, of those in `rows` that have a number."""
    return {model: str(trial) for trial, model in rows["model"].items() if not math.isnan(board.value({str(trial): 1.0}))}


EFFECT = ("difference", "stderr", "margin", "low", "high", "extra_bits", "models")
"""The columns that every table of effects has, see `effect`."""


def effect(board: Scoreboard, of: Mapping[str, str], against: Mapping[str, str]) -> dict[str, object]:
    """What sets the trials `of` apart from `against`, both {model: trial}, over the models that have both.

    difference: mean over models, in the score's own direction; stderr: over examples, paired where the board has samples; margin: half
    of its 95 % interval; low, high: the 95 % interval over models, NaN for fewer than two; extra_bits: a weight; models: how many.
    """
    models = sorted(set(of) & set(against))
    if not models:
        return {**dict.fromkeys(EFFECT, math.nan), "models": 0}
    weights = combine(*(({of[model]: 1.0, against[model]: -1.0}, 1 / len(models)) for model in models))
    each = np.asarray([board.value({of[model]: 1.0, against[model]: -1.0}) for model in models])
    half = half_width(float(each.std(ddof=1)) / math.sqrt(len(each)), len(each) - 1) if len(each) > 1 else math.nan
    bits_per_weight = board.table["bits_per_weight"]
    return {
        "difference": board.value(weights),
        "stderr": board.stderr(weights),
        "margin": board.margin(weights),
        "low": float(each.mean()) - half,
        "high": float(each.mean()) + half,
        "extra_bits": math.fsum(weight * bits_per_weight[trial] for trial, weight in weights.items()),
        "models": len(models),
    }


def effects_at_fixed(
    board: Scoreboard, factor: str, *, fixed: Sequence[str], reference: Callable[[frozenset[str]], str | None]
) -> pd.DataFrame:
    """Each level of the column `factor` against a reference, one row a bit width, setting of the columns `fixed`, and level.

    reference: chooses it from the levels that a setting has; None where there is nothing to compare with.
    Columns: bits, those of `fixed`, the factor, against, then `EFFECT`.
    Raises ConfigurationError where planted and plain models are mixed.
    """
    one_variant(board.table)
    quantized = board.table[board.table["label"] != BASELINE]
    rows = []
    for key, same in quantized.groupby(["bits", *fixed]):
        levels = frozenset(same[factor])
        against = reference(levels)
        for level in sorted(levels - {against}, key=level_order) if against is not None else []:
            of, other = (_by_model(board, same[same[factor] == name]) for name in (level, against))
            rows.append(dict(zip(("bits", *fixed), key, strict=True)) | {factor: level, "against": against} | effect(board, of, other))
    return pd.DataFrame(rows, columns=["bits", *fixed, factor, "against", *EFFECT])


def factor_effects(board: Scoreboard, factor: str, *, against: str | None = None) -> pd.DataFrame:
    """What `factor` changes, one factor at a time: each of its levels against one, at equal bits and all other factors equal.

    board: of `analysis.frames.board`, whose table has a column a factor.  against: the level to compare with; the most
    frequent one by default (of block sizes the largest).
    Columns: bits, the other factors that vary, the factor, against, then `EFFECT`.  `attrs["reasons"]`: of levels that
    could not be compared, in words.
    Raises ConfigurationError for an unknown factor or level, and where no level can be told apart from another factor.
    """
    factors: tuple[str, ...] = board.table.attrs.get("factors", ())
    if factor not in factors:
        raise ConfigurationError(did_you_mean("factor of this table", factor, factors))
    quantized = board.table[board.table["label"] != BASELINE]
    levels = frozenset(quantized[factor])
    if len(levels) < 2:
        raise ConfigurationError(f"factor '{factor}' has one level only ({', '.join(levels)}), so it can have no effect in this table")
    if against is None:
        against = max(levels, key=level_order) if factor == "block_size" else str(quantized[factor].value_counts().index[0])
    elif against not in levels:
        raise ConfigurationError(did_you_mean(f"level of '{factor}'", against, levels))
    reference = against
    others = [name for name in factors if name != factor and quantized[name].nunique() > 1]
    found = effects_at_fixed(board, factor, fixed=others, reference=lambda there: reference if reference in there else None)
    found = found[found["models"] > 0].reset_index(drop=True)
    lacking = sorted(levels - {against} - set(found[factor]), key=level_order)
    reasons = [_why_not(quantized, factor, level, against, others) for level in lacking]
    if found.empty:
        raise ConfigurationError("; ".join(reasons) + ". Run trials that differ in one of them only")
    found.attrs["reasons"] = tuple(reasons)
    return found


def _why_not(quantized: pd.DataFrame, factor: str, level: str, against: str, others: Sequence[str]) -> str:
    """Why a level has no pair with `against`: what else differs in every pair of one model and bit width."""
    of, other = (quantized[quantized[factor] == name] for name in (level, against))
    pairs = of.merge(other, on=["model", "bits"], suffixes=("", "_against"))
    if pairs.empty:
        return f"no model has both {factor} {level} and {factor} {against} at one bit width"
    moving = [name for name in others if (pairs[name] != pairs[f"{name}_against"]).all()]
    moving = moving or [name for name in others if (pairs[name] != pairs[f"{name}_against"]).any()]
    together = ", ".join(f"{name} ({_most(pairs[name])} against {_most(pairs[f'{name}_against'])})" for name in moving)
    return f"{factor} ({level} against {against}) and {together} move together in all {count(len(pairs), 'pair')} of trials"


def _most(column: pd.Series[str]) -> str:
    return str(column.value_counts().index[0])


def level_order(level: str) -> tuple[int, float, str]:
    """Sorting key of a factor's levels: numbers by size, then words."""
    try:
        return (0, float(level), "")
    except ValueError:
        return (1, 0.0, level)
