"""Reading results into pandas.

    df = quantsweep.load_results("results/quickstart")     one row a trial, task and metric
    quantsweep.load_trials(...)                            one row an attempt: status, failures, times
    quantsweep.load_samples(...)                           one row an evaluation: outcomes example by example

A sweep may still be running: rows are whole whenever they can be seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from quantsweep import records
from quantsweep.errors import ResultsError

if TYPE_CHECKING:
    import pandas as pd

Sweeps = str | Path | Iterable[str | Path]


def load_results(sweeps: Sweeps) -> pd.DataFrame:
    """One row for each trial, task and metric, exactly once, every axis a column; options of methods and data types too.

    sweeps: the folder of a sweep, or several (then the column `sweep` tells them apart).
    """
    return _with_options(_frame(sweeps, "metrics", ("trial_id", "task_key", "metric")))


def load_trials(sweeps: Sweeps, *, attempts: bool = False) -> pd.DataFrame:
    """One row a trial: its latest attempt (all of them with attempts=True), with status, failure, times and provenance."""
    return _with_options(_frame(sweeps, "trials", ("trial_id",) if not attempts else ()))


def load_samples(sweeps: Sweeps) -> pd.DataFrame:
    """One row an evaluation, outcomes as lists in the order of the examples; compare rows with equal `requests_hash` only."""
    return _with_options(_frame(sweeps, "samples", ("trial_id", "task_key")))


def load_layers(sweeps: Sweeps) -> pd.DataFrame:
    """One row a trial and layer: stored bits and quantization error."""
    return _with_options(_frame(sweeps, "layers", ("trial_id", "layer")))


def _frame(sweeps: Sweeps, table: str, keys: tuple[str, ...]) -> pd.DataFrame:
    folders = [Path(sweeps)] if isinstance(sweeps, (str, Path)) else [Path(s) for s in sweeps]
    tables = []
    for folder in folders:
        if not (folder / table).is_dir():
            raise ResultsError(f"{folder} is not the folder of a sweep (it has no {table}/). Sweeps lie under results/<name>")
        rows = records.read_table(folder, table)
        rows = records.latest(rows, keys) if keys else rows
        tables.append(rows.append_column("sweep", pa.array([folder.resolve().name] * rows.num_rows, pa.string())))
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    return frame


def _with_options(frame: pd.DataFrame) -> pd.DataFrame:
    """Spread the JSON columns of options over one column each: data_type_exponent_bits, method_…."""
    for prefix in ("data_type", "method"):
        column = f"{prefix}_options"
        parsed = {text: json.loads(text) for text in frame[column].unique()}
        for key in sorted({key for options in parsed.values() for key in options}):
            lookup = {text: options.get(key) for text, options in parsed.items()}
            frame[f"{prefix}_{key}"] = frame[column].map(lookup)
    return frame
