"""Why a worker ends, what it leaves out, and what it leaves behind; its child is played from a script."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from quantsweep.crew import slurm_job
from quantsweep.failures import classes
from quantsweep.failures.classes import Failure
from quantsweep.failures.holds import cancelled, read_holds
from quantsweep.launching.cluster import NoRoomError, RefusedError
from quantsweep.launching.settle import settle
from quantsweep.launching.submissions import read_submissions
from quantsweep.planning.plan_files import read_owners
from quantsweep.running.child_process import Child, ChildDiedError
from quantsweep.running.environment import NOT_RUN, Environment, RunningCode, source_digest
from quantsweep.running.stopping import Allotment, Stop, StoppedError
from quantsweep.running.worker import DiskFullError, JobContext, Worker
from quantsweep.storage.files import write_text
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import ENDED_AND_REQUEUED, ENDED_BY_SLURM, LOST_AND_REQUEUED, WorkerRecord, read_records
from quantsweep.tables import records
from quantsweep.trial.specs import ClusterSpec, PlannedTrial, RunSettings
from tests.unit import engine_cases
from tests.unit.engine_cases import TASKS, Site, fail, failed_rows, finish, submit, trial, write
from tests.unit.test_records import EXAMPLES

SIZES = {column.name: EXAMPLES[column.type] for column in records.SIZE}
RESULT = {
    "seconds": 0.1,
    "requests_hash": "r",
    "samples": {"correct": [True], "correct_norm": None, "loglikelihood": [0.5], "num_bytes": None},
    "metrics": [{"name": "acc", "value": 1.0, "stderr": 0.0, "higher_is_better": True, "is_primary": True}],
    **dict.fromkeys(("num_samples", "window", "num_tokens", "num_input_tokens", "num_truncated", "num_nonfinite", "batch_size"), 1),
    "data_revision": "d",
}
LOADED = {"event": "loaded", "load_seconds": 0.0, "device": "cpu", "driver": None}
QUANTIZED = {"event": "quantized", "quantize_seconds": 0.0, "sizes": SIZES, "layers": []}
DONE = {"event": "done", "restore_seconds": 0.0}


def task(name: str = "t") -> dict[str, Any]:
    return {"event": "task", "task_key": next(t.task_key for t in TASKS if t.name == name), "result": RESULT}


def failed(cause: str, fingerprint: str = "f1") -> dict[str, Any]:
    return {"event": "failed", **dataclasses.asdict(Failure(failure_class=cause, message="m", fingerprint=fingerprint))}


WELL = (LOADED, QUANTIZED, task("t"), task("u"), DONE)
Step = dict[str, Any] | Callable[[Stop], None]


class Script:
    """Plays a child: bit width → what it says; a callable is run in its place; trials that are not named go well."""

    def __init__(self, worker: Worker, by_bits: dict[int, tuple[Step, ...]]) -> None:
        self.by_bits, self.ran, self.kills = by_bits, [], 0
        self.ran: list[int]
        worker.child = self  # type: ignore[assignment]

    def events(self, planned: PlannedTrial, settings: RunSettings, log: Path, stop: Stop) -> Iterator[dict[str, Any]]:
        bits = planned.trial.quantization.bit_width
        assert bits is not None
        self.ran.append(bits)
        for step in self.by_bits.get(bits, WELL):
            if callable(step):
                step(stop)
                continue
            if step["event"] == "task" and step["task_key"] not in {t.task_key for t in planned.tasks}:
                continue
            yield dict(step)
            if stop.is_set() and step["event"] == "task":
                raise StoppedError

    def kill(self) -> None:
        self.kills += 1


@pytest.fixture(autouse=True)
def _quick_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking git what ran is not what is tested here."""
    monkeypatch.setattr(
        "quantsweep.running.worker.environment.capture",
        lambda folder: Environment(host="n0", slurm_job=os.environ.get("TEST_JOB"), code_commit=None, code_diff=None, versions="{}"),
    )


def start(plan: Path, by_bits: dict[int, tuple[Step, ...]] | None = None, **context: Any) -> tuple[Worker, Script]:
    made = Worker(plan, context=JobContext(**context))
    return made, Script(made, by_bits or {})


def record(folder: SweepFolder, made: Worker) -> WorkerRecord:
    [heard] = [heard for heard in read_records(folder) if heard.record.worker == made.beat.record.worker]
    return heard.record


@pytest.fixture
def plan(sweep: SweepFolder) -> Path:
    """One shard of four trials, 2 to 5 bit."""
    return write(sweep, [trial(bits) for bits in (2, 3, 4, 5)], shard_minutes=60)


# --- what is run --------------------------------------------------------------------------------------------------------


def test_all_is_well(sweep: SweepFolder, plan: Path) -> None:
    made, script = start(plan)
    summary = made.run(0)
    made.close()
    assert (summary.done, summary.failed, summary.skipped, summary.left, summary.stopped) == (4, 0, 0, 0, False)
    assert script.ran == [2, 3, 4, 5]
    assert len(records.read_done(sweep.path)) == 8
    assert (record(sweep, made).ended, record(sweep, made).trial_id) == ("finished", None)


