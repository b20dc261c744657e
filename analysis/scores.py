"""From rows of metrics to one row a trial: its mean zero-shot accuracy, its bits per byte, and their standard errors.

With k accuracy tasks, each by its headline metric (`acc` or `acc_norm`), on different examples:

    accuracy        (a_1 + … + a_k) / k
    its error       √(se_1² + … + se_k²) / k            tasks are independent, examples are what varies
    cross entropy   min(−Σ log-likelihood / tokens, ln 100)     nats a token

Dettmers & Zettlemoyer (arXiv:2212.09720) score a model by the mean of LAMBADA, PiQA, WinoGrande and
HellaSwag, and cap perplexities at 100.  Their perplexity is a token's; the tables of metrics hold bits per byte,
and how many bytes a document has stands in the samples.  Without samples the cross entropy is in nats a byte,
capped at ln 100 too; `attrs["cross_entropy_per"]` says which one it is.

A trial that lacks one of the table's tasks has no mean: it is NaN, never the mean of the others.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd

from analysis.selection import (
    ACCURACIES,
    CENTERING_METHOD,
    HEADLINE,
    PROXY_METHOD,
    labelled,
    meaningful,
    planted_apart,
    refuse_other_requests,
)
from quantsweep.errors import ConfigurationError

ACCURACY = "accuracy"
BITS_PER_BYTE = HEADLINE
SIGN = {ACCURACY: 1.0, BITS_PER_BYTE: -1.0}
"""The two scores of a trial; × sign, more is better."""
PERPLEXITY_CAP = 100.0
SIZES = ("total_model_bits", "total_model_bits_without_embeddings")
_ABOUT = (
    *("model", "family", "planted", "method", "data_type", "method_options", "num_parameters", "bits_per_weight"),
    *(*SIZES, "bits", "block", "label"),
)


def scores(results: pd.DataFrame, samples: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a trial (its index is `trial_id`): what it is, its size in bits, and its scores with standard errors.

    results, samples: frames of `quantsweep.load_results` and `load_samples`.
    Columns: model and family (with what was planted into the model, which also stands in `planted`), method, data_type, label, bits, block,
    bits_per_weight, total_model_bits and the same without embeddings; `accuracy`, `bits_per_byte`, `cross_entropy`, each
    with `…_stderr` and `…_examples` (the examples of its smallest task); `outlier_fraction` and `centered`, from the method.
    `attrs`: `accuracy_tasks` {task_key: metric}, `text_task` (or None), `cross_entropy_per`
    ("token" or "byte").
    Accuracies with non-finite log-likelihoods are NaN; an infinite bits_per_byte stays, its cross entropy is capped.
    Raises ConfigurationError where a task was evaluated in several ways, several tasks have bits per byte, or trials
    cannot be told apart.
    """
    _refuse_twins(results)
    rows = labelled(planted_apart(results.drop_duplicates("trial_id"))).set_index("trial_id")
    about = rows.assign(model=rows["model"] + rows["planted"])[list(_ABOUT)]
    fractions = [float(json.loads(text).get("fraction", 0.0)) for text in about.pop("method_options")]
    table = about.assign(
        outlier_fraction=np.where(about["method"] == PROXY_METHOD, fractions, 0.0),
        centered=about["method"] == CENTERING_METHOD,
    )
    accuracy_rows = results[results["is_primary"] & results["metric"].isin(ACCURACIES)]
    text_rows = results[results["metric"] == HEADLINE]
    table = table.join(_accuracy(accuracy_rows).astype(float)).join(_text(text_rows, samples).astype(float))
    table.attrs.update(
        accuracy_tasks=dict(sorted(set(zip(accuracy_rows["task_key"], accuracy_rows["metric"], strict=True)))),
        text_task=None if text_rows.empty else str(text_rows["task_key"].iloc[0]),
        cross_entropy_per="byte" if samples is None else "token",
    )
    return table


def _refuse_twins(results: pd.DataFrame) -> None:
    twins = results[results.duplicated(["trial_id", "task_key", "metric"], keep=False)]
    if len(twins):
        trial, task = twins["trial_id"].iloc[0], twins["task_key"].iloc[0]
        where = f" (sweeps {', '.join(sorted(set(twins['sweep'])))})" if "sweep" in twins else ""
        raise ConfigurationError(
            f"trial '{trial}' has several rows for task '{task}'{where}. Keep one of them: results[results.sweep == …]"
        )
    rows = results[(results["metric"] == HEADLINE) | (results["is_primary"] & results["metric"].isin(ACCURACIES))]
    refuse_other_requests(rows)
    for task, same in rows.groupby("task"):
        keys = sorted(set(same["task_key"]))
        if len(keys) > 1:
            raise ConfigurationError(
                f"task '{task!s}' was evaluated in several ways: {', '.join(keys)}. "
                f"Keep one of them: results[results.task_key != '{keys[0]}']"
            )
    texts = sorted(set(rows.loc[rows["metric"] == HEADLINE, "task"]))
    if len(texts) > 1:
        raise ConfigurationError(
            f"several tasks have {HEADLINE}: {', '.join(texts)}. Keep one of them: results[results.task != '{texts[0]}']"
        )


def _accuracy(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.assign(value=meaningful(rows, ACCURACIES[0]))
    rows = rows.assign(variance=rows["stderr"].mask(rows["value"].isna()) ** 2)
    values, variances = (rows.pivot(index="trial_id", columns="task_key", values=name) for name in ("value", "variance"))
    return pd.DataFrame(
        {
            ACCURACY: values.mean(axis=1, skipna=False),
            f"{ACCURACY}_stderr": np.sqrt(variances.sum(axis=1, skipna=False)) / max(values.shape[1], 1),
            f"{ACCURACY}_examples": rows.groupby("trial_id")["num_samples"].min(),
        }
    )


def _text(rows: pd.DataFrame, samples: pd.DataFrame | None) -> pd.DataFrame:
    rows = rows.set_index("trial_id")
    stderr = rows["stderr"].where(np.isfinite(rows["value"]))
    nats = math.log(2) * (1.0 if samples is None else _bytes_per_token(rows, samples))
    cross_entropy = rows["value"] * nats
    cap = math.log(PERPLEXITY_CAP)
    return pd.DataFrame(
        {
            BITS_PER_BYTE: rows["value"],
            f"{BITS_PER_BYTE}_stderr": stderr,
            f"{BITS_PER_BYTE}_examples": rows["num_samples"],
            "cross_entropy": cross_entropy.clip(upper=cap),
            "cross_entropy_stderr": (stderr * nats).mask(cross_entropy > cap, 0.0),
        }
    )


def _bytes_per_token(rows: pd.DataFrame, samples: pd.DataFrame) -> pd.Series[float]:
    """Bytes a scored token, by trial; NaN for a trial without samples."""
    texts = samples[samples["num_bytes"].notna() & samples["trial_id"].isin(rows.index) & samples["task_key"].isin(set(rows["task_key"]))]
    num_bytes = pd.Series([float(np.sum(lengths)) for lengths in texts["num_bytes"]], index=texts["trial_id"], dtype=float)
    return num_bytes.reindex(rows.index) / rows["num_tokens"]
