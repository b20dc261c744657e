"""Files that are whole or absent: the only way this product writes.

    unique temporary name in the same folder → write → flush → fsync → os.replace → fsync of the folder

A reader sees the old content or the new, never half of it; a crash leaves at most a temporary file
whose name begins with a dot, which every reader ignores.  A full disk is an error that the caller
sees, and leaves the old content standing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` with what `write` puts into the file it is given; all of it, durably, or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the call that the whole module is about
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text`."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_table(path: Path, table: pa.Table) -> None:
    """Replace `path` with a Parquet file of `table` (zstd: a third of snappy's size on plans)."""
    write_atomic(path, lambda file: pq.write_table(table, file, compression="zstd"))


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some network file systems refuse to sync a folder, and do it anyway."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
