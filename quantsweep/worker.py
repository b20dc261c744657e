"""Runs a shard: gives its trials to a child process, and writes what comes back, row by row.

The worker imports no torch and holds no model: nothing that a trial does can hurt it.  A child that
raises reports it; one that dies or falls silent is replaced; either costs one trial, and the shard
goes on.  Each task's samples and metrics are durable before the next task's result is taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from quantsweep import environment, failures, records
from quantsweep.errors import ResultsError
from quantsweep.failures import Failure
from quantsweep.paths import SweepFolder
from quantsweep.plan import read_settings, read_shard, remaining_tasks
from quantsweep.shards import predicted_minutes
from quantsweep.specs import PlannedTrial, RunSettings, Shard, content_hash
from quantsweep.tracking import make_tracker

Observer = Callable[[PlannedTrial, str, int], None]
"""Told of each trial's end: the trial, "done", "failed" or "stopped", and how many evaluations it wrote."""

POLL_SECONDS = 0.2
MIN_TIMEOUT_MINUTES = 10.0
TIMEOUT_FACTOR = 5.0


class ChildDiedError(Exception):
    """The child process ended without saying why (internal; becomes a row)."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class StoppedError(Exception):
    """Somebody asked the worker to stop (internal)."""


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """How a shard went, in trials."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    stopped: bool = False


class Child:
    """One child process, started when needed and replaced when it died.  Its output goes to `log`."""

    def __init__(self, extra_environment: Mapping[str, str] | None = None) -> None:
        self._extra = dict(extra_environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def events(self, planned: PlannedTrial, settings: RunSettings, log: Path, stop: threading.Event) -> Iterator[dict[str, Any]]:
        """Run one trial; yields what the child says, ending with "done" or "failed".

        Raises ChildDiedError if the child dies or is silent for too long, StoppedError between two events once `stop` is set.
        """
        timeout = settings.trial_timeout_minutes or max(MIN_TIMEOUT_MINUTES, TIMEOUT_FACTOR * predicted_minutes(planned))
        pipe = self._start(log)
        try:
            pipe.send_bytes(json.dumps({"planned": planned.to_json(), "settings": asdict(settings)}).encode())
            while True:
                event = self._receive(pipe, timeout)
                if event.pop("last", False):
                    self.kill()
                yield event
                if event["event"] in ("done", "failed"):
                    return
                if stop.is_set():
                    self.kill()
                    raise StoppedError
        except (EOFError, OSError) as error:
            code = self._reap()
            if code == -signal.SIGTERM and environment.slurm_job() is not None:
                stop.set()  # Slurm ends the job (scancel, preemption, time limit): its TERM reaches every process of it
            if stop.is_set():
                raise StoppedError from error  # it was ended on purpose: no failure of the trial
            raise ChildDiedError(failures.from_exit(code)) from error

    def _receive(self, pipe: Connection, timeout_minutes: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_minutes * 60
        while not pipe.poll(POLL_SECONDS):
            if time.monotonic() > deadline:
                self.kill()
                raise ChildDiedError(failures.hung(timeout_minutes))
        return json.loads(pipe.recv_bytes())  # type: ignore[no-any-return]

    def _start(self, log: Path) -> Connection:
        if self._process is not None and self._process.poll() is None and self._pipe is not None:
            return self._pipe
        self._close_pipe()
        ours, theirs = Pipe()
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "quantsweep.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A session of its own: Ctrl-C in the terminal reaches the launcher, which ends trials in order.
                start_new_session=True,
                env={**os.environ, **self._extra},
            )
        self._pipe = ours
        return ours

    def _reap(self) -> int | None:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=10)
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End the child now; what it had reported is written already."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


@dataclass
class _Attempt:
    """What is known of the trial at hand; becomes its row in `trials`."""

    planned: PlannedTrial
    attempt: str
    log: str
    log_start: int
    started_at: datetime
    facts: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    evaluate_seconds: float = 0.0
    write_seconds: float = 0.0
    num_tasks: int = 0


