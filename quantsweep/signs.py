"""Signs of life of long work that others' code does: whoever waits can tell a slow load from one that hangs.

    loading, preparing      bytes that reach this process: read, or mapped into its memory      `while_bytes_move`
    quantizing              a layer, a calibration window, a block                              `pipeline.interface.Help.progress`
    evaluating              a batch, and each block of the model within it                      forward hooks

A file system that answers slowly moves bytes; one that hangs moves none.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

OnProgress = Callable[[], None]
"""Called often while work goes on; must be quick."""

LOOK_SECONDS = 1.0
MOVED_BYTES = 1 << 20
"""So many bytes between two looks are a sign of life: what an idle process moves is far less."""
_IO = Path("/proc/self/io")
_MEMORY = Path("/proc/self/statm")


def moved_bytes() -> int:
    """Bytes that this process has read, written, or brought into its memory: only its changes mean something.

    Files that are mapped (safetensors) are not read but appear in memory, page by page.
    """
    try:
        read_and_written = sum(int(line.split()[1]) for line in _IO.read_text().splitlines() if line.startswith(("rchar", "wchar")))
        resident = int(_MEMORY.read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc (macOS): pages that were read from disk
        return resource.getrusage(resource.RUSAGE_SELF).ru_majflt * resource.getpagesize()
    return read_and_written + resident


@contextlib.contextmanager
def while_bytes_move(on_progress: OnProgress) -> Iterator[None]:
    """Call `on_progress`, from a thread, about every second in which this process moved bytes while the block lasts."""
    ended = threading.Event()

    def look() -> None:
        before = moved_bytes()
        while not ended.wait(LOOK_SECONDS):
            now = moved_bytes()
            if abs(now - before) >= MOVED_BYTES:
                before = now
                on_progress()

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
