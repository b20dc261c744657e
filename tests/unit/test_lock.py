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
from quantsweep.launching import lock
from quantsweep.launching.lock import LIFE_SECONDS, RUN, check_held, launch_lock, lock_holder


def hold(path: Path, *, age: float = 0.0, **changes: object) -> None:
    path.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "token": "other", "purpose": "launch", **changes}))
    when = time.time() - age
    os.utime(path, (when, when))


def test_a_second_launch_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "sweep" / "plan" / "launch.lock"
    path.parent.mkdir(parents=True)
    with launch_lock(path), pytest.raises(LockedError, match=f"process {os.getpid()}"), launch_lock(path):
        pass
    assert not path.exists()


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("changes", [{"pid": dead_pid()}, {"host": "elsewhere", "age": LIFE_SECONDS + 60}], ids=["dead process", "expired"])
def test_a_dead_lock_is_taken_over(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "launch.lock"
    hold(path, **changes)  # type: ignore[arg-type]
    assert lock_holder(path) is None
    with launch_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_live_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    hold(path, host="elsewhere", pid=1, age=LIFE_SECONDS - 60)
    assert lock_holder(path) == "process 1 on elsewhere"
    with pytest.raises(LockedError, match="elsewhere"), launch_lock(path):
        pass
    assert path.exists()


def test_of_many_that_start_together_one_wins(tmp_path: Path) -> None:
    path, winners = tmp_path / "launch.lock", tmp_path / "winners"
    winners.mkdir()
    hold(path, pid=dead_pid())
    code = (
        "import sys, time; from pathlib import Path\n"
        "from quantsweep.launching.lock import launch_lock; from quantsweep.errors import LockedError\n"
        "path, winners, me = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]\n"
        "try:\n    with launch_lock(path):\n        (winners / me).touch(); time.sleep(3)\nexcept LockedError:\n    pass"
    )
    crowd = [subprocess.Popen([sys.executable, "-c", code, str(path), str(winners), str(n)]) for n in range(6)]
    assert [p.wait(timeout=60) for p in crowd] == [0] * 6
    assert len(os.listdir(winners)) == 1


def test_a_clock_that_is_wrong_by_hours_breaks_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "launch.lock"
    hold(path, host="elsewhere", pid=1)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 10 * LIFE_SECONDS)
    with pytest.raises(LockedError), launch_lock(path):
        pass


def test_a_damaged_lock_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    path.write_text('{"host": "elsewhe')
    assert lock_holder(path) is None
    with launch_lock(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_step_is_waited_for_a_run_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "launch.lock"
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)
    hold(path, purpose="advance")
    threading.Timer(0.3, path.unlink).start()
    began = time.monotonic()
    with launch_lock(path, wait_seconds=30):
        assert time.monotonic() - began > 0.2
    hold(path, purpose="advance")
    with pytest.raises(LockedError), launch_lock(path, wait_seconds=0.2):
        pass
    hold(path, purpose=RUN)
    began = time.monotonic()
    with pytest.raises(LockedError), launch_lock(path, wait_seconds=30):
        pass
    assert time.monotonic() - began < 10


def test_whoever_slept_through_the_expiry_finds_out_and_takes_nobodys_lock_away(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    with launch_lock(path):
        check_held(path)
        hold(path, host="elsewhere", pid=1)
        with pytest.raises(LockedError, match="process 1 on elsewhere"):
            check_held(path)
    assert lock_holder(path) == "process 1 on elsewhere"
    path.unlink()
    with pytest.raises(LockedError, match="nobody"):
        check_held(path)


def test_a_holder_renews_while_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    path = tmp_path / "launch.lock"
    with launch_lock(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 1
        check_held(path)
        hold(path, host="elsewhere", pid=1, age=100)
        time.sleep(0.2)
        assert time.time() - path.stat().st_mtime > 50, "another's lock is not renewed"
