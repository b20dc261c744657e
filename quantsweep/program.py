"""What a command owes the shell that started it: work outlives its output, and every end has its exit status.

    with as_program():
        …                                   # print, run, raise SystemExit(status)

A reader that has gone (`| head -1`), a full disk behind `> file` or a terminal that closed must not stop a sweep: what
cannot be written is dropped, the work goes on, and the command ends with OUTPUT_LOST where it would have ended well.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

from quantsweep.exit_status import ExitStatus


class _Output:
    """A text stream whose first failing write turns it into /dev/null."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """The number of characters, written or dropped."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a locale of ASCII alone, a file name of foreign bytes: a "?" is better than an end
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except OSError:
            self._drop()
            return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """Line by line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """What cannot be flushed is dropped."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        self.is_lost = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what is buffered still, and for children
            os.close(nowhere)


@contextlib.contextmanager
def as_program() -> Iterator[None]:
    """Run the block as the whole of a command; anything but success ends in SystemExit with a number."""
    before = sys.stdout, sys.stderr
    outputs = [_Output(stream or io.StringIO()) for stream in before]  # None: it was closed (`>&-`)
    sys.stdout, sys.stderr = outputs
    status: int = ExitStatus.DONE
    try:
        with _ended_by_signals():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = ExitStatus.STOPPED
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = 1 if isinstance(end.code, str) else end.code or 0
    finally:
        for output in outputs:
            output.flush()
        sys.stdout, sys.stderr = before
    if status == 0 and any(output.is_lost for output in outputs):
        status = ExitStatus.OUTPUT_LOST
    if status:
        raise SystemExit(status)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """TERM and a closing terminal end the block as Ctrl-C does, so that locks are released; what is ignored (nohup) stays so."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
