"""`quantsweep watch SWEEP [--interval 30]`: `status`, again and again, until nothing is left to happen.

On a terminal one block is drawn over and over (q or Ctrl-C leaves); elsewhere a block is printed
whenever a count has changed.  Each look asks Slurm as much as `status` does, so looks are seconds apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.cli.status import sweep_status
from quantsweep.errors import ConfigurationError, QuantsweepError
from quantsweep.operations.messages import status_text
from quantsweep.storage.paths import SweepFolder

DEFAULT_SECONDS = 30.0
LEAST_SECONDS = 5.0
"""Slurm answers everybody on the cluster: a loop that asks more often would be felt by others."""

IN_WORK = ("running", "queued", "waiting", "unknown")
COUNTS = (*IN_WORK, "done", "held", "failed", "to_launch", "evaluations_done", "launch")
"""What makes a new block where there is no terminal; rates and hours change at every look."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    text = f"seconds between two looks (default {DEFAULT_SECONDS:.0f}, at least {LEAST_SECONDS:.0f})"
    parser.add_argument("--json", action="store_true", help="print the facts as JSON, a line whenever a count has changed")
    parser.add_argument("--interval", type=float, default=DEFAULT_SECONDS, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Watch until the sweep is over or somebody leaves."""
    if not arguments.interval >= LEAST_SECONDS:  # NaN too
        raise ConfigurationError(f"--interval must be at least {LEAST_SECONDS:.0f} seconds, got {arguments.interval:g}: Slurm is shared")
    folder = find_sweep(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        if sys.stdout.isatty() and not arguments.json:
            _watch_on_terminal(folder, arguments.interval)
        else:
            _watch_in_blocks(folder, arguments.interval, as_json=arguments.json)
    return 0


def is_over(facts: Mapping[str, Any]) -> bool:
    """True if nothing more happens by itself: nothing is in work, no launch is at work, and what is left has failed or is held."""
    return not any(facts[name] for name in IN_WORK) and not facts["launch"] and not facts["to_launch"]


def _looks(folder: SweepFolder) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(facts, complaint) of one look after the other; a look that fails shows the facts before it, the first may not fail."""
    facts = sweep_status(folder)
    yield facts, ""
    while True:
        complaint = ""
        try:
            facts = sweep_status(folder)
        except (QuantsweepError, OSError) as error:
            complaint = f"could not look: {error}"
        yield facts, complaint


def _watch_in_blocks(folder: SweepFolder, interval: float, *, as_json: bool) -> None:
    shown: tuple[Any, ...] | None = None
    for facts, complaint in _looks(folder):
        state = (*(facts[name] for name in COUNTS), complaint)
        if state != shown:
            block = "\n".join(filter(None, (_now(), status_text(facts), complaint)))
            print(json.dumps({**facts, "complaint": complaint or None}) if as_json else block, flush=True)
            shown = state
        if is_over(facts):
            return
        time.sleep(interval)


def _watch_on_terminal(folder: SweepFolder, interval: float) -> None:
    facts: Mapping[str, Any] = {}
    try:
        # Transient: what stays on the screen is the last block, printed whole when it is over.
        with _keys() as keyboard, Live(console=Console(), auto_refresh=False, transient=True) as live:
            for facts, complaint in _looks(folder):
                footer = f"{_now()}   looks again every {interval:.0f} s; q leaves"
                live.update(Group(Text(status_text(facts)), Text(complaint, style="yellow"), Text(footer, style="dim")), refresh=True)
                if is_over(facts) or _waits_for_q(keyboard, interval):
                    return
    finally:
        if facts:
            print(status_text(facts), flush=True)


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The keyboard, giving each key at once; None where input is no terminal.  Left as it was found."""
    if not sys.stdin.isatty():
        yield None
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard, termios.TCSANOW)
    try:
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _waits_for_q(keyboard: int | None, seconds: float) -> bool:
    """Wait; True as soon as q is pressed or the terminal is gone."""
    if keyboard is None:
        time.sleep(seconds)
        return False
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([keyboard], [], [], left)[0]:
            keys = os.read(keyboard, 64).lower()
            if not keys or b"q" in keys:
                return True
    return False


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
