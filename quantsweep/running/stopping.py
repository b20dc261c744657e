"""What ends a process's workers before their shards are done: somebody asks, or their share of the budget is spent.

    signal, Ctrl-C, budget, bad node → Stop.set(reason, grace) → looked at between trials, between tasks, and while a task lasts

The workers of one process are threads, and share one Stop and one Allotment.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from quantsweep.storage.workers import ENDED_BY_SLURM

STOPPING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, a batch system, a terminal that closes."""


class Stop:
    """Asks all workers of a process to end: the trial at hand may go on for `grace` seconds (None: until its own end)."""

    PERSON = "stopped"
    TIME_LIMIT = "time limit"
    ENDED = ENDED_BY_SLURM
    BUDGET = "budget"
    BAD_NODE = "bad node"
    ERROR = "another worker's error"
    SUPERSEDED = "superseded"
    CODE_CHANGED = "code changed"

    def __init__(self) -> None:
        self._event = threading.Event()
        self._drop_at: float | None = None
        self.reason: str | None = None
        self.signal: str | None = None
        """Name of the first signal that asked; None where none did."""

    def set(self, reason: str = PERSON, grace: float | None = None) -> None:
        """Ask; the first reason stays, a shorter grace wins."""
        self.reason = self.reason or reason
        if grace is not None:
            drop_at = time.monotonic() + grace
            self._drop_at = drop_at if self._drop_at is None else min(self._drop_at, drop_at)
        self._event.set()

    def is_set(self) -> bool:
        """True once somebody asked."""
        return self._event.is_set()

    def drops_now(self) -> bool:
        """True once the trial at hand must not go on."""
        return self._drop_at is not None and time.monotonic() >= self._drop_at


@contextlib.contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[None]:
    """While the block lasts, a first signal asks to stop, and a second one drops what is at hand; what is ignored (nohup) stays so.

    The handler raises nothing: an exception in the middle of `Thread.join` makes CPython 3.11 take the thread for ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal = stop.signal or signal.Signals(number).name
        stop.set(grace=0.0 if asked.is_set() else None)
        asked.set()

    before = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


class Allotment:
    """GPU-seconds that all workers of one process may use together; None: as many as they need."""

    def __init__(self, gpu_seconds: float | None = None) -> None:
        self._granted = gpu_seconds
        self._used = 0.0
        self._lock = threading.Lock()

    def use(self, gpu_seconds: float) -> None:
        """Count what was used."""
        with self._lock:
            self._used += gpu_seconds

    def is_spent(self) -> bool:
        """True if nothing is left."""
        return self._granted is not None and self._used >= self._granted


class StoppedError(Exception):
    """Somebody asked the worker to stop (internal: it never leaves the worker)."""
