"""The results: four tables, what is in them, and how they are written and read.

    metrics/   one row an evaluation and metric; only successful evaluations; what is done is what is here
    trials/    one row an attempt at a trial: how it went, how long it took, what ran it; failures live here
    samples/   one list-valued row an evaluation: outcomes example by example, for paired tests
    layers/    one row a quantized layer of a trial: bits stored, error

A worker owns its files: it rewrites its newest small file whole after each task and replaces it
atomically (`quantsweep.storage.files`), and begins another when that one is large.  Nothing is ever
appended to, no two processes write one file, so a plain `pandas.read_parquet` sees whole rows at any moment
(what it sees while files are folded: `quantsweep.tables.table_files`).

The samples of an evaluation are written before its metrics: a pair (trial_id, task_key) that is in
`metrics/` is complete.  Where a pair stands more than once (two workers ran it), `quantsweep.tables.effective` says which one counts.
Rows that were forgotten on purpose (`quantsweep.tables.forgetting`) are left out by everything that reads here.
"""

from __future__ import annotations

import contextlib
import errno
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from quantsweep.errors import ResultsError
from quantsweep.storage.files import filesystem_now, write_table
from quantsweep.storage.paths import TABLES, SweepFolder
from quantsweep.storage.workers import read_records, worker_of_file
from quantsweep.tables.columns import FACTOR_COLUMNS, NEEDED_TO_FILL, Column, factor_columns, filled
from quantsweep.tables.forgetting import read_forgotten
from quantsweep.tables.order import launches
from quantsweep.tables.table_files import FINAL, add_columns, list_files, make_place, next_place, places_of, table_files
from quantsweep.trial.specs import PlannedTrial, TaskSpec, TrialSpec, canonical_json

SCHEMA_VERSION = 2
"""Raised when a column changes its meaning.  New columns need no new version: where a file lacks one, it is read as null."""
MAX_ROWS = {"trials": 1_000, "metrics": 3_200, "samples": 1_600, "layers": 4_000}
"""Rows after which a worker begins another file: small enough to rewrite after each task, large enough to be few."""
MAX_BYTES = 4 * 2**20
"""The same by size in memory: outcomes example by example may be long."""
GONE_SECONDS = 90.0
"""How long a reader goes on listing when files vanish under its hands: an NFS client remembers names for up to a minute."""
DAMAGED_SECONDS = 3.0
"""How long before a file that does not parse counts as damaged: it may have been replaced while it was read."""

WHAT_IS_LOST = {
    "metrics": "the evaluations in it run again with the next launch",
    "trials": "how these trials went (failures, times, provenance) is lost with it; their results are not, and none of them runs again",
    "samples": "outcomes example by example are lost with it, values are not, and nothing runs again by itself: "
    "quantsweep rerun forgets evaluations, then the launch command makes them anew",
    "layers": "bits and errors of these layers are lost with it, values are not, and nothing runs again by itself: "
    "quantsweep rerun forgets trials, then the launch command makes them anew",
}
"""What becomes of the rows of a file that is moved away."""


_TEXT, _INT, _LONG, _REAL, _FLAG = pa.string(), pa.int32(), pa.int64(), pa.float64(), pa.bool_()
_TIME = pa.timestamp("us", tz="UTC")

