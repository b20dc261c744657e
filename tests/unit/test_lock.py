"""One launch at a time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantsweep.errors import LockedError
from quantsweep.launching.lock import launch_lock


def hold(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "expires": time.time() + 100, "token": "other", **changes}))


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


@pytest.mark.parametrize("changes", [{"pid": dead_pid()}, {"host": "elsewhere", "expires": 0.0}], ids=["dead process", "expired"])
def test_a_dead_lock_is_taken_over(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "launch.lock"
    hold(path, **changes)
    with launch_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_live_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "launch.lock"
    hold(path, host="elsewhere", pid=1)
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
