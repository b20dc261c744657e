"""The minimal frame: what a table must have to be analysed here, ours or anybody's.

One row a model, configuration, task and metric.  Six columns are needed:

    model       its name
    family      models of one family make one curve over sizes
    parameters  how many, a count (7e9, not 7)
    bits        bits of one code, a real number (1.58 is one); 16 for the baseline
    metric      acc, acc_norm, perplexity, word_perplexity, bits_per_byte, loss, … (`MEANING`)
    value       accuracies as shares of 1; NaN and infinity are results

These are used where they are there:

    task                what was evaluated; needed where one metric belongs to several
    stderr              standard error of value; of an accuracy it follows from num_samples, the examples behind value
    higher_is_better    needed for metrics that `MEANING` does not know
    is_baseline         else whatever has 16 bits or more is the model's baseline
    bits_per_weight     stored bits with scales and all, else `bits`;  total_bits: of the whole model, else parameters × bits_per_weight
    tokens              what the model was trained on
    protocol            what else values depend on (harness, prompts): several of them are not compared, nor several of any `…version…`
    trial_id            joins our samples
    `FACTORS`           block size, data type, transform, rounding, …: what sets configurations apart, null where there is none

Other columns are let through and have no meaning.  `read_table` reads such a table from a file, `from_results` makes one of ours, and
`analysis.boards.board` makes of one score the `Scoreboard` that every analysis works on.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.selection import (
    ACCURACIES,
    BASELINE,
    BASELINE_BITS,
    block_label,
    data_type_label,
    factor_labels,
    meaningful,
    planted_apart,
    refuse_other_requests,
    rounding_label,
)
from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.words import count

REQUIRED = ("model", "family", "parameters", "bits", "metric", "value")
FACTORS = (
    *("data_type", "block_size", "block_axis", "symmetric", "scale_dtype", "transform", "rounding", "clipping", "correction", "tuning"),
    *("compensation", "activation", "kv_cache", "scope", "calibration", "dtype", "seed"),
)
"""What sets configurations apart, beside their bits."""
SHARES = {"acc", "acc_norm", "accuracy", "exact_match", "f1"}
PERPLEXITIES = {"perplexity", "word_perplexity", "byte_perplexity", "token_perplexity", "ppl"}
LOSSES = {"loss", "cross_entropy", "nll", "bits_per_byte"}
DISTANCES = {"kld"}
MEANING = dict.fromkeys(SHARES, True) | dict.fromkeys(PERPLEXITIES | LOSSES | DISTANCES, False)
"""Metric → more of it is better."""
NUMBERS = ("parameters", "bits", "value", "stderr", "num_samples", "total_bits", "bits_per_weight", "tokens")
LEAST_PARAMETERS, LEAST_TOKENS, MOST_BITS = 1_000, 1_000_000, 64
"""Beyond these a number is taken for one in another unit: millions, billions, bytes."""
_LIKELY = {
    "bit_width": "bits",
    "wbits": "bits",
    "num_parameters": "parameters",
    "params": "parameters",
    "size": "parameters",
    "score": "value",
    "accuracy": "value",
    "ppl": "value",
    "group_size": "block_size",
    "method": "rounding",
    "n": "num_samples",
    "se": "stderr",
}


def read_table(path: str | Path, *, rename: Mapping[str, str] | None = None) -> pd.DataFrame:
    """A minimal frame from a file, checked (`checked`).

    path: .csv or .parquet.  rename: {column of the file: column of the minimal frame}, `{"bit_width": "bits"}`.
    Raises ConfigurationError where the file cannot be read or the table cannot be analysed, with all reasons at once.
    """
    path = Path(path)
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ConfigurationError(f"{path} is no table that can be read: its name must end in {' or '.join(readers)}")
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}")
    try:
        table = readers[path.suffix](path)  # type: ignore[operator]
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parsers raise kinds of these
        raise ConfigurationError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    for column in rename or {}:
        if column not in table:
            raise ConfigurationError(f"{did_you_mean('column', column, table.columns)} (asked to be renamed in {path})")
    return checked(table.rename(columns=dict(rename or {})))


def checked(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with plain types, `task`, `is_baseline` and `higher_is_better` filled in.

    Raises ConfigurationError, with all problems at once: missing columns, numbers that are none or of another unit, unknown metrics,
    rows that stand twice, models with two baselines.
    """
    missing = [name for name in REQUIRED if name not in table]
    if missing:
        raise ConfigurationError(_refusal([_missing(name, table) for name in missing]))
    if table.empty:
        raise ConfigurationError(_refusal(["it has no rows"]))
    problems = []
    frame = table.reset_index(drop=True)
    for name in NUMBERS:
        if name in frame:
            numbers = pd.to_numeric(frame[name], errors="coerce").astype(float)
            words = frame.loc[numbers.isna() & frame[name].notna(), name]
            if len(words):
                problems.append(f"column '{name}' holds '{words.iloc[0]}' where a number is expected ({count(len(words), 'row')})")
            frame[name] = numbers
    for name in ("model", "family", "metric", "task"):
        frame[name] = frame[name].astype("str").where(frame[name].notna(), None) if name in frame else ""
    empty = {name: int(frame[name].isna().sum()) for name in REQUIRED if name != "value"}
    problems += [f"column '{name}' is empty in {count(number, 'row')}" for name, number in empty.items() if number]
    if not problems:
        problems = _units(frame)
    frame["task"] = frame["task"].fillna("")
    if "is_baseline" not in frame:
        frame["is_baseline"] = frame["bits"] >= BASELINE_BITS
    if "higher_is_better" not in frame:
        frame["higher_is_better"] = frame["metric"].map(MEANING)
    unknown = sorted(set(frame.loc[frame["higher_is_better"].isna(), "metric"].dropna()))
    if unknown:
        problems.append(f"it is not known whether more of {', '.join(unknown)} is better: add a column higher_is_better")
    if not problems:
        problems = _duplicates(frame)
    if problems:
        raise ConfigurationError(_refusal(problems))
    return frame.astype({"is_baseline": bool, "higher_is_better": bool})


