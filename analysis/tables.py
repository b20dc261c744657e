"""Tables of one metric over the axes of a sweep.

Functions take the frame of `quantsweep.load_results` and return frames; they average over models and say over how many.
A table of values has no standard errors: its rows share documents, and what is read from it are differences.
`against_baseline` gives these, with their intervals.
"""

from __future__ import annotations

import math
from typing import cast

import pandas as pd

from analysis.curves import combine
from analysis.scores import ACCURACY, BITS_PER_BYTE, scores
from analysis.selection import ACCURACIES, BASELINE, BASELINE_BITS, HEADLINE, block_order, documents, select
from analysis.uncertainty import Scoreboard
from quantsweep.errors import ConfigurationError

BASELINE_ROW = (BASELINE_BITS, BASELINE)


def by_bit_width(results: pd.DataFrame, *, metric: str = HEADLINE, task: str | None = None, family: str | None = None) -> pd.DataFrame:
    """Mean of `metric` over the models, one row a bit width and block size, one column a data type (`analysis.selection`).

    The baseline (no data type) is the row of 16 bits, with the same value in each column (in those of models with
    planted outliers, the value of these models).  Every cell
    averages all models of the table: it is NaN where one of them is missing or NaN, infinite where one is.
    `attrs` says over how many models and documents, and of which task.
    """
    rows = select(results, metric=metric, task=task, family=family)
    models = sorted(rows["model"].unique())
    by_model = rows.pivot(index=["bits", "block", "label"], columns="model", values="value").reindex(columns=models)
    table = by_model.mean(axis=1, skipna=False).unstack("label")
    table = _ordered(table)
    for planted in rows["planted"].unique():
        columns = [label for label in rows.loc[rows["planted"] == planted, "label"].unique() if label != BASELINE + planted]
        if BASELINE + planted in table and columns:
            table.loc[BASELINE_ROW, columns] = table.pop(BASELINE + planted).loc[BASELINE_ROW]
    table.index.names = ["bit_width", "block_size"]
    table.columns.name = "data_type"
    table.attrs.update(task=rows["task"].iloc[0], num_models=len(models), documents=documents(rows))
    return table


def against_baseline(
    results: pd.DataFrame,
    samples: pd.DataFrame | None = None,
    *,
    metric: str = HEADLINE,
    task: str | None = None,
    family: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What quantizing costs: the mean over models of (value − the same model's baseline), and half its 95 % interval; two tables.

    Rows and columns as in `by_bit_width`, without the baseline.  samples (`quantsweep.load_samples`): the difference is taken document
    by document, which knows it better than either value; without them trials are taken as independent.
    NaN where a model is missing, has no number or no baseline; the half interval also where no document differs.
    Raises ConfigurationError for a metric whose sums over documents are not kept (`bits_per_byte`, `acc` and `acc_norm` are).
    """
    if metric not in (HEADLINE, *ACCURACIES):
        kept = ", ".join((HEADLINE, *ACCURACIES))
        raise ConfigurationError(f"differences of {metric} have no standard error: documents are kept of {kept}")
    rows = select(results, metric=metric, task=task, family=family)
    asked = results[results["trial_id"].isin(set(rows["trial_id"])) & (results["metric"] == metric)]
    asked = asked[asked["task_key"].isin(set(rows["task_key"]))].assign(is_primary=True)
    score = BITS_PER_BYTE if metric == HEADLINE else ACCURACY
    board = Scoreboard(scores(asked, samples), score, samples)
    baselines = board.table[board.table["method"] == BASELINE]
    baseline_of = dict(zip(baselines["model"], baselines.index, strict=True))
    num_models = {kind: same["model"].nunique() for kind, same in board.table.groupby("planted")}
    found = {}
    for key, cell in board.table[board.table["method"] != BASELINE].groupby(["bits", "block", "label", "planted"]):
        bits, block, label, planted = cast("tuple[int, str, str, str]", key)
        pairs = [(str(trial), baseline_of.get(model)) for trial, model in cell["model"].items()]
        whole = len(pairs) == num_models[planted] and all(baseline is not None for _, baseline in pairs)
        weights = combine(*(({trial: 1.0, str(baseline): -1.0}, 1 / len(pairs)) for trial, baseline in pairs)) if whole else {}
        found[bits, block, label + planted] = (board.value(weights), board.margin(weights)) if whole else (math.nan, math.nan)
    index = pd.MultiIndex.from_tuples(found, names=["bit_width", "block_size", "data_type"])
    values = pd.DataFrame(list(found.values()), index=index, columns=["difference", "margin"])
    difference, margin = (_ordered(values[name].unstack("data_type")) for name in values)
    return difference, margin


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    return table.loc[sorted(table.index, key=lambda row: (row[0], block_order(row[1])))]


def primary(results: pd.DataFrame) -> pd.DataFrame:
    """One row a trial and task: the task's headline metric only."""
    return results[results["is_primary"]]
