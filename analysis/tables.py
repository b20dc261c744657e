"""Tables of one metric over the axes of a sweep.

Functions take the frame of `quantsweep.load_results` and return a frame; they average over models
and say over how many, and leave standard errors to the caller who knows what varies.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.selection import BASELINE, BASELINE_BITS, HEADLINE, block_order, documents, select

BASELINE_ROW = (BASELINE_BITS, BASELINE)


def by_bit_width(results: pd.DataFrame, *, metric: str = HEADLINE, task: str | None = None, family: str | None = None) -> pd.DataFrame:
    """Mean of `metric` over the models, one row a bit width and block size, one column a data type (`analysis.selection`).

    The baseline (no data type) is the row of 16 bits, with the same value in each column (in those of models with
    planted outliers, the value of these models).  Every cell
    averages all models of the table: it is NaN where one of them is missing or NaN, infinite where one is.
    `attrs` says over how many models and documents, of which task, and the mean standard error of a row
    over the documents (of the rows whose value is finite).
    """
    rows = select(results, metric=metric, task=task, family=family)
    models = sorted(rows["model"].unique())
    by_model = rows.pivot(index=["bits", "block", "label"], columns="model", values="value").reindex(columns=models)
    table = by_model.mean(axis=1, skipna=False).unstack("label")
    table = table.loc[sorted(table.index, key=lambda row: (row[0], block_order(row[1])))]
    for planted in rows["planted"].unique():
        columns = [label for label in rows.loc[rows["planted"] == planted, "label"].unique() if label != BASELINE + planted]
        if BASELINE + planted in table and columns:
            table.loc[BASELINE_ROW, columns] = table.pop(BASELINE + planted).loc[BASELINE_ROW]
    table.index.names = ["bit_width", "block_size"]
    table.columns.name = "data_type"
    stderr = rows["stderr"].where(np.isfinite(rows["value"])).mean()
    table.attrs.update(task=rows["task"].iloc[0], num_models=len(models), documents=documents(rows), mean_stderr=float(stderr))
    return table


def primary(results: pd.DataFrame) -> pd.DataFrame:
    """One row a trial and task: the task's headline metric only."""
    return results[results["is_primary"]]