IDENTITY = (
    Column("trial_id", _TEXT, "hash", "16 hexadecimal digits over everything that can change a number (TrialSpec.trial_id)"),
    Column("model", _TEXT, "name", "model, as in conf/model"),
    Column("family", _TEXT, "name", "model family: sizes of one family make one scaling curve"),
    Column("model_content", _TEXT, "", "the exact weights: commit of the hub, or hash of the local files"),
    Column("method", _TEXT, "name", "the method that was named, and steps that are others than its own; none is the unquantized baseline"),
    Column("method_version", _INT, "", "version of its rounding's numbers, raised by hand"),
    Column("data_type_version", _INT, "", "version of the data type's numbers; null for the baseline"),
    Column("data_type", _TEXT, "name", "element data type; null for the baseline"),
    Column("bit_width", _INT, "bits", "bits of one code; null for the baseline and for methods without a data type"),
    Column("granularity", _TEXT, "block, channel, tensor", "which weights share a scale; null for the baseline"),
    Column("block_size", _INT, "weights", "weights that share a scale where granularity is block, else null"),
    Column("block_axis", _TEXT, "flat, input", "direction in which blocks run"),
    Column("symmetric", _FLAG, "", "levels are symmetric about zero (no zero point)"),
    Column("scale_dtype", _TEXT, "name", "what scales are stored in"),
    Column("data_type_options", _TEXT, "JSON", "options of the data type, defaults written out"),
    Column("method_options", _TEXT, "JSON", "options of the rounding, defaults written out"),
    *FACTOR_COLUMNS,
    Column("calibration", _TEXT, "name", "calibration text; null where no step looks at any"),
    Column("calibration_content", _TEXT, "", "the exact text: hash of its file, or commit of the data set, and its column; null as above"),
    Column("calibration_rule", _TEXT, "", "how sequences are cut out of it, and its version; null without calibration"),
    Column("calibration_samples", _INT, "sequences", "calibration.num_samples; null without calibration, and in older tables"),
    Column("calibration_length", _INT, "tokens", "calibration.sequence_length; null without calibration, and in older tables"),
    Column("calibration_seed", _LONG, "", "calibration.seed: where the text is cut; null without calibration, and in older tables"),
    Column("seed", _LONG, "", "seed; null where nothing is random"),
    Column("dtype", _TEXT, "name", "dtype in which the model computed"),
    Column("plant_channels", _INT, "channels", "outlier channels planted into the model (model.plant_outliers); null for the plain model"),
    Column("plant_scale", _REAL, "", "factor by which they were made larger; null for the plain model"),
    Column("plant_seed", _LONG, "", "which channels; null for the plain model"),
)
TASK = (
    Column("task", _TEXT, "name", "task, as in conf/task"),
    Column("task_key", _TEXT, "", "task with version, few-shot count, limit, window and protocol: what makes two evaluations the same"),
    Column("num_fewshot", _INT, "examples", "examples in the prompt; null: the task's own default"),
    Column("limit", _INT, "examples", "only the first so many; null: all"),
    Column(
        "protocol",
        _TEXT,
        "",
        "lm_eval: lm-eval's own encoding and scoring, its faults included; null: ours. Of a perplexity: how its text is joined and cut",
    ),
)
SIZE = (
    Column("num_parameters", _LONG, "parameters", "all parameters of the loaded model, tied ones once"),
    Column("num_embedding_parameters", _LONG, "parameters", "of them token and position embeddings and an untied output head"),
    Column("num_quantized", _LONG, "parameters", "of them in quantized layers"),
    Column(
        "num_fallbacks",
        _INT,
        "layers",
        "layers that were done otherwise than asked (`fallbacks` of the table layers); null in older tables",
    ),
    Column("calibration_hash", _TEXT, "hash", "of the tokens of the calibration text; null without one, and in older tables"),
    Column(
        "bits_per_weight", _REAL, "bits", "stored bits a quantized weight, all counted (kept columns and means too); 16 for the baseline"
    ),
    Column("total_model_bits", _REAL, "bits", "stored bits of the whole model; what is not quantized counts 16 a parameter"),
    Column("total_model_bits_without_embeddings", _REAL, "bits", "the same without num_embedding_parameters"),
    Column("architecture", _TEXT, "name", "model_type of the model's config.json; null in older tables"),
    Column(
        "architecture_known",
        _FLAG,
        "",
        "somebody has looked at which of its layers are to be quantized; if false, `quantsweep plan` lists those that are",
    ),
)
PROVENANCE = (
    Column("attempt", _TEXT, "hash", "which run of this trial wrote the row: joins metrics, samples and layers to trials"),
    Column("shard_id", _INT, "", "shard of the plan"),
    Column("plan", _TEXT, "file name", "plan of the launch or retry, in plan/; its number only grows"),
    Column("launch", _INT, "", "number of the launch that asked for it (that of its plan, or of the plan that a retry descends from)"),
    Column("tag", _TEXT, "", "what was typed as tag=… for that launch; null where nothing was, and in older tables"),
    Column("life", _INT, "restarts", "how often Slurm had started the job again"),
    Column("finished_at", _TIME, "UTC", "when the row was made, by its machine's clock; for people: which row counts is not told by it"),
    Column("host", _TEXT, "", "machine"),
    Column("device", _TEXT, "", "GPU by name, or the processor"),
    Column("driver", _TEXT, "", "GPU driver; null on a processor"),
    Column("slurm_job", _TEXT, "", "Slurm job and array task; null elsewhere"),
    Column("code_commit", _TEXT, "git commit", "commit of the checkout that ran; null outside a checkout"),
    Column("code_diff", _TEXT, "hash", "uncommitted changes, kept as code/<hash>.diff; null if there were none"),
    Column("code_hash", _TEXT, "hash", "the Python files of quantsweep that the trial's process imported; null in older tables"),
    Column("versions", _TEXT, "JSON", "versions of Python and of the libraries that can change a number"),
    Column("schema_version", _INT, "", "version of these tables"),
)

COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "metrics": (
        *IDENTITY,
        *TASK,
        Column("metric", _TEXT, "name", "metric, as lm-eval names it"),
        Column("value", _REAL, "", "its value; NaN and infinity are results"),
        Column("stderr", _REAL, "as value", "standard error over the examples (delta method for ratios and exponentials)"),
        Column("num_samples", _INT, "examples", "examples behind the value"),
        Column("higher_is_better", _FLAG, "", "direction of the metric"),
        Column("is_primary", _FLAG, "", "the task's headline metric"),
        Column("requests_hash", _TEXT, "hash", "rendered requests; evaluations with equal hashes may be compared example by example"),
        Column("data_revision", _TEXT, "", "commit or hash of the task's data; null where it cannot be known"),
        Column("window", _INT, "tokens", "length of the windows that a rolling task's documents are cut into; null for other tasks"),
        Column("num_tokens", _LONG, "tokens", "tokens scored"),
        Column("num_input_tokens", _LONG, "tokens", "tokens that went through the model, contexts included"),
        Column(
            "num_truncated",
            _INT,
            "requests",
            "requests whose context was cut on the left to fit the model (as lm-eval cuts it): these have no start token",
        ),
        Column(
            "num_nonfinite", _INT, "requests", "requests whose log-likelihood is NaN or infinite; an accuracy that would compare NaN is NaN"
        ),
        Column("batch_size", _INT, "sequences", "batch size that was used"),
        Column("evaluate_seconds", _REAL, "s", "time of the whole evaluation (the same in each of its metrics)"),
        *SIZE,
        *PROVENANCE,
    ),
    "trials": (
        *IDENTITY,
        Column("label", _TEXT, "", "the trial in words"),
        Column("status", _TEXT, "done, failed", "how the attempt ended"),
        Column("failure_class", _TEXT, "name", "cause of a failure (quantsweep.failures.classes); null if done"),
        Column("failure_message", _TEXT, "", "the error's own words"),
        Column("failure_fingerprint", _TEXT, "hash", "same code path, same fingerprint: exception type and functions of the traceback"),
        Column("failure_traceback", _TEXT, "", "traceback, where there is one"),
        Column("num_tasks", _INT, "", "tasks of this attempt that got their rows"),
        Column("started_at", _TIME, "UTC", "when the attempt began"),
        Column("load_seconds", _REAL, "s", "loading the model; 0 when it was loaded already"),
        Column("quantize_seconds", _REAL, "s", "quantizing"),
        Column("evaluate_seconds", _REAL, "s", "evaluating, all tasks"),
        Column("write_seconds", _REAL, "s", "writing rows"),
        Column("restore_seconds", _REAL, "s", "putting the original weights back and checking them"),
        Column(
            "calibration_overlap",
            _REAL,
            "share",
            "calibration sequences that have 13 words in a row with what the attempt's tasks score; null without, and in older tables",
        ),
        Column("peak_memory_bytes", _LONG, "bytes", "peak memory of the device (GPU) or of the process (processor)"),
        Column("energy_joules", _REAL, "J", "energy of the GPU while the trial ran; null where it does not tell"),
        Column("log", _TEXT, "file name", "log, in logs/"),
        Column("log_start", _LONG, "bytes", "where the trial's part of the log begins"),
        Column("log_end", _LONG, "bytes", "and ends"),
        Column("config", _TEXT, "JSON", "the resolved configuration: trial and tasks"),
        *SIZE,
        *PROVENANCE,
    ),
    "samples": (
        *IDENTITY,
        *TASK,
        Column("requests_hash", _TEXT, "hash", "as in metrics"),
        Column(
            "correct", pa.list_(pa.bool_()), "", "right or wrong, example by example (null: NaN, no outcome); null for perplexity tasks"
        ),
        Column("correct_norm", pa.list_(pa.bool_()), "", "the same for length-normalised scores; null where the task has none"),
        Column("loglikelihood", pa.list_(pa.float32()), "nats", "log-likelihood of the right answer, of the document, or of the window"),
        Column("num_bytes", pa.list_(pa.int32()), "bytes", "length of each document; null where the task is not a perplexity"),
        *PROVENANCE,
    ),
    "layers": (
        *IDENTITY,
        Column("layer", _TEXT, "name", "module of the model"),
        Column("out_features", _INT, "", "rows of the weight"),
        Column("in_features", _INT, "", "columns of the weight"),
        Column("bits", _REAL, "bits", "stored bits of this weight, all counted"),
        Column("relative_error", _REAL, "", "squared Frobenius norm of the error over that of the weight"),
        Column("max_abs_error", _REAL, "as weight", "largest error of one weight"),
        Column("num_kept_columns", _INT, "columns", "input columns of the weight that stayed at 16 bit; null in older tables"),
        Column("bits_by_part", _TEXT, "bits", "`bits` part by part: blocks=… (codes, scales), then what a step stores beside them"),
        Column(
            "output_error", _REAL, "", "squared error of the layer's outputs on its calibration inputs over their size; null without any"
        ),
        Column("num_tokens", _LONG, "tokens", "calibration tokens that the layer saw; null without calibration"),
        Column("seconds", _REAL, "s", "from reading the weight to writing it; shared passes of calibration are not in it"),
        Column("fallbacks", _TEXT, "", "what was done otherwise than asked; empty for nothing"),
        *PROVENANCE,
    ),
}


