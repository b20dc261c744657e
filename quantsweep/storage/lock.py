"""One launch of a sweep at a time: a lock that works on shared file systems.

    plan/launch.lock.<n>      the file of the greatest number is the lock: free, or held by the process that it names

To take a lock that is free is to make the file of the next number, with `os.link` from a unique name:
that is atomic on NFS and Lustre, where `flock` is not, so of any number of processes one gets it.  Nobody
ever removes, moves or writes a lock of somebody else (older files, which nobody asks any more, are
swept up), so no moment is left in which a lock that is held is not there to be seen.

Its holder renews the file while it lives.  A lock is free when its holder said so, when its process is
gone from this very machine, or, of another machine, when it was not renewed for LIFE_SECONDS by the
files' stamps *and* does not change while it is watched for WATCH_SECONDS (some file systems take the
stamps from their clients' clocks, which differ).  A process of this machine that lives keeps its lock, however long it stands
still: whoever wants it is told to continue or end it.  A holder that slept through its own expiry
finds out before it does anything that cannot be undone: `check_held`, `check_not_lost`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantsweep.errors import LockedError
from quantsweep.storage.files import filesystem_now, write_text
from quantsweep.storage.workers import is_process, this_machine

LIFE_SECONDS = 600.0
RENEW_SECONDS = 20.0
WATCH_SECONDS = 50.0
"""How long a lock that looks dead is watched: longer than two renewals."""
POLL_SECONDS = 0.5
STALE_READS = 10
RUN = "run"
"""Purpose of a lock that is held for a whole run on this machine: nobody waits for it."""


@dataclass(frozen=True)
class _Held:
    """A lock that this process has taken: its file, and the token that is in it."""

    file: Path
    token: str


@dataclass(frozen=True)
class _Seen:
    """The lock as it is now.  content: None for one that cannot be read as what it should be."""

    file: Path
    number: int
    content: dict[str, Any] | None
    stamp: float

    def get(self, name: str) -> Any:
        return None if self.content is None else self.content.get(name)

    @property
    def who(self) -> str:
        return "somebody unknown" if self.content is None else f"process {self.content['pid']} on {self.content['host']}"


_HELD: dict[Path, _Held] = {}


@contextlib.contextmanager
def launch_lock(path: Path, *, purpose: str = "launch", wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock `<path>.<n>` for the duration of the block; raises LockedError if somebody else holds it.

    wait_seconds: how long to wait for a holder that will be done soon (one that is not a run on this machine).
    """
    held = _take_patiently(path, purpose, wait_seconds)
    _HELD[path] = held
    ended = threading.Event()
    renewer = threading.Thread(target=_renew, args=(held, ended), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        if _HELD.get(path) == held:
            del _HELD[path]
        with contextlib.suppress(OSError, LockedError):  # a lock that cannot be given back frees itself: this process is done
            _write_own(held, released=True)


def check_held(path: Path) -> None:
    """Raise LockedError unless this process holds the lock (it may have been stopped for long, and the lock taken over)."""
    held, seen = _HELD.get(path), _newest(path)
    if held is None or seen is None or seen.get("token") != held.token:
        raise LockedError(f"the lock {path} is not this process's any more ({lock_holder(path) or 'nobody'} has it): it ends here")


def check_not_lost(path: Path) -> None:
    """Raise LockedError if this process has taken the lock, and somebody else has it now."""
    if path in _HELD:
        check_held(path)


def lock_holder(path: Path) -> str | None:
    """Who holds the lock, in words; None if nobody that lives does."""
    seen = _newest(path)
    return None if seen is None or _is_released(seen) or _looks_dead(seen) else seen.who


# --- taking ---------------------------------------------------------------------------------------------------------------


def _take_patiently(path: Path, purpose: str, wait_seconds: float) -> _Held:
    deadline = time.monotonic() + wait_seconds
    while True:
        seen = _newest(path)
        if seen is None or _is_released(seen) or (_looks_dead(seen) and _stays_so(seen)):
            held = _take(path, 1 if seen is None else seen.number + 1, purpose)
            if held is not None:
                return held
            seen = _newest(path)
        if seen is not None and not _is_released(seen):
            if seen.get("purpose") == RUN or time.monotonic() > deadline:
                raise LockedError(_held_message(path, seen))
            time.sleep(POLL_SECONDS)


def _take(path: Path, number: int, purpose: str) -> _Held | None:
    """Make the file of that number; None if another process has made it, or a later one, before."""
    held = _Held(path.with_name(f"{path.name}.{number}"), secrets.token_hex(8))
    unique = path.with_name(f".{path.name}.{held.token}")
    about = {"host": platform.node(), "pid": os.getpid(), "token": held.token, "purpose": purpose}
    write_text(unique, json.dumps({**about, "machine": this_machine(), "birth": _birth(os.getpid()), "beat": 0}), durable=False)
    try:
        os.link(unique, held.file)
    except FileExistsError:
        pass
    finally:
        # A link that NFS reported as failed may have happened: the file itself tells.
        unique.unlink()
    seen = _newest(path)
    if seen is not None and seen.get("token") == held.token:
        for old in _numbers(path):
            if old < number:
                _file(path, old).unlink(missing_ok=True)
        return held
    made = _look(held.file, number)
    if made is not None and made.get("token") == held.token:  # this process stood still, and others went further: the number was free again
        held.file.unlink(missing_ok=True)
    return None


def _stays_so(seen: _Seen) -> bool:
    """True if a lock that looks dead is no process of this machine's, or does not change while it is watched."""
    if _is_here(seen):
        return True
    until = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(min(POLL_SECONDS, WATCH_SECONDS))
        now = _look(seen.file, seen.number)
        if now is None or now.content != seen.content or now.stamp != seen.stamp:
            return False
    return True


def _renew(held: _Held, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        # A file system that fails for a moment must not end the renewing: the next round tries again.
        with contextlib.suppress(OSError, LockedError):
            _write_own(held)


def _write_own(held: _Held, **changes: object) -> None:
    seen = _look(held.file, 0)
    if seen is not None and seen.content is not None and seen.get("token") == held.token:
        write_text(held.file, json.dumps({**seen.content, "beat": seen.content.get("beat", 0) + 1, **changes}), durable=False)


# --- looking --------------------------------------------------------------------------------------------------------------


def _file(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _numbers(path: Path) -> list[int]:
    """Numbers of the files that are there, sorted; 0 is a file without one, as earlier versions made it."""
    pattern = re.compile(re.escape(path.name) + r"(?:\.(\d+))?")
    if not path.parent.is_dir():
        return []
    return sorted(int(match[1] or 0) for file in path.parent.iterdir() if (match := pattern.fullmatch(file.name)))


def _newest(path: Path) -> _Seen | None:
    for _ in range(STALE_READS):
        numbers = _numbers(path)
        if not numbers:
            return None
        seen = _look(_file(path, numbers[-1]), numbers[-1])
        if seen is not None:
            return seen
        with contextlib.suppress(OSError):  # swept up since, so a later one is there: this host's view may be old
            filesystem_now(path.parent)
        time.sleep(POLL_SECONDS / 10)
    raise LockedError(f"the lock {path} changes too fast to be read: another launch is at work")


def _look(file: Path, number: int) -> _Seen | None:
    """What a lock file says; None if it is not there."""
    for _ in range(STALE_READS):
        try:
            status = file.stat()
            text = file.read_text() if file.is_file() else ""  # a pipe would be waited for
        except FileNotFoundError:
            return _Seen(file, number, None, file.lstat().st_mtime) if file.is_symlink() else None  # a link that leads nowhere
        except UnicodeDecodeError:
            text = ""
        except OSError as error:
            if error.errno != errno.ESTALE:  # its holder has just renewed it, on another host
                raise LockedError(f"the lock {file} cannot be read: {error.strerror}. Make it readable, or take it away") from error
            time.sleep(POLL_SECONDS)
            continue
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        whole = isinstance(content, dict) and isinstance(content.get("pid"), int) and isinstance(content.get("host"), str)
        return _Seen(file, number, content if whole else None, status.st_mtime)
    raise LockedError(f"the lock {file} changes too fast to be read: another launch is at work")


def _is_released(seen: _Seen) -> bool:
    return bool(seen.get("released"))


def _is_here(seen: _Seen) -> bool:
    """True if the holder is, or was, a process whose life this process can see."""
    if seen.content is None or seen.content["host"] != platform.node():
        return False
    return bool(seen.content.get("machine", this_machine()) == this_machine())


def _looks_dead(seen: _Seen) -> bool:
    if _is_here(seen):
        return not is_process(seen.get("pid")) or seen.get("birth") not in (None, _birth(seen.get("pid")))
    return _age(seen) > LIFE_SECONDS


def _age(seen: _Seen) -> float:
    try:
        return filesystem_now(seen.file.parent) - seen.stamp
    except OSError:
        return time.time() - seen.stamp  # somebody who may only read looks; their clock has to do


def _birth(pid: int) -> str | None:
    """When a process began, in this machine's own words: numbers of processes are used again.  None where it cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    with contextlib.suppress(OSError):
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


def _held_message(path: Path, seen: _Seen) -> str:
    sweep = path.parent.parent.name
    if seen.content is None:
        return (
            f"the lock {seen.file} of sweep {sweep} cannot be read as one (damaged, or not made by quantsweep). If no launch of this "
            f"sweep is at work, take it away; else wait: it counts for nothing {LIFE_SECONDS / 60:.0f} minutes after its last change"
        )
    said = f"sweep {sweep} is being launched or run by {seen.who}. "
    age = _age(seen)
    if _is_here(seen):
        if age > 3 * RENEW_SECONDS:
            pid = seen.get("pid")
            return said + (
                f"It lives, but was not heard of for {age / 60:.0f} minutes (stopped with Ctrl-Z, perhaps). Let it go on "
                f"(fg, or kill -CONT {pid}), or end it (kill {pid}; kill -CONT {pid}): its lock is free then"
            )
        return said + "Wait for it, or stop it: its lock is free then"
    return said + f"Wait for it, or stop it; a dead launch frees its lock ({seen.file}) by itself within {LIFE_SECONDS / 60:.0f} minutes"
