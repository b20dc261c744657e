"""One launch of a sweep at a time: a lock that works on shared file systems.

The lock is a file made with `os.link` from a unique name, which is atomic on NFS and Lustre where
`flock` is not.  It names host, process and purpose; its holder renews it while it lives.  A lock whose
process is dead on this host, or that was not renewed for LIFE_SECONDS *by the file system's clock*
(hosts' own clocks differ), is taken over.  A holder that slept through its own expiry finds out
before it does anything that cannot be undone: `check_held`.
"""

from __future__ import annotations

import contextlib
import errno
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
from quantsweep.files import filesystem_now, write_text
from quantsweep.workers import is_process

LIFE_SECONDS = 600.0
RENEW_SECONDS = 60.0
POLL_SECONDS = 0.5
STALE_READS = 10
RUN = "run"
"""Purpose of a lock that is held for a whole run on this machine: nobody waits for it."""


@contextlib.contextmanager
def launch_lock(path: Path, *, purpose: str = "launch", wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock for the duration of the block; raises LockedError if somebody else holds it.

    wait_seconds: how long to wait for a holder that will be done soon (one that is not a run on this machine).
    """
    token = secrets.token_hex(8)
    deadline = time.monotonic() + wait_seconds
    while not _acquire(path, token, purpose):
        holder = _read(path)
        if holder.get("purpose") == RUN or time.monotonic() > deadline:
            raise LockedError(_held_message(path, holder))
        time.sleep(POLL_SECONDS)
    ended = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, token, ended), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        with contextlib.suppress(OSError):  # a lock that cannot be taken away frees itself: this process is done
            if _read(path).get("token") == token:
                path.unlink()


def check_held(path: Path) -> None:
    """Raise LockedError unless this process holds the lock (it may have been stopped for long, and the lock taken over)."""
    holder = _read(path)
    if (holder.get("pid"), holder.get("host")) != (os.getpid(), platform.node()):
        raise LockedError(f"the launch lock {path} is not this process's any more ({lock_holder(path) or 'nobody'} has it): it ends here")


def lock_holder(path: Path) -> str | None:
    """Who holds the lock, in words; None if nobody that lives does."""
    holder = _read(path)
    return None if _is_stale(path, holder) else f"process {holder['pid']} on {holder['host']}"


def _acquire(path: Path, token: str, purpose: str) -> bool:
    if _take(path, token, purpose):
        return True
    holder = _read(path)
    if not _is_stale(path, holder):
        return False
    _break(path, holder)
    return _take(path, token, purpose)


def _take(path: Path, token: str, purpose: str) -> bool:
    unique = path.with_name(f".{path.name}.{token}")
    unique.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "token": token, "purpose": purpose}))
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
            content = _read(path)
            if content.get("token") == token:
                write_text(path, json.dumps(content))


def _read(path: Path) -> dict[str, Any]:
    for _ in range(STALE_READS):
        try:
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        except OSError as error:
            if error.errno != errno.ESTALE:  # its holder has just renewed it, on another host
                raise
            time.sleep(POLL_SECONDS)
    raise LockedError(f"the launch lock {path} changes too fast to be read: another launch is at work")


def _is_stale(path: Path, holder: dict[str, Any]) -> bool:
    if not holder:
        return True
    try:
        age = filesystem_now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return True  # released this moment
    if age > LIFE_SECONDS:
        return True
    return holder["host"] == platform.node() and not is_process(holder["pid"])


def _held_message(path: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    return (
        f"sweep {path.parent.parent.name} is being launched or run by {who}. Wait for it, or stop it; "
        f"a dead launch frees its lock ({path}) by itself within {LIFE_SECONDS / 60:.0f} minutes"
    )
