"""Folding a sweep's many small files into few.

    list the closed files → read their keys → write the rows, each once, beside a place → note, originals out, place filled

A file is *closed* when nobody can change it any more: an older part of a worker, a file of a worker
that has ended or is gone, a file that was final when it was written.  Only closed files are folded.  They are
folded into places (`quantsweep.tables.table_files`): names that every host has seen for NAME_SECONDS, so that nothing is ever
missing where new names show late.  Where there are too few, some are made, and the rest waits for them.

Whatever stops it, and wherever, no row is lost: an original goes only when all of its rows are durable, and what a kill
leaves is ended by the next run from the note in the place.  Nothing is ever left out of a file because some other file
holds it already, and a place is filled by whoever has claimed it and nobody else, so even two runs at once (the lock,
looked at before each step, forbids it) could only double rows, never drop them.

A worker that was thought gone and is not may replace its file while it is folded.  So an original is
first moved out of sight, then looked at: if it is no longer the file that was read, it is put back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from quantsweep.errors import LockedError, ResultsError
from quantsweep.storage.files import filesystem_now, sync_folder, write_table, write_text
from quantsweep.storage.lock import check_held, launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import STALE_SECONDS, read_records, worker_of_file
from quantsweep.tables import records
from quantsweep.tables.forgetting import Forgotten, read_forgotten
from quantsweep.tables.table_files import (
    FINAL,
    PLACE,
    Identity,
    Note,
    identity_in,
    identity_of,
    make_place,
    next_place,
    places_of,
    read_place,
    table_files,
)

TARGET_ROWS = {"trials": 50_000, "metrics": 100_000, "samples": 20_000, "layers": 200_000}
"""Rows after which a compacted file is full."""
TARGET_BYTES = 128 * 2**20
"""Bytes in memory after which it is full whatever its rows; on disk it is smaller."""
UNPACKED = 4
"""Bytes in memory for each on disk, about."""
LEFTOVER_SECONDS = 86_400.0
"""Age at which unfinished files of killed writers are deleted."""
NAME_SECONDS = 90.0
"""Age at which every host has seen a new name: network file systems' clients remember what a folder held for up to a minute."""
PAUSE_SECONDS = 0.05
"""Between the originals' end and the place's filling: a plain reader opens several files side by side."""

_FULL_MARK = {b"quantsweep": b"full"}
_OLD_FULL = f"-full{FINAL}"
_NEXT, _RETIRED, _CLAIM, _GRAVE = ".next", ".retired", ".claim", ".folded"
"""Ends of hidden names: rows that a note speaks of; an original out of sight; whose a place is; an original, as earlier versions hid it."""
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


def compact(folder: SweepFolder, *, say: Callable[[str], object] | None = None) -> CompactSummary:
    """Fold the closed files of every table; may run at any time, and be killed at any time.

    say: is told that NAME_SECONDS are waited for, where places must be made first; None: what has no place yet is left for the next run.
    Raises LockedError while another compaction of this sweep is at work, ResultsError for a damaged
    file, OSError when the disk is full (everything is then as it was, or folded in part).
    """
    lock = folder.plan / "compact.lock"
    try:
        with launch_lock(lock):
            folds = [_Fold(folder, table, lock) for table in _ORDER]
            wanting = [fold.prepare() for fold in folds]
            waits = say is not None and any(wanting)
            if say is not None and waits:
                say(f"waiting {NAME_SECONDS:.0f} s until every machine sees the names of the new files")
                time.sleep(NAME_SECONDS)
            return CompactSummary(tables={fold.table: fold.run(look_again=waits) for fold in folds})
    except LockedError as error:
        raise LockedError(f"sweep {folder.name} is being compacted already. Nothing is wrong: wait for it, or do without") from error


@dataclass(frozen=True)
class _Scanned:
    """A file whose keys were read.

    is_closed: nobody will change it.  is_full: a compaction filled it.  is_whole: it has all columns of this version.
    """

    path: Path
    identity: Identity
    keys: pa.Table
    is_closed: bool
    is_full: bool
    is_whole: bool