def test_every_row_has_the_tag_of_its_launch_whoever_writes_it(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tagged = write(sweep, [trial(bits) for bits in (2, 3, 4, 5)], shard_minutes=60, tag="mine")
    retry = write(sweep, [trial(6)], tag="mine", root=tagged.name)
    for one in TASKS:
        finish(sweep, trial(2), [one], plan=tagged.name, tag="mine")  # completed by a run that is gone: only its row is missing
    gone = {"job": "7_0", "plan": tagged.name, "shard_id": 0}
    engine_cases.worker(sweep, **gone, trial_id=trial(2).trial.trial_id, restarts=0)
    for restarts in range(1, 4):
        engine_cases.worker(sweep, **gone, trial_id=trial(3).trial.trial_id, restarts=restarts)
    monkeypatch.setenv("TEST_JOB", "7_0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    layer = dict.fromkeys(("out_features", "in_features", "bits", "relative_error", "max_abs_error", "num_kept_columns"), 1)
    layer |= {"bits_by_part": "blocks=1", "fallbacks": "", "num_tokens": None, "output_error": None, "seconds": 0.1}
    quantized = {**QUANTIZED, "layers": [{"layer": "l", **layer}]}
    for plan in (tagged, retry):
        made, _ = start(plan, {4: (LOADED, quantized, task("t"), task("u"), DONE), 5: (LOADED, failed(classes.BUG))})
        made.run(0)
        made.close()
    assert len(failed_rows(sweep)) == 2, "one was given up, one failed"
    for table, count in {"trials": 5, "metrics": 6, "samples": 4, "layers": 1}.items():
        assert records.read_table(sweep.path, table).column("tag").to_pylist() == ["mine"] * count


def test_what_is_done_or_owned_by_a_newer_plan_or_failed_under_this_plan_is_left_out(sweep: SweepFolder, plan: Path) -> None:
    finish(sweep, trial(2))
    fail(sweep, trial(3), classes.BUG, plan=plan.name)
    newer = write(sweep, [trial(4)])
    made, script = start(plan)
    summary = made.run(0)
    assert (summary.skipped, summary.superseded) == (2, 1)
    assert script.ran == [5]
    made.close()
    again, script = start(newer)
    again.run(read_owners(sweep.plan)[trial(4).trial.trial_id][1])
    again.close()
    assert script.ran == [4]


def test_what_failed_under_an_older_plan_is_tried(sweep: SweepFolder, plan: Path) -> None:
    fail(sweep, trial(2), classes.BUG, plan=plan.name)
    retry = write(sweep, [trial(2)], root=plan.name)
    made, script = start(retry)
    made.run(0)
    made.close()
    assert script.ran == [2]


def test_only_missing_tasks_are_run(sweep: SweepFolder, plan: Path) -> None:
    finish(sweep, trial(2), TASKS[:1])
    made, _ = start(plan)
    made.run(0)
    made.close()
    assert records.read_table(sweep.path, "metrics").num_rows == 8


def test_a_hold_that_comes_meanwhile_is_heard_before_the_next_trial(sweep: SweepFolder, plan: Path) -> None:
    made, script = start(plan, {2: (*WELL[:-1], lambda stop: cancelled(["bit_width=3,5"], sweep).save(sweep), DONE)})
    summary = made.run(0)
    made.close()
    assert (script.ran, summary.held, summary.done, summary.left) == ([2, 4], 2, 2, 0)


def test_holds_are_read_again_only_when_there_is_another(sweep: SweepFolder, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[int] = []
    genuine = read_holds
    monkeypatch.setattr("quantsweep.running.wanted.read_holds", lambda folder: readings.append(1) or genuine(folder))
    made, script = start(plan, {3: (*WELL[:-1], lambda stop: cancelled(["bit_width=5"], sweep).save(sweep), DONE)})
    made.run(0)
    made.close()
    assert (script.ran, len(readings)) == ([2, 3, 4], 1)


def test_a_hold_is_heard_that_comes_in_the_second_of_the_last_reading(sweep: SweepFolder, plan: Path) -> None:
    """Some file systems count whole seconds: the folder looks as it did, whatever has been put into it."""

    def hold(text: str) -> Callable[[Stop], None]:
        def put(stop: Stop) -> None:
            cancelled([text], sweep).save(sweep)
            os.utime(sweep.holds, (1_000, 1_000))

        return put

    os.utime(sweep.holds, (1_000, 1_000))
    made, script = start(plan, {2: (*WELL[:-1], hold("bit_width=3"), DONE), 4: (*WELL[:-1], hold("bit_width=5"), DONE)})
    made.run(0)
    made.close()
    assert script.ran == [2, 4]


def test_a_hold_that_is_replaced_under_its_name_is_heard(sweep: SweepFolder, plan: Path) -> None:
    first = cancelled(["bit_width=5"], sweep)
    first.save(sweep)
    made, script = start(plan, {2: (*WELL[:-1], lambda stop: dataclasses.replace(first, filters=("bit_width=3,4",)).save(sweep), DONE)})
    made.run(0)
    made.close()
    assert script.ran == [2, 5]


def test_a_hold_on_earlier_launches_does_not_touch_this_one(sweep: SweepFolder, plan: Path) -> None:
    cancelled(["bit_width=2"], sweep).save(sweep)
    newer = write(sweep, [trial(2)], shard_minutes=60)
    old, script = start(plan)
    old.run(0)
    old.close()
    assert script.ran == [3, 4, 5], "the newer plan has it"
    made, script = start(newer)
    assert made.run(0).held == 0
    made.close()
    assert script.ran == [2]


def test_the_record_says_what_is_at_hand(sweep: SweepFolder, plan: Path) -> None:
    seen: list[WorkerRecord] = []
    made, _ = start(plan, {3: (lambda stop: seen.append(record(sweep, made)), *WELL)}, job_name="qs-1", shard_ids=(0,), gpus=2)
    made.run(0)
    made.close()
    [one] = seen
    assert (one.trial_id, one.shard_id, one.job_name, one.shard_ids, one.gpus) == (trial(3).trial.trial_id, 0, "qs-1", (0,), 2)
    assert one.label == trial(3).trial.label
    text = made.log.read_bytes()[one.log_start :].decode()
    assert text.startswith(f"--- trial {one.trial_id}")


# --- why it ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [Stop.PERSON, Stop.TIME_LIMIT, Stop.ENDED])
def test_asked_to_stop_it_keeps_the_task_and_drops_the_trial(sweep: SweepFolder, plan: Path, reason: str) -> None:
    made, script = start(plan, {3: (LOADED, QUANTIZED, lambda stop: stop.set(reason), task("t"), task("u"), DONE)})
    summary = made.run(0)
    made.close()
    assert (summary.done, summary.failed, summary.stopped, summary.left, script.ran) == (1, 0, True, 3, [2, 3])
    assert len(records.read_done(sweep.path)) == 3
    assert failed_rows(sweep) == []
    # Only Slurm knows why it ended the job, so what was dropped stays in the record for whoever settles.
    dropped = script.ran and record(sweep, made).trial_id is not None
    assert (record(sweep, made).ended, dropped) == (reason, reason == Stop.ENDED)


@pytest.mark.parametrize(
    ("reason", "minutes", "is_overtime"),
    [
        (Stop.TIME_LIMIT, 0.1 / 60, True),
        (Stop.TIME_LIMIT, 60.0, False),
        (Stop.TIME_LIMIT, None, False),
        (Stop.ENDED, 0.1 / 60, False),
        (Stop.PERSON, 0.1 / 60, False),
    ],
)
def test_a_trial_is_too_long_if_it_had_most_of_the_jobs_time(
    sweep: SweepFolder, plan: Path, reason: str, minutes: float | None, *, is_overtime: bool
) -> None:
    def limit(stop: Stop) -> None:
        time.sleep(0.08)
        stop.set(reason, 0.0)
        raise StoppedError

    made, _ = start(plan, {2: (LOADED, limit)}, minutes=minutes)
    made.run(0)
    made.close()
    rows = failed_rows(sweep)
    assert [row["failure_class"] for row in rows] == [classes.TIME_LIMIT] * is_overtime
    assert record(sweep, made).ended == reason
    if is_overtime:
        made, script = start(plan)
        made.run(0)
        made.close()
        assert script.ran == [3, 4, 5], "requeued, it goes on without the trial that is too long"


def test_the_budget_ends_it_within_one_trial(sweep: SweepFolder, plan: Path) -> None:
    allotment = Allotment(0.05)
    made, script = start(plan, {2: (*WELL[:-1], lambda stop: time.sleep(0.06), DONE)}, gpus=1, allotment=allotment)
    summary = made.run(0)
    made.close()
    assert record(sweep, made).ended in (Stop.BUDGET, "finished")
    assert summary.stopped
    assert len(script.ran) <= 2, "what the first trial used counts before the next one begins, or before the one after it"


def test_a_budget_that_is_spent_begins_nothing(sweep: SweepFolder, plan: Path) -> None:
    made, script = start(plan, gpus=1, allotment=Allotment(0.0))
    assert made.run(0).stopped
    made.close()
    assert (script.ran, record(sweep, made).ended) == ([], Stop.BUDGET)


def test_a_worker_without_a_gpu_uses_none_of_it(sweep: SweepFolder, plan: Path) -> None:
    made, script = start(plan, {2: (*WELL[:-1], lambda stop: time.sleep(0.02), DONE)}, gpus=0, allotment=Allotment(0.001))
    made.run(0)
    made.close()
    assert script.ran == [2, 3, 4, 5]


@pytest.mark.parametrize("cause", [classes.BAD_NODE, classes.NO_ANSWER])
def test_two_strikes_of_the_machine_end_the_worker_also_across_shards(sweep: SweepFolder, cause: str) -> None:
    plan = write(sweep, [trial(bits) for bits in (2, 3, 4)])
    bad = (LOADED, failed(cause))
    made, script = start(plan, {2: bad, 3: bad})
    summaries = [made.run(shard_id) for shard_id in (0, 1)]
    made.close()
    assert [summary.stopped for summary in summaries] == [False, True]
    assert (script.ran, record(sweep, made).ended) == ([2, 3], Stop.BAD_NODE)


def test_a_success_in_between_forgives_a_strike(sweep: SweepFolder, plan: Path) -> None:
    bad = (LOADED, failed(classes.BAD_NODE))
    made, script = start(plan, {2: bad, 4: bad})
    made.run(0)
    made.close()
    assert script.ran == [2, 3, 4, 5]


def test_the_breaker_trips_at_once_where_this_worker_alone_has_failures_enough(sweep: SweepFolder) -> None:
    plan = write(sweep, [trial(bits) for bits in (2, 3, 4, 5)], shard_minutes=60, breaker_trials=2)
    bug = (LOADED, failed(classes.BUG))
    made, script = start(plan, dict.fromkeys((2, 3, 4, 5), bug))
    summary = made.run(0)
    made.close()
    assert (script.ran, summary.failed, summary.held) == ([2, 3], 2, 2)
    assert [hold.by for hold in read_holds(sweep)] == ["breaker"]


@pytest.mark.parametrize(("seconds", "ran"), [(0.0, [2]), (60.0, [2, 3, 4, 5])])
def test_others_failures_are_read_now_and_then(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, seconds: float, ran: list[int]) -> None:
    monkeypatch.setattr("quantsweep.running.worker.BREAKER_SECONDS", seconds)
    plan = write(sweep, [trial(bits) for bits in (2, 3, 4, 5, 6, 7)], shard_minutes=60, breaker_trials=3)
    for bits in (6, 7):
        fail(sweep, trial(bits), classes.BUG, plan=plan.name, fingerprint="f1")
    bug = {2: (LOADED, failed(classes.BUG)), **{bits: (LOADED, failed(classes.BUG, f"g{bits}")) for bits in (3, 4, 5)}}
    made, script = start(plan, bug)
    made.run(0)
    made.close()
    assert script.ran == ran
    assert len(read_holds(sweep)) == (seconds == 0.0)


def test_without_a_breaker_nothing_is_held(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantsweep.running.worker.BREAKER_SECONDS", 0.0)
    plan = write(sweep, [trial(bits) for bits in (2, 3, 4, 5)], shard_minutes=60, breaker_trials=None)
    made, _ = start(plan, dict.fromkeys((2, 3, 4, 5), (LOADED, failed(classes.BUG))))
    assert made.run(0).failed == 4
    made.close()
    assert read_holds(sweep) == []


# --- requeued -----------------------------------------------------------------------------------------------------------


def test_a_requeued_job_writes_the_row_of_a_trial_that_its_earlier_run_completed(
    sweep: SweepFolder, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in TASKS:
        finish(sweep, trial(2), [one], plan=plan.name)
    engine_cases.worker(sweep, job="7_0", plan=plan.name, shard_id=0, trial_id=trial(2).trial.trial_id, restarts=0)
    monkeypatch.setenv("TEST_JOB", "7_0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    made, script = start(plan)
    made.run(0)
    made.close()
    rows = records.read_table(sweep.path, "trials").to_pylist()
    assert sorted(row["status"] for row in rows) == ["done"] * 4
    assert script.ran == [3, 4, 5]
    [completed] = [row for row in rows if row["trial_id"] == trial(2).trial.trial_id]
    rows = records.read_table(sweep.path, "metrics").to_pylist()
    assert {row["code_hash"] for row in rows if row["attempt"] == completed["attempt"]} == {completed["code_hash"]} != {None}


def test_a_requeued_job_closes_its_earlier_runs_and_gives_up_what_keeps_taking_it_down(
    sweep: SweepFolder, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly, unlucky = trial(2).trial.trial_id, trial(3).trial.trial_id
    for restarts in range(3):
        engine_cases.worker(sweep, job="7_0", restarts=restarts, trial_id=deadly, plan=plan.name, shard_id=0, node=f"n{restarts}")
    engine_cases.worker(sweep, job="7_0", restarts=3, trial_id=unlucky)
    engine_cases.worker(sweep, job="8_0", restarts=0, trial_id=unlucky)
    monkeypatch.setenv("TEST_JOB", "7_0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    made, script = start(plan)
    summary = made.run(0)
    made.close()
    assert script.ran == [3, 4, 5]
    assert (summary.done, summary.failed, summary.left) == (3, 1, 0)
    [lost] = failed_rows(sweep)
    assert (lost["trial_id"], lost["failure_class"], lost["slurm_job"]) == (deadly, classes.NODE_FAILURE, "7_0")
    assert (lost["plan"], lost["shard_id"]) == (plan.name, 0)
    assert lost["host"] in {"n0", "n1", "n2"}, "where it was lost, not where that is found out"
    assert "3 times in this one job" in lost["failure_message"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    again, script = start(plan)
    again.run(0)
    again.close("gone")
    assert (script.ran, len(failed_rows(sweep))) == ([], 1), "once, however often the job comes back"
    ends = {(heard.record.job, heard.record.restarts): heard.record.ended for heard in read_records(sweep)}
    assert ends == {**{("7_0", n): LOST_AND_REQUEUED for n in range(4)}, ("8_0", 0): None, ("7_0", 4): "finished", ("7_0", 5): "gone"}


def test_a_trial_dropped_at_a_preemption_is_settled_by_the_run_that_follows(
    sweep: SweepFolder, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would count as lost when the job has ended, after the later run's own word."""
    engine_cases.worker(sweep, job="7_0", trial_id=trial(2).trial.trial_id, plan=plan.name, shard_id=0, ended=ENDED_BY_SLURM)
    monkeypatch.setenv("TEST_JOB", "7_0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    made, _ = start(plan)
    made.close()
    ends = {heard.record.restarts: heard.record.ended for heard in read_records(sweep)}
    assert ends[0] == ENDED_AND_REQUEUED


# --- results that cannot be written -------------------------------------------------------------------------------------


def full(*arguments: object, **more: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_worker_and_says_so(sweep: SweepFolder, plan: Path) -> None:
    made, script = start(plan)
    genuine = made.writer.add
    made.writer.add = lambda table, rows: full() if table == "metrics" else genuine(table, rows)  # type: ignore[method-assign]
    with pytest.raises(DiskFullError, match="Make space"):
        made.run(0)
    made.close()
    assert script.ran == [2]
    assert record(sweep, made).ended == "DISK_FULL"
    assert [row["failure_class"] for row in failed_rows(sweep)] == [classes.DISK_FULL]


def test_a_disk_with_no_room_for_the_workers_last_word_hears_it_all_the_same(
    sweep: SweepFolder, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever settles takes the full disk for a kill, and tries again with twice the memory."""
    made, _ = start(plan)
    made.beat.update(trial_id="x" * 16, label="a label that is longer than the word at the end")
    monkeypatch.setattr("quantsweep.running.heartbeat.write_record", full)
    made.close("DISK_FULL")
    assert (record(sweep, made).ended, record(sweep, made).trial_id) == ("DISK_FULL", None)


def test_on_a_really_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file system, if this process may mount one; then Slurm says FAILED, and nothing goes on by itself."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root; the same errors are injected in the tests before this one")
    try:
        folder = SweepFolder(mount / "sweep")
        folder.create()
        site = engine_cases.install(monkeypatch, folder)
        plan = write(folder, [trial(bits) for bits in (2, 3)], shard_minutes=60)
        submit(folder)
        monkeypatch.setenv("TEST_JOB", "101_0")

        def fill(stop: Stop) -> None:
            with contextlib.suppress(OSError), (mount / "rubbish").open("wb", buffering=0) as file:
                while file.write(b"x" * 512):
                    pass
            assert shutil.disk_usage(mount).free < 512

        made, script = start(plan, {2: (LOADED, QUANTIZED, fill, task("t"), task("u"), DONE)})
        with pytest.raises(DiskFullError):
            made.run(0)
        made.close()
        (mount / "rubbish").unlink()
        assert script.ran == [2]
        site.set("FAILED")
        assert [one.ended for one in settle(folder).ended] == ["DISK_FULL"]
        assert [row for row in failed_rows(folder) if row["failure_class"] != classes.DISK_FULL] == []
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_another_error_of_the_tables_ends_the_worker_with_its_name(sweep: SweepFolder, plan: Path) -> None:
    made, _ = start(plan)

    def broken(table: str, rows: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    made.writer.add = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError, match="Input/output"):
        made.run(0)
    made.close()
    assert str(record(sweep, made).ended).startswith("error: OSError")


# --- the stop itself ----------------------------------------------------------------------------------------------------


def test_the_first_reason_stays_and_the_shorter_grace_wins() -> None:
    stop = Stop()
    assert (stop.is_set(), stop.drops_now(), stop.reason) == (False, False, None)
    stop.set(Stop.TIME_LIMIT, 1_000.0)
    assert (stop.is_set(), stop.drops_now()) == (True, False)
    stop.set(Stop.ENDED, 0.0)
    assert (stop.reason, stop.drops_now()) == (Stop.TIME_LIMIT, True)
    stop.set(Stop.PERSON, 500.0)
    assert stop.drops_now(), "a longer grace takes nothing back"
    gentle = Stop()
    gentle.set()
    assert (gentle.is_set(), gentle.drops_now()) == (True, False)


class Piped(Child):
    """A child whose process is a thread at the other end of the pipe, or a process that ends with a given signal."""

    def __init__(self, say: Callable[[Connection], None], process: subprocess.Popen[bytes] | None = None) -> None:
        super().__init__()
        self._say, self._process = say, process

    def _start(self, log: Path) -> Connection:
        ours, theirs = Pipe()
        threading.Thread(target=self._talk, args=(theirs,), daemon=True).start()
        self._pipe = ours
        return ours

    def _talk(self, theirs: Connection) -> None:
        assert json.loads(theirs.recv_bytes())["planned"]
        with contextlib.suppress(OSError):  # on a busy machine the worker may have hung up before everything is said
            self._say(theirs)


def says(*events: dict[str, Any], then: float = 0.0) -> Callable[[Connection], None]:
    def talk(pipe: Connection) -> None:
        for event in events:
            pipe.send_bytes(json.dumps(event).encode())
        time.sleep(then)
        pipe.close()

    return talk


def listen(child: Child, stop: Stop, tmp_path: Path, minutes: float | None = None) -> list[str]:
    return [event["event"] for event in child.events(trial(2), RunSettings(trial_timeout_minutes=minutes), tmp_path / "log", stop)]


def test_a_task_at_hand_is_dropped_when_the_grace_is_over(tmp_path: Path) -> None:
    stop = Stop()
    stop.set(Stop.TIME_LIMIT, 0.3)
    began = time.monotonic()
    with pytest.raises(StoppedError):
        listen(Piped(says(LOADED, then=30)), stop, tmp_path)
    assert 0.2 < time.monotonic() - began < 5


def test_without_a_grace_the_task_at_hand_ends_first(tmp_path: Path) -> None:
    stop = Stop()
    stop.set()
    events = Piped(says(LOADED, task("t"), task("u"), DONE, then=1)).events(trial(2), RunSettings(), tmp_path / "log", stop)
    assert [next(events)["event"], next(events)["event"]] == ["loaded", "task"]
    with pytest.raises(StoppedError):
        next(events)


def test_silence_is_a_hang(tmp_path: Path) -> None:
    with pytest.raises(ChildDiedError) as caught:
        listen(Piped(says(LOADED, then=30)), Stop(), tmp_path, minutes=0.005)
    assert caught.value.failure.failure_class == classes.HUNG


@pytest.mark.parametrize(
    ("number", "in_slurm", "outcome"),
    [
        (signal.SIGSEGV, True, classes.CRASHED),
        (signal.SIGKILL, True, classes.KILLED),
        (signal.SIGTERM, False, classes.KILLED),
        (signal.SIGTERM, True, None),
    ],
)
def test_a_child_that_slurm_ends_is_no_failure_of_its_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, outcome: str | None, *, in_slurm: bool
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if in_slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    process = subprocess.Popen(["sleep", "100"])
    process.send_signal(number)
    stop = Stop()
    with pytest.raises((ChildDiedError, StoppedError)) as caught:
        listen(Piped(says(LOADED), process), stop, tmp_path)
    if outcome is None:
        assert (caught.type, stop.reason, stop.drops_now()) == (StoppedError, Stop.ENDED, True)
    else:
        assert isinstance(caught.value, ChildDiedError)
        assert caught.value.failure.failure_class == outcome


# --- the job around it --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of task 0 of the array; handlers of signals are as before afterwards."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "101")
    monkeypatch.setenv("TEST_JOB", "101_0")
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def play(monkeypatch: pytest.MonkeyPatch, by_bits: dict[int, tuple[Step, ...]]) -> list[Script]:
    scripts: list[Script] = []

    def make(*arguments: Any, **more: Any) -> Worker:
        made = Worker(*arguments, **more)
        scripts.append(Script(made, by_bits))
        return made

    monkeypatch.setattr(slurm_job, "Worker", make)
    return scripts


def submission(folder: SweepFolder) -> str:
    [path] = sorted(folder.plan.glob("submission-*.json"))
    return str(path)


def test_a_job_runs_its_shards_and_looks_after_the_sweep(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(sweep)
    scripts = play(monkeypatch, {})
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert [script.ran for script in scripts] == [[2, 3, 4, 5]]
    assert "planned 0 trials again" in capsys.readouterr().out
    assert len(records.read_done(sweep.path)) == 8


@pytest.mark.parametrize("requeues", [True, False])
def test_at_the_time_limit_the_job_goes_back_into_the_queue(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch, *, requeues: bool
) -> None:
    submit(sweep)
    play(monkeypatch, {3: (LOADED, QUANTIZED, lambda stop: os.kill(os.getpid(), signal.SIGUSR2) or time.sleep(0.7), task("t"), DONE)})
    if not requeues:
        site.down = {"scontrol"}
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert ["scontrol", "requeue", "101_0"] in site.asked
    assert len(records.read_done(sweep.path)) == 3


def test_at_the_time_limit_with_nothing_left_the_job_just_ends(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Back in the queue it would wait for a place, load everything, and find nothing to do."""
    submit(sweep)
    last = (*WELL[:-1], DONE, lambda stop: os.kill(os.getpid(), signal.SIGUSR2) or time.sleep(0.7))
    for bits in (2, 3, 4):
        finish(sweep, trial(bits))
    play(monkeypatch, {5: last})
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert not [argv for argv in site.asked if argv[:2] == ["scontrol", "requeue"]]
    assert "planned 0 trials again" in capsys.readouterr().out


def test_a_job_that_nobody_knows_ends_without_touching_a_trial(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm heard one sbatch twice: the receipt names the other job."""
    submit(sweep)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "999")
    scripts = play(monkeypatch, {})
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert scripts == []
    assert "999" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "runs"), [(101, True), (55, False)])
def test_a_job_that_is_faster_than_its_receipt_waits_for_it(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch, number: int, *, runs: bool
) -> None:
    without_receipt(sweep)
    path = Path(submission(sweep))
    threading.Timer(0.7, lambda: write_text(path, path.read_text().replace('"array_job_id": null', f'"array_job_id": {number}'))).start()
    scripts = play(monkeypatch, {})
    began = time.monotonic()
    assert slurm_job.main(["task", str(path), "0"]) == 0
    assert time.monotonic() - began > 0.6
    assert bool(scripts) == runs


def test_a_job_whose_launcher_died_before_the_receipt_is_the_one(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_receipt(sweep)
    monkeypatch.setattr(slurm_job, "RECEIPT_SECONDS", 0.0)
    play(monkeypatch, {})
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert len(records.read_done(sweep.path)) == 8


def without_receipt(folder: SweepFolder) -> None:
    submit(folder)
    [one] = read_submissions(folder)
    dataclasses.replace(one, arrays=(dataclasses.replace(one.arrays[0], array_job_id=None),)).save()


def test_other_code_than_the_copy_is_refused(
    sweep: SweepFolder, site: Site, in_job: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy is not seen on this node, say, and Python finds what is installed there."""
    write(sweep, [trial(2)], code="cafe")
    submit(sweep)
    scripts = play(monkeypatch, {})
    assert slurm_job.main(["task", submission(sweep), "0"]) == 1
    assert str(sweep.code / "cafe") in capsys.readouterr().err
    assert scripts == []
    monkeypatch.setattr("quantsweep.__file__", str(sweep.code / "cafe" / "quantsweep" / "__init__.py"))
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert len(scripts) == 1


def test_a_requeued_job_has_used_some_of_its_budget_already(
    sweep: SweepFolder, site: Site, in_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(sweep, [trial(bits, gpus=1) for bits in (2, 3)], shard_minutes=60, gpu_hours=100.0)
    submit(sweep)
    [[granted]] = [array.gpu_seconds for array in site.submitted]
    used = {"gpus": 1, "ended": LOST_AND_REQUEUED}
    engine_cases.worker(sweep, job="101_0", seconds=granted - 100, **used)
    engine_cases.worker(sweep, job="102_0", seconds=10 * granted, **used)
    scripts = play(monkeypatch, {})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert [script.ran for script in scripts] == [[2, 3]], "what other jobs used is not its own"


def test_a_requeued_job_that_has_used_its_budget_runs_nothing(
    sweep: SweepFolder, site: Site, in_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(sweep, [trial(bits, gpus=1) for bits in (2, 3)], shard_minutes=60, gpu_hours=100.0)
    submit(sweep)
    [[granted]] = [array.gpu_seconds for array in site.submitted]
    engine_cases.worker(sweep, job="101_0", seconds=granted + 1, gpus=1, ended=LOST_AND_REQUEUED)
    scripts = play(monkeypatch, {})
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert [script.ran for script in scripts] == [[]]


def test_a_job_that_is_ended_asks_for_nothing_more(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(sweep)
    play(monkeypatch, {2: (LOADED, QUANTIZED, lambda stop: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(0.7), task("t"), DONE)})
    site.asked.clear()
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert site.asked == []


def test_results_that_cannot_be_written_fail_the_job(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(sweep)
    monkeypatch.setattr("quantsweep.crew.slurm_job.Worker", full)
    assert slurm_job.main(["task", submission(sweep), "0"]) == 1
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize(("widths", "gpus"), [((2, 3), ["0,1", "2,3"]), ((2,), ["0,1"])], ids=["full", "one shard is left"])
def test_a_whole_node_runs_workers_side_by_side_each_with_its_gpus(
    sweep: SweepFolder, site: Site, in_job: None, monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...], gpus: list[str]
) -> None:
    cluster = ClusterSpec(kind="slurm", allocation="node", node_gpus=4)
    write(sweep, [trial(bits, gpus=2) for bits in widths], cluster=cluster)
    submit(sweep)
    seen: list[str] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr("quantsweep.crew.gpus._num_there", lambda: 4)
    monkeypatch.setattr("quantsweep.crew.slurm_job.read_header", lambda path: _on_gpus(path))

    def make(*arguments: Any, **more: Any) -> Worker:
        made = Worker(*arguments, **more)
        seen.append(more["extra_environment"]["CUDA_VISIBLE_DEVICES"])
        assert more["context"].gpus == 2
        Script(made, {})
        return made

    monkeypatch.setattr(slurm_job, "Worker", make)
    assert slurm_job.main(["task", submission(sweep), "0"]) == 0
    assert sorted(seen) == gpus
    assert len(records.read_done(sweep.path)) == 2 * len(widths)


def _on_gpus(path: Path) -> Any:
    from quantsweep.planning.plan_files import read_header

    header = read_header(path)
    return dataclasses.replace(header, settings=dataclasses.replace(header.settings, device="auto"))


# --- the collector ------------------------------------------------------------------------------------------------------


def test_a_collector_takes_the_step_and_compacts(sweep: SweepFolder, site: Site, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm_job.main(["collect", str(sweep.path)]) == 0
    printed = capsys.readouterr().out
    assert "submitted 1 shard," in printed
    assert "compacted" in printed
    assert site.later == []


def test_a_collector_comes_back_where_slurm_is_silent_or_there_is_no_room(sweep: SweepFolder, site: Site, plan: Path) -> None:
    submit(sweep)
    site.down = {"squeue"}
    assert slurm_job.main(["collect", str(sweep.path)]) == 0
    assert site.later == [slurm_job.COLLECTOR_PAUSE_MINUTES]
    site.down = set()
    site.jobs.clear()
    assert slurm_job.main(["collect", str(sweep.path)]) == 0
    assert len(site.later) == 2, "tasks that nobody knows, and no other that lives"


def test_a_collector_does_not_come_back_for_what_waits_for_a_person(
    sweep: SweepFolder, site: Site, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.refuse[0] = RefusedError("give cluster.account=…")
    assert slurm_job.main(["collect", str(sweep.path)]) == 0
    assert "a person is needed: give cluster.account" in capsys.readouterr().out
    assert site.later == []


def test_a_collector_for_which_there_is_no_room_goes_back_into_the_queue_itself(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.refuse.update(dict.fromkeys(range(9), NoRoomError("full")))

    def full_queue(*arguments: object, **more: object) -> int:
        raise NoRoomError("full")

    monkeypatch.setattr("quantsweep.launching.cluster.submit_collector", full_queue)
    assert slurm_job.main(["collect", str(sweep.path)]) == 0
    assert ["scontrol", "requeue", "101_0"] in site.asked
    site.down = {"scontrol"}
    assert slurm_job.main(["collect", str(sweep.path)]) == 1, "nobody comes back: a person must see it"


def test_a_submission_that_never_comes_in_sight_is_an_error_with_a_remedy(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_job, "VISIBLE_SECONDS", -1.0)
    assert slurm_job.main(["task", str(sweep.plan / "submission-x.json"), "0"]) == 1
    assert "Does this node see that file system?" in capsys.readouterr().err


def test_a_submission_that_comes_late_is_waited_for(
    sweep: SweepFolder, site: Site, plan: Path, in_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(sweep)
    path = Path(submission(sweep))
    text = path.read_text()
    path.unlink()
    threading.Timer(0.7, lambda: write_text(path, text)).start()
    play(monkeypatch, {})
    assert slurm_job.main(["task", str(path), "0"]) == 0
    assert len(records.read_done(sweep.path)) == 8


# --- the code that runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("job", "ran"), [(None, [2]), ("101_0", [2, 3, 4, 5])], ids=["here", "in a job"])
def test_other_code_than_was_planned_with_makes_no_row(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, job: str | None, ran: list[int]
) -> None:
    """On this machine it would be the same with every trial; in a job the breaker holds the rest."""
    if job is not None:
        monkeypatch.setenv("TEST_JOB", job)
    plan = write(sweep, [trial(bits) for bits in (2, 3, 4, 5)], shard_minutes=60, sources="planned")
    said = ({**LOADED, "code": "planned"}, {**QUANTIZED, "code": "edited"}, *({**step, "code": "edited"} for step in WELL[2:]))
    made, script = start(plan, dict.fromkeys((2, 3, 4, 5), said))
    summary = made.run(0)
    made.close()
    assert (script.ran, summary.done, summary.failed) == (ran, 0, len(ran))
    assert {row["failure_class"] for row in failed_rows(sweep)} == {classes.CODE_CHANGED}
    for table in ("metrics", "samples", "layers"):
        assert records.read_table(sweep.path, table).num_rows == 0
    assert script.kills >= len(ran)


def test_rows_say_which_code_made_them(sweep: SweepFolder) -> None:
    plan = write(sweep, [trial(2)], sources="planned")
    made, _ = start(plan, {2: tuple({**step, "code": "planned"} for step in WELL if not callable(step))})
    made.run(0)
    made.close()
    for table in ("metrics", "samples", "trials"):
        assert set(records.read_table(sweep.path, table).column("code_hash").to_pylist()) == {"planned"}


def test_an_editors_hidden_files_are_no_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one")
    before = source_digest(tmp_path)
    (tmp_path / ".#a.py").symlink_to("somebody@somewhere.1234")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("none")
    assert source_digest(tmp_path) == before


def test_code_that_talks_to_people_is_in_no_trial(tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "a.py").write_text("one")
    before = source_digest(tmp_path)
    (tmp_path / "cli" / "status.py").write_text("other words")
    assert source_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("two")
    assert source_digest(tmp_path) != before
    probe = "import quantsweep.running.child, quantsweep.evaluation.evaluator, quantsweep.models.loading, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert not [name for name in run.stdout.split() if name.startswith("quantsweep.") and f"{name.split('.')[1]}/" in NOT_RUN]


def test_code_is_hashed_again_when_another_module_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quantsweep"
    package.mkdir()
    (package / "a.py").write_text("one")
    monkeypatch.setattr("quantsweep.running.environment.running_package", lambda: package)
    code = RunningCode()
    first = code.digest()
    (package / "a.py").write_text("two")
    assert code.digest() == first, "what is imported stays what it was"
    monkeypatch.setitem(sys.modules, "quantsweep.another", sys)
    assert code.digest() == source_digest(package) != first
