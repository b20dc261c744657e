"""From a minimal frame to one score on a `Scoreboard`: choosing the score, and means over tasks and seeds.

    frame = read_table("table.csv", rename={"bit_width": "bits"})
    board(frame, metric="acc", task="lambada")
    board(mean_over_tasks(frame, "acc"))

Whatever cannot be compared is refused here: several metrics or tasks at once, protocols, versions, seeds.
"""

from __future__ import annotations

import math
import shlex
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames import FACTORS, checked
from analysis.scores import ACCURACY, BITS_PER_BYTE, SIZES
from analysis.selection import ACCURACIES, BASELINE, HEADLINE
from analysis.uncertainty import Scoreboard
from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.words import count


def one_score(frame: pd.DataFrame, metric: str | None = None, task: str | None = None) -> pd.DataFrame:
    """The rows of one metric of one task; each is needed where there are several.

    Raises ConfigurationError where rows of several protocols or versions would be compared.
    """
    metrics = sorted(set(frame["metric"]))
    if metric is None and len(metrics) > 1:
        raise ConfigurationError(
            f"the table has several metrics, which are never mixed: {', '.join(metrics)}. Choose one: --metric {metrics[0]}"
        )
    rows = frame if metric is None else frame[frame["metric"] == metric]
    if rows.empty:
        raise ConfigurationError(did_you_mean("metric", metric, metrics))
    tasks = sorted(set(rows["task"]))
    if task is None and len(tasks) > 1:
        raise ConfigurationError(
            f"several tasks have {rows['metric'].iloc[0]}: {', '.join(tasks)}. Choose one: --task {shlex.quote(tasks[0])}, "
            "or take their mean: --task mean"
        )
    rows = rows if task is None else rows[rows["task"] == task]
    if rows.empty:
        raise ConfigurationError(did_you_mean("task", task, tasks))
    for name in [str(column) for column in rows.columns if column == "protocol" or "version" in str(column)]:
        kinds = sorted(map(str, rows[name].dropna().unique()))
        if len(kinds) > 1:
            raise ConfigurationError(
                f"values of {rows['metric'].iloc[0]} come from several kinds of '{name}' ({', '.join(kinds[:6])}): not comparable. "
                f"Keep one: frame[frame['{name}'] == …]"
            )
    return rows


