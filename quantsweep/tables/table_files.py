"""Which files of a table are to be read, also while a compaction replaces some of them.

    <worker>-<part>.parquet           a worker's, replaced by that worker alone
    <stem>.final.parquet              never written again
    +compacted-….final.parquet      a *place*: made empty, filled once

Folding many files into one cannot be one step: a reader lists a folder, then opens file after file.  So a
fold fills a place whose name everybody has known for long (a name that is new is not seen by every host
at once), in this order:

    the place's content becomes a note → the originals go → the place's content becomes their rows

The name of a place sorts before all others, so a reader opens it first.  Finds it the rows, the originals were gone before, and
opening one of them fails; finds it nothing yet, each original is whole or opening it fails.  The note is
no Parquet, so who comes in between, or after a fold that was killed, is told so by an error.  A plain
`pandas.read_parquet` is therefore right or fails; nothing is missing, nothing twice.  Readers of
quantsweep understand the note (the rows lie beside it in a hidden file), and read again what changed meanwhile.

Plain readers take the columns of the folder from its first file: a place has them all, and places with more
columns sort before those that an older version has made.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from quantsweep.errors import ResultsError
from quantsweep.storage.files import write_table

FINAL = ".final.parquet"
"""End of the name of a file that no worker owns; other files are their workers' (`quantsweep.storage.workers.worker_of_file`)."""
PLACE = "+compacted-"
MAX_COLUMNS = 1_000
MAX_PLACES = 100_000_000
NOTE = b"Being compacted: read again in a moment. If this stays, a compaction was killed: quantsweep compact ends it. "

Identity = tuple[int, int, int]
"""(inode, bytes, time of change in ns): the same as long as nobody replaced the file."""


@dataclass(frozen=True)
class Note:
    """What a fold is about: the hidden file with the rows, the files that it stands for, and the fold's own token."""

    rows: str
    originals: Mapping[str, Identity]
    token: str

    def content(self) -> str:
        """As it stands in the place."""
        return NOTE.decode() + json.dumps({"rows": self.rows, "originals": self.originals, "token": self.token})


@dataclass(frozen=True)
class Listing:
    """The files to read.  places: what identifies the places' contents; the reading is right if these are the same after it."""

    files: tuple[Path, ...]
    places: Mapping[Path, Identity]

    def still_holds(self) -> bool:
        """True if no fold has begun or ended since."""
        try:
            return all(identity_of(path) == identity for path, identity in self.places.items())
        except OSError:
            return False


def list_files(room: Path) -> Listing:
    """The files of one table as they are to be read now; raises FileNotFoundError where a fold ended this moment (list again)."""
    names = table_files(room)
    files: list[Path] = []
    left_out: set[Path] = set()
    places: dict[Path, Identity] = {}
    for path in names:
        if not path.name.startswith(PLACE):
            files.append(path)
            continue
        note, places[path] = read_place(path)
        if note is None:
            files.append(path)
            continue
        if not (room / note.rows).is_file():
            raise FileNotFoundError(f"{room / note.rows}: the compaction has ended, or its file was taken away")
        files.append(room / note.rows)
        left_out |= {room / name for name, identity in note.originals.items() if _is(room / name, identity)}
    return Listing(tuple(path for path in files if path not in left_out), places)


def table_files(room: Path) -> list[Path]:
    """The files of one table, sorted; raises ResultsError for what has the name of one and is none (a pipe would be waited for)."""
    if not room.is_dir():
        return []
    with os.scandir(room) as entries:
        found = [entry for entry in entries if entry.name.endswith(".parquet") and not entry.name.startswith(".")]
        for entry in found:
            if not entry.is_file() and (entry.is_symlink() or os.path.lexists(entry.path)):
                raise ResultsError(f"{entry.path} is not a file (a folder, a pipe, or a link that leads nowhere). Move it away")
    return sorted(Path(entry.path) for entry in found)


def read_place(path: Path) -> tuple[Note | None, Identity]:
    """(the note that stands in a place, None if there is none; what identifies its content)."""
    with path.open("rb") as file:
        identity = identity_in(os.fstat(file.fileno()))
        if file.read(len(NOTE)) != NOTE:
            return None, identity
        try:
            said = json.loads(file.read())
            originals = {str(name): (int(a), int(b), int(c)) for name, (a, b, c) in said["originals"].items()}
            return Note(rows=str(said["rows"]), originals=originals, token=str(said["token"])), identity
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} is damaged: {error}. Its rows lie beside it, in a hidden file that ends in .next") from error


def identity_of(path: Path) -> Identity:
    """The identity of a file as the server has it: opening asks anew where `stat` may be answered from memory."""
    with path.open("rb") as file:
        return identity_in(os.fstat(file.fileno()))


def identity_in(status: os.stat_result) -> Identity:
    """The identity in what stat says."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is(path: Path, identity: Identity) -> bool:
    try:
        return identity_of(path) == identity
    except OSError:
        return False


# --- places -----------------------------------------------------------------------------------------------------------------


def places_of(room: Path, schema: pa.Schema) -> list[Path]:
    """Places with all columns of this version, sorted: the youngest first."""
    return sorted(path for path in room.glob(f"{_prefix(schema)}*{FINAL}"))


def next_place(room: Path, schema: pa.Schema) -> str:
    """The name of one more place, which sorts before those that are there: one may be folded into a younger one."""
    prefix = _prefix(schema)
    numbers = [int(path.name.removeprefix(prefix).removesuffix(FINAL)) for path in places_of(room, schema)]
    return f"{prefix}{min(numbers, default=MAX_PLACES) - 1:08d}{FINAL}"


def make_place(room: Path, name: str, schema: pa.Schema) -> None:
    """Make an empty place, unless it is there: of several that do it at once, one does."""
    unique = room / f".{name}.{secrets.token_hex(4)}.tmp"
    write_table(unique, schema.empty_table())
    try:
        with contextlib.suppress(FileExistsError):
            os.link(unique, room / name)
    finally:
        unique.unlink()


def add_columns(paths: Iterable[Path], schema: pa.Schema) -> int:
    """Rewrite files that lack columns of the schema with all of them (null), each whole and atomically; returns how many.

    For files that nobody else writes.  Columns that the schema does not know stay, behind the others.
    """
    done = 0
    for path in paths:
        names = pq.read_schema(path).names
        if names[: len(schema)] == schema.names or "trial_id" not in names:  # whole already, or none of ours
            continue
        with path.open("rb") as file:
            rows = pq.read_table(file)
        if not set(schema.names) <= set(rows.column_names):
            arrays = [rows.column(f.name) if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type) for f in schema]
            extra = [name for name in rows.column_names if name not in schema.names]
            write_table(path, pa.table([*arrays, *map(rows.column, extra)], names=[*schema.names, *extra]))
            done += 1
    return done


def _prefix(schema: pa.Schema) -> str:
    """More columns, smaller number: of two versions' places the one that knows more comes first."""
    return f"{PLACE}{MAX_COLUMNS - len(schema):03d}-"
