"""The row of one attempt at a trial, whoever writes it: the worker that ran it, or who finds that its worker is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantsweep import records
from quantsweep.environment import Environment
from quantsweep.failures import Failure
from quantsweep.order import launch_number
from quantsweep.paths import SweepFolder
from quantsweep.specs import PlannedTrial, content_hash
from quantsweep.workers import WorkerRecord

FACTS = ("load_seconds", "quantize_seconds", "restore_seconds", "peak_memory_bytes", "energy_joules")


@dataclass
class Attempt:
    """What is known of a trial while it runs; becomes its row in `trials`.

    environment: what ran it; of a lost worker no more is known than its machine and its job.
    plan, launch, life: where its rows stand in the order (quantsweep.order).
    facts: what the child reported (FACTS, device, driver, code).  sizes: the columns of records.SIZE.
    """

    planned: PlannedTrial
    attempt: str
    plan: str
    launch: int
    life: int
    shard_id: int | None
    environment: Environment
    log: str
    log_start: int
    started_at: datetime
    facts: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    evaluate_seconds: float = 0.0
    write_seconds: float = 0.0
    num_tasks: int = 0

    @property
    def is_whole(self) -> bool:
        """True once every task has its row: the trial is done, whatever becomes of its process."""
        return self.num_tasks == len(self.planned.tasks)

    def common(self, now: datetime) -> dict[str, Any]:
        """The columns that every table has: the trial's axes and where the row comes from."""
        return {
            **records.identity_columns(self.planned.trial),
            "attempt": self.attempt,
            "shard_id": self.shard_id,
            "plan": self.plan,
            "launch": self.launch,
            "life": self.life,
            "finished_at": now,
            "device": self.facts.get("device"),
            "driver": self.facts.get("driver"),
            **asdict(self.environment),
            "code_hash": self.facts.get("code"),
            "schema_version": records.SCHEMA_VERSION,
        }

    def row(self, failure: Failure | None, now: datetime, log_end: int) -> dict[str, Any]:
        """The row of `trials`."""
        return {
            **self.common(now),
            "label": self.planned.trial.label,
            "status": "done" if failure is None else "failed",
            **_failure_columns(failure),
            "num_tasks": self.num_tasks,
            "started_at": self.started_at,
            **{key: self.facts.get(key) for key in FACTS},
            "evaluate_seconds": self.evaluate_seconds,
            "write_seconds": self.write_seconds,
            "log": self.log,
            "log_start": self.log_start,
            "log_end": log_end,
            "config": records.config_json(self.planned),
            **{column.name: self.sizes.get(column.name) for column in records.SIZE},
        }


def _failure_columns(failure: Failure | None) -> Mapping[str, Any]:
    fields = {"class": "failure_class", "message": "message", "fingerprint": "fingerprint", "traceback": "traceback"}
    return {f"failure_{name}": getattr(failure, key, None) for name, key in fields.items()}


def lost_row(folder: SweepFolder, record: WorkerRecord, planned: PlannedTrial, failure: Failure) -> dict[str, Any]:
    """The row of `trials` for an attempt whose worker cannot write it any more; the same loss has the same attempt id."""
    now = datetime.now(UTC)
    attempt = Attempt(
        planned=planned,
        attempt=content_hash([record.worker, planned.trial.trial_id, record.trial_started]),
        plan=record.plan,
        launch=launch_number(folder.plan, record.plan),
        life=record.restarts,
        shard_id=record.shard_id,
        environment=Environment(host=record.node, slurm_job=record.job, code_commit=None, code_diff=None, versions="{}"),
        log=Path(record.log).name,
        log_start=record.log_start,
        started_at=now if record.trial_started is None else datetime.fromtimestamp(record.trial_started, UTC),
    )
    return attempt.row(failure, now, log_end=record.log_start if not record.log else _size(record.log, record.log_start))


def _size(log: str, at_least: int) -> int:
    try:
        return max(at_least, Path(log).stat().st_size)
    except OSError:
        return at_least
