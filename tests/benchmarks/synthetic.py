"""Tables as a sweep that ran would have left them, made in seconds: for benchmarks of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.trial.specs import PlannedTrial, TaskSpec

TRIALS_A_WORKER = 3_000
METRICS = ("bits_per_byte", "word_perplexity")
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
_VALUES: dict[pa.DataType, Any] = {
    pa.string(): "x",
    pa.int32(): 1,
    pa.int64(): 1_000,
    pa.float64(): 0.5,
    pa.bool_(): True,
    pa.timestamp("us", tz="UTC"): BEGAN,
}


def write_done(folder: SweepFolder, trials: Sequence[PlannedTrial], *, device: str = "EPYC") -> None:
    """Rows in `trials` and `metrics` for these trials, all of them done, in files as workers write them."""
    folder.create()
    for start in range(0, len(trials), TRIALS_A_WORKER):
        writer = records.Writer(folder, f"w{start:06d}")
        mine = trials[start : start + TRIALS_A_WORKER]
        for table, rows in (
            ("metrics", [row for n, planned in enumerate(mine, start) for row in metric_rows(planned, n, device)]),
            ("trials", [trial_row(planned, n, device) for n, planned in enumerate(mine, start)]),
        ):
            size = records.MAX_ROWS[table]
            for first in range(0, len(rows), size):
                writer.add(table, rows[first : first + size])


def trial_row(planned: PlannedTrial, n: int, device: str) -> dict[str, Any]:
    """The row of the n-th trial in `trials`."""
    own = {"label": planned.trial.label, "status": "done", "config": records.config_json(planned), "num_tasks": len(planned.tasks)}
    empty = {c.name: None for c in records.COLUMNS["trials"] if c.name.startswith("failure_")}
    return _row("trials", planned, n, device) | own | empty


def metric_rows(planned: PlannedTrial, n: int, device: str) -> list[dict[str, Any]]:
    """The rows of the n-th trial in `metrics`: METRICS of each task."""
    return [_metric_row(planned, task, metric, n, device) for task in planned.tasks for metric in METRICS]


def _metric_row(planned: PlannedTrial, task: TaskSpec, metric: str, n: int, device: str) -> dict[str, Any]:
    own = {"metric": metric, "is_primary": metric == METRICS[0], "num_samples": task.limit or 100, "num_input_tokens": 150}
    return _row("metrics", planned, n, device) | records.task_columns(task) | own


def _row(table: str, planned: PlannedTrial, n: int, device: str) -> dict[str, Any]:
    parameters = planned.trial.model.parameters or 1
    measured = {
        "attempt": f"{n:016x}",
        "finished_at": BEGAN + timedelta(seconds=n),
        "device": device,
        "driver": None,
        "num_parameters": parameters,
        "evaluate_seconds": 0.1 + 3e-8 * parameters * (1 + n % 7 / 50),
        "quantize_seconds": 0.05 + 1e-8 * parameters,
        "write_seconds": 0.01,
        "restore_seconds": 0.01,
    }
    columns = records.COLUMNS[table]
    names = {column.name for column in columns}
    return {
        **{column.name: _VALUES[column.type] for column in columns},
        **records.identity_columns(planned.trial),
        **{name: value for name, value in measured.items() if name in names},
    }
