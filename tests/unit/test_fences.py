"""A worker frozen anywhere, taken over by anybody, wakes up: nothing wrong is shown, nothing is lost, at most one task is begun in vain.

What is counted comes from the children's own ledger and from the raw files, by nothing of the product but its readers' answers.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import quantsweep
from quantsweep.cli.main import main
from quantsweep.cli.status import sweep_status
from quantsweep.launching.advance import advance
from quantsweep.launching.settle import settle
from quantsweep.launching.tasks import to_leave_alone
from quantsweep.planning.plan_files import plan_files, read_header
from quantsweep.running.environment import Environment
from quantsweep.running.stopping import Stop, StoppedError
from quantsweep.running.wanted import Wanted
from quantsweep.running.worker import JobContext, ShardSummary, Worker
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import LOST_AND_REQUEUED, close_record, read_records, write_record
from quantsweep.tables.compaction import compact
from quantsweep.trial.specs import PlannedTrial, RunSettings
from tests.unit.engine_cases import Site, submit, trial, write
from tests.unit.test_worker_stop import DONE, LOADED, QUANTIZED, RESULT

TRIALS = [trial(bits) for bits in (2, 3, 4)]
PAIRS = {(planned.trial.trial_id, task.task_key) for planned in TRIALS for task in planned.tasks}
FROZEN = TRIALS[1].trial.trial_id
SECONDS = 30.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(folder: SweepFolder) -> Environment:
        return Environment(host="n0", slurm_job="101_0", code_commit=None, code_diff=None, versions="{}")

    monkeypatch.setattr("quantsweep.running.worker.environment.capture", capture)


@dataclasses.dataclass
class Ledger:
    """What children began, as they say it themselves: (worker, trial, task), in order."""

    begun: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def of(self, worker: str) -> list[tuple[str, str, str]]:
        return [line for line in self.begun if line[0] == worker]


class Child:
    """Evaluates every task to the number of its code; `at` is called wherever it gets to."""

    def __init__(self, worker: Worker, code: float, ledger: Ledger, at: Callable[[str, str], None]) -> None:
        self._name, self._code, self._ledger, self._at = worker.beat.record.worker, code, ledger, at

    def events(self, planned: PlannedTrial, settings: RunSettings, log: Path, stop: Stop) -> Iterator[dict[str, Any]]:
        yield dict(LOADED)
        yield dict(QUANTIZED)
        for number, task in enumerate(planned.tasks):
            self._ledger.begun.append((self._name, planned.trial.trial_id, task.task_key))
            self._at("evaluated", planned.trial.trial_id)
            result = {**RESULT, "metrics": [{**RESULT["metrics"][0], "value": self._code}]}  # type: ignore[index]
            yield {"event": "task", "task_key": task.task_key, "result": result}
            if stop.is_set() and number + 1 < len(planned.tasks):
                raise StoppedError
        yield dict(DONE)

    def kill(self) -> None: ...


class Frozen:
    """A worker of the old code in a thread of its own, that stands still at one point of its second trial."""

    def __init__(self, plan: Path, point: str, ledger: Ledger) -> None:
        self.reached, self._wake, self._point = threading.Event(), threading.Event(), point
        self.worker = Worker(plan, context=JobContext(job_name="j"))
        self.name = self.worker.beat.record.worker
        self.summary: ShardSummary | None = None
        self.worker.child = Child(self.worker, 1.0, ledger, self._at)  # type: ignore[assignment]
        self._hook(self.worker.beat, "update", lambda changes: "claim" if changes.get("trial_id") == FROZEN else "")
        self._hook(self.worker.writer, "add", lambda changes: "")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self.reached.wait(SECONDS)

    def _run(self) -> None:
        self.summary = self.worker.run(0)
        self.worker.close()

    def _hook(self, owner: Any, name: str, claimed: Callable[[dict[str, Any]], str]) -> None:
        real = getattr(owner, name)

        def hooked(*arguments: Any, **changes: Any) -> Any:
            what = claimed(changes) or (arguments[0] if arguments else "")
            whose = changes.get("trial_id") or (arguments[1][0]["trial_id"] if len(arguments) > 1 and arguments[1] else "")
            self._at(f"before {what}", str(whose))
            result = real(*arguments, **changes)
            self._at(f"after {what}", str(whose))
            return result

        setattr(owner, name, hooked)

    def _at(self, point: str, trial_id: str) -> None:
        if point == self._point and trial_id == FROZEN and not self.reached.is_set():
            self.reached.set()
            assert self._wake.wait(SECONDS)

    def wake(self) -> ShardSummary:
        """Goes on where it stood, to its end."""
        self._wake.set()
        self._thread.join(SECONDS)
        assert self.summary is not None
        return self.summary


POINTS = ("before claim", "after claim", "evaluated", "after samples", "after metrics", "before trials", "after trials")


def run(plan: Path, code: float, ledger: Ledger, **context: Any) -> ShardSummary:
    made = Worker(plan, context=JobContext(job_name="j", **context))
    made.child = Child(made, code, ledger, lambda point, trial_id: None)  # type: ignore[assignment]
    summary = made.run(0)
    made.close()
    return summary


def launch(sweep: SweepFolder) -> Path:
    """What a launch command plans: everything that is missing and that nobody is at."""
    plan = write(sweep, TRIALS, in_flight=to_leave_alone(sweep, settle(sweep)), shard_minutes=60)
    submit(sweep)
    return plan


def by_requeue(sweep: SweepFolder, site: Site, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm starts the job again under its own id."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(plan_files(sweep.plan)[0], 1.0, ledger)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    site.set("COMPLETED")


def by_retry(sweep: SweepFolder, site: Site, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm says that the node is lost; the running sweep plans the rest again."""
    site.set("NODE_FAIL")
    advance(sweep)
    if len(plan_files(sweep.plan)) > 1:  # else nothing was left
        run(plan_files(sweep.plan)[-1], 1.0, ledger)
    site.set("COMPLETED")


