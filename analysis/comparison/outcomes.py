"""From two rows of samples to the numbers that are compared, example by example.

Every metric here is Σ values / Σ weights over the examples of a task (perplexities: its exponential):

    acc, acc_norm       right or wrong, weight 1
    bits_per_byte       −log₂-likelihood of the document, weight its bytes
    byte_perplexity     −log-likelihood of the document, weight its bytes; compared on the log scale
    perplexity          −log-likelihood of the answer, or a token's of the window, weight 1; compared on the log scale

Rows are compared only where they answered the same requests (`requests_hash`), and where every example has an outcome:
a difference over the examples that happen to have one would be about other examples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.comparison.paired import Vector
from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.words import count

Row = Mapping[str, Any]
"""A row of samples."""
Pair = tuple[Row, Row]
"""A's row and B's of one task."""
Clusters = Mapping[str, Sequence[Hashable]]
"""Task or task_key → for each of its examples, in their order, what it belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How a metric is made of samples; is_log: it is the exponential of Σ values / Σ weights, which is what is compared."""

    name: str
    column: str
    factor: float
    by_bytes: bool
    is_log: bool
    unit: str

    @property
    def is_count(self) -> bool:
        """True for accuracies, of which more is better; of all others less is."""
        return self.column != "loglikelihood"


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="acc", column="correct", factor=1.0, by_bytes=False, is_log=False, unit="share"),
        Metric(name="acc_norm", column="correct_norm", factor=1.0, by_bytes=False, is_log=False, unit="share"),
        Metric(name="bits_per_byte", column="loglikelihood", factor=-1 / math.log(2), by_bytes=True, is_log=False, unit="bits a byte"),
        Metric(name="byte_perplexity", column="loglikelihood", factor=-1.0, by_bytes=True, is_log=True, unit="log of the ratio"),
        Metric(name="perplexity", column="loglikelihood", factor=-1.0, by_bytes=False, is_log=True, unit="log of the ratio"),
    )
}


def metric_of(task_key: str, row: Row, wanted: Mapping[str, str] | str | None) -> Metric:
    """The metric to compare in a task: the one named (by task_key or task), else bits_per_byte of documents and acc of answers.

    Raises ConfigurationError where samples do not make it.
    """
    named = wanted if isinstance(wanted, str) or wanted is None else wanted.get(task_key, wanted.get(row["task"]))
    if named is None:
        named = "acc" if _has(row, "correct") else "bits_per_byte" if _has(row, "num_bytes") else "perplexity"
    if named not in METRICS:
        raise ConfigurationError(f"task '{task_key}': {did_you_mean('metric', named, METRICS)}. Of others no outcomes by example are kept")
    metric = METRICS[named]
    if not _has(row, metric.column) or (metric.by_bytes and not _has(row, "num_bytes")):
        there = [name for name, one in METRICS.items() if _has(row, one.column) and (not one.by_bytes or _has(row, "num_bytes"))]
        raise ConfigurationError(f"task '{task_key}' has no {named}; its samples make {', '.join(there)}")
    return metric


def refuse_other_requests(task_key: str, pairs: Iterable[Pair]) -> None:
    """Raise ConfigurationError where partners answered other requests, or it is not known whether they did."""
    for a, b in pairs:
        if pd.isna(a["requests_hash"]) or a["requests_hash"] != b["requests_hash"]:
            raise ConfigurationError(
                f"task '{task_key}': trials {a['trial_id']} and {b['trial_id']} answered different requests under one name "
                f"(requests_hash {a['requests_hash']} and {b['requests_hash']}: other data, prompts or libraries), so their answers "
                f"cannot be paired. Compare another task, or run one of them again: quantsweep rerun SWEEP trial_id={a['trial_id']}"
            )


def values(task_key: str, row: Row, metric: Metric) -> tuple[Vector, Vector]:
    """(values, weights) of one row, one number an example.  Raises ConfigurationError where an example has no finite outcome."""
    found = metric.factor * np.asarray(row[metric.column], dtype=np.float64)
    missing = int((~np.isfinite(found)).sum())
    if missing:
        raise ConfigurationError(
            f"task '{task_key}': {metric.name} of trial {row['trial_id']} has no finite outcome in {count(missing, 'example')} of "
            f"{len(found):,} (NaN or infinite log-likelihoods): that trial is broken there, and no number says by how much. Leave it out"
        )
    if _is_of_windows(row):
        found /= _tokens_a_window(task_key, row)
    weights = np.asarray(row["num_bytes"], dtype=np.float64) if metric.by_bytes else np.ones(len(found))
    return found, weights


def with_tokens(samples: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """`samples` with the column num_tokens of `results` (`load_results` of the same sweeps): what windows' perplexities are made with."""
    keys = [key for key in ("trial_id", "task_key", "sweep") if key in samples and key in results]
    return samples.merge(results[[*keys, "num_tokens"]].drop_duplicates(keys), on=keys, how="left", validate="many_to_one")


def tie_share(pairs: Iterable[Pair]) -> float:
    """Share of examples of which both arms have the very same log-likelihood: no bit of the model's answer changed."""
    same = [np.asarray(a["loglikelihood"], np.float32) == np.asarray(b["loglikelihood"], np.float32) for a, b in pairs]
    return float(np.mean(np.concatenate(same)))


def cluster_codes(row: Row, clusters: Clusters | None) -> npt.NDArray[np.int64]:
    """For each example the number of its cluster, 0 … K − 1; every example its own where none are given for its task.

    Raises ConfigurationError for another number of examples than the task has.
    """
    number = len(row["loglikelihood"])
    given = None if clusters is None else clusters.get(row["task_key"], clusters.get(row["task"]))
    if given is None:
        return np.arange(number)
    if len(given) < number:
        raise ConfigurationError(
            f"clusters of task '{row['task_key']}' are given for {count(len(given), 'example')}, and it has {number:,}"
        )
    return np.asarray(pd.factorize(np.asarray(list(given[:number]), dtype=object))[0], dtype=np.int64)


def clusters_of(table: pd.DataFrame) -> dict[str, list[Hashable]]:
    """Clusters from a table with the columns task (name or task_key), document (its place in the task, from 0) and cluster.

    Raises ConfigurationError where columns are missing, or the documents of a task are not 0, 1, 2, … once each.
    """
    if lacking := sorted({"task", "document", "cluster"} - set(table.columns)):
        raise ConfigurationError(f"clusters: the table has no column {', '.join(lacking)}; it needs task, document and cluster")
    found: dict[str, list[Hashable]] = {}
    for task, rows in table.sort_values("document").groupby("task"):
        if rows["document"].tolist() != list(range(len(rows))):
            raise ConfigurationError(f"clusters: the documents of task '{task}' are not 0 … {len(rows) - 1}, once each")
        found[str(task)] = rows["cluster"].tolist()
    return found


def _is_of_windows(row: Row) -> bool:
    """True for a perplexity of windows, all of one length: its log-likelihoods are sums over a window's tokens."""
    return not (_has(row, "correct") or _has(row, "num_bytes"))


def _tokens_a_window(task_key: str, row: Row) -> float:
    if not _has(row, "num_tokens"):
        raise ConfigurationError(
            f"task '{task_key}' is measured in windows, and its samples do not say of how many tokens: "
            "samples = analysis.comparison.outcomes.with_tokens(samples, load_results(…))"
        )
    return float(row["num_tokens"]) / len(row["loglikelihood"])


def _has(row: Row, column: str) -> bool:
    return row.get(column) is not None and not (isinstance(row[column], float) and math.isnan(row[column]))
