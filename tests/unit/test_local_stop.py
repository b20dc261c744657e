"""Ctrl-C, TERM and a closing terminal on this machine: what was promised to finish is finished, and every record is closed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantsweep.crew import local
from quantsweep.crew.local import LocalSummary, run_local
from quantsweep.failures import classes
from quantsweep.operations.messages import local_text
from quantsweep.running.child_process import ChildDiedError
from quantsweep.running.stopping import Stop, StoppedError
from quantsweep.running.worker import Worker, run_shard
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import close_record, read_records
from quantsweep.tables import records
from tests.unit.engine_cases import trial, write
from tests.unit.test_worker_stop import DONE, LOADED, QUANTIZED, WELL, Script, Step, task

BITS = (2, 3, 4, 5, 6, 7)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(*numbers: signal.Signals) -> Callable[[Stop], None]:
    """As a terminal would, and the task at hand goes on for a while."""

    def step(stop: Stop) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    return step


def ask(number: signal.Signals = signal.SIGINT) -> Callable[[Stop], None]:
    return send(number)


MOMENTS: dict[str, tuple[Step, ...]] = {
    "before it is loaded": (ask(), LOADED, QUANTIZED, task("t"), task("u"), DONE),
    "while it is quantized": (LOADED, ask(), QUANTIZED, task("t"), task("u"), DONE),
    "in the first task": (LOADED, QUANTIZED, ask(), task("t"), task("u"), DONE),
    "in the last task": (LOADED, QUANTIZED, task("t"), ask(), task("u"), DONE),
    "after the last task": (LOADED, QUANTIZED, task("t"), task("u"), ask(), DONE),
}


@pytest.fixture
def play(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalSummary]:
    """Run six trials on workers whose children are played from a script."""

    def run(by_bits: dict[int, tuple[Step, ...]], *, workers: int = 2, bits: tuple[int, ...] = BITS) -> LocalSummary:
        class Played(Worker):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                Script(self, by_bits)

        monkeypatch.setattr(local, "Worker", Played)
        plan = write(sweep, [trial(b) for b in bits])
        return run_local(plan, list(range(len(bits))), workers=workers, device="cpu")

    return run


def done(folder: SweepFolder, bits: int) -> int:
    """Evaluations of a trial that have their row."""
    return sum(trial_id == trial(bits).trial.trial_id for trial_id, _ in records.read_done(folder.path))


def rows_of_trials(folder: SweepFolder, bits: int) -> list[str]:
    rows = records.read_table(folder.path, "trials").to_pylist()
    return [row["status"] for row in rows if row["trial_id"] == trial(bits).trial.trial_id]


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_task_at_hand_finishes_and_is_kept(sweep: SweepFolder, play: Callable[..., LocalSummary], moment: str) -> None:
    begun = threading.Event()

    def begin(stop: Stop) -> None:
        begun.set()
        time.sleep(0.4)

    slow = (LOADED, QUANTIZED, begin, task("t"), lambda stop: time.sleep(0.4), task("u"), DONE)
    summary = play({2: (lambda stop: begun.wait(10) and None, *MOMENTS[moment]), 3: slow})
    assert summary.interrupted
    assert summary.problems == []
    kept = 1 if moment in ("before it is loaded", "while it is quantized", "in the first task") else 2
    assert done(sweep, 2) == kept
    assert done(sweep, 3) >= 1, "the other worker's task at hand finishes too"
    assert rows_of_trials(sweep, 2) == ["done"] * (kept == 2), "a trial that was stopped after its last task has its row"
    heard = read_records(sweep)
    assert len(heard) == 2
    assert [one.record.ended for one in heard] == [Stop.PERSON] * 2
    assert done(sweep, 7) == 0, "and nothing new was begun"


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_is_heard_as_ctrl_c(sweep: SweepFolder, play: Callable[..., LocalSummary], number: signal.Signals) -> None:
    summary = play({2: (LOADED, QUANTIZED, ask(number), task("t"), task("u"), DONE)}, workers=1)
    assert (summary.interrupted, done(sweep, 2), done(sweep, 3)) == (True, 1, 0)
    assert [one.record.ended for one in read_records(sweep)] == [Stop.PERSON]
    assert signal.getsignal(number) is not None


def test_a_second_one_drops_it_and_closes_the_record(sweep: SweepFolder, play: Callable[..., LocalSummary]) -> None:
    dropped = threading.Event()

    def until_dropped(stop: Stop) -> None:
        send(signal.SIGINT, signal.SIGINT)(stop)
        assert stop.drops_now()
        dropped.set()
        raise StoppedError

    summary = play({2: (LOADED, QUANTIZED, task("t"), until_dropped)}, workers=1)
    assert dropped.is_set()
    assert (summary.interrupted, summary.problems, done(sweep, 2)) == (True, [], 1)
    assert [one.record.ended for one in read_records(sweep)] == [Stop.PERSON]


def test_workers_that_do_not_end_are_left_in_words(
    sweep: SweepFolder, play: Callable[..., LocalSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "DROP_SECONDS", 0.2)
    wake = threading.Event()
    summary = play({2: (send(signal.SIGINT, signal.SIGINT), lambda stop: wake.wait(20) and None)}, workers=1)
    wake.set()
    assert "did not end" in summary.problems[0]


@pytest.mark.parametrize("error", [SystemExit(3), KeyError("bug"), KeyboardInterrupt()])
def test_an_exit_in_a_worker_is_a_problem_not_a_success(
    sweep: SweepFolder, play: Callable[..., LocalSummary], error: BaseException
) -> None:
    def leave(stop: Stop) -> None:
        raise error

    summary = play({2: (LOADED, leave)}, workers=1)
    assert type(error).__name__ in summary.problems[0]
    assert [one.record.ended for one in read_records(sweep)] == [f"error: {type(error).__name__}: {error}"]


def test_a_worker_that_cannot_begin_is_a_problem(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Worker:
        raise OSError("no such place")

    monkeypatch.setattr(local, "Worker", broken)
    summary = run_local(write(sweep, [trial(2)]), [0], workers=1, device="cpu")
    assert summary.problems == ["OSError: no such place"]


def test_a_stock_launchers_shard_stops_as_well_and_the_next_does_not_begin(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Played(Worker):
        def __init__(self, plan: Path, **options: Any) -> None:
            super().__init__(plan, **options)
            Script(self, {2: MOMENTS["in the last task"]})

    monkeypatch.setattr("quantsweep.running.worker.Worker", Played)
    plan = write(sweep, [trial(2), trial(3)], shard_minutes=60)
    with pytest.raises(KeyboardInterrupt):
        run_shard(plan, 0)
    assert (done(sweep, 2), done(sweep, 3), rows_of_trials(sweep, 2)) == (2, 0, ["done"])
    assert [one.record.ended for one in read_records(sweep)] == [Stop.PERSON]


def test_a_child_that_dies_after_its_last_task_has_done_its_trial(sweep: SweepFolder, play: Callable[..., LocalSummary]) -> None:
    def die(stop: Stop) -> None:
        raise ChildDiedError(classes.from_exit(-9))

    summary = play({2: (*WELL[:-1], die)}, workers=1, bits=(2,))
    assert (summary.done, rows_of_trials(sweep, 2)) == (1, ["done"])


def test_a_run_that_was_taken_for_gone_leaves_all_the_rest_alone(sweep: SweepFolder, play: Callable[..., LocalSummary]) -> None:
    """A laptop slept for an hour, and somebody launched the sweep elsewhere meanwhile."""

    def take_over(stop: Stop) -> None:
        [heard] = read_records(sweep)
        close_record(sweep, heard.record.worker, "lost")

    summary = play({3: (LOADED, QUANTIZED, task("t"), take_over, task("u"), DONE)}, workers=1)
    assert (summary.done, summary.failed, summary.superseded, summary.problems) == (2, 0, len(BITS) - 2, []), summary.problems
    assert not summary.interrupted
    assert "4 trials were left alone" in local_text(summary, sweep="s", folder=sweep.path)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGINT, "stopping: the tasks at hand finish first; press Ctrl-C again to drop them"),
        (signal.SIGTERM, "stopping (SIGTERM): the tasks at hand finish first; a second signal drops them"),
    ],
)
def test_what_is_waited_for_is_said_when_the_signal_comes(
    play: Callable[..., LocalSummary], capfd: pytest.CaptureFixture[str], number: signal.Signals, words: str
) -> None:
    play({2: (LOADED, QUANTIZED, ask(number), task("t"), task("u"), DONE)}, workers=1, bits=(2,))
    assert words in capfd.readouterr().err