class Worker:
    """Runs shards one after another, keeping its child (and the model in it) between them."""

    def __init__(self, plan_path: Path, *, extra_environment: Mapping[str, str] | None = None, stop: threading.Event | None = None) -> None:
        self._plan = plan_path
        self._folder = SweepFolder(plan_path.resolve().parent.parent)
        self._folder.check()
        self._settings = read_settings(plan_path)
        self._environment = environment.capture(self._folder)
        self._stop = stop or threading.Event()
        self._child = Child(extra_environment)
        # One log a worker: its child writes there for as long as it lives, and each trial's row holds its place.
        self._log = self._folder.logs / f"{plan_path.stem}-{self._environment.host}-{os.getpid()}-{id(self):x}.log"

    @property
    def stopping(self) -> bool:
        """True once somebody asked the workers to stop."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Ask all workers that share this stop event to end after the task at hand."""
        self._stop.set()

    def close(self) -> None:
        """End the child."""
        self._child.kill()

    def run(self, shard_id: int, observer: Observer | None = None) -> ShardSummary:
        """Run what is left of one shard; never raises for what happens inside a trial, only when results cannot be written."""
        shard = read_shard(self._plan, shard_id)
        run = _ShardRun(self._plan, self._folder, shard, self._settings, self._environment, self._child, self._stop, self._log)
        return run.all(observer or (lambda planned, status, evaluations: None))


