"""What quantizing costs: each configuration against the baseline of the same model, its mean over models, and block by block.

    degradation     how much worse the score is, in its own unit; of perplexities also in nats (their log ratio), which one exploded model
                    does not carry away
    recovery        100 × score / baseline, of scores of which more is better
    block errors    the error that quantized layers make, decoder block by decoder block, from the layers table

Intervals of a trial are over examples (paired where the board has samples).  Those of means are over models, by Student's t: they are about
other models of the kind, and with few models they are wide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.frames import PERPLEXITIES
from analysis.selection import BASELINE
from analysis.uncertainty import Scoreboard, half_width
from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.words import count

EXPLODED = 10.0
"""A perplexity that is so many times the baseline's (or no finite number) is called exploded."""
_ABOUT = ("family", "model", "bits", "label", "block")


def degradation(board: Scoreboard) -> pd.DataFrame:
    """What each quantized trial lost against its model's baseline: one row a trial, under its index.

    Columns: family, model, bits, label, block, num_parameters, value, baseline, degradation (above 0: worse), low and high (its 95 %
    interval over examples), nats (log ratio, of perplexities only), exploded.  A trial without a number has none; a model without a
    baseline has none either and is named in `attrs["without_baseline"]`.
    Raises ConfigurationError where no model has both.
    """
    table = board.table
    baselines = table[table["label"] == BASELINE]
    baseline_of = dict(zip(baselines["model"], map(str, baselines.index), strict=True))
    quantized = table[table["label"] != BASELINE]
    without = sorted(set(quantized["model"]) - set(baseline_of))
    if quantized.empty or len(without) == quantized["model"].nunique():
        lacks = "no quantized row" if quantized.empty else "no model with a baseline (a row of 16 bits, or is_baseline)"
        raise ConfigurationError(
            f"the table has {lacks}, so there is nothing to subtract. Models: {', '.join(sorted(set(table['model']))[:12])}"
        )
    rows = [_against(board, str(trial), baseline_of.get(str(model))) for trial, model in quantized["model"].items()]
    found = quantized[[*_ABOUT, "num_parameters"]].join(pd.DataFrame(rows, index=quantized.index))
    found.attrs.update(without_baseline=tuple(without), metric=table.attrs.get("metric", board.score))
    return found


def _against(board: Scoreboard, trial: str, baseline: str | None) -> dict[str, object]:
    raw = float(board.table[board.score][trial])
    before = board.value({baseline: 1.0}) if baseline is not None else math.nan
    weights = {} if baseline is None else {trial: -board.sign, baseline: board.sign}
    lost, half = (board.value(weights), board.margin(weights)) if weights else (math.nan, math.nan)
    is_perplexity = board.table.attrs.get("metric") in PERPLEXITIES
    return {
        "value": raw,
        "baseline": before,
        "degradation": lost,
        "low": lost - half,
        "high": lost + half,
        "nats": math.log(raw / before) if is_perplexity and math.isfinite(raw) and before > 0 else math.nan,
        "exploded": bool(is_perplexity and (not math.isfinite(raw) or raw > EXPLODED * before)),
    }


def mean_degradation(found: pd.DataFrame, *, column: str = "degradation") -> pd.DataFrame:
    """The mean of `degradation` over models, one row a bit width, label and block.

    column: `degradation`, or `nats`.  Columns: bits, label, block, mean, low and high (95 %, Student's t over models; NaN for one
    model), median, models (that have a number), of_models (that have the configuration), exploded (how many).
    """
    rows = []
    for (bits, label, block), same in found.groupby(["bits", "label", "block"]):
        mean, low, high, models = _over_models(same[column].to_numpy(float))
        rows.append(
            {"bits": bits, "label": label, "block": block, "mean": mean, "low": low, "high": high}
            | {"median": float(same[column].median()), "models": models, "of_models": len(same), "exploded": int(same["exploded"].sum())}
        )
    return pd.DataFrame(rows)


def _over_models(values: np.typing.NDArray[np.float64]) -> tuple[float, float, float, int]:
    """Mean, its 95 % interval by Student's t, and how many of the values are numbers."""
    known = values[np.isfinite(values)]
    n = len(known)
    mean = float(known.mean()) if n else math.nan
    half = half_width(float(known.std(ddof=1)) / math.sqrt(n), n - 1) if n > 1 else math.nan
    return mean, mean - half, mean + half, n


def recovery(board: Scoreboard) -> pd.DataFrame:
    """100 × score / baseline of each quantized trial.

    Columns: family, model, bits, label, block, recovery, low and high (95 %, over examples).

    The standard error is that of the ratio R = q / b to first order, √Var(q − R b) / b, paired where the board has samples.
    Raises ConfigurationError for scores of which less is better: a perplexity has no part that could be recovered.
    """
    if board.sign < 0:
        raise ConfigurationError(f"recovery is a share of a score of which more is better; of {board.score} less is. See degradation")
    found = degradation(board)
    table = board.table
    baselines = table[table["label"] == BASELINE]
    baseline_of = dict(zip(baselines["model"], map(str, baselines.index), strict=True))
    rows = []
    for trial, row in found.iterrows():
        ratio, half = row["value"] / row["baseline"] if row["baseline"] else math.nan, math.nan
        if math.isfinite(ratio):
            half = board.margin({str(trial): 1 / row["baseline"], baseline_of[row["model"]]: -ratio / row["baseline"]})
        rows.append({"recovery": 100 * ratio, "low": 100 * (ratio - half), "high": 100 * (ratio + half)})
    return found[list(_ABOUT)].join(pd.DataFrame(rows, index=found.index))


def block_errors(layers: pd.DataFrame, *, error: str = "relative_error", by: Sequence[str] = ("model", "trial_id")) -> pd.DataFrame:
    """The error of quantized layers, decoder block by decoder block: one row a trial and block.

    layers: of `quantsweep.load_layers`.  error: a column of it that is an error of a layer (`relative_error`: squared, of the weights,
    over their squares).  Columns: those of `by`, decoder_block (its number in the model), mean, lowest and highest over its
    layers, and `layers`, how many: no interval, as a block's layers are all there are.
    Raises ConfigurationError for a column that is not there, and where no layer's name has a number.
    """
    if error not in layers:
        raise ConfigurationError(did_you_mean("column of layers", error, [name for name in layers.columns if "error" in str(name)]))
    numbers = layers["layer"].map(_block_number)
    if numbers.isna().any():
        names = layers.loc[numbers.isna(), "layer"]
        raise ConfigurationError(f"{count(len(names), 'layer')} such as '{names.iloc[0]}' are in no numbered decoder block")
    groups = layers.assign(decoder_block=numbers.astype(int)).groupby([*by, "decoder_block"])[error]
    return groups.agg(mean="mean", lowest="min", highest="max", layers="size").reset_index()


def _block_number(layer: str) -> float:
    """3 of `model.layers.3.self_attn.q_proj`; NaN where no part of the name is a number."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
    return float(found.group(1)) if found else math.nan
