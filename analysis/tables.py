"""Tables of one metric over the axes of a sweep.

Functions take the frame of `quantsweep.load_results` and return a frame; they average over models
and say over how many, and leave standard errors to the caller who knows what varies.
"""

from __future__ import annotations

import pandas as pd

HEADLINE = "bits_per_byte"


def by_bit_width(results: pd.DataFrame, *, metric: str = HEADLINE, family: str | None = None) -> pd.DataFrame:
    """Mean of `metric` over the models, one row a bit width and block size, one column a data type.

    The baseline (no data type) is the row of 16 bits, with the same value in each column.  Only
    models that have every cell enter, so that all cells average the same models.
    """
    rows = results[results["metric"] == metric]
    if family is not None:
        rows = rows[rows["family"] == family]
    quantized = rows[rows["method"] != "none"]
    cells = quantized.pivot_table(index=["bit_width", "block_size"], columns=["data_type", "model"], values="value", dropna=False)
    incomplete = set(cells.columns[cells.isna().any()].get_level_values("model"))
    complete = sorted(set(rows["model"]) - incomplete)
    table = quantized[quantized["model"].isin(complete)].pivot_table(index=["bit_width", "block_size"], columns="data_type", values="value")
    baseline = rows[(rows["method"] == "none") & rows["model"].isin(complete)]["value"].mean()
    table.loc[(16, "none"), :] = baseline
    table.attrs["num_models"] = len(complete)
    return table


def primary(results: pd.DataFrame) -> pd.DataFrame:
    """One row a trial and task: the task's headline metric only."""
    return results[results["is_primary"]]
