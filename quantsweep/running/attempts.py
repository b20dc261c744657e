"""The row of one attempt at a trial, whoever writes it: the worker that ran it, or who finds that its worker is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from quantsweep.failures.classes import Failure
from quantsweep.planning.plan import remaining_tasks
from quantsweep.planning.plan_files import read_header, read_shard
from quantsweep.running.environment import Environment
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import WorkerRecord
from quantsweep.tables import records
from quantsweep.tables.order import launch_number
from quantsweep.trial.specs import PlannedTrial, content_hash

FACTS = ("load_seconds", "quantize_seconds", "restore_seconds", "calibration_overlap", "peak_memory_bytes", "energy_joules")


@dataclass
class Attempt:
    """What is known of a trial while it runs; becomes its row in `trials`.

    environment: what ran it; of a lost worker no more is known than its machine and its job.
    plan, launch, life: where its rows stand in the order (quantsweep.tables.order).  tag: what its launch was told to keep with its rows.
    facts: what the child reported (FACTS, device, driver, code).  sizes: the columns of records.SIZE.
    """

    planned: PlannedTrial
    attempt: str
    plan: str
    launch: int
    tag: str | None
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
            "tag": self.tag,
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
    names = {"class": "failure_class", "message": "message", "fingerprint": "fingerprint", "traceback": "traceback"}
    return {f"failure_{name}": getattr(failure, key, None) for name, key in names.items()}


def lost_row(folder: SweepFolder, record: WorkerRecord, planned: PlannedTrial, failure: Failure) -> dict[str, Any]:
    """The row of `trials` for an attempt whose worker cannot write it any more; the same loss has the same attempt id."""
    now = datetime.now(UTC)
    attempt = Attempt(
        planned=planned,
        attempt=content_hash([record.worker, planned.trial.trial_id, record.trial_started]),
        plan=record.plan,
        launch=launch_number(folder.plan, record.plan),
        tag=_tag(folder.plan / record.plan),
        life=record.restarts,
        shard_id=record.shard_id,
        environment=Environment(host=record.node, slurm_job=record.job, code_commit=None, code_diff=None, versions="{}"),
        log=Path(record.log).name,
        log_start=record.log_start,
        started_at=now if record.trial_started is None else datetime.fromtimestamp(record.trial_started, UTC),
    )
    return attempt.row(failure, now, log_end=record.log_start if not record.log else _size(record.log, record.log_start))


def _tag(plan: Path) -> str | None:
    """The tag of a plan's launch; None where its file is gone."""
    return read_header(plan).launch.tag if plan.exists() else None


def completed_rows(folder: SweepFolder, record: WorkerRecord) -> list[dict[str, Any]]:
    """The row of the trial that a lost worker was at, if it wrote every evaluation of it and only this row is missing."""
    if record.trial_id is None or record.shard_id is None:
        return []
    shard = read_shard(folder.plan / record.plan, record.shard_id)
    planned = next((planned for planned in shard.trials if planned.trial.trial_id == record.trial_id), None)
    if planned is None or remaining_tasks(planned, records.read_done(folder.path)).tasks:
        return []
    metrics = records.read_encoded(folder.path, "metrics")
    own = pc.and_(pc.equal(metrics.column("trial_id"), record.trial_id), pc.equal(metrics.column("plan"), record.plan))
    rows = metrics.filter(pc.and_(own, metrics.column("is_primary"))).to_pylist()
    last = max(rows, key=lambda row: row["finished_at"], default=None)
    if last is None or last["attempt"] in records.read_table(folder.path, "trials", ["attempt"]).column("attempt").to_pylist():
        return []
    evaluations = {row["task_key"]: row for row in rows if row["attempt"] == last["attempt"]}
    return [_completed_row(record, planned, list(evaluations.values()))]


def _completed_row(record: WorkerRecord, planned: PlannedTrial, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """From the primary rows of `metrics` of the attempt; what only its process knew (memory, seconds of loading) is null."""
    last = max(evaluations, key=lambda row: row["finished_at"])
    attempt = Attempt(
        planned=planned,
        **{name: last[name] for name in ("attempt", "plan", "launch", "tag", "life", "shard_id")},
        environment=Environment(**{one.name: last[one.name] for one in fields(Environment)}),
        log=Path(record.log).name,
        log_start=record.log_start,
        started_at=last["finished_at"] if record.trial_started is None else datetime.fromtimestamp(record.trial_started, UTC),
        facts={"device": last["device"], "driver": last["driver"], "code": last["code_hash"]},
        sizes={column.name: last[column.name] for column in records.SIZE},
        evaluate_seconds=sum(row["evaluate_seconds"] for row in evaluations),
        num_tasks=len(evaluations),
    )
    return attempt.row(None, last["finished_at"], log_end=_size(record.log, record.log_start))


def _size(log: str, at_least: int) -> int:
    try:
        return max(at_least, Path(log).stat().st_size)
    except OSError:
        return at_least
