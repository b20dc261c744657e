"""Files that are whole or absent: the only way this product writes.

    unique temporary name in the same folder → write → flush → fsync → os.replace → fsync of the folder

A reader sees the old content or the new, never half of it; a crash leaves at most a temporary file
whose name begins with a dot, which every reader ignores.  A full disk is an error that the caller
sees, and leaves the old content standing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
PRIVATE = 0o600


def own_umask() -> None:
    """What this process and its children make from now on is closed to others' writing, whatever the site's umask says."""
    os.umask(os.umask(0) | OTHERS_MAY_WRITE)


def write_atomic(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True, private: bool = False) -> None:
    """Replace `path` with what `write` puts into the file it is given; all of it, durably, or nothing.

    durable=False leaves out the two fsyncs: for what is only of use while the machine runs (heartbeats).
    private: only the owner may read it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode & ~OTHERS_MAY_WRITE  # whatever the site's umask says
            os.fchmod(file.fileno(), mode & ~0o777 | PRIVATE if private else mode)
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        try:
            os.replace(temporary, path)  # noqa: PTH105 - the call that the whole module is about
        except FileNotFoundError as error:
            raise OSError(
                errno.ESTALE,
                "the unfinished file was cleaned away while this process stood still, for more than a day; nothing was written",
                str(path),
            ) from error
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:  # a disk that is full says no name
            error.filename = str(path)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, *, durable: bool = True, private: bool = False) -> None:
    """Replace `path` with `text`."""
    write_atomic(path, lambda file: file.write(text.encode()), durable=durable, private=private)


def filesystem_now(folder: Path) -> float:
    """The time now by the clock that stamps files in `folder`, and a fresh view of that folder.

    Ages of files are compared with this clock, never with this machine's: two hosts' clocks may
    differ by minutes, the file server's is one.  Making a file in a folder also makes an NFS client
    throw away what it remembers of it (the server's answer tells that somebody else changed the
    folder: `wcc_data` of RFC 1813), so what other hosts have put there is seen afterwards.
    """
    probe = folder / f".now.{os.getpid()}.{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def checked_file(path: Path) -> Path:
    """The path, if a file is there; raises OSError for a folder, or a pipe (opening it would wait for whoever writes)."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "a folder or a pipe, not a file", str(path))
    return path


def write_table(path: Path, table: pa.Table, *, row_group_size: int | None = None) -> None:
    """Replace `path` with a Parquet file of `table` (zstd: a third of snappy's size on plans)."""
    write_atomic(path, lambda file: pq.write_table(table, file, compression="zstd", row_group_size=row_group_size))


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some network file systems refuse to sync a folder, and do it anyway."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
