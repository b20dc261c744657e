"""Runs a shard: gives its trials to a child process, and writes what comes back, row by row.

The worker imports no torch and holds no model: nothing that a trial does can hurt it.  A child that
raises reports it; one that dies or falls silent is replaced; either costs one trial, and the shard
goes on.  Each task's samples and metrics are durable before the next task's result is taken.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantsweep.errors import ResultsError
from quantsweep.failures import breaker, classes
from quantsweep.failures.classes import Failure
from quantsweep.planning.plan import remaining_tasks
from quantsweep.planning.plan_files import PlanHeader, read_header, read_shard
from quantsweep.running import environment
from quantsweep.running.attempts import Attempt, completed_rows, lost_row
from quantsweep.running.child import GIVEN_GPUS
from quantsweep.running.child_process import Child, ChildDiedError
from quantsweep.running.heartbeat import LAST_WORDS, MAX_RESTARTS_OF_A_TRIAL, Beat, close_earlier_runs
from quantsweep.running.stopping import Allotment, Stop, StoppedError, stopped_by_signals
from quantsweep.running.tracking import make_tracker
from quantsweep.running.wanted import Wanted
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import ENDED_WITH_ERROR, WorkerRecord, new_worker_name, read_records, this_machine
from quantsweep.tables import records
from quantsweep.trial.specs import PlannedTrial, Shard, content_hash

Observer = Callable[[PlannedTrial, str, int], None]
"""Told of each trial's end: the trial, "done", "failed", "stopped" or "superseded", and how many evaluations it wrote."""

BREAKER_SECONDS = 60.0
"""A worker whose trials fail reads everybody's attempts about this often, to see whether others fail in the same place."""
OF_THE_MACHINE = frozenset({classes.BAD_NODE, classes.NO_ANSWER})
MAX_STRIKES = 2
"""A worker on whose machine so many trials in a row failed for the machine's fault ends."""
OVERTIME_SHARE = 0.5
"""A trial that had this share of its job's time for itself when the limit came is too long for the job."""


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """The job that a worker is part of: its array's name and shards, the GPUs of one worker, its time limit, its share of the budget."""

    job_name: str | None = None
    shard_ids: tuple[int, ...] = ()
    gpus: int = 0
    minutes: float | None = None
    allotment: Allotment = field(default_factory=Allotment)


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """How a shard went, in trials."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    held: int = 0
    superseded: int = 0
    left: int = 0
    stopped: bool = False


class Worker:
    """Runs shards one after another, keeping its child (and the model in it) between them.

    Its name is in every file that it writes, and its record says what it is at.
    """

    def __init__(
        self,
        plan_path: Path,
        *,
        extra_environment: Mapping[str, str] | None = None,
        stop: Stop | None = None,
        context: JobContext | None = None,
    ) -> None:
        self.plan = plan_path
        self.folder = SweepFolder(plan_path.resolve().parent.parent)
        self.folder.check()
        self.header = read_header(plan_path)
        self.environment = environment.capture(self.folder)
        self.stop = stop or Stop()
        self.context = context or JobContext()
        given = {GIVEN_GPUS: str(self.context.gpus)} if self.context.gpus else {}
        self.child = Child({**dict(self.header.launch.variables), **given, **(extra_environment or {})})
        name = new_worker_name()
        # One log a worker: its child writes there for as long as it lives, and each trial's row holds its place.
        self.log = self.folder.logs / f"{name}.log"
        self.writer = records.Writer(self.folder, name)
        self.beat = Beat(self.folder, self._first_record(name), self.context.allotment)
        self.writer.add("trials", self._completed_before())
        self.tracker = make_tracker(self.folder, self.header)
        self.poison = close_earlier_runs(self.folder, self.beat.record)
        self.given_up = frozenset(_given_up(self.folder, self.header))
        self.wanted = Wanted(self.folder, self.header, name)
        self.trials_run = self.trials_left_alone = 0
        self.strikes = 0
        self.failed_in_one_place: Counter[str] = Counter()
        self.breaker_checked = time.monotonic()
        self.beat.start()

    def _first_record(self, name: str) -> WorkerRecord:
        return WorkerRecord(
            worker=name,
            host=platform.node(),
            machine=this_machine(),
            node=self.environment.host,
            pid=os.getpid(),
            plan=self.plan.name,
            job=self.environment.slurm_job,
            job_name=self.context.job_name,
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            shard_ids=self.context.shard_ids,
            gpus=self.context.gpus,
            log=str(self.log),
        )

    def _completed_before(self) -> list[dict[str, Any]]:
        """Rows of trials that earlier runs of this very job, which Slurm has requeued, completed but for this row.

        Runs that a later one has closed had that row written by it.
        """
        mine = self.beat.record
        heard = read_records(self.folder) if mine.job is not None and mine.restarts else []
        earlier = [one.record for one in heard if one.record.job == mine.job and one.record.restarts < mine.restarts]
        return [row for record in earlier if record.ended in LAST_WORDS for row in completed_rows(self.folder, record)]

    @property
    def is_superseded(self) -> bool:
        """True if somebody else has all that this worker was to do."""
        return self.wanted.closed is not None or (self.trials_left_alone > 0 and not self.trials_run)

    def close(self, ended: str | None = None) -> None:
        """End the child; write down how this worker ended (by default: as it was asked to, or finished)."""
        self.child.kill()
        self.tracker.close()
        self.beat.end(ended or (Stop.SUPERSEDED if self.is_superseded else self.stop.reason or "finished"))

    def run(self, shard_id: int, observer: Observer | None = None) -> ShardSummary:
        """Run what is left of one shard; never raises for what happens inside a trial, only when results cannot be written."""
        try:
            return _ShardRun(self, read_shard(self.plan, shard_id)).all(observer or (lambda planned, status, evaluations: None))
        except BaseException as error:  # an exit too: its record is closed
            full = isinstance(error, DiskFullError) or (isinstance(error, OSError) and classes.is_disk_full(error))
            self.close("DISK_FULL" if full else f"{ENDED_WITH_ERROR}{type(error).__name__}: {error}")
            raise


class DiskFullError(ResultsError):
    """Results cannot be written for want of space: the shard ends, and nothing goes on by itself."""


class _SupersededError(Exception):
    """Between two tasks of a trial: it is somebody else's by now (internal)."""


