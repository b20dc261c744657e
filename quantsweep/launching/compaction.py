"""Folding a sweep's many small files into few.

    list the closed files → read their keys → write the rows, each once, to new files → delete the originals

A file is *closed* when nobody can change it any more: an older part of a worker, a file of a worker
that has ended or is gone, a file that was final when it was written.  Only closed files are folded.

Whatever stops it, and wherever, no row is lost: an original is deleted only when all of its rows stand
in files that are durable.  What a kill leaves is rows that stand twice; the next run finds these exact
copies and writes them once.  Nothing is ever left out of a file because some other file holds it
already, so even two runs at once (the lock forbids it) could only double rows, never drop them.

A worker that was thought gone and is not may replace its file while it is folded.  So an original is
first moved out of sight, then looked at: if it is no longer the file that was read, it is put back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quantsweep import records
from quantsweep.errors import LockedError, ResultsError
from quantsweep.files import filesystem_now, write_table
from quantsweep.forgetting import read_forgotten
from quantsweep.launching.lock import launch_lock
from quantsweep.paths import SweepFolder
from quantsweep.workers import STALE_SECONDS, read_records, worker_of_file

TARGET_ROWS = {"trials": 50_000, "metrics": 100_000, "samples": 20_000, "layers": 200_000}
"""Rows after which a compacted file is full."""
TARGET_BYTES = 128 * 2**20
"""Bytes in memory after which it is full whatever its rows; on disk it is smaller."""
LEFTOVER_SECONDS = 86_400.0
"""Age at which unfinished files of killed writers are deleted."""

_FULL, _REST = f"-full{records.FINAL}", f"-rest{records.FINAL}"
_GRAVE = ".folded"
_COPY_KEYS = {
    "metrics": ("attempt", "trial_id", "task_key", "metric", "finished_at"),
    "trials": ("attempt", "trial_id", "status", "finished_at"),
    "samples": ("attempt", "trial_id", "task_key", "finished_at"),
    "layers": ("attempt", "trial_id", "layer", "finished_at"),
}
"""Rows that agree in these are copies of one row: one attempt writes each of its rows once, at one moment."""
_ORDER = ("metrics", "samples", "layers", "trials")
"""Metrics first: rows that are forgotten leave `metrics` before `samples`, so what is in metrics always has its samples."""


@dataclass(frozen=True, kw_only=True)
class TableSummary:
    """What compaction did to one table.

    files_before, files_after: files in the folder.  rows: rows rewritten.  copies, forgotten: rows left out, as exact copies or
    forgotten on purpose.  forgotten_left: forgotten rows in files that live workers own (readers leave them out anyway).
    """

    files_before: int = 0
    files_after: int = 0
    rows: int = 0
    copies: int = 0
    forgotten: int = 0
    forgotten_left: int = 0


@dataclass(frozen=True, kw_only=True)
class CompactSummary:
    """What compaction did, table by table."""

    tables: Mapping[str, TableSummary]

    def total(self, name: str) -> int:
        """The sum over the tables of one field of TableSummary."""
        return sum(getattr(summary, name) for summary in self.tables.values())


def compact(folder: SweepFolder) -> CompactSummary:
    """Fold the closed files of every table; may run at any time, and be killed at any time.

    Raises LockedError while another compaction of this sweep is at work, ResultsError for a damaged
    file, OSError when the disk is full (everything is then as it was, or folded in part).
    """
    try:
        with launch_lock(folder.plan / "compact.lock"):
            return CompactSummary(tables={table: _Fold(folder, table).run() for table in _ORDER})
    except LockedError as error:
        raise LockedError(f"sweep {folder.name} is being compacted already. Nothing is wrong: wait for it, or do without") from error


Identity = tuple[int, int, int]
"""(inode, bytes, time of change in ns): the same as long as nobody replaced the file."""


@dataclass(frozen=True)
class _Scanned:
    """A file whose keys were read; `rows` counts them, `is_closed` says that nobody will change it."""

    path: Path
    identity: Identity
    keys: pa.Table
    is_closed: bool

    @property
    def is_full(self) -> bool:
        return self.path.name.endswith(_FULL)


class _ChangedError(Exception):
    """A file that was thought closed is not what it was a moment ago: its worker lives."""


class _Fold:
    """One pass over one table."""

    def __init__(self, folder: SweepFolder, table: str) -> None:
        self._folder, self._table, self._room = folder, table, folder.table(table)
        self._names = records.arrow_schema(table).names
        self._written = 0

    def run(self) -> TableSummary:
        if not self._room.is_dir():
            return TableSummary()
        alive = {heard.record.worker: heard.is_alive for heard in read_records(self._folder)}
        now = filesystem_now(self._room)  # after the records: who had ended by then has written all that stands here
        self._recover(now)
        files = records.table_files(self._room)
        forgotten = read_forgotten(self._folder.path)
        scanned = self._scan(files, self._closed(files, alive, now), forgotten.columns(self._table))
        choices = _compared([(file, forgotten.mask(self._table, file.keys)) for file in scanned if file.is_closed])
        chosen = _worth_it(choices)
        with contextlib.suppress(_ChangedError):  # what is folded by then is folded; the rest is for the next run
            self._rewrite([(choice.file, ~(choice.gone | choice.copies)) for choice in chosen])
        return TableSummary(
            files_before=len(files),
            files_after=len(records.table_files(self._room)),
            rows=self._written,
            copies=sum(int((choice.copies & ~choice.gone).sum()) for choice in chosen),
            forgotten=sum(int(choice.gone.sum()) for choice in chosen),
            forgotten_left=sum(int(forgotten.mask(self._table, file.keys).sum()) for file in scanned if not file.is_closed),
        )

    # --- what is there ---

    def _closed(self, files: Iterable[Path], alive: Mapping[str, bool], now: float) -> set[Path]:
        owners = {path: None if path.name.endswith(records.FINAL) else worker_of_file(path) for path in files}
        newest: dict[str, int] = {}
        for worker, part in filter(None, owners.values()):
            newest[worker] = max(part, newest.get(worker, 0))
        closed = set()
        for path, owner in owners.items():
            if owner is not None and owner[1] < newest[owner[0]]:
                closed.add(path)
            elif owner is not None and owner[0] in alive:
                if not alive[owner[0]]:
                    closed.add(path)
            elif path.name.endswith(records.FINAL) or _age(path, now) > STALE_SECONDS:
                closed.add(path)
        return closed

    def _scan(self, files: Iterable[Path], closed: set[Path], more: Sequence[str]) -> list[_Scanned]:
        """Keys and the columns `more` of the closed files (and of the others, if there are any such columns).

        Files that are gone, or that this version cannot hold, are left out.
        """
        found = []
        for path in files:
            if path in closed or more:
                with contextlib.suppress(FileNotFoundError):
                    keys, identity, known = self._read(path, dict.fromkeys((*_COPY_KEYS[self._table], *more)))
                    found.append(_Scanned(path, identity, keys, path in closed and known))
        return found

    def _read(self, path: Path, columns: Iterable[str]) -> tuple[pa.Table, Identity, bool]:
        """(rows, identity of exactly the file that they came from, True if it has no column that this version does not know)."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
        try:
            rows, unknown = records.read_file(content, self._table, columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise ResultsError(f"{path} cannot be read: {error}. Move it away; the evaluations in it will run again") from error
        return rows, _identity(status), not unknown

    # --- what is written ---

    def _rewrite(self, files: Iterable[tuple[_Scanned, npt.NDArray[np.bool_]]]) -> None:
        """Write the kept rows of the files into few, deleting originals as soon as all of their rows are durable elsewhere.

        Originals go in the order of the files, and of rows that stand twice the first is kept, so whatever a
        row was left out for is durable before its original is deleted.
        """
        held: list[pa.Table] = []
        originals: list[_Scanned] = []
        number = size = 0
        for file, kept in files:
            try:
                rows, identity, _ = self._read(file.path, self._names)
            except FileNotFoundError as error:
                raise _ChangedError from error
            if identity != file.identity:
                raise _ChangedError
            held.append(rows.filter(pa.array(kept)))
            originals.append(file)
            number, size = number + held[-1].num_rows, size + held[-1].nbytes
            if number >= TARGET_ROWS[self._table] or size >= TARGET_BYTES:
                self._flush(held, originals, _FULL)
                held, originals, number, size = [], [], 0, 0
        self._flush(held, originals, _REST)

    def _flush(self, held: list[pa.Table], originals: list[_Scanned], ending: str) -> None:
        if any(rows.num_rows for rows in held):
            whole = records.decoded(pa.concat_tables(held), self._table)
            write_table(self._room / f"{records.COMPACTED}{time.time_ns():016x}-{secrets.token_hex(4)}{ending}", whole)
            self._written += whole.num_rows
        for file in originals:
            self._bury(file)

    def _bury(self, file: _Scanned) -> None:
        """Delete an original if it is still the file that was read."""
        grave = self._room / f".{file.path.name}.{secrets.token_hex(4)}{_GRAVE}"
        try:
            if _identity(file.path.stat()) != file.identity:
                raise _ChangedError
            file.path.rename(grave)
        except FileNotFoundError as error:
            raise _ChangedError from error
        with contextlib.suppress(FileNotFoundError):  # another run, which the lock should have kept away, has put it back already
            if _identity(grave.stat()) != file.identity:
                with contextlib.suppress(FileExistsError):  # its worker has written once more by now, all that it holds
                    os.link(grave, file.path)
                grave.unlink()
                raise _ChangedError
            grave.unlink()

    def _recover(self, now: float) -> None:
        """Put back what a kill left between moving and deleting, as a file of its own; delete old unfinished files."""
        for path in self._room.glob(f".*{_GRAVE}"):
            with contextlib.suppress(FileNotFoundError):
                path.rename(self._room / f"recovered-{secrets.token_hex(8)}{records.FINAL}")
        for pattern in (".*.tmp", ".now.*"):
            for path in self._room.glob(pattern):
                if _age(path, now) > LEFTOVER_SECONDS:
                    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Choice:
    """A closed file, with flags of its rows: forgotten; a copy of an earlier row; one of several copies, the first included."""

    file: _Scanned
    gone: npt.NDArray[np.bool_]
    copies: npt.NDArray[np.bool_]
    doubled: npt.NDArray[np.bool_]


def _compared(files: list[tuple[_Scanned, npt.NDArray[np.bool_]]]) -> list[_Choice]:
    """The files, full ones first, each with what is to be said of its rows."""
    if not files:
        return []
    ordered = sorted(files, key=lambda pair: not pair[0].is_full)
    rows = pa.concat_tables([file.keys for file, _ in ordered])
    codes, count = records.row_codes(rows, rows.column_names)
    doubled = (np.bincount(codes, minlength=count) > 1)[codes]
    copies = np.ones(rows.num_rows, np.bool_)
    copies[np.unique(codes, return_index=True)[1]] = False
    cuts = np.cumsum([file.keys.num_rows for file, _ in ordered])[:-1]
    return [
        _Choice(file, gone, copy, double)
        for (file, gone), copy, double in zip(ordered, np.split(copies, cuts), np.split(doubled, cuts), strict=True)
    ]


def _worth_it(choices: list[_Choice]) -> list[_Choice]:
    """The files to rewrite: those with rows that must go, and those that are not full, if there are two.

    Of rows that stand twice all copies are rewritten, also the one that stays: nothing is left out of
    one file for the sake of another that somebody else may be rewriting.
    """
    small = sum(not choice.file.is_full for choice in choices)
    dirty = [choice for choice in choices if choice.gone.any() or choice.doubled.any()]
    if not dirty and small < 2:
        return []
    return [choice for choice in choices if not choice.file.is_full or any(choice is other for other in dirty)]


def _identity(status: os.stat_result) -> Identity:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