def mean_over_tasks(frame: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """One row a model and configuration: the mean of `metric` over the table's tasks, as a task of its own.

    The standard error is √(Σ se²) / k: tasks have examples of their own.  A configuration that lacks a task has no mean: NaN.
    """
    rows = _with_stderr(frame if metric is None else frame[frame["metric"] == metric])
    if rows["metric"].nunique() != 1:
        metrics = sorted(set(frame["metric"]))
        raise ConfigurationError(f"a mean is over one metric; there are: {', '.join(metrics)}. Choose one: --metric {metrics[0]}")
    tasks = rows["task"].nunique()
    key = ["model", "bits", "is_baseline", *(name for name in FACTORS if name in rows)]
    groups = rows.assign(variance=rows["stderr"] ** 2).groupby(key, dropna=False, sort=False)
    means = groups.first().assign(
        value=groups["value"].agg(lambda values: values.mean(skipna=False)).where(groups.size() == tasks),
        stderr=np.sqrt(groups["variance"].agg(lambda values: values.sum(skipna=False))) / tasks,
        num_samples=groups["num_samples"].min() if "num_samples" in rows else math.nan,
        task=f"mean of {count(tasks, 'task')}",
    )
    return checked(means.drop(columns="variance").reset_index())


def mean_over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a model, configuration, task and metric: the mean over its seeds, with the standard error that they spread by.

    `num_seeds` says how many; one seed alone keeps its own standard error.
    """
    key = ["model", "bits", "is_baseline", "task", "metric", *(name for name in FACTORS if name in frame and name != "seed")]
    groups = _with_stderr(frame).groupby(key, dropna=False, sort=False)
    first, number = groups.first(), groups.size()
    spread: pd.Series[float] = groups["value"].std(ddof=1) / np.sqrt(number)
    value = groups["value"].agg(lambda values: values.mean(skipna=False))
    means = first.assign(value=value, stderr=spread.where(number > 1, first["stderr"]), num_seeds=number)
    return checked(means.drop(columns=["seed", "trial_id"], errors="ignore").reset_index())


def side_by_side(frame: pd.DataFrame, x: tuple[str, str], y: tuple[str, str]) -> pd.DataFrame:
    """Two scores of each configuration, for `analysis.correlation.correlation(table, "x", "y")`.

    x, y: (metric, task).  One row a configuration that has one of them; columns: model, family, bits, x, y.
    """
    key = ["model", "family", "bits", "is_baseline", *(name for name in FACTORS if name in frame)]
    first, second = (one_score(frame, *score)[[*key, "value"]].rename(columns={"value": name}) for name, score in (("x", x), ("y", y)))
    return first.merge(second, on=key, how="outer")[["model", "family", "bits", "x", "y"]]


def board(frame: pd.DataFrame, *, metric: str | None = None, task: str | None = None, samples: pd.DataFrame | None = None) -> Scoreboard:
    """One score of a minimal frame, as the `Scoreboard` that every analysis works on; one row a configuration.

    samples: of `quantsweep.load_samples`, for frames of `from_results`: differences of acc, acc_norm and bits_per_byte are then paired
    example by example.  Without, trials count as independent, which makes intervals of differences too wide, and where the table has
    neither standard errors nor numbers of examples there is no interval over examples at all.
    Table: model, family, num_parameters, bits, bits_per_weight, total_model_bits, tokens (NaN if not known), `label` (the factors that
    vary, "none" for baselines), `block`, and a column a factor; `attrs["factors"]` names these.
    Raises ConfigurationError where metric or task must be chosen, and where seeds would be mixed.
    """
    rows = _with_stderr(one_score(checked(frame), metric, task))
    about = {"metric": str(rows["metric"].iloc[0]), "task": str(rows["task"].iloc[0])}
    factors = [name for name in FACTORS if name in rows]
    table = rows.assign(**{name: _words(rows[name]) for name in factors})
    _refuse_seeds(table, factors)
    quantized = ~table["is_baseline"]
    shown = [name for name in factors if name != "block_size" and table.loc[quantized, name].nunique() > 1]
    kinds = [name for name in ("data_type", *shown) if name in factors]
    labels = [" ".join(word for word in words if word != BASELINE) for words in table[list(dict.fromkeys(kinds))].itertuples(index=False)]
    table["label"] = [(label or "quantized") if is_quantized else BASELINE for label, is_quantized in zip(labels, quantized, strict=True)]
    table["block"] = table["block_size"].where(quantized, BASELINE) if "block_size" in factors else BASELINE
    per_weight = table["bits_per_weight"] if "bits_per_weight" in table else table["bits"]
    score = _paired_name(about["metric"]) if samples is not None else about["metric"]
    table = table.assign(
        planted="",
        num_parameters=table["parameters"],
        bits_per_weight=per_weight.fillna(table["bits"]),
        tokens=table.get("tokens", math.nan),
        **{score: table["value"], f"{score}_stderr": table["stderr"], f"{score}_examples": table["num_samples"].fillna(math.inf)},
    )
    total = table["parameters"] * table["bits_per_weight"]
    table[SIZES[0]] = table["total_bits"].fillna(total) if "total_bits" in table else total
    sign = 1.0 if bool(rows["higher_is_better"].iloc[0]) else -1.0
    table.index = pd.Index(_ids(table), name="trial_id")
    table.attrs.update(
        factors=tuple(factors),
        accuracy_tasks={about["task"]: about["metric"]} if score == ACCURACY else {},
        text_task=about["task"] if score == BITS_PER_BYTE else None,
        **about,
    )
    return Scoreboard(table, score, samples, sign=sign)


def _paired_name(metric: str) -> str:
    if metric not in (HEADLINE, *ACCURACIES):
        raise ConfigurationError(f"samples pair {', '.join((HEADLINE, *ACCURACIES))}; of {metric} they hold nothing: leave them out")
    return BITS_PER_BYTE if metric == HEADLINE else ACCURACY


def _ids(table: pd.DataFrame) -> list[str]:
    if "trial_id" in table:
        return list(table["trial_id"].astype(str))
    rows = zip(table["model"], table["bits"], table["label"], table["block"], strict=True)
    return [f"{model} {bits:g} bit {label}" + (f" block {block}" if block != BASELINE else "") for model, bits, label, block in rows]


def _with_stderr(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with columns stderr and num_samples; the standard error of a share of right answers follows from their number."""
    nothing = pd.Series(math.nan, index=rows.index)
    number = rows.get("num_samples", nothing)
    value = rows["value"].where(rows["metric"].isin(ACCURACIES))
    binomial = np.sqrt(value * (1 - value) / (number - 1).where(number > 1))
    stderr = rows["stderr"].fillna(binomial) if "stderr" in rows else binomial
    return rows.assign(stderr=stderr, num_samples=number)


def _words(column: pd.Series[Any]) -> pd.Series[str]:
    """A factor's levels as words: 64, not 64.0; none for null."""
    return pd.Series([BASELINE if pd.isna(value) else _word(value) for value in column], index=column.index, dtype=object)


def _word(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _refuse_seeds(table: pd.DataFrame, factors: list[str]) -> None:
    if "seed" not in factors:
        return
    cell = ["model", "bits", "is_baseline", *(name for name in factors if name != "seed")]
    seeds = table.groupby(cell)["seed"].nunique()
    if (seeds > 1).any():
        name = seeds.idxmax()
        model = name[0] if isinstance(name, tuple) else name
        raise ConfigurationError(
            f"model '{model}' has {int(seeds.max())} seeds in one configuration. "
            "Keep one (frame[frame.seed == …]) or take their mean: mean_over_seeds"
        )
