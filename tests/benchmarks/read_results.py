"""How long results take to read, to fold and to write: seconds and megabytes on this machine.

    python -m tests.benchmarks.read_results [--trials 35000] [--tasks 5] [--metrics 4]

Makes a sweep as workers leave it (many small files), reads it, folds it (`quantsweep compact`), and reads it again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

import quantsweep
from quantsweep.cli.rerun import select
from quantsweep.storage.files import write_table
from quantsweep.storage.paths import TABLES, SweepFolder
from quantsweep.tables import compaction, records
from quantsweep.tables.compaction import compact
from quantsweep.tables.filters import parse
from quantsweep.tables.forgetting import write_fence
from tests.unit.engine_cases import trial

compaction.NAME_SECONDS = 0.0  # one machine looks
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
ROWS_PER_FILE = 1_600
VERSIONS = (
    '{"accelerate":"1.11.0","datasets":"4.4.1","lm_eval":"0.4.11","numpy":"2.3.5","python":"3.11.2","torch":"2.9.1","transformers":"5.1.0"}'
)
CONFIG = trial().to_json()


def trial_columns(n: int) -> dict[str, Any]:
    """Identity and provenance of the n-th trial."""
    return {
        "trial_id": f"{n * 2654435761 % 2**64:016x}",
        "model": f"mini-neox-{n % 7}m",
        "family": "mini-neox",
        "model_content": f"{n % 7:040x}",
        "method": "round_to_nearest",
        "method_version": 1,
        "data_type_version": 1,
        "data_type": ("int", "fp", "quantile", "dynamic")[n % 4],
        "bit_width": 3 + n % 6,
        "granularity": "block",
        "block_size": 16 * (1 + n // 100),
        "block_axis": "flat",
        "symmetric": True,
        "scale_dtype": "float16",
        "data_type_options": f'{{"convention":"kbit","exponent_bits":{n % 3}}}',
        "method_options": "{}",
        "calibration": None,
        "seed": None,
        "dtype": "float16",
        **dict.fromkeys(("plant_channels", "plant_scale", "plant_seed")),
        "attempt": f"{n * 40503 % 2**64:016x}",
        "shard_id": n // 20,
        "plan": "plan-00001-20260101T000000-1a2b3c4d.parquet",
        "launch": 1,
        "tag": None,
        "life": 0,
        "finished_at": BEGAN + timedelta(seconds=n),
        "host": f"node{n % 40:03d}",
        "device": "NVIDIA H100 80GB HBM3",
        "driver": "570.86.15",
        "slurm_job": f"123456_{n // 20}",
        "code_commit": "0" * 40,
        "code_diff": None,
        "code_hash": "c" * 16,
        "versions": VERSIONS,
        "schema_version": records.SCHEMA_VERSION,
        **{c.name: {pa.string(): "gpt_neox", pa.bool_(): True}.get(c.type, 1_000_000 + n) for c in records.SIZE},
        "bits_per_weight": 4.25,
    }


def metric_rows(n: int, tasks: int, metrics: int) -> Iterator[dict[str, Any]]:
    """The rows of the n-th trial in `metrics`."""
    common = trial_columns(n)
    rest = {
        "num_fewshot": None,
        "limit": 20,
        "protocol": None,
        "stderr": 0.01,
        "num_samples": 20,
        "higher_is_better": True,
        "data_revision": "d" * 16,
        "window": None,
        "num_tokens": 2_000,
        "num_input_tokens": 3_000,
        "num_truncated": 0,
        "num_nonfinite": 0,
        "batch_size": 16,
        "evaluate_seconds": 1.5,
    }
    for t in range(tasks):
        for m in range(metrics):
            names = {"task": f"task{t}", "task_key": f"task{t}@1.0+limit20", "metric": f"metric{m}", "requests_hash": f"{t:016x}"}
            yield {**common, **rest, **names, "value": (n * 7919 + t * 31 + m) % 1_000 / 1_000, "is_primary": m == 0}


def trial_row(n: int) -> dict[str, Any]:
    """The row of the n-th trial in `trials`: every twentieth failed."""
    failed = n % 20 == 0
    base = {column.name: 1 for column in records.COLUMNS["trials"]} | trial_columns(n)
    texts = ("class", "message", "fingerprint", "traceback")
    return base | {
        "label": f"mini-neox {n}",
        "status": "failed" if failed else "done",
        **{f"failure_{name}": f"{name} {n % 5}" if failed else None for name in texts},
        "started_at": BEGAN + timedelta(seconds=n),
        "log": f"worker-{n // 400}.log",
        "config": CONFIG,
    }


def make_sweep(folder: SweepFolder, trials: int, tasks: int, metrics: int) -> int:
    """Fill a sweep with rows in files of the size that workers write; returns how many metric rows."""
    folder.create()
    per_file = max(1, ROWS_PER_FILE // (tasks * metrics))
    for first in range(0, trials, per_file):
        numbers = range(first, min(first + per_file, trials))
        for table, rows in (
            ("metrics", [row for n in numbers for row in metric_rows(n, tasks, metrics)]),
            ("trials", [trial_row(n) for n in numbers]),
        ):
            whole = pa.Table.from_pylist(rows, schema=records.arrow_schema(table))
            write_table(folder.table(table) / f"node{first % 40:03d}-1-{first:x}-000.parquet", whole)
    return trials * tasks * metrics


def timed(label: str, call: Callable[[], Any], times: int = 3) -> None:
    """Run some times; print the first and the best: seconds on the clock, and of the processors in brackets."""
    taken = []
    for _ in range(times):
        wall, used = time.perf_counter(), time.process_time()
        result = call()
        taken.append((time.perf_counter() - wall, time.process_time() - used))
        size = f"{len(result):,}" if hasattr(result, "__len__") else ""
        del result
    (first, first_cpu), (best, best_cpu) = taken[0], min(taken)
    print(f"  {label:46} {first:6.2f} ({first_cpu:.2f})   {best:6.2f} ({best_cpu:.2f})   {size}", flush=True)


def read_all(folder: SweepFolder) -> None:
    """Everything that reads, once more after each change of the files."""
    print(f"{sum(1 for name in TABLES for _ in folder.table(name).iterdir())} files; seconds: first (CPU), best of three (CPU), rows")
    timed("load_results", lambda: quantsweep.load_results(folder.path))
    timed("load_trials", lambda: quantsweep.load_trials(folder.path))
    timed("read_done (what a resume must know)", lambda: records.read_done(folder.path))
    script = (
        "import pathlib, sys, quantsweep; n = len(quantsweep.load_results(sys.argv[1])); "  # (ru_maxrss would count the parent's)
        "peak = pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]; "
        "print(f'  {n:,} rows in a process of its own: peak memory {int(peak) / 1e3:.0f} MB')"
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", script, str(folder.path)], check=True)
    print(f"  …and {time.perf_counter() - began:.2f} s with Python's start and all imports", flush=True)


def write_one_by_one(folder: SweepFolder, tasks: int, metrics: int) -> None:
    """What one worker pays for durable rows: the mean of its calls while its file fills."""
    writer = records.Writer(folder, "writer-1")
    for table, rows in (("trials", lambda n: [trial_row(n)]), ("metrics", lambda n: list(metric_rows(n, 1, metrics)))):
        seconds, used, calls = time.perf_counter(), time.process_time(), records.MAX_ROWS[table] // len(rows(0))
        for n in range(calls):
            writer.add(table, rows(n))
        seconds, used = (time.perf_counter() - seconds) / calls, (time.process_time() - used) / calls
        print(f"  Writer.add to {table}, mean of {calls} calls: {seconds * 1e3:.1f} ms (CPU {used * 1e3:.1f} ms)", flush=True)


def main() -> None:
    """Make, read, fold, read, forget, read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=35_000)
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--metrics", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = SweepFolder(Path(place) / "sweep")
        rows = make_sweep(folder, arguments.trials, arguments.tasks, arguments.metrics)
        print(
            f"{arguments.trials:,} trials × {arguments.tasks} tasks × {arguments.metrics} metrics = {rows:,} rows, as workers leave them:"
        )
        read_all(folder)
        for path in (path for name in TABLES for path in folder.table(name).iterdir()):
            os.utime(path, (0, 0))  # their workers are long gone
        print("quantsweep compact:")
        timed("compact", lambda: compact(folder), times=1)
        timed("compact again: nothing to do", lambda: compact(folder), times=1)
        read_all(folder)
        print("quantsweep rerun bit_width=3 (a sixth of all):")
        timed("select", lambda: select(folder, parse(["bit_width=3"])), times=1)
        write_fence(folder, select(folder, parse(["bit_width=3"])).lines)
        read_all(folder)
        timed("compact: rewrites all files", lambda: compact(folder), times=1)
        read_all(folder)
        print("writing:")
        write_one_by_one(folder, arguments.tasks, arguments.metrics)


if __name__ == "__main__":
    main()
