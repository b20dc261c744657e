"""What stands in the place of a file of a sweep's folder and is none is one message with its name; nobody waits for a pipe."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quantsweep.checkpoints.pins import PINS_FILE, read_pins
from quantsweep.errors import ResultsError
from quantsweep.failures.causes import is_disk_full
from quantsweep.failures.holds import read_holds
from quantsweep.launching.submissions import read_submissions
from quantsweep.planning.plan_files import read_asked_tasks, read_headers, read_minutes
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import read_records
from quantsweep.tables.forgetting import read_forgotten

PLAN = "plan/plan-00002-20260101T000000-00000000.parquet"
READ: dict[str, tuple[str, Callable[[SweepFolder], object]]] = {
    "header": (PLAN, lambda folder: read_headers(folder.plan)),
    "plan": (PLAN, lambda folder: read_asked_tasks(folder.plan)),
    "minutes": (PLAN, lambda folder: read_minutes(folder.path / PLAN)),
    "fence": ("plan/fence-00003-20260101T000000-00000000.parquet", lambda folder: read_forgotten(folder.path)),
    "submission": ("plan/submission-20260101T000000-00000000.json", read_submissions),
    "hold": ("holds/cancel-00000000.json", read_holds),
    "pins": (PINS_FILE, lambda folder: read_pins(folder.path)),
}


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, Path.touch, lambda path: path.symlink_to(path.name)], ids=["pipe", "folder", "empty", "loop"]
)
@pytest.mark.parametrize("what", READ)
def test_what_is_no_file_is_said_by_name(what: str, make: Callable[[Path], object], sweep: SweepFolder) -> None:
    place, read = READ[what]
    make(sweep.path / place)
    with pytest.raises(ResultsError, match=rf"{Path(place).name}.*([Mm]ove|Delete)"):
        read(sweep)


def test_a_pipe_is_no_worker(sweep: SweepFolder) -> None:
    os.mkfifo(sweep.workers / "w.json")
    assert read_records(sweep) == []


def test_a_limit_on_the_size_of_files_is_a_full_disk() -> None:
    assert is_disk_full(OSError(errno.EFBIG, "File too large"))
