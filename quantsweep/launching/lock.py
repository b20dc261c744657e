"""One launch of a sweep at a time: a lock that works on shared file systems.

The lock is a file made with `os.link` from a unique name, which is atomic on NFS and Lustre where
`flock` is not.  It names host, process and expiry; its holder renews it while it lives.  A lock whose
process is dead on this host, or that was not renewed until its expiry, is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantsweep.errors import LockedError
from quantsweep.files import write_text

LIFE_SECONDS = 600.0
RENEW_SECONDS = 60.0


@contextlib.contextmanager
def launch_lock(path: Path) -> Iterator[None]:
    """Hold the lock for the duration of the block; raises LockedError if somebody else holds it."""
    token = secrets.token_hex(8)
    if not _take(path, token):
        holder = _read(path)
        if not _is_stale(holder):
            raise LockedError(_held_message(path, holder))
        _break(path, holder)
        if not _take(path, token):
            raise LockedError(_held_message(path, _read(path)))
    ended = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, token, ended), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        if _read(path).get("token") == token:
            path.unlink()


def lock_holder(path: Path) -> str | None:
    """Who holds the lock, in words; None if nobody that lives does."""
    holder = _read(path)
    return None if _is_stale(holder) else f"process {holder['pid']} on {holder['host']}"


def _content(token: str) -> str:
    return json.dumps({"host": platform.node(), "pid": os.getpid(), "expires": time.time() + LIFE_SECONDS, "token": token})


def _take(path: Path, token: str) -> bool:
    unique = path.with_name(f".{path.name}.{token}")
    unique.write_text(_content(token))
    try:
        os.link(unique, path)
    except FileExistsError:
        pass
    finally:
        # A link that NFS reported as failed may have happened: the file itself tells.
        unique.unlink()
    return _read(path).get("token") == token


def _break(path: Path, holder: dict[str, Any]) -> None:
    """Move a stale lock away; of two that try, the one that moved the lock they both judged wins."""
    grave = path.with_name(f".{path.name}.{secrets.token_hex(8)}.stale")
    with contextlib.suppress(FileNotFoundError):
        path.rename(grave)
        if _read(grave).get("token") != holder.get("token"):
            with contextlib.suppress(FileExistsError):
                os.link(grave, path)  # it was a new one: put it back
        grave.unlink()


def _renew(path: Path, token: str, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        # A file system that fails for a moment must not end the renewing: the next round tries again.
        with contextlib.suppress(OSError):
            if _read(path).get("token") == token:
                write_text(path, _content(token))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _is_stale(holder: dict[str, Any]) -> bool:
    if not holder or holder["expires"] < time.time():
        return True
    return holder["host"] == platform.node() and not _is_alive(holder["pid"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _held_message(path: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    return (
        f"sweep {path.parent.parent.name} is being launched or run by {who}. Wait for it, or stop it; "
        f"a dead launch frees its lock ({path}) by itself within {LIFE_SECONDS / 60:.0f} minutes"
    )