def _refusal(problems: list[str]) -> str:
    return "\n".join(["the table cannot be analysed as it is:", *(f"  - {problem}" for problem in problems)])


def _missing(name: str, table: pd.DataFrame) -> str:
    likely = [other for other in table.columns if _LIKELY.get(str(other).lower()) == name or name in str(other).lower()]
    hint = (
        f": is it '{likely[0]}'? Then --rename {shlex.quote(f'{likely[0]}={name}')}"
        if likely
        else f". There are: {', '.join(map(str, table.columns))}"
    )
    return f"column '{name}' is missing{hint}"


def _units(frame: pd.DataFrame) -> list[str]:
    """Numbers that are likely to be in another unit than the frame's."""

    def lowest(name: str) -> float:
        return float(frame[name].min()) if name in frame else math.inf

    problems = []
    if lowest("parameters") < LEAST_PARAMETERS:
        problems.append(f"column 'parameters' has {lowest('parameters'):g}: it counts parameters, and a model of 7 billion has 7e9")
    if lowest("tokens") < LEAST_TOKENS:
        problems.append(f"column 'tokens' has {lowest('tokens'):g}: it counts tokens, and 300 billion are 3e11")
    if lowest("bits") <= 0 or frame["bits"].max() > MOST_BITS:
        seen = f"{lowest('bits'):g} to {frame['bits'].max():g}"
        problems.append(f"column 'bits' has {seen}: bits of one code lie above 0 and up to {MOST_BITS}")
    if lowest("stderr") < 0:
        problems.append("column 'stderr' has numbers below 0")
    if lowest("num_samples") < 1:
        problems.append("column 'num_samples' has numbers below 1")
    if "total_bits" in frame and (frame["total_bits"] < frame["parameters"] * frame["bits"] / 2).any():
        problems.append("column 'total_bits' is less than half of parameters × bits: it counts bits of the whole model, not bytes")
    for names, low, high, words in (
        (SHARES, 0.0, 1.0, "a share of 1 is expected; if these are per cent, divide by 100"),
        (PERPLEXITIES, 1.0, math.inf, "a perplexity is 1 or more; if these are nats, call the metric loss"),
        (LOSSES, 0.0, math.inf, "a loss is 0 or more"),
    ):
        of = frame[frame["metric"].isin(names)]
        bad = of[(of["value"] < low) | (of["value"] > high)]
        if len(bad):
            problems.append(f"{count(len(bad), 'value')} of {bad['metric'].iloc[0]} such as {bad['value'].iloc[0]:g}: {words}")
    return problems