def _given_up(folder: SweepFolder, header: PlanHeader) -> Iterator[str]:
    """Trials that have failed under this plan already, other hosts' latest rows included."""
    records.refresh(folder.table("trials"))
    columns = ["trial_id", "status", "plan"]
    rows = records.read_table(folder.path, "trials", columns).to_pylist()
    yield from (row["trial_id"] for row in rows if row["status"] == "failed" and row["plan"] == header.name)


class _ShardRun:
    """One pass over one shard."""

    def __init__(self, worker: Worker, shard: Shard) -> None:
        self._worker, self._shard = worker, shard
        self._folder, self._stop, self._log = worker.folder, worker.stop, worker.log
        self._launch, self._settings = worker.header.launch, worker.header.settings
        self._writer = worker.writer

    def all(self, observer: Observer) -> ShardSummary:
        """Every trial that is not done yet, in order."""
        done = records.read_done(self._folder.path)
        left = [remaining_tasks(planned, done) for planned in self._shard.trials]
        todo = [planned for planned in left if planned.tasks and planned.trial.trial_id not in self._worker.given_up]
        wanted = self._worker.wanted
        counts: Counter[str] = Counter()
        tracker = self._worker.tracker
        if todo:
            tracker.begin(self._shard.shard_id)
        try:
            for planned in todo:
                if self._worker.context.allotment.is_spent():
                    self._stop.set(Stop.BUDGET)
                self._look()
                if self._stop.is_set():
                    break
                if (why := wanted.superseded(planned)) is not None:
                    self._leave_alone(planned, why)
                    counts["superseded"] += 1
                    continue
                if wanted.is_held(planned):
                    counts["held"] += 1
                    continue
                planned = wanted.still_asked(planned)
                lost = self._worker.poison.get(planned.trial.trial_id)
                row, evaluations = self._trial(planned, tracker.log_evaluation) if lost is None else (self._give_up(planned, lost), 0)
                status = row["status"] if row is not None else "superseded" if wanted.superseded(planned) else "stopped"
                counts[status] += 1
                observer(planned, status, evaluations)
                if row is not None:
                    self._look_at(row)
        finally:
            if todo:
                tracker.end()
        return ShardSummary(
            done=counts["done"],
            failed=counts["failed"],
            held=counts["held"],
            superseded=counts["superseded"],
            skipped=len(left) - len(todo),
            left=len(todo) - sum(counts[how] for how in ("done", "failed", "held", "superseded")),
            stopped=self._stop.is_set(),
        )

    def _look(self) -> None:
        """See what others have done meanwhile; a worker that was taken for gone ends, and with it all of its process."""
        self._worker.wanted.look()
        if (word := self._worker.wanted.closed) is not None:
            self._say(f"--- superseded: this worker was taken for gone ({word}), and others have its trials\n")
            self._stop.set(Stop.SUPERSEDED)

    def _leave_alone(self, planned: PlannedTrial, why: str) -> None:
        self._worker.trials_left_alone += 1
        self._say(f"--- left alone: trial {planned.trial.trial_id}  {planned.trial.label}: {why}\n")

    def _give_up(self, planned: PlannedTrial, lost: WorkerRecord) -> dict[str, Any]:
        """The row of a trial at which this very job was lost, and started again, too often."""
        failure = classes.of_lost_job("NODE_FAIL", f"{planned.trial.label}, {MAX_RESTARTS_OF_A_TRIAL} times in this one job")
        row = lost_row(self._folder, lost, planned, failure)
        self._writer.add("trials", [row])
        return row

    def _look_at(self, row: Mapping[str, Any]) -> None:
        """What a trial's end means for those that come after it."""
        cause = row["failure_class"]
        if cause == classes.DISK_FULL:
            raise DiskFullError(
                f"disk full while writing {self._folder.path}: {row['failure_message']}. "
                "Make space, then launch again; nothing that was written is lost"
            )
        worker = self._worker
        worker.strikes = worker.strikes + 1 if cause in OF_THE_MACHINE else 0
        if worker.strikes >= MAX_STRIKES:
            self._stop.set(Stop.BAD_NODE)
        if cause == classes.CODE_CHANGED and worker.beat.record.job is None:
            self._stop.set(Stop.CODE_CHANGED)  # it would be the same with every other trial
        if cause in breaker.COUNTED:
            self._look_for_company(str(row["failure_fingerprint"]))

    def _look_for_company(self, fingerprint: str) -> None:
        """Have the breaker read everybody's attempts: whenever this worker alone has failures enough (again), and now and then."""
        worker, threshold = self._worker, self._launch.breaker_trials
        worker.failed_in_one_place[fingerprint] += 1
        late = time.monotonic() - worker.breaker_checked > BREAKER_SECONDS
        if late or (threshold is not None and worker.failed_in_one_place[fingerprint] % threshold == 0):
            worker.breaker_checked = time.monotonic()
            breaker.check(self._folder, worker.header.root, threshold)

    # One trial ---------------------------------------------------------------------------------------------------------

    def _trial(self, planned: PlannedTrial, track: Callable[[Mapping[str, Any]], None]) -> tuple[dict[str, Any] | None, int]:
        """Run one trial; returns its row (None if the worker was asked to stop in the middle) and how many evaluations it wrote."""
        attempt = self._begin(planned)
        self._worker.trials_run += 1
        failure: Failure | None = None
        try:
            for event in self._worker.child.events(planned, self._settings, self._log, self._stop):
                failure = self._on_event(attempt, event, track) or failure
        except ChildDiedError as error:
            failure = None if attempt.is_whole else error.failure
        except StoppedError:
            failure = None if attempt.is_whole else self._overtime(attempt)
            if failure is None and not attempt.is_whole:
                if self._stop.reason != Stop.ENDED:
                    self._worker.beat.update(trial_id=None, label=None)
                return None, attempt.num_tasks
        except _SupersededError as error:
            self._worker.child.kill()
            self._leave_alone(planned, str(error))
            self._worker.beat.update(trial_id=None, label=None)
            return None, attempt.num_tasks
        except OSError as error:
            if not classes.is_disk_full(error):
                raise
            failure = classes.from_exception(error)
            self._worker.child.kill()  # in the middle of a trial: it would go on talking of it
        return self._finish(attempt, failure), attempt.num_tasks

    def _overtime(self, attempt: Attempt) -> Failure | None:
        """A trial that was dropped at the time limit failed if it had most of the job's time; otherwise it simply runs again."""
        minutes = self._worker.context.minutes
        taken = (datetime.now(UTC) - attempt.started_at).total_seconds() / 60
        if self._stop.reason != Stop.TIME_LIMIT or minutes is None or taken < OVERTIME_SHARE * minutes:
            return None
        return classes.overtime(minutes)

    def _begin(self, planned: PlannedTrial) -> Attempt:
        started = datetime.now(UTC)
        trial_id = planned.trial.trial_id
        start = self._say(f"--- trial {trial_id}  {planned.trial.label}  {started.isoformat(timespec='seconds')}\n")
        self._worker.beat.update(
            shard_id=self._shard.shard_id,
            trial_id=trial_id,
            label=planned.trial.label,
            trial_started=started.timestamp(),
            share=0.0,
            log_start=start,
        )
        return Attempt(
            planned=planned,
            attempt=content_hash([trial_id, self._worker.beat.record.worker, time.time_ns(), threading.get_ident()]),
            plan=self._worker.plan.name,
            launch=self._worker.header.launched,
            tag=self._worker.header.launch.tag,
            life=self._worker.beat.record.restarts,
            shard_id=self._shard.shard_id,
            environment=self._worker.environment,
            log=self._log.name,
            log_start=start,
            started_at=started,
        )

    def _say(self, text: str) -> int:
        """Append to the log and return where that began; a full disk is reported by the tables, not by their log."""
        try:
            with self._log.open("ab") as log:
                start = log.tell()
                log.write(text.encode())
                return start
        except OSError as error:
            if not classes.is_disk_full(error):
                raise
            return self._log.stat().st_size if self._log.exists() else 0

    def _on_event(self, attempt: Attempt, event: Mapping[str, Any], track: Callable[[Mapping[str, Any]], None]) -> Failure | None:
        kind = event["event"]
        self._check_code(attempt, event.get("code"))
        if kind == "failed":
            return Failure(**{key: value for key, value in event.items() if key not in ("event", "code")})
        if kind == "task":
            self._write_task(attempt, event, track)
            if not attempt.is_whole:
                self._look()
                if (why := self._worker.wanted.superseded(attempt.planned)) is not None:
                    raise _SupersededError(why)
        elif kind == "progress":
            self._worker.beat.note(share=event.get("share", 0.0))
        elif kind == "quantized":
            attempt.facts["quantize_seconds"] = event["quantize_seconds"]
            attempt.sizes = dict(event["sizes"])
            now = datetime.now(UTC)
            self._add(attempt, "layers", [{**attempt.common(now), **layer} for layer in event["layers"]])
        else:
            attempt.facts.update({key: value for key, value in event.items() if key != "event"})
        return None

    def _check_code(self, attempt: Attempt, imported: str | None) -> None:
        """Nothing becomes a row that other code made than the launch was planned with; the row says which code it was."""
        attempt.facts["code"] = imported
        planned = self._launch.sources
        if imported is not None and planned is not None and imported != planned:
            self._worker.child.kill()
            raise ChildDiedError(classes.code_changed(planned, imported))

    def _write_task(self, attempt: Attempt, event: Mapping[str, Any], track: Callable[[Mapping[str, Any]], None]) -> None:
        task = next(t for t in attempt.planned.tasks if t.task_key == event["task_key"])
        result = event["result"]
        common = {**attempt.common(datetime.now(UTC)), **records.task_columns(task), "requests_hash": result["requests_hash"]}
        self._add(attempt, "samples", [{**common, **result["samples"]}])
        shared = {
            key: result[key]
            for key in (
                "num_samples",
                "data_revision",
                "window",
                "num_tokens",
                "num_input_tokens",
                "num_truncated",
                "num_nonfinite",
                "batch_size",
            )
        }
        rows = [
            {
                **common,
                **shared,
                **attempt.sizes,
                "evaluate_seconds": result["seconds"],
                "metric": metric["name"],
                **{key: metric[key] for key in ("value", "stderr", "higher_is_better", "is_primary")},
            }
            for metric in result["metrics"]
        ]
        self._add(attempt, "metrics", rows)
        attempt.evaluate_seconds += result["seconds"]
        attempt.num_tasks += 1
        for row in rows:
            track(row)

    def _finish(self, attempt: Attempt, failure: Failure | None) -> dict[str, Any]:
        if failure is not None:
            self._say(f"{failure.traceback or ''}--- failed: {failure.failure_class}: {failure.message}\n")
        end = self._log.stat().st_size if self._log.exists() else 0
        row = attempt.row(failure, datetime.now(UTC), end)
        try:
            self._writer.add("trials", [row])
        except OSError as error:
            if not classes.is_disk_full(error):
                raise
            row |= {"status": "failed", "failure_class": classes.DISK_FULL, "failure_message": str(error)}
        return row

    def _add(self, attempt: Attempt, table: str, rows: list[dict[str, Any]]) -> None:
        started = time.perf_counter()
        self._writer.add(table, rows)
        attempt.write_seconds += time.perf_counter() - started


def run_shard(plan_path: str | Path, shard_id: int) -> ShardSummary:
    """Run one shard in this process and end: what the stock Hydra launchers call."""
    stop = Stop()
    with stopped_by_signals(stop), contextlib.closing(Worker(Path(plan_path), stop=stop)) as worker:
        summary = worker.run(int(shard_id))
    if stop.reason == Stop.PERSON:
        raise KeyboardInterrupt  # whoever called would otherwise go on with the next shard
    return summary
