"""Compaction: few files, the same rows, whoever writes or dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_records import NOW, row

import quantsweep
from quantsweep.cli.main import main
from quantsweep.errors import LockedError, ResultsError
from quantsweep.storage import workers
from quantsweep.storage.files import write_table
from quantsweep.storage.lock import launch_lock
from quantsweep.storage.paths import TABLES, SweepFolder
from quantsweep.storage.workers import WorkerRecord, new_worker_name, write_record
from quantsweep.tables import compaction, records
from quantsweep.tables.compaction import compact
from quantsweep.tables.forgetting import Kind, Tombstone, write_fence
from quantsweep.tables.table_files import FINAL, PLACE, read_place

ROOT = Path(__file__).resolve().parents[2]
ENDED = {"ended": "done"}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    made = SweepFolder(tmp_path / "sweep")
    made.create()
    return made


def evaluation(n: int, **values: Any) -> dict[str, Any]:
    return row("metrics", trial_id=f"{n:016x}", attempt=f"a{n}", value=float(n), **values)


def worker(folder: SweepFolder, numbers: range, **record: Any) -> records.Writer:
    """A worker that has written metrics and samples of these trials, one file each; alive unless told otherwise."""
    name = new_worker_name()
    write_record(folder, WorkerRecord(**{"worker": name, "host": workers.platform.node(), "pid": os.getpid(), "plan": "p", **record}))
    writer = records.Writer(folder, name)
    for n in numbers:
        writer.add("samples", [row("samples", trial_id=f"{n:016x}", attempt=f"a{n}")])
        writer.add("metrics", [evaluation(n)])
    return writer


def numbers(folder: SweepFolder, table: str = "metrics") -> Counter[int]:
    """How often each trial stands in the files, by plain pandas."""
    return Counter(int(text, 16) for text in pd.read_parquet(folder.table(table)).trial_id)


def plainly(folder: SweepFolder, table: str = "metrics") -> Counter[int] | None:
    """The same; None where pandas says loudly that it cannot."""
    try:
        return numbers(folder, table)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


def files(folder: SweepFolder, table: str = "metrics") -> list[str]:
    """Names of all that lies in a room but for empty places (`quantsweep.tables.table_files`)."""
    return sorted(path.name for path in folder.table(table).iterdir() if not is_empty_place(path))


def is_empty_place(path: Path) -> bool:
    return path.name.startswith(PLACE) and read_place(path)[0] is None and pq.read_metadata(path).num_rows == 0


def once(count: int) -> Counter[int]:
    return Counter(range(count))


def make_old(path: Path) -> None:
    then = time.time() - workers.STALE_SECONDS - 60
    os.utime(path, (then, then))


def test_files_of_ended_workers_become_one_and_rows_stay_as_they_are(folder: SweepFolder) -> None:
    for first in range(0, 12, 3):
        worker(folder, range(first, first + 3), **ENDED)
    before = {table: records.read_table(folder.path, table).sort_by("trial_id") for table in TABLES}
    summary = compact(folder)
    assert len(files(folder)) == len(files(folder, "samples")) == 1
    assert {table: records.read_table(folder.path, table).sort_by("trial_id") for table in TABLES} == before
    assert (summary.tables["metrics"].files_before, summary.tables["metrics"].files_after, summary.tables["metrics"].rows) == (4, 1, 12)
    assert numbers(folder) == numbers(folder, "samples") == once(12)


def test_a_second_run_does_nothing(folder: SweepFolder) -> None:
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)
    compact(folder)
    before = {table: files(folder, table) for table in TABLES}
    assert compact(folder).total("rows") == 0
    assert {table: files(folder, table) for table in TABLES} == before


def test_full_files_are_left_alone_and_the_rest_grows(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compaction.TARGET_ROWS, "metrics", 4)
    for n in range(10):
        worker(folder, range(n, n + 1), **ENDED)
    compact(folder)
    first = files(folder)
    assert len(first) == 3
    worker(folder, range(10, 11), **ENDED)
    compact(folder)
    assert len(files(folder)) == 3
    assert len(set(first) & set(files(folder))) == 2
    assert numbers(folder) == once(11)


def test_a_bound_in_bytes_holds_too(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "TARGET_BYTES", 1)
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)
    compact(folder)
    assert len(files(folder)) == 3
    assert compact(folder).total("rows") == 0


def test_a_live_worker_keeps_its_newest_file_only(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(records.MAX_ROWS, "metrics", 2)
    writer = worker(folder, range(5))
    newest = files(folder)[-1]
    compact(folder)
    assert newest in files(folder)
    assert len(files(folder)) == 2
    writer.add("metrics", [evaluation(5)])
    writer.add("metrics", [evaluation(6)])
    assert numbers(folder) == once(7)


@pytest.mark.parametrize(
    ("record", "folded"),
    [
        (ENDED, True),
        ({}, False),
        ({"pid": 2**22 + 1}, True),  # no such process on this machine
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),  # another machine's processes cannot be seen
    ],
)
def test_whose_files_are_folded(folder: SweepFolder, record: dict[str, Any], folded: bool) -> None:
    for n in range(2):
        worker(folder, range(n, n + 1), **record)
    before = files(folder)
    compact(folder)
    assert (len(files(folder)) == 1) is folded
    assert folded or files(folder) == before


def test_files_of_unknown_workers_are_folded_once_they_are_old(folder: SweepFolder) -> None:
    for n in range(2):
        records.Writer(folder, f"unknown-{n}").add("metrics", [evaluation(n)])
    before = files(folder)
    compact(folder)
    assert files(folder) == before
    for name in before:
        make_old(folder.table("metrics") / name)
    compact(folder)
    assert len(files(folder)) == 1


def test_rows_that_nobody_owns_are_folded_at_once(folder: SweepFolder) -> None:
    records.write_rows(folder, "metrics", [evaluation(0)], "settled-12-3")
    records.write_rows(folder, "metrics", [evaluation(1)], "settled-12-004")
    assert files(folder) == ["settled-12-004.final.parquet", "settled-12-3.final.parquet"]
    compact(folder)
    assert len(files(folder)) == 1
    assert numbers(folder) == once(2)


def test_a_worker_that_was_thought_gone_loses_nothing(folder: SweepFolder) -> None:
    """It writes on after its file was folded: rows stand twice until the next run, and count once."""
    writer = worker(folder, range(3), **ENDED)
    worker(folder, range(3, 5), **ENDED)
    compact(folder)
    writer.add("metrics", [evaluation(5)])
    assert numbers(folder) == once(6) + Counter(range(3))
    assert len(quantsweep.load_results(folder.path)) == 6
    summary = compact(folder)
    assert summary.tables["metrics"].copies == 3
    assert numbers(folder) == once(6)


@pytest.mark.parametrize("moment", ["stat", "rename"])
def test_a_file_that_is_replaced_while_it_is_folded_stays(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Its worker writes between reading and deleting, or in the very instant between looking and moving."""
    writer = worker(folder, range(3), **ENDED)
    worker(folder, range(3, 5), **ENDED)
    real_write, real_rename = compaction.write_table, Path.rename
    added = []

    def add_once() -> None:
        if not added:
            added.append(True)
            writer.add("metrics", [evaluation(5)])

    def write(path: Path, table: pa.Table) -> None:
        real_write(path, table)
        if "metrics" in str(path):
            add_once()

    def rename(path: Path, target: Path) -> Path:
        if path.parent == folder.table("metrics") and path.name.endswith("-000.parquet"):
            add_once()
        return real_rename(path, target)

    if moment == "stat":
        monkeypatch.setattr(compaction, "write_table", write)
    else:
        monkeypatch.setattr(Path, "rename", rename)
    compact(folder)
    assert added
    assert set(numbers(folder)) == set(range(6))
    compact(folder)
    assert numbers(folder) == once(6)
    assert len(files(folder)) == 1


