"""Records of workers: hints that must not mislead."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from pathlib import Path

import pytest

from quantsweep.running.heartbeat import Beat
from quantsweep.running.stopping import Allotment
from quantsweep.storage import workers
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import (
    STALE_SECONDS,
    WorkerRecord,
    new_worker_name,
    overwrite_record,
    read_records,
    worker_of_file,
    write_record,
)
from tests.unit.engine_cases import worker

NOBODY = 2**22 - 1
"""No process has this number (pid_max is at most 2²²)."""


def test_a_record_is_read_as_it_was_written(sweep: SweepFolder) -> None:
    record = WorkerRecord(
        worker="w", host="h", pid=1, plan="p", job="7_0", shard_ids=(1, 2), trial_id="t", trial_started=1.5, gpus=2, seconds=3.0
    )
    write_record(sweep, record)
    [heard] = read_records(sweep)
    assert heard.record == record
    assert -1 < heard.age < 60


def test_names_are_unique_and_told_from_files() -> None:
    names = {new_worker_name() for _ in range(100)}
    assert len(names) == 100
    for name in names:
        assert worker_of_file(Path(f"/r/{name}-007.parquet")) == (name, 7)
    assert worker_of_file(Path("w-1000.parquet")) == ("w", 1000)
    assert worker_of_file(Path("compacted-0123.final.parquet")) is None


def test_unreadable_records_are_left_out(sweep: SweepFolder) -> None:
    worker(sweep, worker="good")
    (sweep.workers / "empty.json").write_text("")
    (sweep.workers / "half.json").write_text('{"worker": "half", "ho')
    (sweep.workers / "newer.json").write_text('{"worker": "newer", "host": "h", "pid": 1, "plan": "p", "shard_ids": [], "mood": "good"}')
    (sweep.workers / "list.json").write_text("[]")
    assert [heard.record.worker for heard in read_records(sweep)] == ["good"]
    assert not list(sweep.workers.glob(".now.*"))


@pytest.mark.parametrize(
    ("values", "alive"),
    [
        ({}, True),
        ({"age": STALE_SECONDS - 30}, True),
        ({"age": STALE_SECONDS + 30}, False),
        ({"ended": "finished"}, False),
        ({"host": platform.node(), "pid": os.getpid()}, True),
        ({"host": platform.node(), "pid": NOBODY}, False),
        ({"pid": NOBODY}, True),
    ],
)
def test_who_is_alive(sweep: SweepFolder, values: dict[str, object], *, alive: bool) -> None:
    worker(sweep, **values)  # type: ignore[arg-type]
    assert read_records(sweep)[0].is_alive == alive


def test_ages_are_measured_by_the_clock_that_stamps_the_files(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """This host's clock is an hour ahead; the file server's is not."""
    worker(sweep, age=100)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    assert read_records(sweep)[0].is_alive


def test_overwriting_in_place_leaves_a_record_that_can_be_read(sweep: SweepFolder) -> None:
    long = WorkerRecord(worker="w", host="h", pid=1, plan="p", trial_id="t" * 16, label="x" * 100)
    write_record(sweep, long)
    before = (sweep.workers / "w.json").stat()
    short = dataclasses.replace(long, ended="DISK_FULL", trial_id=None, label=None)
    overwrite_record(sweep, short)
    after = (sweep.workers / "w.json").stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert read_records(sweep)[0].record == short
    overwrite_record(sweep, long)
    assert read_records(sweep)[0].record == long


def test_the_beat_keeps_the_record_fresh_and_counts_gpu_seconds(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantsweep.running.heartbeat.BEAT_SECONDS", 0.05)
    allotment = Allotment(0.3)
    beat = Beat(sweep, WorkerRecord(worker="w", host="h", pid=1, plan="p", gpus=2), allotment)
    beat.start()
    deadline = time.monotonic() + 10
    while not allotment.is_spent() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert allotment.is_spent(), "also in the middle of a trial that lasts"
    [heard] = read_records(sweep)
    assert heard.record.seconds > 0.1
    beat.end("finished")
    beat.end("again")
    beat.join(timeout=10)
    last = read_records(sweep)[0].record
    assert (last.ended, last.trial_id) == ("finished", None)


def test_a_file_system_that_fails_for_a_moment_does_not_end_the_beat(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantsweep.running.heartbeat.BEAT_SECONDS", 0.02)
    beat = Beat(sweep, WorkerRecord(worker="w", host="h", pid=1, plan="p"), Allotment())
    calls: list[int] = []

    def sometimes(folder: SweepFolder, record: WorkerRecord) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        workers.write_record(folder, record)

    monkeypatch.setattr("quantsweep.running.heartbeat.write_record", sometimes)
    beat.start()
    deadline = time.monotonic() + 10
    while len(calls) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    beat.end("finished")
    beat.join(timeout=10)
    assert len(calls) >= 5
