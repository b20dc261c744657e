"""Which rows are compared: one metric of one task, every quantized row under a column label and a block label.

Nothing is averaged that differs in something other than the model: what varies becomes part of the
label, and what cannot be told apart is refused.  A model with planted outliers keeps its name, but its
rows have labels of their own and make a family of their own, baselines included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, cast, get_args

import pandas as pd
import yaml

from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.storage.paths import product_root
from quantsweep.trial.constraints import place_of
from quantsweep.trial.quantization import DEFAULT_STEPS
from quantsweep.trial.specs import LEVELS, PerplexityProtocol, PlantedOutliers
from quantsweep.words import count

HEADLINE = "bits_per_byte"
ACCURACIES = ("acc", "acc_norm")
BASELINE_BITS = 16
PLAIN_METHOD = "round_to_nearest"
PROXY_METHOD = "outlier_dependent"
CENTERING_METHOD = "centering"
BASELINE = "none"
PLAIN_MODELS = "plain models"
_STEPS = ("transform", "clipping", "correction", "tuning", "compensation", "activation", "kv_cache")
"""Factors whose options are in the column `step_options`."""
_WITH_FORMAT = ("activation", "kv_cache")
"""Of them those whose options hold a format of codes."""
_CALIBRATION = {"calibration_samples": "num_samples", "calibration_length": "sequence_length", "calibration_seed": "seed"}
"""Column → key of the calibration's yaml."""
_VARIANT = ("method", "method_options", "data_type", "data_type_options", "bits")
_OTHER_AXES = ("symmetric", "scale_dtype", "block_axis", *_STEPS, "scope", "calibration", "seed", "dtype")


def select(results: pd.DataFrame, *, metric: str, task: str | None = None, family: str | None = None) -> pd.DataFrame:
    """The rows of `metric` in one task, with columns `label` (data type and what is unusual about it), `bits`, `block` and `planted`.

    task: name or task_key; needed where several tasks have the metric, or one task has several keys.
    family: as in the results; of models with planted outliers with what was planted: `mini-opt planted 4×16`.
    planted: what was planted, in the words that end label and family; empty for plain models.
    Accuracies of evaluations with non-finite log-likelihoods count as NaN.
    Raises ConfigurationError for unknown names and where rows of one model cannot be told apart.
    """
    rows = _one_task(_only(results, "metric", metric), metric, task)
    refuse_other_requests(rows)
    rows = planted_apart(rows)
    if family is not None:
        rows = _only(rows, "family", family)
    rows = labelled(rows.assign(value=meaningful(rows, metric)))
    return rows.assign(label=rows["label"] + rows["planted"])


def refuse_other_requests(rows: pd.DataFrame) -> None:
    """Raise ConfigurationError where evaluations with one `task_key` answered different requests: other data, prompts or libraries.

    A table without the column, or rows of which it is not known (null), are taken as they are.  Windows of tokens are other ones for each
    tokenizer: perplexities of windows are compared within a model.
    """
    if "requests_hash" not in rows:
        return
    is_of_windows = rows["protocol"].isin(get_args(PerplexityProtocol)) if "protocol" in rows else pd.Series(False, index=rows.index)
    for (task, _), same in rows.groupby(["task_key", rows["model"].where(is_of_windows, "")]):
        counts = same.drop_duplicates("trial_id")["requests_hash"].value_counts()
        if len(counts) > 1:
            told = ", ".join(f"{value} ({count(int(number), 'trial')})" for value, number in counts.items())
            raise ConfigurationError(
                f"the trials answered different requests under the name '{task!s}': requests_hash {told}. Their scores cannot be compared. "
                f"Keep one: results[results.requests_hash == '{counts.index[0]}'], or run the others again: quantsweep rerun"
            )


def one_variant(rows: pd.DataFrame) -> None:
    """Raise ConfigurationError where plain models and models with planted outliers (or two kinds of these) would be averaged.

    rows: results, or `analysis.scores.scores` of them.  `variants` takes them apart.
    """
    kinds = sorted(set(rows["planted"] if "planted" in rows else _planted(rows)))
    if len(kinds) > 1:
        told = ", ".join(kind.strip() or "plain" for kind in kinds)
        raise ConfigurationError(
            f"models of several kinds ({told}) have no common mean: a planted model is another model. "
            "Take them apart first: for name, rows in analysis.selection.variants(results)"
        )


