"""Who is at work: one small file a worker, replaced at each trial and at least every BEAT_SECONDS.

    workers/<worker>.json      {"worker", "host", "pid", "job", "plan", "shard_ids", "trial_id", "ended", …}
    workers/<worker>.closed    the last word that somebody else wrote for it, having taken it for gone

The name of a worker is also the stem of its table files (`metrics/<worker>-000.parquet`), so that a
file can be told to be in use.  The record says which trial a job was at when it was lost, which no
batch system knows, and that a job lives of which the batch system has never heard.  Its age is
measured by the file system's clock (`quantsweep.storage.files.filesystem_now`), so hosts' clocks may differ.

A record is a hint for people and for recovery, never a result: it may be lost without harm.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from quantsweep.storage.files import checked_file, filesystem_now, write_text
from quantsweep.storage.paths import SweepFolder

BEAT_SECONDS = 30.0
"""A worker says at least this often that it lives."""
STALE_SECONDS = 900.0
"""After this long without a word a worker of which nobody else knows anything counts as gone."""
ENDED_WITH_ERROR = "error: "
"""How the last word of a worker begins that could not go on (what follows is the exception)."""
ENDED_BY_SLURM = "ended by Slurm"
"""What a worker says that was told to end at once (TERM); its record keeps the trial that was dropped, since only Slurm knows why."""
LOST_AND_REQUEUED = "lost, requeued"
"""What a worker that Slurm has started again says of its forerunner."""
ENDED_AND_REQUEUED = "ended by Slurm, requeued"
"""The same of one that was told to end: its trial is run again, and nobody asks any more what became of the first time."""

CLOSED = ".closed"
_PART = re.compile(r"(.+)-(\d{3,})")


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """What one worker says of itself.

    node: what Slurm calls the machine (the host's name elsewhere).  job: Slurm's id (`123_4`), None on this machine alone.
    job_name: the array's unique name, which its submission holds.  restarts: how often Slurm has requeued the job.
    trial_id, label, trial_started, share: the trial at hand, and the share of it that is done; None between trials.
    ended: how it ended; None while it works.  machine: whose processes see it (`this_machine`); None in older records.
    gpus, seconds: GPUs it occupies, and for how long so far (the budget counts their product).
    log, log_start: where the trial at hand writes.
    """

    worker: str
    host: str
    pid: int
    plan: str
    node: str = ""
    job: str | None = None
    job_name: str | None = None
    restarts: int = 0
    shard_ids: tuple[int, ...] = ()
    shard_id: int | None = None
    trial_id: str | None = None
    label: str | None = None
    trial_started: float | None = None
    share: float = 0.0
    gpus: int = 0
    seconds: float = 0.0
    log: str = ""
    log_start: int = 0
    ended: str | None = None
    machine: str | None = None


def new_worker_name() -> str:
    """A name that no other worker has: host, process, time and chance."""
    host = re.sub(r"[^A-Za-z0-9]", "-", platform.node()) or "host"
    return f"{host}-{os.getpid()}-{time.time_ns():x}-{secrets.token_hex(2)}"


def worker_of_file(path: Path) -> tuple[str, int] | None:
    """(worker, part) of a table file `<worker>-<part>.parquet`; None for a file that no worker writes."""
    match = _PART.fullmatch(path.stem)
    return (match[1], int(match[2])) if match else None


def write_record(folder: SweepFolder, record: WorkerRecord) -> None:
    """Replace the worker's file (not fsynced: after a power cut nobody is at work anyway)."""
    write_text(folder.workers / f"{record.worker}.json", json.dumps(asdict(record)), durable=False)


def close_record(folder: SweepFolder, worker: str, word: str) -> None:
    """Write the last word of a worker that is taken for gone, into a file of its own: should it live, its beat cannot undo it."""
    write_text(folder.workers / f"{worker}{CLOSED}", word, durable=False)


def closing_word(folder: SweepFolder, worker: str) -> str | None:
    """What somebody else wrote as a worker's last word; None if nobody did.  What stands there and is no file closes it all the same."""
    try:
        return checked_file(folder.workers / f"{worker}{CLOSED}").read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ELOOP):
            raise
        return f"closed ({error.strerror})"


def overwrite_record(folder: SweepFolder, record: WorkerRecord) -> None:
    """Write the record over the old one in place, which needs no space; for a disk that is full (a reader may see half of it)."""
    path = folder.workers / f"{record.worker}.json"
    with path.open("r+b") as file:
        old = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(json.dumps(asdict(record)).encode().ljust(old))  # JSON may end in spaces


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A record and how long ago its worker was last heard of, in seconds."""

    record: WorkerRecord
    age: float

    @property
    def is_alive(self) -> bool:
        """True if it has not ended and was heard of lately; a process that is gone from this very machine is dead at once.

        A container may have this machine's name and process numbers of its own.
        """
        record = self.record
        if record.ended is not None or self.age >= STALE_SECONDS:
            return False
        return record.host != platform.node() or record.machine not in (None, this_machine()) or is_process(record.pid)


def read_records(folder: SweepFolder) -> list[Heard]:
    """All workers that ever were, with the age of their last word; unreadable files are left out."""
    if not folder.workers.is_dir():
        return []
    try:
        now = filesystem_now(folder.workers)
    except OSError:
        now = time.time()  # somebody who may only read looks; their clock has to do
    found = []
    closed = {path.stem for path in folder.workers.glob(f"*{CLOSED}")}
    for path in sorted(folder.workers.glob("*.json")):
        try:
            content = json.loads(checked_file(path).read_text())
            content["shard_ids"] = tuple(content["shard_ids"])
            record = WorkerRecord(**content)
            if record.ended in (None, ENDED_BY_SLURM) and path.stem in closed:
                record = replace(record, ended=closing_word(folder, path.stem) or record.ended)
            found.append(Heard(record=record, age=now - path.stat().st_mtime))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # lost in a power cut, or of another version: a record is a hint
    return found


@cache
def this_machine() -> str:
    """What processes that can see each other have in common: this start of the kernel, this space of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def is_process(pid: int) -> bool:
    """True if this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
