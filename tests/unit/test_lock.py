"""One launch at a time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quantsweep.errors import LockedError
from quantsweep.storage import lock
from quantsweep.storage.lock import LIFE_SECONDS, RUN, check_held, check_not_lost, launch_lock, lock_holder
from quantsweep.storage.workers import this_machine

LATER = LIFE_SECONDS + 60


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)


def hold(path: Path, number: int = 1, *, age: float = 0.0, **changes: object) -> Path:
    """The lock's file of that number, as somebody holds it."""
    file = path.with_name(f"{path.name}.{number}")
    about = {"host": platform.node(), "pid": os.getpid(), "token": "other", "purpose": "launch", "machine": this_machine()}
    file.write_text(json.dumps({**about, **changes}))
    when = time.time() - age
    os.utime(file, (when, when))
    return file


def elsewhere(path: Path, number: int = 1, *, age: float = 0.0, **changes: object) -> Path:
    return hold(path, number, age=age, **{"host": "elsewhere", "machine": "another", "pid": 1, **changes})


def pid_in(path: Path) -> int:
    """Whose the lock is."""
    seen = lock._newest(path)
    assert seen is not None
    return int(seen.get("pid"))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def is_refused(path: Path) -> bool:
    try:
        with launch_lock(path):
            return False
    except LockedError:
        return True


def test_a_second_launch_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "sweep" / "plan" / "launch.lock"
    path.parent.mkdir(parents=True)
    with launch_lock(path), pytest.raises(LockedError, match=f"process {os.getpid()}"), launch_lock(path):
        pass
    assert lock_holder(path) is None
    assert not is_refused(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": dead_pid()},
        {"birth": "long ago"},
        {"host": "elsewhere", "machine": "another", "age": LATER},
        {"machine": "before the machine was started again", "age": LATER},
    ],
    ids=["dead process", "number used again", "expired", "other boot"],
)
def test_a_dead_lock_is_taken_over(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "launch.lock"
    hold(path, **changes)  # type: ignore[arg-type]
    assert lock_holder(path) is None
    with launch_lock(path):
        assert pid_in(path) == os.getpid()
    assert os.listdir(tmp_path) == ["launch.lock.2"]


def test_a_lock_of_an_earlier_version_is_heeded(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    path.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "token": "old", "purpose": "launch"}))
    assert is_refused(path)
    path.write_text(json.dumps({"host": platform.node(), "pid": dead_pid(), "token": "old", "purpose": "launch"}))
    assert not is_refused(path)


def test_a_live_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    elsewhere(path, age=LIFE_SECONDS - 60)
    assert lock_holder(path) == "process 1 on elsewhere"
    with pytest.raises(LockedError, match="elsewhere"), launch_lock(path):
        pass


def test_a_living_process_of_this_machine_keeps_its_lock_however_long_it_stands_still(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        hold(path, pid=sleeper.pid, age=10 * LIFE_SECONDS)
        with pytest.raises(LockedError, match=rf"not heard of for 100 minutes.*kill -CONT {sleeper.pid}"), launch_lock(path):
            pass
        assert lock_holder(path) is not None
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not is_refused(path)


def test_a_lock_that_is_renewed_is_alive_whatever_its_stamp_says(tmp_path: Path) -> None:
    """A file system that takes stamps from its clients: the holder's clock is 20 minutes behind."""
    path = tmp_path / "launch.lock"
    ended = threading.Event()

    def renew() -> None:
        for beat in range(1_000):
            elsewhere(path, age=1_200, beat=beat)
            if ended.wait(0.1):
                return

    renewer = threading.Thread(target=renew)
    elsewhere(path, age=1_200)
    renewer.start()
    try:
        assert is_refused(path)
    finally:
        ended.set()
        renewer.join()
    assert not is_refused(path)


CROWD = """
import sys, time
from pathlib import Path
from quantsweep.errors import LockedError
from quantsweep.storage import lock
lock.WATCH_SECONDS = 0.05
path, inside, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for _ in range(rounds):
    try:
        with lock.launch_lock(path):
            inside.mkdir()     # fails if anybody else is inside
            time.sleep(0.002)
            inside.rmdir()
    except LockedError:
        time.sleep(0.001)
"""


def test_of_many_none_is_ever_inside_with_another(tmp_path: Path) -> None:
    path = tmp_path / "plan" / "launch.lock"
    path.parent.mkdir()
    hold(path, pid=dead_pid())
    crowd = [subprocess.Popen([sys.executable, "-c", CROWD, str(path), str(tmp_path / "inside"), "60"]) for _ in range(4)]
    assert [process.wait(timeout=100) for process in crowd] == [0] * 4


def test_who_stood_still_while_taking_it_does_not_get_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It judged number 1 dead; until it makes number 2, others have had 2 and swept it up, and hold 3."""
    path = tmp_path / "launch.lock"
    hold(path, pid=dead_pid())
    real = os.link

    def late(source: Path, target: Path) -> None:
        (tmp_path / "launch.lock.1").unlink()
        elsewhere(path, 3)
        real(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(LockedError, match="elsewhere"), launch_lock(path):
        pass
    assert sorted(os.listdir(tmp_path)) == ["launch.lock.3"]


def test_a_clock_that_is_wrong_by_hours_breaks_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "launch.lock"
    elsewhere(path)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 10 * LIFE_SECONDS)
    assert is_refused(path)


@pytest.mark.parametrize("content", [b"", b'{"host": "elsewhe', b"[1]", b'"text"', b"\xff\xfe", b'{"pid": "x", "host": 3}'])
def test_a_damaged_lock_is_said_and_frees_itself(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sweep" / "plan" / "launch.lock"
    path.parent.mkdir(parents=True)
    file = path.with_name("launch.lock.4")
    file.write_bytes(content)
    with pytest.raises(LockedError, match=r"launch\.lock\.4 of sweep sweep cannot be read.*take it away"), launch_lock(path):
        pass
    os.utime(file, (time.time() - LATER,) * 2)
    assert not is_refused(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_is_no_file_is_no_lock_and_hangs_nobody(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "launch.lock"
    file = tmp_path / "launch.lock.1"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("nowhere")
    assert is_refused(path)


def test_a_step_is_waited_for_a_run_is_not(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    file = hold(path, purpose="advance")
    threading.Timer(0.3, file.unlink).start()
    began = time.monotonic()
    with launch_lock(path, wait_seconds=30):
        assert time.monotonic() - began > 0.2
    hold(path, 9, purpose="advance")
    with pytest.raises(LockedError), launch_lock(path, wait_seconds=0.2):
        pass
    hold(path, 9, purpose=RUN)
    began = time.monotonic()
    with pytest.raises(LockedError), launch_lock(path, wait_seconds=30):
        pass
    assert time.monotonic() - began < 10


def test_whoever_slept_through_the_expiry_finds_out_and_takes_nobodys_lock_away(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    check_not_lost(path)
    with pytest.raises(LockedError, match="nobody"):
        check_held(path)
    with launch_lock(path):
        check_held(path)
        elsewhere(path, 2)
        for check in (check_held, check_not_lost):
            with pytest.raises(LockedError, match="process 1 on elsewhere"):
                check(path)
    assert lock_holder(path) == "process 1 on elsewhere"


def test_a_holder_renews_while_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    path = tmp_path / "launch.lock"
    with launch_lock(path):
        file = tmp_path / "launch.lock.1"
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert file.stat().st_mtime > 1
        check_held(path)
        theirs = elsewhere(path, 2, age=100)
        time.sleep(0.2)
        assert time.time() - theirs.stat().st_mtime > 50, "another's lock is not renewed"