def test_rows_of_one_attempt_that_differ_are_no_copies(folder: SweepFolder) -> None:
    """The job was thought lost, and its worker then ended well: two rows, both stay."""
    records.write_rows(folder, "trials", [row("trials", attempt="a", status="failed")], "settled-1")
    records.write_rows(folder, "trials", [row("trials", attempt="a", status="done", finished_at=NOW + timedelta(seconds=9))], "settled-2")
    compact(folder)
    assert sorted(records.read_table(folder.path, "trials").column("status").to_pylist()) == ["done", "failed"]


KILLER = """
import os, sys
from pathlib import Path
from quantsweep.tables import compaction
from quantsweep.storage.paths import SweepFolder

left = 0

def step(real):
    def call(*args, **options):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return real(*args, **options)
    return call

for owner, name in ((os, "replace"), (Path, "rename"), (Path, "unlink")):
    setattr(owner, name, step(getattr(owner, name)))
compaction.NAME_SECONDS = compaction.PAUSE_SECONDS = 0.0
compaction.TARGET_ROWS = {"trials": 4, "metrics": 4, "samples": 4, "layers": 4}
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        left = int(line)
        compaction.compact(SweepFolder(Path(sys.argv[1])))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_kill_at_any_step_loses_no_row_and_the_next_run_tidies(folder: SweepFolder) -> None:
    """Death before every single call that changes the folder, one after the other, on the same sweep."""
    for n in range(6):
        worker(folder, range(n, n + 1), **ENDED)
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLER, str(folder.path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert killer.stdin is not None
    assert killer.stdout is not None
    step, moved_away, errors = 0, 0, 0
    with killer:
        while True:
            print(step, file=killer.stdin, flush=True)
            code = int(killer.stdout.readline())
            moved_away += any(name.endswith(".retired") for name in files(folder))
            for table in ("metrics", "samples"):
                assert set(records.read_table(folder.path, table).column("trial_id").to_pylist()) == {f"{n:016x}" for n in range(6)}
                assert plainly(folder, table) in (None, once(6)), f"killed at step {step}"
            assert len(quantsweep.load_results(folder.path)) == 6
            errors += plainly(folder) is None
            if code == 0:
                break
            assert code == 9
            step += 1
        killer.stdin.close()
    assert len(quantsweep.load_results(folder.path)) == 6
    assert step > 20
    assert moved_away, "no kill came between moving a file away and deleting it"
    assert errors, "no kill came between the note and the rows"
    assert numbers(folder) == numbers(folder, "samples") == once(6)
    assert not [name for name in files(folder) if name.endswith(".retired")]


def test_a_full_disk_loses_nothing(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)

    def full(path: Path, table: pa.Table) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "write_table", full)
        with pytest.raises(OSError, match="No space"):
            compact(folder)
    assert numbers(folder) == once(3)
    compact(folder)
    assert numbers(folder) == once(3)


def test_two_at_once_are_told(folder: SweepFolder) -> None:
    with launch_lock(folder.plan / "compact.lock"), pytest.raises(LockedError, match="being compacted already"):
        compact(folder)


def test_readers_and_a_writer_at_work_see_every_row(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compactions run one after the other while a worker writes and a reader reads: what was durable is always seen."""
    monkeypatch.setitem(records.MAX_ROWS, "metrics", 3)
    durable, stop, problems, reads = [0], threading.Event(), [], [0]

    def write() -> None:
        writer = worker(folder, range(0))
        while not stop.is_set():
            writer.add("metrics", [evaluation(durable[0])])
            durable[0] += 1

    def read() -> None:
        while not stop.is_set():
            expected = durable[0]
            seen = records.read_done(folder.path)
            reads[0] += 1
            missing = {f"{n:016x}" for n in range(expected)} - {trial for trial, _ in seen}
            if missing:
                problems.append(missing)

    threads = [threading.Thread(target=target) for target in (write, read, read)]
    for thread in threads:
        thread.start()
    folded = 0
    deadline = time.monotonic() + 60
    while (folded < 5 or reads[0] < 5) and time.monotonic() < deadline:
        folded += compact(folder).total("rows") > 0
    stop.set()
    for thread in threads:
        thread.join()
    compact(folder)
    assert not problems
    assert folded > 0
    assert reads[0] > 1
    assert numbers(folder) == once(durable[0])