def by_assume_dead(sweep: SweepFolder, site: Site, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows the job any more, and a person says that it is gone."""
    site.forget()
    site.accounts = None
    settle(sweep, assume_dead=True)
    run(launch(sweep), 1.0, ledger)
    site.set("COMPLETED")


def by_nobody(sweep: SweepFolder, site: Site, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job still runs: what follows is a second launch, after a rerun."""


TAKEOVERS = (by_requeue, by_retry, by_assume_dead, by_nobody)


def agrees(sweep: SweepFolder, code: float) -> None:
    """Every evaluation shows the value of this code, in every reader and with each row once."""
    frame = quantsweep.load_results(sweep.path)
    assert set(zip(frame.trial_id, frame.task_key, strict=True)) == PAIRS, "lost"
    assert len(frame) == len(PAIRS), "doubled"
    assert set(frame.value) == {code}, "wrong or contradicting"
    samples = quantsweep.load_samples(sweep.path)
    assert set(zip(samples.trial_id, samples.task_key, samples.attempt, strict=True)) == set(
        zip(frame.trial_id, frame.task_key, frame.attempt, strict=True)
    )
    trials = quantsweep.load_trials(sweep.path)
    assert list(trials.status) == ["done"] * len(TRIALS)
    status = sweep_status(sweep)
    assert (status["done"], status["failed"], status["evaluations_done"]) == (len(TRIALS), 0, len(PAIRS))


@pytest.mark.parametrize("takeover", TAKEOVERS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("point", POINTS)
def test_after_a_rerun_the_old_code_never_comes_back(
    sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch, point: str, takeover: Callable[..., None]
) -> None:
    ledger = Ledger()
    plan = write(sweep, TRIALS, shard_minutes=60)
    submit(sweep)
    site.set("RUNNING")
    zombie = Frozen(plan, point, ledger)
    takeover(sweep, site, ledger, monkeypatch)
    assert main(["rerun", str(sweep.path), "--all", "--yes"]) == 0
    run(launch(sweep), 2.0, ledger)
    agrees(sweep, 2.0)
    before = len(ledger.of(zombie.name))
    zombie.wake()
    assert len(ledger.of(zombie.name)) - before <= 1, "begun after its row was written"
    agrees(sweep, 2.0)
    compact(sweep)
    agrees(sweep, 2.0)
    assert set(pd.read_parquet(sweep.table("metrics")).value) == {2.0}


@pytest.mark.parametrize("takeover", [by_requeue, by_retry, by_assume_dead], ids=lambda one: one.__name__)
@pytest.mark.parametrize("point", ["before claim", "evaluated", "after trials"])
def test_a_zombie_leaves_alone_what_others_have_done(
    sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch, point: str, takeover: Callable[..., None]
) -> None:
    ledger = Ledger()
    plan = write(sweep, TRIALS, shard_minutes=60)
    submit(sweep)
    site.set("RUNNING")
    zombie = Frozen(plan, point, ledger)
    takeover(sweep, site, ledger, monkeypatch)
    agrees(sweep, 1.0)
    before = len(ledger.of(zombie.name))
    summary = zombie.wake()
    assert len(ledger.of(zombie.name)) - before <= 1
    assert summary.stopped
    [record] = [heard.record for heard in read_records(sweep) if heard.record.worker == zombie.name]
    assert record.ended in (Stop.SUPERSEDED, LOST_AND_REQUEUED, "lost: NODE_FAIL", "lost: UNKNOWN")
    assert '"ended": "superseded"' in (sweep.workers / f"{zombie.name}.json").read_text()
    assert "superseded: this worker was taken for gone" in (sweep.logs / f"{zombie.name}.log").read_text()
    agrees(sweep, 1.0)


def test_a_queued_job_leaves_alone_what_was_forgotten_and_a_launch_plans_it_at_once(
    sweep: SweepFolder, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """No fault at all: a job waits in the queue, code is mended, everything is to run again, and then the job begins."""
    ledger = Ledger()
    plan = write(sweep, TRIALS, shard_minutes=60)
    submit(sweep)
    site.set("REQUEUED")
    assert main(["rerun", str(sweep.path), "--all", "--yes"]) == 0
    assert "of 3 trials without any result" in capsys.readouterr().out
    run(launch(sweep), 2.0, ledger)
    old = Worker(plan, context=JobContext(job_name="j"))
    old.child = Child(old, 1.0, ledger, lambda point, trial_id: None)  # type: ignore[assignment]
    summary = old.run(0)
    old.close()
    assert (summary.done, summary.superseded + summary.skipped, summary.left) == (0, 3, 0)
    agrees(sweep, 2.0)


def test_queued_jobs_that_have_nothing_else_to_do_leave_the_queue(
    sweep: SweepFolder, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    write(sweep, TRIALS)
    submit(sweep)
    assert main(["rerun", str(sweep.path), "bit_width=2,3", "--yes"]) == 0
    assert "2 queued jobs had nothing else to do and left the queue" in capsys.readouterr().out
    assert sorted(state for _, state, _ in site.jobs.values() if state != "CANCELLED") == ["PENDING", "PENDING"], "one job, one collector"
    assert to_leave_alone(sweep, settle(sweep)) == {TRIALS[2].trial.trial_id}
    assert sweep_status(sweep)["to_launch"] == 2


def test_a_task_that_was_forgotten_is_left_out_and_the_others_are_run(sweep: SweepFolder) -> None:
    ledger = Ledger()
    plan = write(sweep, TRIALS, shard_minutes=60)
    assert main(["rerun", str(sweep.path), "task=t", "bit_width=2", "--yes"]) == 0
    assert run(plan, 1.0, ledger).done == 3
    t, _ = TRIALS[0].tasks
    assert {(trial_id, task) for _, trial_id, task in ledger.begun} == PAIRS - {(TRIALS[0].trial.trial_id, t.task_key)}


def test_a_beat_never_revives_a_record_that_was_closed(sweep: SweepFolder) -> None:
    made = Worker(write(sweep, TRIALS, shard_minutes=60), context=JobContext(job_name="j"))
    record = made.beat.record
    close_record(sweep, record.worker, "lost: NODE_FAIL")
    write_record(sweep, record)
    made.beat.update(label="again")
    [heard] = read_records(sweep)
    assert (heard.record.ended, heard.is_alive, heard.record.label) == ("lost: NODE_FAIL", False, "again")
    made.close()


def test_a_new_number_is_greater_than_that_of_every_plan_and_fence(sweep: SweepFolder) -> None:
    """Also where the newest plan was taken back, since Slurm refused it: what comes after a fence lies above it."""
    plans = [write(sweep, TRIALS, shard_minutes=60) for _ in range(2)]
    plans[1].unlink()
    assert main(["rerun", str(sweep.path), "--all", "--yes"]) == 0
    plan = write(sweep, TRIALS, shard_minutes=60)
    assert run(plan, 2.0, Ledger()).done == 3
    agrees(sweep, 2.0)


def test_a_file_system_that_fails_for_a_moment_ends_no_worker(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen last holds until the next look; a full disk is another thing."""
    plan = write(sweep, TRIALS, shard_minutes=60)
    looks = Wanted(sweep, read_header(plan), "w")
    looks.look()
    holding_back = frozenset(looks._fences)
    for number, ends in ((errno.EIO, False), (errno.ESTALE, False), (errno.ENOSPC, True)):

        def fails(folder: Path, number: int = number) -> float:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("quantsweep.running.wanted.filesystem_now", fails)
        looks._next = 0.0
        if ends:
            with pytest.raises(OSError, match="No space left"):
                looks.look()
        else:
            looks.look()
        assert (frozenset(looks._fences), looks.closed) == (holding_back, None)