def arrow_schema(table: str) -> pa.Schema:
    """The Arrow schema of one table."""
    return pa.schema([(column.name, column.type) for column in COLUMNS[table]])


# --- rows ---------------------------------------------------------------------------------------------------------------


def identity_columns(trial: TrialSpec) -> dict[str, Any]:
    """The axes of a trial as columns."""
    q, planted, text = trial.quantization, trial.model.plant_outliers, trial.calibration
    granularity = None if q.data_type is None else "tensor" if q.block_size == "tensor" else "channel" if q.block_size is None else "block"
    return {
        "trial_id": trial.trial_id,
        "model": trial.model.name,
        "family": trial.model.family,
        "model_content": trial.model.content,
        "method": q.method,
        "method_version": q.rounding.version,
        "data_type_version": q.data_type_version,
        "data_type": q.data_type,
        "bit_width": q.bit_width,
        "granularity": granularity,
        "block_size": q.block_size if granularity == "block" else None,
        "block_axis": q.block_axis,
        "symmetric": q.symmetric,
        "scale_dtype": q.scale_dtype,
        "data_type_options": canonical_json(dict(q.data_type_options)),
        "method_options": canonical_json(dict(q.rounding.options)),
        **factor_columns(q),
        "calibration": None if text is None else text.name,
        "calibration_content": None if text is None else f"{text.content} {text.column}",
        "calibration_rule": None if text is None else f"{text.rule}@{text.version}",
        "calibration_samples": None if text is None else text.num_samples,
        "calibration_length": None if text is None else text.sequence_length,
        "calibration_seed": None if text is None else text.seed,
        "seed": trial.seed,
        "dtype": trial.model.dtype,
        "plant_channels": None if planted is None else planted.channels,
        "plant_scale": None if planted is None else planted.scale,
        "plant_seed": None if planted is None else planted.seed,
    }