@dataclass(frozen=True)
class _Content:
    """Rows of a file, and what identifies exactly the file that they came from."""

    rows: pa.Table
    identity: Identity
    is_known: bool
    is_full: bool
    is_whole: bool


class _ChangedError(Exception):
    """A file that was thought closed is not what it was a moment ago: its worker lives."""


class _Fold:
    """One pass over one table."""

    def __init__(self, folder: SweepFolder, table: str, lock: Path) -> None:
        self._folder, self.table, self._room, self._lock = folder, table, folder.table(table), lock
        self._schema = records.arrow_schema(table)
        self._written = 0
        self._chosen: _Chosen | None = None

    def prepare(self) -> bool:
        """End what a killed run began, and make the places that are wanting; True if places were made, so that waiting helps."""
        if not self._room.is_dir():
            return False
        now = filesystem_now(self._room)
        self._recover(now)
        self._chosen = self._choose(now)
        places, wanted = self._empty_places(), _places_wanted(self.table, self._chosen.choices)
        for _ in range(wanted + 1 - len(places)):  # one is left for the next run: it will be known by then
            make_place(self._room, next_place(self._room, self._schema), self._schema)
        return wanted > sum(_age(path, now) >= NAME_SECONDS for path in places)

    def run(self, *, look_again: bool) -> TableSummary:
        """Fold what there are places for."""
        if not self._room.is_dir():
            return TableSummary()
        now = filesystem_now(self._room)
        before = self._files_with_rows()
        chosen = self._choose(now) if look_again or self._chosen is None else self._chosen
        forgotten, scanned = chosen.forgotten, chosen.scanned
        places = [path for path in self._empty_places() if _age(path, now) >= NAME_SECONDS]
        folded: list[_Choice] = []
        with contextlib.suppress(_ChangedError):  # what is folded by then is folded; the rest is for the next run
            self._rewrite(chosen.choices, places, folded)
        return TableSummary(
            files_before=before,
            files_after=self._files_with_rows(),
            rows=self._written,
            copies=sum(int((choice.copies & ~choice.gone).sum()) for choice in folded),
            forgotten=sum(int(choice.gone.sum()) for choice in folded),
            forgotten_left=sum(int(forgotten.mask(self.table, file.keys).sum()) for file in scanned if not file.is_closed),
        )

    def _choose(self, now: float) -> _Chosen:
        """Look at all files, and choose those to rewrite."""
        alive = {heard.record.worker: heard.is_alive for heard in read_records(self._folder)}
        filesystem_now(self._room)  # after the records: who had ended by then has written all that stands here
        files = [path for path in table_files(self._room) if not self._is_spoken_for(path)]
        forgotten = read_forgotten(self._folder.path)
        scanned = self._scan(files, self._closed(files, alive, now), forgotten.columns(self.table))
        choices = _compared([(file, forgotten.mask(self.table, file.keys)) for file in scanned if file.is_closed])
        return _Chosen(forgotten, scanned, _worth_it(choices))

    # --- places ---

    def _is_spoken_for(self, path: Path) -> bool:
        """True for a place that is empty, or in which a note stands."""
        if not path.name.startswith(PLACE):
            return False
        try:
            return read_place(path)[0] is not None or pq.read_metadata(path).num_rows == 0
        except FileNotFoundError:
            return True
        except pa.lib.ArrowException:
            return False  # damaged: said when it is read

    def _empty_places(self) -> list[Path]:
        """Places that may be filled, oldest first: the younger sort before them, and so before what will be folded into those."""
        return [
            path
            for path in reversed(places_of(self._room, self._schema))
            if self._is_spoken_for(path) and read_place(path)[0] is None and not _claim(path).exists()
        ]

    def _files_with_rows(self) -> int:
        return sum(not self._is_spoken_for(path) for path in table_files(self._room))

    # --- what is there ---

    def _closed(self, files: Iterable[Path], alive: Mapping[str, bool], now: float) -> set[Path]:
        owners = {path: None if path.name.endswith(FINAL) else worker_of_file(path) for path in files}
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
            elif path.name.endswith(FINAL) or _age(path, now) > STALE_SECONDS:
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
                    content = self._read(path, dict.fromkeys((*_COPY_KEYS[self.table], *more)))
                    is_full = content.is_full or path.name.endswith(_OLD_FULL)
                    closed_now = path in closed and content.is_known
                    found.append(_Scanned(path, content.identity, content.rows, closed_now, is_full, content.is_whole))
        return found

    def _read(self, path: Path, columns: Iterable[str]) -> _Content:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
        try:
            rows, unknown = records.read_file(content, self.table, columns)
            metadata = pq.read_metadata(pa.BufferReader(content))
        except (OSError, pa.lib.ArrowException) as error:
            raise ResultsError(records.damaged_text(path, self.table, error)) from error
        return _Content(
            rows=rows,
            identity=identity_in(status),
            is_known=not unknown,
            is_full=_FULL_MARK.items() <= (metadata.metadata or {}).items(),
            is_whole=set(self._schema.names) <= set(metadata.schema.to_arrow_schema().names),
        )

    # --- what is written ---

    def _rewrite(self, chosen: Iterable[_Choice], places: list[Path], folded: list[_Choice]) -> None:
        """Fold the kept rows of the files into places, as far as these go.

        Originals go in the order of the files, and of rows that stand twice the first is kept, so whatever a
        row was left out for is durable before its original goes.
        """
        held: list[pa.Table] = []
        batch: list[_Choice] = []
        number = size = 0
        for choice in chosen:
            try:
                content = self._read(choice.file.path, self._schema.names)
            except FileNotFoundError as error:
                raise _ChangedError from error
            if content.identity != choice.file.identity:
                raise _ChangedError
            held.append(content.rows.filter(pa.array(~(choice.gone | choice.copies))))
            batch.append(choice)
            number, size = number + held[-1].num_rows, size + held[-1].nbytes
            if number >= TARGET_ROWS[self.table] or size >= TARGET_BYTES:
                if not self._flush(held, batch, places, folded, is_full=True):
                    return
                held, batch, number, size = [], [], 0, 0
        self._flush(held, batch, places, folded, is_full=False)

    def _flush(self, held: list[pa.Table], batch: list[_Choice], places: list[Path], folded: list[_Choice], *, is_full: bool) -> bool:
        """Fold these; False where no place is left for them."""
        originals = {choice.file.path.name: choice.file.identity for choice in batch}
        if any(rows.num_rows for rows in held):
            if not places:
                return False
            whole = records.decoded(pa.concat_tables(held), self.table)
            self._fill(places.pop(0), whole.replace_schema_metadata(_FULL_MARK if is_full else None), originals)
            self._written += whole.num_rows
        else:
            self._retire_all(originals, secrets.token_hex(4))
        folded += batch
        return True

    def _fill(self, place: Path, rows: pa.Table, originals: Mapping[str, Identity]) -> None:
        token = secrets.token_hex(4)
        note = Note(rows=f".{place.name}.{token}{_NEXT}", originals=originals, token=token)
        write_table(self._room / note.rows, rows)
        try:
            if any(identity_of(self._room / name) != identity for name, identity in originals.items()):
                raise _ChangedError
            check_held(self._lock)
            with _claim(place).open("x") as claim:  # of two that think they are alone, one fills it
                claim.write(token)
            # Who stood still here for so long that others tidied up must not write over what they have filled.
            if _claim(place).read_text() != token or not (self._room / note.rows).exists():
                raise _ChangedError
        except (FileNotFoundError, FileExistsError, _ChangedError, LockedError) as error:
            (self._room / note.rows).unlink(missing_ok=True)
            if isinstance(error, LockedError):
                raise
            raise _ChangedError from error
        write_text(place, note.content())
        self._finish(place, note)

    def _finish(self, place: Path, note: Note) -> None:
        """From the note to the rows: the originals out of sight, then the rows into the place, then what is out of sight away."""
        changed = self._retire_all(note.originals, note.token, delete=False)
        time.sleep(PAUSE_SECONDS)
        check_held(self._lock)
        with contextlib.suppress(FileNotFoundError):  # another run, which the lock should have kept away, has ended this one
            (self._room / note.rows).rename(place)
        sync_folder(self._room)
        self._sweep(note.token)
        _claim(place).unlink(missing_ok=True)
        if changed:
            raise _ChangedError

    def _retire_all(self, originals: Mapping[str, Identity], token: str, *, delete: bool = True) -> bool:
        """Move originals out of sight (and delete them); True if any was not the file that was read any more, and stays."""
        changed = False
        for name, identity in originals.items():
            check_held(self._lock)
            changed |= not self._retire(self._room / name, identity, token)
        if delete:
            self._sweep(token)
        return changed

    def _retire(self, path: Path, identity: Identity, token: str) -> bool:
        """Move an original out of sight if it is still the file that was read; what is not is put back.  True if it is out of sight."""
        hidden = self._hidden(path.name, token)
        with contextlib.suppress(FileNotFoundError):  # moved already, by a run that was killed
            if identity_of(path) != identity:
                return False
            path.rename(hidden)
        with contextlib.suppress(FileNotFoundError):
            if identity_of(hidden) != identity:
                with contextlib.suppress(FileExistsError):  # its worker has written once more by now, all that it holds
                    os.link(hidden, path)
                hidden.unlink()
                return False
        return True

    def _hidden(self, name: str, token: str) -> Path:
        """Where an original is out of sight."""
        return self._room / f".{name}.{token}{_RETIRED}"

    def _sweep(self, token: str) -> None:
        for path in self._room.glob(f".*.{token}{_RETIRED}"):
            path.unlink(missing_ok=True)

    def _recover(self, now: float) -> None:
        """End what a kill left half done: notes, originals out of sight; delete old unfinished files."""
        for place in table_files(self._room):
            if place.name.startswith(PLACE):
                note, _ = read_place(place)
                if note is not None and not (self._room / note.rows).exists():
                    self._take_back(place, note)
                elif note is not None:
                    with contextlib.suppress(_ChangedError):
                        self._finish(place, note)
        for path in self._room.glob(f".*{_RETIRED}"):  # no note speaks of them any more: their rows are in a place
            path.unlink(missing_ok=True)
        for path in self._room.glob(f".*{_GRAVE}"):
            with contextlib.suppress(FileNotFoundError):
                path.rename(self._room / f"recovered-{secrets.token_hex(8)}{FINAL}")
        for pattern in (".*.tmp", ".now.*", f".*{_NEXT}", f".*{_CLAIM}"):
            for path in self._room.glob(pattern):
                if _age(path, now) > LEFTOVER_SECONDS:
                    path.unlink(missing_ok=True)

    def _take_back(self, place: Path, note: Note) -> None:
        """Undo a fold whose rows somebody has deleted (hidden files were tidied away, say): the originals are all that is left."""
        check_held(self._lock)
        for name in note.originals:
            hidden = self._hidden(name, note.token)
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # not moved yet; written again, all of it
                os.link(hidden, self._room / name)
            hidden.unlink(missing_ok=True)
        write_table(place, self._schema.empty_table())
        _claim(place).unlink(missing_ok=True)


def _claim(place: Path) -> Path:
    return place.with_name(f".{place.name}{_CLAIM}")


@dataclass(frozen=True)
class _Chosen:
    """What a look at a table gave: what is forgotten, all files that were looked at, those to rewrite."""

    forgotten: Forgotten
    scanned: list[_Scanned]
    choices: list[_Choice]


def _places_wanted(table: str, choices: list[_Choice]) -> int:
    """How many places the kept rows of these files will fill, or a few more."""
    kept = [(int((~(choice.gone | choice.copies)).sum()), choice.file.identity[1]) for choice in choices]
    rows, size = (sum(column) for column in zip(*kept, strict=True)) if kept else (0, 0)
    return min(sum(number > 0 for number, _ in kept), -(-rows // TARGET_ROWS[table]) + UNPACKED * size // TARGET_BYTES)


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
    dirty = [choice for choice in choices if choice.gone.any() or choice.doubled.any() or not choice.file.is_whole]
    if not dirty and small < 2:
        return []
    return [choice for choice in choices if not choice.file.is_full or any(choice is other for other in dirty)]


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
