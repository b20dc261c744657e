"""What stands in the place of a file of a sweep's folder and is none is one message with its name; nobody waits for a pipe."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import quantsweep
from quantsweep.checkpoints.pins import PINS_FILE, read_pins
from quantsweep.cli.list import sweep_facts
from quantsweep.cli.main import main
from quantsweep.cli.status import sweep_status
from quantsweep.errors import QuantsweepError, ResultsError
from quantsweep.failures.causes import is_disk_full
from quantsweep.failures.holds import cancelled, read_holds
from quantsweep.hydra_plugin.mistakes import shown_plainly
from quantsweep.launching.advance import advance
from quantsweep.launching.settle import settle
from quantsweep.launching.submissions import read_submissions
from quantsweep.launching.tasks import observe
from quantsweep.planning import plan_files
from quantsweep.planning.plan_files import plan_sequence, read_asked_tasks, read_headers, read_minutes
from quantsweep.storage.files import write_atomic, write_table
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import close_record, read_records
from quantsweep.tables import records
from quantsweep.tables.forgetting import SCHEMA, Tombstone, read_forgotten, write_fence
from tests.unit.engine_cases import Site, fail, finish, submit, trial, worker, write

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


# --- a sweep that has everything ------------------------------------------------------------------------------------------


@pytest.fixture
def launched(site: Site) -> SweepFolder:
    """A sweep with two launches, of which jobs of the first have ended, a hold, a fence, an older fence, a lost worker and rows."""
    folder = site.folder
    done, failed = trial(3), trial(4)
    first = write(folder, [done, failed])
    submit(folder)
    site.forget(account="COMPLETED")
    finish(folder, done, plan=first.name)
    fail(folder, failed, "bug", plan=first.name)
    close_record(folder, worker(folder, age=5000.0, plan=first.name).worker, "lost")
    cancelled(["bit_width=4"], folder).save(folder)
    write_fence(folder, [Tombstone(None, done.trial.trial_id, None, "trial")])
    lines = [{"attempt": "a", "trial_id": "b", "task_key": None, "kind": "attempt"}]
    write_table(folder.plan / "forgotten-20250101T000000-00000000.parquet", pa.Table.from_pylist(lines, schema=SCHEMA))
    write(folder, [trial(5), trial(6)])
    submit(folder)
    return folder


FILES = {
    "old plan": "plan/plan-00001-*",
    "new plan": "plan/plan-00003-*",
    "fence": "plan/fence-*",
    "older fence": "plan/forgotten-*",
    "submission": "plan/submission-*",
    "limits": "plan/limits.json",
    "hold": "holds/*.json",
    "worker": "workers/*.json",
    "closed": "workers/*.closed",
    "rows": "trials/w*",
}
NEVER_MISSED = {"limits", "worker", "closed"}
"""What these say is found out again, or a hint."""
DAMAGE: dict[str, Callable[[Path], object]] = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another's": lambda path: pq.write_table(pa.table({"a": [1]}), path),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}
COMMANDS: dict[str, Callable[[SweepFolder], object]] = {
    "launch": settle,
    "step": lambda folder: advance(folder),
    "status": sweep_status,
    "list": lambda folder: sweep_facts(folder)["problem"],
    "show": lambda folder: main(["show", str(folder.path)]),
    "resume": lambda folder: main(["resume", str(folder.path), "--dry-run"]),
    "cancel": lambda folder: main(["cancel", str(folder.path), "bit_width=4"]),
    "compact": lambda folder: main(["compact", str(folder.path)]),
    "load_results": lambda folder: quantsweep.load_trials(folder.path),
}


@pytest.mark.parametrize("how", ["another's", "pipe", "loop"])
@pytest.mark.parametrize("what", FILES)
def test_whatever_is_damaged_every_command_says_it_in_a_message_or_does_without(
    what: str, how: str, launched: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "DAMAGED_SECONDS", 0.0)
    monkeypatch.setattr(records, "GONE_SECONDS", 0.0)
    path = sorted(launched.path.glob(FILES[what]))[-1]
    DAMAGE[how](path)
    said = []
    for command in COMMANDS.values():
        try:  # a traceback or a pipe that is waited for fails the test
            command(launched)
        except QuantsweepError as error:
            said.append(str(error))
    if what not in NEVER_MISSED:
        assert any(path.name in words for words in said)
    assert all(path.name in words for words in said)


@pytest.mark.parametrize("how", ["half", "another's"])
def test_a_launch_sees_that_the_newest_plan_is_damaged(how: str, sweep: SweepFolder) -> None:
    path = write(sweep, [trial()])
    DAMAGE[how](path)
    with pytest.raises(ResultsError, match=rf"{path.name}.*Move it away"):
        observe(sweep)


def test_a_plan_of_which_jobs_may_be_in_the_queue_is_not_simply_moved_away(site: Site) -> None:
    path = write(site.folder, [trial()])
    submit(site.folder)
    [submission] = site.folder.plan.glob("submission-*")
    away = path.rename(path.with_suffix(".away"))
    with pytest.raises(ResultsError, match=rf"put it back; or cancel them.*{submission.name}"):
        observe(site.folder)
    away.rename(path)
    DAMAGE["half"](path)
    with pytest.raises(ResultsError, match=rf"cancel them \(scancel\), and move it and {submission.name} away"):
        observe(site.folder)
    path.unlink()
    submission.unlink()
    site.jobs.clear()
    assert observe(site.folder).in_flight == ()


@pytest.mark.parametrize("speaker", ["worker", "submission", "hold"])
def test_the_number_of_a_plan_that_was_moved_away_is_not_used_again(speaker: str, site: Site) -> None:
    write(site.folder, [trial(3)])
    path = write(site.folder, [trial(4)])
    if speaker == "worker":
        worker(site.folder, plan=path.name)
    elif speaker == "submission":
        submit(site.folder)
    else:
        cancelled([], site.folder).save(site.folder)
    path.unlink()
    assert plan_sequence(write(site.folder, [trial(4)]).name) == 3


def test_a_step_opens_each_plan_a_few_times(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(site.folder, [trial(3)])
    for bits in range(4, 9):
        write(site.folder, [trial(bits, block=block) for block in (32, 64)], root=root.name)
    submit(site.folder)
    site.set("COMPLETED")
    opened: Counter[str] = Counter()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def open_it(path: Path, *arguments: Any, **options: Any) -> Any:
            opened[path.name] += 1
            return call(path, *arguments, **options)

        return open_it

    for name in ("read_schema", "ParquetFile", "read_table"):
        monkeypatch.setattr(plan_files.pq, name, counted(getattr(plan_files.pq, name)))
    plan_files._header.cache_clear()
    plan_files._rows.cache_clear()
    advance(site.folder)
    assert max(opened[path.name] for path in plan_files.plan_files(site.folder.plan)) <= 8


def test_a_launch_under_a_limit_on_the_size_of_files_ends_with_the_name_of_the_file(sweep: SweepFolder) -> None:
    def write_much(file: BinaryIO) -> None:
        raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(SystemExit) as ended, shown_plainly():
        write_atomic(sweep.plan / "plan-x.parquet", write_much)
    assert ended.value.code == f"{sweep.plan / 'plan-x.parquet'}: File too large"
    assert list(sweep.plan.iterdir()) == []
