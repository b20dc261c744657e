"""How much quantization costs a model, as ZeroQuant-V2 classes it: by the mean of three perplexities.

    Δ = mean(WikiText-2, PTB, C4) of a trial − the same of its model's 16-bit baseline

    Class-1     Δ ≤ 0.1        nearly nothing
    Class-2     0.1 < Δ ≤ 0.5  small
    Class-3     Δ > 0.5        large

Absolute differences of perplexities mean something for the models and the protocol that the bounds were made for, and for nothing
else: OPT and BLOOM, as they were published, in windows of 2,048 tokens, on the texts of `task=perplexity`, all of them.  Whatever
else is asked about is out of scope, and says why.
Source: Yao et al. 2023 (arXiv:2303.08302).  Which of GPTQ's loaders the paper used is inferred from its averages, not stated there.
"""

from __future__ import annotations

import math

import pandas as pd

from analysis.selection import BASELINE
from quantsweep.errors import ConfigurationError

TASKS = ("wikitext2@1+joined_paragraphs", "ptb@1+joined_paragraphs", "c4@1+crops_256")
"""Keys of the three evaluations whose perplexities are averaged."""
WINDOW = 2048
FAMILIES = ("opt", "bloom")
CLASSES = ("Class-1", "Class-2", "Class-3")
BOUNDS = (0.1, 0.5)
"""Largest Δ of Class-1 and of Class-2."""
_FACTORS = ["rounding", "transform", "correction", "tuning", "compensation", "activation", "kv_cache"]
"""What a baseline has none of."""
_MODEL = ["model_content", "dtype", "plant_channels", "plant_scale", "plant_seed"]
"""What a trial shares with its baseline."""


def sensitivity_class(increase: float) -> str | None:
    """The class of an increase in perplexity; None for NaN.

    >>> [sensitivity_class(x) for x in (-0.2, 0.1, 0.5, 0.51)]
    ['Class-1', 'Class-1', 'Class-2', 'Class-3']
    """
    if math.isnan(increase):
        return None
    return CLASSES[sum(increase > bound for bound in BOUNDS)]


def mean_perplexity(results: pd.DataFrame) -> pd.Series[float]:
    """The mean of the three perplexities by trial_id; NaN for a trial that lacks one of them, never the mean of the others."""
    rows = results[results["task_key"].isin(TASKS) & (results["metric"] == "perplexity")]
    if rows.duplicated(["trial_id", "task_key"]).any():
        raise ConfigurationError(
            "a trial has several rows for one perplexity (several sweeps?). Keep one of them: results[results.sweep == …]"
        )
    table = rows.pivot(index="trial_id", columns="task_key", values="value").reindex(columns=list(TASKS))
    return table.mean(axis=1, skipna=False)


def sensitivity(results: pd.DataFrame) -> pd.DataFrame:
    """One row a trial (its index is trial_id) that has any perplexity of windows.

    results: the frame of `quantsweep.load_results`.  Columns: model, method, `perplexity` (the mean of three), `baseline` (the same of
    the model's baseline), `increase`, `sensitivity` (a class, or None), `out_of_scope` (why there is no class, or None).
    """
    rows = results[results["metric"] == "perplexity"]
    trials = rows.drop_duplicates("trial_id").set_index("trial_id")
    table = trials[["model", "method"]].assign(perplexity=mean_perplexity(results).reindex(trials.index))
    baselines = trials[(trials[_FACTORS] == BASELINE).all(axis=1)].join(table["perplexity"]).drop_duplicates(_MODEL)
    own = trials[_MODEL].merge(baselines[[*_MODEL, "perplexity"]], how="left", on=_MODEL)["perplexity"]
    table["baseline"] = own.to_numpy()
    table["increase"] = table["perplexity"] - table["baseline"]
    windows = rows[rows["task_key"].isin(TASKS)].groupby("trial_id")["window"].agg(["min", "max"]).reindex(trials.index)
    reasons = [_out_of_scope(trials.loc[trial], table.loc[trial], windows.loc[trial]) for trial in table.index]
    classes = [sensitivity_class(x) if why is None else None for x, why in zip(table["increase"], reasons, strict=True)]
    said = pd.DataFrame({"sensitivity": classes, "out_of_scope": reasons}, index=table.index, dtype=object)
    return table.join(said)


def _out_of_scope(trial: pd.Series, row: pd.Series, windows: pd.Series) -> str | None:
    """Why a trial has no class; None where it has one."""
    if trial["family"] not in FAMILIES:
        return f"the classes are those of {' and '.join(FAMILIES)}, not of {trial['family']}"
    if pd.notna(trial["plant_channels"]):
        return "outliers were planted into the model"
    if math.isnan(row["perplexity"]):
        return f"it needs all of {', '.join(TASKS)}"
    if not windows["min"] == windows["max"] == WINDOW:
        return f"its windows have {windows['min']:.0f} tokens, not {WINDOW}"
    return "its baseline has not been measured" if math.isnan(row["baseline"]) else None