def _duplicates(frame: pd.DataFrame) -> list[str]:
    """Rows that stand twice, a model's second baseline, and models of two families."""
    families = frame.groupby("model")["family"].nunique()
    if (families > 1).any():
        return [f"model '{families.idxmax()}' is of several families"]
    factors = [name for name in FACTORS if name in frame]
    baseline = frame["is_baseline"]
    score = ["task", "metric"]
    for rows, key in ((frame[baseline], ["model", *score]), (frame[~baseline], ["model", "bits", *factors, *score])):
        twins = rows[rows.duplicated(key, keep=False)]
        if len(twins):
            return [_twins(next(same for _, same in twins.groupby(key, dropna=False, sort=False)), factors, len(twins))]
    return []


def _twins(same: pd.DataFrame, factors: list[str], number: int) -> str:
    first = same.iloc[0]
    known = {*REQUIRED, *(() if first["is_baseline"] else factors), "task", "stderr"}
    differ = [str(name) for name in same.columns if name not in known and same[name].nunique(dropna=False) > 1]
    what = "baselines" if first["is_baseline"] else f"rows of one configuration at {first['bits']:g} bit"
    score = f"{first['metric']} of task {first['task']}" if first["task"] else str(first["metric"])
    values = ", ".join(f"{value:g}" for value in same["value"].head(4))
    return (
        f"model '{first['model']}' has {len(same)} {what} with {score}: {values}{'; differing in ' if differ else ''}{', '.join(differ)}. "
        f"Keep one, or rename what sets them apart to a factor ({', '.join(FACTORS[:4])}, …, seed); such rows: {number}"
    )


def from_results(results: pd.DataFrame) -> pd.DataFrame:
    """The minimal frame of our own tables (`quantsweep.load_results`), all metrics and tasks of it.

    `task` is the task_key.  Models with planted outliers have a name and a family of their own.  Options that are not a component's
    default stand behind its name: data_type "fp exponent_bits=3", rounding "outlier_dependent fraction=0.1", transform "smooth alpha=0.8".
    Accuracies of evaluations with non-finite log-likelihoods are NaN.
    Raises ConfigurationError where evaluations of one name answered different requests, and as `checked`.
    """
    refuse_other_requests(results)
    rows = planted_apart(results)
    is_baseline = rows["method"] == BASELINE
    value = rows["value"].mask(rows["metric"].isin(ACCURACIES) & meaningful(rows, ACCURACIES[0]).isna())
    frame = pd.DataFrame(
        {
            "trial_id": rows["trial_id"],
            "model": rows["model"] + rows["planted"],
            "family": rows["family"],
            "parameters": rows["num_parameters"],
            "bits": rows["bit_width"].fillna(BASELINE_BITS),
            "bits_per_weight": rows["bits_per_weight"],
            "total_bits": rows["total_model_bits"],
            "task": rows["task_key"],
            "metric": rows["metric"],
            "value": value,
            "stderr": rows["stderr"],
            "num_samples": rows["num_samples"],
            "higher_is_better": rows["higher_is_better"],
            "is_baseline": is_baseline,
            "data_type": data_type_label(rows),
            "block_size": block_label(rows),
            "rounding": rounding_label(rows),
            **factor_labels(rows),
        }
    )
    same = [name for name in FACTORS if name in rows and name not in frame]
    frame[same] = rows[same]
    return checked(frame)