def task_columns(task: TaskSpec) -> dict[str, Any]:
    """A task as columns."""
    return {
        "task": task.name,
        "task_key": task.task_key,
        "num_fewshot": task.num_fewshot,
        "limit": task.limit,
        "protocol": task.protocol,
    }


def config_json(planned: PlannedTrial) -> str:
    """The resolved configuration of a trial, as kept in `trials.config`."""
    return planned.to_json()


# --- writing ------------------------------------------------------------------------------------------------------------


class Writer:
    """One worker's files: `<worker>-<part>.parquet` in each table, of which only the newest part is ever written.

    One writer serves a worker for its whole life, so that its rows stand in few files.  `add` is durable
    when it returns: the rows survive a kill, a crash, a power cut.
    """

    def __init__(self, folder: SweepFolder, worker: str) -> None:
        self._folder = folder
        self._worker = worker
        self._parts = dict.fromkeys(TABLES, 0)
        self._tables: dict[str, pa.Table] = {}

    def add(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to one of the tables; raises OSError (a full disk, say) with the old file left standing."""
        if not rows:
            return
        new = _rows_table(table, rows)
        held = self._tables.get(table)
        if held is not None and (held.num_rows + new.num_rows > MAX_ROWS[table] or held.nbytes + new.nbytes > MAX_BYTES):
            self._parts[table] += 1
            held = None
        if held is None:
            make_ready(self._folder, table)
            while self._path(table).exists():  # names of workers are unique; should one ever come back, it overwrites nothing
                self._parts[table] += 1
        whole = new if held is None else pa.concat_tables([held, new]).combine_chunks()
        write_table(self._path(table), whole)
        self._tables[table] = whole

    def _path(self, table: str) -> Path:
        return self._folder.table(table) / f"{self._worker}-{self._parts[table]:03d}.parquet"


def write_rows(folder: SweepFolder, table: str, rows: Sequence[Mapping[str, Any]], stem: str) -> None:
    """Write one file of rows that is final at once, `<stem>.final.parquet`: no worker owns it, compaction may fold it any time.

    Durable when it returns.  The same stem again replaces the file.
    """
    if rows:
        make_ready(folder, table)
        write_table(folder.table(table) / f"{stem}{FINAL}", _rows_table(table, rows))


def make_ready(folder: SweepFolder, table: str) -> None:
    """See to it, before the first row of this version is written, that plain readers see every column of every file.

    Files that an older version has closed get the columns that they lack (null); then a place with all columns is made,
    which plain readers come to first (`quantsweep.tables.table_files`).
    """
    room, schema = folder.table(table), arrow_schema(table)
    if places_of(room, schema):
        return
    files = table_files(room)
    if files:
        ended = {heard.record.worker for heard in read_records(folder) if heard.record.ended is not None}
        owners = {path: None if path.name.endswith(FINAL) else worker_of_file(path) for path in files}
        with contextlib.suppress(pa.lib.ArrowException, FileNotFoundError):  # damaged, or being compacted: said by whoever reads
            add_columns((path for path, owner in owners.items() if owner is None or owner[0] in ended), schema)
    make_place(room, next_place(room, schema), schema)


def _rows_table(table: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    schema = arrow_schema(table)
    for row in rows:
        if set(row) != set(schema.names):
            raise ResultsError(
                f"row of table {table}: missing {sorted(set(schema.names) - set(row))}, unknown {sorted(set(row) - set(schema.names))}"
            )
    return pa.Table.from_pylist(list(rows), schema=schema)


# --- reading ------------------------------------------------------------------------------------------------------------


def read_table(folder: Path, table: str, columns: Iterable[str] | None = None) -> pa.Table:
    """All rows of one table of one sweep, as written, but for those that are forgotten; an empty table if there are none.

    Files whose name begins with a dot are unfinished and are left out.  Columns that a file of an
    older version does not have are null,
    factors (`quantsweep.tables.columns`) none.  Raises ResultsError for a file that is not Parquet, by name:
    a damaged file is said, never skipped.
    """
    return decoded(read_encoded(folder, table, columns), table)


def decoded(rows: pa.Table, table: str) -> pa.Table:
    """Encoded rows of a table with plain texts again."""
    schema = pa.schema([arrow_schema(table).field(name) for name in rows.column_names])
    with ThreadPoolExecutor() as pool:  # Arrow casts one column after the other, on one core
        return pa.table(list(pool.map(lambda field: rows.column(field.name).cast(field.type), schema)), schema=schema)


def read_encoded(folder: Path, table: str, columns: Iterable[str] | None = None) -> pa.Table:
    """The same as `read_table`, texts dictionary-encoded: a third of the memory, and quick to sort and compare."""
    forgotten = read_forgotten(folder)
    names = list(columns) if columns is not None else arrow_schema(table).names
    needed = [*names, *forgotten.columns(table), *(["plan"] if "launch" in names else [])]
    needed += [other for name in needed for other in NEEDED_TO_FILL.get(name, ())]
    rows = filled(_read_patiently(folder / table, table, list(dict.fromkeys(needed))))
    gone = forgotten.mask(table, rows)
    return _with_launches(rows.filter(pa.array(~gone)) if gone.any() else rows, folder).select(names)


def _with_launches(rows: pa.Table, folder: Path) -> pa.Table:
    """The rows with the column `launch`, if they have it, filled where an older version wrote none."""
    if "launch" not in rows.column_names or not rows.column("launch").null_count:
        return rows
    place = rows.column_names.index("launch")
    return rows.set_column(place, "launch", pa.chunked_array([pa.array(launches(rows, folder / "plan"), pa.int32())]))


def _read_patiently(room: Path, table: str, names: list[str]) -> pa.Table:
    """Read, and list again where files changed under our hands.

    A file that is gone was folded into another (on NFS its name may be shown for a minute more); one
    that does not parse may have been replaced while it was read, unless it stays so.
    """
    began, wait = time.monotonic(), 0.02
    while True:
        files: tuple[Path, ...] = ()
        try:
            listing = list_files(room)
            files = listing.files
            rows = _read_files(files, table, names)
            if listing.still_holds():
                return rows
        except (OSError, pa.lib.ArrowException) as error:
            gone = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.ESTALE
            if time.monotonic() - began > (GONE_SECONDS if gone else DAMAGED_SECONDS):
                raise ResultsError(_unreadable_text(room, table, files, error, gone=gone)) from error
        time.sleep(wait)
        wait = min(2 * wait, 5.0)
        refresh(room)


def _unreadable_text(room: Path, table: str, files: Iterable[Path], error: Exception, *, gone: bool) -> str:
    if gone:
        path = _unreadable(files, table) or room
        return f"{path} cannot be read: {error}. Its name is listed, but it cannot be opened: look at the file system"
    return damaged_text(_unreadable(files, table) or room, table, error)


def damaged_text(path: Path, table: str, error: Exception | str) -> str:
    """What a file of a table that cannot be read means, and what brings back what was in it."""
    if isinstance(error, PermissionError):
        return f"{path} cannot be read: {error.strerror}. Ask {path.parent}'s owner for the right to read it"
    words = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{path} cannot be read: {words}. Move it away; {WHAT_IS_LOST[table]}"


def _read_files(files: Sequence[Path], table: str, names: list[str]) -> pa.Table:
    schema = _encoded_schema(table)
    if not files:
        return pa.schema([schema.field(name) for name in names]).empty_table()
    form = ds.ParquetFileFormat(dictionary_columns=[field.name for field in schema if pa.types.is_dictionary(field.type)])
    asked = list(dict.fromkeys([*names, "trial_id"]))
    whole = ds.dataset([str(file) for file in files], schema=schema, format=form).to_table(columns=asked)
    if whole.column("trial_id").null_count:
        raise pa.ArrowInvalid("it has rows without a trial_id: it is not a file of this table")
    return whole.select(names)


def read_file(content: bytes, table: str, columns: Iterable[str]) -> tuple[pa.Table, frozenset[str]]:
    """Some columns of one file's content, as `read_encoded` gives them, and the file's columns that this version does not know.

    Columns that the file does not have are null, factors none.
    """
    schema = _encoded_schema(table)
    metadata = pq.read_metadata(io.BytesIO(content))
    there = frozenset(metadata.schema.to_arrow_schema().names)
    if "trial_id" not in there:
        raise pa.ArrowInvalid("it has no column trial_id: it is not a file of this table")
    texts = [field.name for field in schema if pa.types.is_dictionary(field.type) and field.name in there]
    names = list(columns)
    wide = list(dict.fromkeys([*names, *(other for name in names for other in NEEDED_TO_FILL.get(name, ()))]))
    rows = pq.ParquetFile(io.BytesIO(content), metadata=metadata, read_dictionary=texts).read([name for name in wide if name in there])
    arrays = [rows.column(name) if name in there else pa.nulls(metadata.num_rows, schema.field(name).type) for name in wide]
    whole = filled(pa.table(arrays, names=wide).cast(pa.schema([schema.field(name) for name in wide])))
    return whole.select(names), there - set(schema.names)


def _encoded_schema(table: str) -> pa.Schema:
    code = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([(field.name, code if field.type == pa.string() else field.type) for field in arrow_schema(table)])


def _unreadable(files: Iterable[Path], table: str) -> Path | None:
    """The first file that cannot be read as one of the table."""
    for file in files:
        try:
            if read_file(file.read_bytes(), table, arrow_schema(table).names)[0].column("trial_id").null_count:
                return file
        except (OSError, pa.lib.ArrowException):
            return file
    return None


def refresh(room: Path) -> None:
    """Have this machine's view of a folder renewed (`quantsweep.storage.files.filesystem_now`), if we may write there; readers may not."""
    with contextlib.suppress(OSError):
        filesystem_now(room)


def read_done(folder: Path) -> frozenset[tuple[str, str]]:
    """The pairs (trial_id, task_key) that have a durable row, as seen now: other hosts' latest rows included."""
    refresh(folder / "plan")
    refresh(folder / "metrics")
    rows = read_encoded(folder, "metrics", ["trial_id", "task_key"])
    codes, _ = row_codes(rows, ["trial_id", "task_key"])
    some = np.unique(codes, return_index=True)[1]
    # Each distinct text becomes one Python object, shared by its pairs: most of the time would go into making them.
    trials, tasks = (_texts(rows.column(name), some) for name in ("trial_id", "task_key"))
    return frozenset(zip(trials, tasks, strict=True))


def _texts(column: pa.ChunkedArray, places: npt.NDArray[np.int64]) -> Iterator[str]:
    whole = encoded(column)
    return map(whole.dictionary.to_pylist().__getitem__, whole.indices.to_numpy()[places].tolist())


def row_codes(table: pa.Table, keys: Sequence[str]) -> tuple[npt.NDArray[np.int64], int]:
    """(one number a row, equal exactly where all `keys` are equal; a bound above all of them).  Null equals null."""
    codes, count = np.zeros(table.num_rows, np.int64), 1
    for key in keys:
        column = encoded(table.column(key))
        size = len(column.dictionary) + 1
        codes = codes * size + pc.fill_null(column.indices.cast(pa.int64()), size - 1).to_numpy(zero_copy_only=False)
        count *= size
        if count > 4 * table.num_rows + 1_000:  # keep the numbers small: they serve as places in arrays
            distinct, codes = np.unique(codes, return_inverse=True)
            count = len(distinct)
    return codes, count


def encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A column as one dictionary array: distinct values, and for each row the place of its value (null stays null)."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    if column.num_chunks == 0:
        return pa.array([], column.type)
    whole = column.unify_dictionaries().combine_chunks()
    return whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