def test_a_reading_that_straddles_a_compaction_is_made_again(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it begins before the fold and ends after it, once it has opened the place before, and the originals after."""
    for n in range(2):
        records.write_rows(folder, "metrics", [evaluation(n)], f"settled-{n}")
    real = records._read_files
    compacting = {"now": True}

    def straddling(paths: Sequence[Path], table: str, names: list[str]) -> pa.Table:
        early = real(paths, table, names)
        if compacting.pop("now", False):
            compact(folder)
            return pa.concat_tables([early, real([path for path in paths if path.exists()], table, names)])
        return early

    monkeypatch.setattr(records, "_read_files", straddling)
    assert records.read_table(folder.path, "metrics").num_rows == 2
    assert not compacting


PANDAS = """
import sys, pandas as pd, pyarrow as pa
from pathlib import Path
folder, expected, stop = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
right = loud = wrong = 0
while not stop.exists():
    try:
        numbers = sorted(int(text, 16) for text in pd.read_parquet(folder, columns=["trial_id"]).trial_id)
    except (FileNotFoundError, pa.ArrowInvalid):
        loud += 1
    else:
        right, wrong = (right + 1, wrong) if numbers == list(range(expected)) else (right, wrong + 1)
print(right, loud, wrong)
"""


def test_plain_pandas_is_right_or_fails_while_files_are_folded(
    folder: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "PAUSE_SECONDS", 0.05)
    monkeypatch.setitem(compaction.TARGET_ROWS, "metrics", 3)
    for n in range(24):
        worker(folder, range(n, n + 1), **ENDED)
    stop = tmp_path / "stop"
    command = [sys.executable, "-c", PANDAS, str(folder.table("metrics")), "24", str(stop)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    time.sleep(2)
    compact(folder)
    assert len(files(folder)) == 8, "eight folds, one after the other"
    time.sleep(0.5)
    stop.touch()
    counts = [[int(number) for number in reader.communicate(timeout=60)[0].split()] for reader in readers]
    assert sum(right for right, _, _ in counts) > 0
    assert [wrong for _, _, wrong in counts] == [0, 0]


def test_a_host_that_sees_old_names_misses_nothing(folder: SweepFolder) -> None:
    """Its listing is older than the fold; opening asks the server: the place has the rows, the originals cannot be opened."""
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)
    remembered = sorted(folder.table("metrics").glob("*.parquet"))
    assert remembered[0].name.startswith(PLACE), "plain readers open it first"
    compact(folder)
    assert pq.read_metadata(remembered[0]).num_rows == 3
    assert not any(path.exists() for path in remembered[1:])


def test_places_that_not_every_host_has_seen_are_not_filled(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "NAME_SECONDS", 90.0)
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)
    before = files(folder)
    assert compact(folder).total("rows") == 0
    assert files(folder) == before
    for path in folder.table("metrics").glob(f"{PLACE}*"):
        make_old(path)
    assert compact(folder).tables["metrics"].rows == 3
    said: list[str] = []
    monkeypatch.setattr(compaction.time, "sleep", lambda seconds: [make_old(path) for path in folder.table("samples").glob(f"{PLACE}*")])
    assert compact(folder, say=said.append).tables["samples"].rows == 3
    assert said == ["waiting 90 s until every machine sees the names of the new files"]


@pytest.mark.parametrize("step", range(6))
def test_whoever_loses_the_lock_stops_and_the_next_run_ends_it(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """It stood still for long before any of its steps."""
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)
    calls = iter(range(100))

    def lost(path: Path) -> None:
        if next(calls) == step:
            raise LockedError("somebody else has it")

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "check_held", lost)
        with pytest.raises(LockedError):
            compact(folder)
    assert len(quantsweep.load_results(folder.path)) == 3
    assert plainly(folder) in (None, once(3))
    compact(folder)
    assert numbers(folder) == numbers(folder, "samples") == once(3)
    assert len(files(folder)) == 1


@pytest.mark.parametrize("step", range(1, 5))
def test_a_fold_whose_rows_were_deleted_is_undone(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """It was killed after its note, and somebody tidied hidden files away: what is left are the originals."""
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)
    calls = iter(range(100))

    def killed(path: Path) -> None:
        if next(calls) == step:
            raise LockedError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "check_held", killed)
        with pytest.raises(LockedError):
            compact(folder)
    [rows] = folder.table("metrics").glob(".*.next")
    rows.unlink()
    compact(folder)
    assert numbers(folder) == once(3)
    compact(folder)
    assert numbers(folder) == once(3)


def test_a_place_that_somebody_else_has_claimed_is_left_alone(folder: SweepFolder) -> None:
    for n in range(2):
        worker(folder, range(n, n + 1), **ENDED)
    [place] = folder.table("metrics").glob(f"{PLACE}*")
    place.with_name(f".{place.name}.claim").touch()
    compact(folder)
    compact(folder)
    assert pq.read_metadata(place).num_rows == 0
    assert numbers(folder) == once(2)


def test_forgotten_rows_leave_the_files_but_for_those_of_live_workers(folder: SweepFolder) -> None:
    worker(folder, range(2), **ENDED)
    live = worker(folder, range(2, 4))
    write_fence(folder, [Tombstone(f"a{n}", f"{n:016x}", None, Kind.ATTEMPT) for n in (0, 2)])
    summary = compact(folder)
    assert numbers(folder) == Counter([1, 2, 3])
    assert (summary.tables["metrics"].forgotten, summary.tables["metrics"].forgotten_left) == (1, 1)
    assert {int(trial, 16) for trial, _ in records.read_done(folder.path)} == {1, 3}
    live.add("metrics", [evaluation(4)])
    for heard in workers.read_records(folder):
        write_record(folder, WorkerRecord(**{**vars(heard.record), "ended": "done"}))
    compact(folder)
    assert numbers(folder) == Counter([1, 3, 4])
    assert numbers(folder, "samples") == Counter([1, 3])


def test_a_file_whose_rows_are_all_forgotten_goes(folder: SweepFolder) -> None:
    worker(folder, range(1), **ENDED)
    write_fence(folder, [Tombstone("a0", f"{0:016x}", None, Kind.ATTEMPT)])
    compact(folder)
    assert files(folder) == []


def test_files_of_a_newer_version_keep_their_columns(folder: SweepFolder) -> None:
    newer = pa.Table.from_pylist([evaluation(0)], schema=records.arrow_schema("metrics")).append_column("invented", pa.array([1]))
    write_table(folder.table("metrics") / f"newer{FINAL}", newer)
    for n in (1, 2):
        worker(folder, range(n, n + 1), **ENDED)
    compact(folder)
    assert "invented" in pq.read_schema(folder.table("metrics") / f"newer{FINAL}").names
    assert len(files(folder)) == 2
    assert len(quantsweep.load_results(folder.path)) == 3


def test_files_of_an_older_version_get_null_for_new_columns(folder: SweepFolder) -> None:
    for n in range(2):
        rows = pa.Table.from_pylist([evaluation(n)], schema=records.arrow_schema("metrics")).drop_columns(["num_nonfinite", "driver"])
        write_table(folder.table("metrics") / f"older-{n}{FINAL}", rows)
    before = quantsweep.load_results(folder.path)
    assert before.num_nonfinite.isna().all()
    compact(folder)
    assert len(files(folder)) == 1
    pd.testing.assert_frame_equal(before, quantsweep.load_results(folder.path))


def test_a_damaged_file_is_said_by_name(folder: SweepFolder) -> None:
    worker(folder, range(2), **ENDED)
    (folder.table("metrics") / f"damaged{FINAL}").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ResultsError, match=r"damaged\.final\.parquet"):
        compact(folder)
    assert len(files(folder)) == 2


def test_unfinished_files_of_killed_writers_go_when_they_are_old(folder: SweepFolder) -> None:
    old, young = (folder.table("metrics") / f".{name}.parquet.1.abc.tmp" for name in ("old", "young"))
    old.touch()
    young.touch()
    then = time.time() - compaction.LEFTOVER_SECONDS - 60
    os.utime(old, (then, then))
    compact(folder)
    assert young.exists()
    assert not old.exists()


def test_the_command_says_what_it_did(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)
    assert main(["compact", str(folder.path)]) == 0
    assert "sweep: 6 files, now 2" in capsys.readouterr().out
    assert main(["compact", str(folder.path)]) == 0
    assert "2 files, nothing to fold" in capsys.readouterr().out


def test_what_a_kill_left_out_of_sight_comes_back(folder: SweepFolder) -> None:
    """Killed between moving a file away and finding that it had been replaced: its rows stand nowhere else."""
    worker(folder, range(3), **ENDED)
    [name] = files(folder)
    path = folder.table("metrics") / name
    path.rename(path.with_name(f".{path.name}.0badcafe.folded"))
    assert records.read_table(folder.path, "metrics").num_rows == 0
    compact(folder)
    assert numbers(folder) == once(3)


def test_who_slept_between_its_claim_and_its_note_writes_over_nothing(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """For more than a day: claim and rows were tidied away, and others have filled the place."""
    for n in range(3):
        worker(folder, range(n, n + 1), **ENDED)
    real, slept = compaction._claim, iter([True])

    def claim(place: Path) -> Path:
        path = real(place)
        if path.exists() and path.stat().st_size and next(slept, False):
            for leftover in (path, *place.parent.glob(".*.next")):
                leftover.unlink()
            compact_apart(folder)
        return path

    def compact_apart(folder: SweepFolder) -> None:
        monkeypatch.setattr(compaction, "_claim", real)
        with monkeypatch.context() as patch:
            patch.setattr(compaction, "launch_lock", lambda *_, **__: contextlib.nullcontext())
            patch.setattr(compaction, "check_held", lambda path: None)
            compact(folder)

    monkeypatch.setattr(compaction, "_claim", claim)
    compact(folder)
    assert next(slept, None) is None, "it did sleep"
    assert numbers(folder) == numbers(folder, "samples") == once(3)
    assert plainly(folder) == once(3)