def variants(results: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The results of plain models ("plain models") and those of each kind of planted ones ("planted 4×16"), one after the other."""
    planted = _planted(results)
    for kind in sorted(set(planted)):
        yield kind.strip() or PLAIN_MODELS, results[planted == kind]


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows`, no more than one a trial, with columns `bits` (16 for the baseline), `block` and `label`.

    A label is the data type and what is unusual: options that are not the default of the data type, the rounding or another
    step, another method, and any other axis that varies where everything else is equal.
    Raises ConfigurationError where rows of one model cannot be told apart.
    """
    bits = rows["bit_width"].fillna(BASELINE_BITS).astype(int)
    rows = rows.assign(bits=bits, block=[_block(row) for row in _records(rows, "method", "granularity", "block_size")])
    rows = rows.assign(label=_labels(rows))
    _refuse_duplicates(rows)
    return rows


def meaningful(rows: pd.DataFrame, metric: str) -> pd.Series[float]:
    """The values of `rows`, all of `metric`; accuracies of evaluations with non-finite log-likelihoods are NaN."""
    if metric not in ACCURACIES or "num_nonfinite" not in rows:  # older tables lack the column
        return rows["value"]
    return rows["value"].mask(rows["num_nonfinite"] > 0)


def block_label(rows: pd.DataFrame) -> pd.Series[str]:
    """The block of each row: weights that share a scale, "channel", "tensor", or "none" for baselines."""
    return pd.Series([_block(row) for row in _records(rows, "method", "granularity", "block_size")], index=rows.index, dtype=object)


def data_type_label(rows: pd.DataFrame) -> pd.Series[str]:
    """The data type of each row with those of its options that are not its default: `fp exponent_bits=3`; null where there is none."""
    return _component_label(rows, "data_type")


def rounding_label(rows: pd.DataFrame) -> pd.Series[str]:
    """The rounding of each row with those of its options that are not its default: `outlier_dependent fraction=0.1`; null for baselines."""
    rows = rows if "rounding" in rows else rows.assign(rounding=rows["method"])  # older tables lack the column
    return _component_label(rows, "rounding").mask(rows["method"] == BASELINE)


def factor_labels(rows: pd.DataFrame) -> dict[str, pd.Series[str]]:
    """By factor the steps of each row with those of their options that are not their default: `smooth alpha=0.8`; `calibration` likewise.

    Without the rounding (`rounding_label`), and without what the table has no column for.
    """
    found = {factor: pd.Series("", index=rows.index, dtype=object) for factor in _STEPS if factor in rows}
    if found:
        steps = [dict(_steps(*one)) for one in _step_columns(rows)]
        for factor in found:
            told = ["+".join(" ".join([name, *unusual]) for name, unusual in of_row.get(factor, ())) for of_row in steps]
            found[factor] = pd.Series(told, index=rows.index, dtype=object).where(lambda words: words != "", rows[factor])
    if "calibration" in rows and set(_CALIBRATION) <= set(rows):
        cuts = zip(rows["calibration"], *(rows[column] for column in _CALIBRATION), strict=True)
        texts = [" ".join([name, *_calibration(name, *cut)]) if isinstance(name, str) else None for name, *cut in cuts]
        found["calibration"] = pd.Series(texts, index=rows.index, dtype=object)
    return found


def _step_columns(rows: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Of each row the arguments of `_steps`."""
    nothing = pd.Series(None, index=rows.index, dtype=object)
    columns = [rows.get(name, nothing) for name in ("step_options", "activation_bit_width", *_STEPS)]
    for options, width, *names in zip(*columns, strict=True):
        yield (
            options if isinstance(options, str) else "{}",
            None if pd.isna(width) else int(width),
            *(name if isinstance(name, str) else None for name in names),
        )


@cache
def _steps(options: str, width: int | None, *names: str | None) -> tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...]:
    """(factor, its steps as (name, `key=value` of what is not its default)) of the factors that have any."""
    given = json.loads(options) | ({} if width is None else {"activation.bit_width": width})
    found = []
    for factor, joined in zip(_STEPS, names, strict=True):
        if joined is None or joined == DEFAULT_STEPS[factor]:
            continue
        steps = []
        for name in joined.split("+"):
            place = f"{place_of(factor, name)}."
            own = {key.removeprefix(place): value for key, value in given.items() if key.startswith(place)}
            usual = _usual_activation(factor, name, own) if factor in _WITH_FORMAT else _usual_options(factor, name, BASELINE_BITS)
            steps.append((name, tuple(f"{key}={value}" for key, value in _unusual(own, usual))))
        found.append((factor, tuple(steps)))
    return tuple(found)


def _usual_activation(factor: str, name: str, own: dict[str, Any]) -> dict[str, Any]:
    """What the yaml of a step that quantizes activations declares, the format of their codes included."""
    declared = _declared(factor, name)
    if not declared:
        return {}
    of_type = _usual_options("data_type", str(own.get("data_type")), int(own.get("bit_width", declared["bit_width"])))
    kept = {key: declared[key] for key in ("data_type", "bit_width", "symmetric", "block_size", "clip_percentile")}
    return {**of_type, **declared["data_type_options"], **kept, "sites": "+".join(declared["sites"]), **declared["options"]}


@cache
def _calibration(name: str, *cut: float) -> tuple[str, ...]:
    """How a calibration text is cut otherwise than its yaml says, as `key=value`."""
    usual = _declared("calibration", name)
    given = {key: int(value) for key, value in zip(_CALIBRATION.values(), cut, strict=True) if not pd.isna(value)}
    return tuple(f"{key}={value}" for key, value in _unusual(given, usual))


def _component_label(rows: pd.DataFrame, kind: str) -> pd.Series[str]:
    bits = rows["bit_width"].fillna(BASELINE_BITS).astype(int)
    options = rows["method_options" if kind == "rounding" else f"{kind}_options"]
    return pd.Series([_with_unusual(kind, *one) for one in zip(rows[kind], options, bits, strict=True)], index=rows.index, dtype=object)


@cache
def _with_unusual(kind: str, name: str | None, options: str, bits: int) -> str | None:
    if name is None or pd.isna(name):
        return None
    return " ".join([name, *(f"{key}={value}" for key, value in _unusual(json.loads(options), _usual_options(kind, name, bits)))])


def block_order(block: str) -> tuple[int, int]:
    """Sorting key: numbers by size, then channel, tensor, and the baseline's none."""
    return (0, int(block)) if block.isdigit() else (1 + ("channel", "tensor", BASELINE).index(block), 0)


def documents(rows: pd.DataFrame) -> str:
    """How many documents stand behind a row, in words."""
    low, high = int(rows["num_samples"].min()), int(rows["num_samples"].max())
    return count(low, "document") if low == high else f"{low} to {high} documents"


def _records(rows: pd.DataFrame, *columns: str) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", rows[list(columns)].to_dict("records"))


def _only(rows: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    if value not in set(rows[column]):
        raise ConfigurationError(did_you_mean(column, value, set(rows[column])))
    return rows[rows[column] == value]


def _one_task(rows: pd.DataFrame, metric: str, task: str | None) -> pd.DataFrame:
    tasks = sorted(set(rows["task"]))
    if task is None and len(tasks) > 1:
        raise ConfigurationError(f"several tasks have the metric '{metric}': {', '.join(tasks)}. Choose one: --task {tasks[0]}")
    if task in set(rows["task_key"]):
        return rows[rows["task_key"] == task]
    if task is not None and task not in tasks:
        raise ConfigurationError(did_you_mean(f"task with the metric '{metric}'", task, tasks))
    rows = rows if task is None else rows[rows["task"] == task]
    keys = sorted(set(rows["task_key"]))
    if len(keys) > 1:
        raise ConfigurationError(
            f"task '{rows['task'].iloc[0]}' was evaluated in several ways: {', '.join(keys)}. Choose one: --task '{keys[0]}'"
        )
    return rows


def planted_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with a column `planted`, what was planted into the model (in words, behind a space), which also ends its `family`."""
    planted = _planted(rows)
    return rows.assign(planted=planted, family=rows["family"] + planted)


def _planted(rows: pd.DataFrame) -> pd.Series[str]:
    """What was planted into the model of each row, behind a space; empty for plain models."""
    if "plant_channels" not in rows:  # older tables lack the columns
        return pd.Series("", index=rows.index, dtype=object)
    values = zip(rows["plant_channels"], rows["plant_scale"], rows["plant_seed"], strict=True)
    return pd.Series([_planted_words(*three) for three in values], index=rows.index, dtype=object)


def _planted_words(channels: float, scale: float, seed: float) -> str:
    if pd.isna(channels):
        return ""
    return f" {PlantedOutliers(channels=int(channels), scale=scale, seed=int(seed)).label}"


def _block(row: dict[str, Any]) -> str:
    if row["method"] == BASELINE or pd.isna(row["granularity"]):
        return BASELINE
    return str(int(row["block_size"])) if row["granularity"] == "block" else str(row["granularity"])


def _labels(rows: pd.DataFrame) -> pd.Series[str]:
    """A column label for each row: data type, unusual options and method, and whatever else varies within a cell."""
    steps = [_step_words(dict(_steps(*one))) for one in _step_columns(rows)]
    variants = zip(_records(rows, *_VARIANT), rows.get("rounding", rows["method"]), steps, strict=True)
    labels = pd.Series([_variant(*one) for one in variants], index=rows.index, dtype=object)
    quantized = rows["method"] != BASELINE
    rows = rows.assign(**factor_labels(rows))
    for axis in (axis for axis in _OTHER_AXES if axis in rows):  # older tables lack some
        cells = rows[quantized].groupby([labels[quantized], "bits", "block", "family", "model"])[axis]
        if (cells.nunique(dropna=False) > 1).any():
            is_told = quantized & (rows[axis] != DEFAULT_STEPS.get(axis, ...))  # a step that nobody chose has no word
            labels[is_told] = labels[is_told] + f" {axis}=" + rows.loc[is_told, axis].map(str)
    return labels


def _step_words(steps: dict[str, tuple[tuple[str, tuple[str, ...]], ...]]) -> list[str]:
    """Unusual options of steps under their dotted names: `smooth.alpha=0.8`, `clipping.grid=50`."""
    return [
        f"{name if factor == 'transform' else factor}.{option}"
        for factor, of_factor in steps.items()
        for name, unusual in of_factor
        for option in unusual
    ]


def _variant(row: dict[str, Any], rounding: str, steps: list[str]) -> str:
    if row["method"] == BASELINE:
        return BASELINE
    unusual = [
        f"{key}={value}"
        for kind, name in (("data_type", row["data_type"]), ("rounding", rounding))
        for key, value in _unusual(
            json.loads(row["data_type_options" if kind == "data_type" else "method_options"]), _usual_options(kind, name, row["bits"])
        )
    ]
    method = [row["method"]] if row["method"] != PLAIN_METHOD else []
    data_type = [] if pd.isna(row["data_type"]) else [row["data_type"]]
    return " ".join([*data_type, *method, *unusual, *steps])


def _unusual(options: dict[str, Any], usual: dict[str, Any]) -> list[tuple[str, Any]]:
    """Options that are not the default; levels belong to the name, unless they are others than the yaml of that name has."""
    told_apart = {key: value for key, value in options.items() if key != LEVELS or key in usual}
    return [(key, value) for key, value in sorted(told_apart.items()) if key not in usual or usual[key] != value]


@cache
def _usual_options(kind: str, name: str, bit_width: int) -> dict[str, Any]:
    """The defaults that the component's yaml declares at this bit width; none for a component that is no longer there."""
    declared = _declared(kind, name)
    if not declared:
        return {}
    by_width = declared["capabilities"].get("defaults_by_bit_width", {})
    return {key: by_width.get(key, {}).get(bit_width) if value is None else value for key, value in declared["options"].items()}


@cache
def _declared(kind: str, name: str) -> dict[str, Any]:
    """A component's yaml; empty for one that is no longer there."""
    path = product_root() / "conf" / kind / f"{name}.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def _refuse_duplicates(rows: pd.DataFrame) -> None:
    cell = ["label", "bits", "block", "family", "model"]
    twins = rows[rows.duplicated(cell, keep=False)]  # none, as a rule: ten thousands of cells are not looked at one by one
    for (label, *_, model), same in twins.groupby(cell):
        axes = [axis for axis in ("sweep", *_OTHER_AXES, "trial_id") if axis in same and same[axis].nunique(dropna=False) > 1]
        raise ConfigurationError(
            f"{len(same)} rows of model '{model}' fall into one cell of column '{label}' and differ in {', '.join(axes) or 'nothing'}. "
            f"Keep one of them before comparing: results[results.{(axes or ['trial_id'])[0]} == …]"
        )
