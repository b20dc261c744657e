"""Reading results into pandas.

    df = quantsweep.load_results("results/quickstart")     one row a trial, task and metric
    quantsweep.load_trials(...)                            one row an attempt: status, failures, times
    quantsweep.load_samples(...)                           one row an evaluation: outcomes example by example

A sweep may still be running: rows are whole whenever they can be seen.  They come in the order of the files, which
means nothing; what was forgotten (`quantsweep rerun`) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from quantsweep.errors import ResultsError
from quantsweep.tables import records
from quantsweep.tables.effective import effective

if TYPE_CHECKING:
    import pandas as pd

WHOLE_OR_NULL = (
    "data_type_version",
    "bit_width",
    "block_size",
    "activation_bit_width",
    "calibration_samples",
    "calibration_length",
    "calibration_seed",
    "seed",
    "num_fewshot",
    "limit",
    "plant_channels",
    "plant_seed",
)
"""Axes of `records.IDENTITY` and `records.TASK` that are whole numbers or null: columns of pandas' Int64, with <NA> for null."""

Sweeps = str | Path | Iterable[str | Path]


def load_results(sweeps: Sweeps) -> pd.DataFrame:
    """One row for each trial, task and metric, exactly once, every axis a column; options of methods and data types too.

    Axes that are whole numbers or null (bit_width, block_size, …) are of pandas' Int64: a baseline has <NA> there.
    sweeps: the folder of a sweep, or several of different names (the column `sweep` tells them apart).
    """
    return _frame(sweeps, "metrics")


def load_trials(sweeps: Sweeps, *, attempts: bool = False) -> pd.DataFrame:
    """One row a trial: the attempt that counts, with status, failure, times and provenance; attempts=True: all attempts, as each ended.

    A trial is `done` where everything that its attempt was to evaluate has its row, also if that attempt failed afterwards or another
    one wrote the rows: as `load_results` and `quantsweep status` have it.
    """
    return _frame(sweeps, "trials", whole=attempts)


def load_samples(sweeps: Sweeps) -> pd.DataFrame:
    """One row an evaluation, outcomes as lists in the order of the examples; compare rows with equal `requests_hash` only."""
    return _frame(sweeps, "samples")


def load_layers(sweeps: Sweeps) -> pd.DataFrame:
    """One row a trial and layer: stored bits and quantization error."""
    return _frame(sweeps, "layers")


def _frame(sweeps: Sweeps, table: str, *, whole: bool = False) -> pd.DataFrame:
    tables, names = [], []
    for name, folder in _folders(sweeps, table).items():
        rows = records.read_encoded(folder, table)
        tables.append(rows if whole else effective(folder, table, rows))
        names.append(pa.array([name] * tables[-1].num_rows, pa.string()))
    # Texts stay encoded until here: choosing rows is quick on codes.  Users get plain text columns, not categories,
    # which sort by first appearance, keep values that no row has, and fall apart when frames are joined.
    encoded = pa.concat_tables(tables)
    plain = records.decoded(encoded, table).append_column("sweep", pa.chunked_array(names))
    frame: pd.DataFrame = plain.to_pandas(split_blocks=True)
    return frame.assign(**_whole_numbers(plain), **_options(encoded))


def _folders(sweeps: Sweeps, table: str) -> dict[str, Path]:
    """Folder by the name that the column `sweep` tells it by; raises ResultsError where rows would be double, or two sweeps one."""
    folders: dict[str, Path] = {}
    for folder in [Path(sweeps)] if isinstance(sweeps, (str, Path)) else map(Path, sweeps):
        if not (folder / table).is_dir():
            files = ". Its .parquet files are read with pandas.read_parquet" if any(folder.glob("*.parquet")) else ""
            raise ResultsError(f"{folder} is not the folder of a sweep (it has no {table}/). Sweeps lie under results/<name>{files}")
        place = folder.resolve()
        if place in folders.values():
            raise ResultsError(f"{folder} is given twice; its rows would be double. Give each sweep once")
        if place.name in folders:
            raise ResultsError(
                f"{folders[place.name]} and {place} are two sweeps of one name, {place.name}: "
                "the column `sweep` could not tell them apart. Rename one of the folders, or load them one after the other"
            )
        folders[place.name] = place
    if not folders:
        raise ResultsError("no sweep to load: give the folder of a sweep, such as results/quickstart, or several")
    return folders


def _whole_numbers(rows: pa.Table) -> dict[str, pd.Series[Any]]:
    """The axes that are whole numbers or null, as such: pandas itself would turn 4 bits into 4.0 beside a baseline, which has none."""
    import pandas as pd

    types = {pa.int32(): pd.Int64Dtype(), pa.int64(): pd.Int64Dtype()}
    return {name: rows.column(name).to_pandas(types_mapper=types.get) for name in WHOLE_OR_NULL if name in rows.column_names}


def _options(rows: pa.Table) -> dict[str, pd.Series[Any]]:
    """The JSON columns of options, one column each option: data_type_exponent_bits, method_…, transform_smooth_alpha."""
    import pandas as pd

    columns: dict[str, pd.Series[Any]] = {}
    for name, prefix in (("data_type_options", "data_type_"), ("method_options", "method_"), ("step_options", "")):
        encoded = records.encoded(rows.column(name))
        parsed = [json.loads(text) for text in encoded.dictionary.to_pylist()]
        codes = encoded.indices.to_numpy()
        for key in sorted({key for options in parsed for key in options}):
            given = [options.get(key) for options in parsed]
            kinds = {type(value) for value in given if value is not None}
            values = pd.Series(given, dtype="Int64" if kinds == {int} else None)
            columns[f"{prefix}{key.replace('.', '_')}"] = values.take(codes).reset_index(drop=True)
    return columns
