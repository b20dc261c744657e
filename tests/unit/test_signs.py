"""Slow work is heard of and hung work is not; time in which nobody could listen is not silence."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from quantsweep import signs
from quantsweep.planning.plan import expand
from quantsweep.running import child, child_process
from quantsweep.running.child import TrialRunner
from quantsweep.running.child_process import TICK_SECONDS, Child, Silence
from quantsweep.signs import MOVED_BYTES, while_bytes_move
from quantsweep.trial.specs import RunSettings
from tests.conftest import ROOT
from tests.unit.test_composition import schema_and_grids


@pytest.mark.parametrize(
    ("looks", "silent"),
    [
        ([0.2] * 10, 2.0),
        ([0.2, 3600.0, 0.2], 0.4 + TICK_SECONDS),  # suspended for an hour
        ([3600.0] * 3, 3 * TICK_SECONDS),  # again and again
        ([0.9] * 700, 630.0),  # a busy machine that looks late still hears a hang
    ],
)
def test_a_jump_between_two_looks_is_one_tick_at_most(looks: list[float], silent: float) -> None:
    now = [0.0]
    silence = Silence(lambda: now[0])
    for seconds in looks:
        now[0] += seconds
        silence.look()
    assert silence.seconds == pytest.approx(silent)


WORKER = """
import sys, subprocess, json
from multiprocessing import Pipe
from pathlib import Path
from quantsweep.running.child_process import Child, ChildDiedError
from quantsweep.trial.specs import RunSettings
from quantsweep.running.stopping import Stop
from tests.unit.engine_cases import trial

CHILD = '''
import sys, json, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
pipe.recv_bytes()
time.sleep(2.0)
pipe.send_bytes(json.dumps({"event": "done"}).encode())
time.sleep(60)
'''

class Real(Child):
    def _start(self, log):
        ours, theirs = Pipe()
        self._process = subprocess.Popen([sys.executable, "-c", CHILD, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        self._pipe = ours
        print(self._process.pid, flush=True)
        return ours

child = Real()
try:
    events = child.events(trial(2), RunSettings(trial_timeout_minutes=3 / 60), Path(sys.argv[1]), Stop())
    print([event["event"] for event in events], flush=True)
except ChildDiedError as error:
    print(error.failure.failure_class, flush=True)
child.kill()
"""


@pytest.mark.parametrize(("stopped", "outcome"), [("both", "['done']"), ("child", "hung")])
def test_a_stopped_worker_and_child_are_not_hung_and_a_stopped_child_is(tmp_path: Path, stopped: str, outcome: str) -> None:
    """Real processes, as `scontrol suspend` or a closed laptop stop them: for longer than the limit of silence."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert worker.stdout is not None
    of_child = int(worker.stdout.readline())
    time.sleep(0.5)
    os.kill(of_child, signal.SIGSTOP)
    if stopped == "both":
        os.kill(worker.pid, signal.SIGSTOP)
        time.sleep(3.5)
        os.kill(worker.pid, signal.SIGCONT)
        time.sleep(0.7)  # the worker looks first: it must not take its own sleep for the child's silence
        os.kill(of_child, signal.SIGCONT)
    said, _ = worker.communicate(timeout=60)
    assert said.strip() == outcome


def test_a_child_that_cannot_be_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel holds it (a driver, a file system that hangs): its worker must not hang with it."""

    class Held:
        def poll(self) -> None:
            return None

        def kill(self) -> None:
            pass

        def wait(self, timeout: float | None = None) -> int:
            assert timeout is not None, "this would last for ever"
            raise subprocess.TimeoutExpired("child", timeout)

    monkeypatch.setattr(child_process, "KILL_SECONDS", 0.0)
    held = Child()
    held._process = Held()  # type: ignore[assignment]
    held.kill()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When something was heard."""
    monkeypatch.setattr(signs, "LOOK_SECONDS", 0.02)
    return []


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(b"x" * (8 * MOVED_BYTES))
    return path


def test_reading_slowly_is_heard_of(heard: list[float], large: Path) -> None:
    with while_bytes_move(lambda: heard.append(time.monotonic())), large.open("rb", buffering=0) as file:
        for _ in range(4):
            file.read(2 * MOVED_BYTES)
            time.sleep(0.05)
    assert len(heard) >= 3


def test_so_is_a_file_that_is_mapped(heard: list[float], large: Path) -> None:
    with while_bytes_move(lambda: heard.append(time.monotonic())), large.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for start in range(0, 8 * MOVED_BYTES, 2 * MOVED_BYTES):
            assert sum(mapped[at] for at in range(start, start + 2 * MOVED_BYTES, 4096))
            time.sleep(0.05)
        mapped.close()
    assert len(heard) >= 3


def test_a_hang_is_not(heard: list[float]) -> None:
    with while_bytes_move(lambda: heard.append(time.monotonic())):
        time.sleep(0.3)
    assert heard == []


def test_each_long_step_of_a_trial_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, preparing, quantizing, evaluating within a batch, restoring: with a real model, told more often than usual."""
    monkeypatch.setattr(child, "PROGRESS_SECONDS", -1.0)
    monkeypatch.setattr(signs, "LOOK_SECONDS", 0.005)
    [planned] = expand(*schema_and_grids("model=mini-neox-0.3m", "data_type=int", "bit_width=4", "task=mini_ppl", "limit=8")).trials
    said: list[str] = []
    TrialRunner(lambda message: said.append(message["event"])).run(planned, RunSettings(device="cpu", batch_size=4))
    steps = [number for number, event in enumerate(said) if event != "progress"]
    assert [said[number] for number in steps] == ["loaded", "quantized", "task", "done"]
    loading, quantizing, evaluating, restoring = (last - first - 1 for first, last in pairwise([-1, *steps]))
    layers, blocks, batches = 4 * 4, 4, 2
    assert loading >= 1
    assert layers <= quantizing
    assert layers <= restoring
    assert evaluating >= batches * (1 + blocks)