class _ShardRun:
    """One pass over one shard."""

    def __init__(
        self,
        plan: Path,
        folder: SweepFolder,
        shard: Shard,
        settings: RunSettings,
        environment_: environment.Environment,
        child: Child,
        stop: threading.Event,
        log: Path,
    ) -> None:
        self._log = log
        self._plan, self._folder, self._shard, self._settings = plan, folder, shard, settings
        self._environment, self._child, self._stop = environment_, child, stop
        stem = f"{shard.shard_id:05d}-{environment_.host}-{os.getpid()}"
        self._writer = records.Writer(folder, stem)

    def all(self, observer: Observer) -> ShardSummary:
        """Every trial that is not done yet, in order."""
        done = records.read_done(self._folder.path)
        left = [remaining_tasks(planned, done) for planned in self._shard.trials]
        todo = [planned for planned in left if planned.tasks]
        counts = {"done": 0, "failed": 0, "stopped": 0}
        tracker = make_tracker(self._settings, self._folder, self._shard.shard_id)
        try:
            for planned in todo:
                if self._stop.is_set():
                    break
                row, evaluations = self._trial(planned, tracker.log_evaluation)
                status = "stopped" if row is None else row["status"]
                counts[status] += 1
                observer(planned, status, evaluations)
                if row is not None and row["failure_class"] == failures.DISK_FULL:
                    raise ResultsError(
                        f"disk full while writing {self._folder.path}: {row['failure_message']}. "
                        "Make space, then launch again; nothing that was written is lost"
                    )
        finally:
            tracker.finish()
        return ShardSummary(done=counts["done"], failed=counts["failed"], skipped=len(left) - len(todo), stopped=self._stop.is_set())

    # One trial ---------------------------------------------------------------------------------------------------------

    def _trial(self, planned: PlannedTrial, track: Callable[[Mapping[str, Any]], None]) -> tuple[dict[str, Any] | None, int]:
        """Run one trial; returns its row (None if the worker was asked to stop in the middle) and how many evaluations it wrote."""
        attempt = self._begin(planned)
        failure: Failure | None = None
        try:
            for event in self._child.events(planned, self._settings, self._log, self._stop):
                failure = self._on_event(attempt, event, track) or failure
        except ChildDiedError as error:
            failure = error.failure
        except StoppedError:
            return None, attempt.num_tasks
        except OSError as error:
            if not failures.is_disk_full(error):
                raise
            failure = failures.from_exception(error)
            self._child.kill()  # in the middle of a trial: it would go on talking of it
        return self._finish(attempt, failure), attempt.num_tasks

    def _begin(self, planned: PlannedTrial) -> _Attempt:
        started = datetime.now(UTC)
        identity = [planned.trial.trial_id, self._environment.host, os.getpid(), time.time_ns(), threading.get_ident()]
        start = self._say(f"--- trial {planned.trial.trial_id}  {planned.trial.label}  {started.isoformat(timespec='seconds')}\n")
        return _Attempt(planned, content_hash(identity), self._log.name, start, started)

    def _say(self, text: str) -> int:
        """Append to the log and return where that began; a full disk is reported by the tables, not by their log."""
        try:
            with self._log.open("ab") as log:
                start = log.tell()
                log.write(text.encode())
                return start
        except OSError as error:
            if not failures.is_disk_full(error):
                raise
            return self._log.stat().st_size if self._log.exists() else 0

    def _on_event(self, attempt: _Attempt, event: Mapping[str, Any], track: Callable[[Mapping[str, Any]], None]) -> Failure | None:
        kind = event["event"]
        if kind == "failed":
            return Failure(**{key: value for key, value in event.items() if key != "event"})
        if kind == "task":
            self._write_task(attempt, event, track)
        elif kind == "progress":
            pass  # it only says that the child is alive and gets on
        elif kind == "quantized":
            attempt.facts["quantize_seconds"] = event["quantize_seconds"]
            attempt.sizes = dict(event["sizes"])
            self._add(attempt, "layers", [{**self._common(attempt), **layer} for layer in event["layers"]])
        else:
            attempt.facts.update({key: value for key, value in event.items() if key != "event"})
        return None

    def _write_task(self, attempt: _Attempt, event: Mapping[str, Any], track: Callable[[Mapping[str, Any]], None]) -> None:
        task = next(t for t in attempt.planned.tasks if t.task_key == event["task_key"])
        result = event["result"]
        common = {**self._common(attempt), **records.task_columns(task), "requests_hash": result["requests_hash"]}
        self._add(attempt, "samples", [{**common, **result["samples"]}])
        shared = {
            key: result[key]
            for key in ("num_samples", "data_revision", "num_tokens", "num_input_tokens", "num_truncated", "num_nonfinite", "batch_size")
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

    def _finish(self, attempt: _Attempt, failure: Failure | None) -> dict[str, Any]:
        if failure is not None:
            self._say(f"{failure.traceback or ''}--- failed: {failure.failure_class}: {failure.message}\n")
        end = self._log.stat().st_size if self._log.exists() else 0
        failed = {
            f"failure_{name}": getattr(failure, key, None)
            for name, key in (
                ("class", "failure_class"),
                ("message", "message"),
                ("fingerprint", "fingerprint"),
                ("traceback", "traceback"),
            )
        }
        row = {
            **self._common(attempt),
            "label": attempt.planned.trial.label,
            "status": "done" if failure is None else "failed",
            **failed,
            "num_tasks": attempt.num_tasks,
            "started_at": attempt.started_at,
            **{
                key: attempt.facts.get(key)
                for key in ("load_seconds", "quantize_seconds", "restore_seconds", "peak_memory_bytes", "energy_joules")
            },
            "evaluate_seconds": attempt.evaluate_seconds,
            "write_seconds": attempt.write_seconds,
            "log": attempt.log,
            "log_start": attempt.log_start,
            "log_end": end,
            "config": records.config_json(attempt.planned),
            **{column.name: attempt.sizes.get(column.name) for column in records.SIZE},
        }
        try:
            self._writer.add("trials", [row])
        except OSError as error:
            if not failures.is_disk_full(error):
                raise
            row |= {"status": "failed", "failure_class": failures.DISK_FULL, "failure_message": str(error)}
        return row

    def _add(self, attempt: _Attempt, table: str, rows: list[dict[str, Any]]) -> None:
        started = time.perf_counter()
        self._writer.add(table, rows)
        attempt.write_seconds += time.perf_counter() - started

    def _common(self, attempt: _Attempt) -> dict[str, Any]:
        return {
            **records.identity_columns(attempt.planned.trial),
            "attempt": attempt.attempt,
            "shard_id": self._shard.shard_id,
            "plan": self._plan.name,
            "finished_at": datetime.now(UTC),
            "device": attempt.facts.get("device"),
            "driver": attempt.facts.get("driver"),
            **asdict(self._environment),
            "schema_version": records.SCHEMA_VERSION,
        }


def run_shard(plan_path: str | Path, shard_id: int) -> ShardSummary:
    """Run one shard in this process and end: what a Slurm array task and the stock Hydra launchers call."""
    worker = Worker(Path(plan_path))
    try:
        return worker.run(int(shard_id))
    finally:
        worker.close()
