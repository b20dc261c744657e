"""`quantsweep resume SWEEP`: the words of its launches again, through `launch.py` itself, in the folder where they were typed.

launched three times, the second is done            → the words of the first, then those of the third
everything is done                                   → the words of the last: it says so and prints its table
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TextIO

from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.errors import ResultsError
from quantsweep.exit_status import ExitStatus
from quantsweep.operations.launches import KEEP_DROPPED, Launch, dropped_trials, held_trials, read_launches
from quantsweep.planning.typed import Typed
from quantsweep.storage.paths import SweepFolder, product_root
from quantsweep.tables import records


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the words, and launch nothing")
    parser.add_argument("--json", action="store_true", help="print what was launched, and how it ended, as JSON; the rest goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Launch again what has something left; returns the first status that is not 0, at once if it was stopped or refused."""
    folder = find_sweep(arguments)
    status: int = ExitStatus.DONE
    output = sys.stderr if arguments.json else sys.stdout
    launched: list[dict[str, object]] = []
    for typed in to_type(folder):
        print(f"(in {typed.folder})\n{typed.command}", flush=True, file=output)
        launched.append({"command": typed.command, "folder": typed.folder, "status": None})
        if arguments.dry_run:
            continue
        now = launch_again(typed, output)
        launched[-1]["status"] = now
        status = status or now
        if now in (ExitStatus.REFUSED, ExitStatus.USAGE, ExitStatus.STOPPED):
            break
    if arguments.json:
        print(json.dumps(launched, indent=2))
    return status


def to_type(folder: SweepFolder) -> list[Typed]:
    """The words, each once, of the launches that have something left which is not dropped; those of the last if none has."""
    launches = read_launches(folder)
    if not launches:
        raise ResultsError(f"{folder.path} has no plan yet: nothing was launched")
    done = records.read_done(folder.path)
    left = {trial_id for launch in launches for trial_id in launch.left(done)}
    left -= dropped_trials(held_trials(folder, left))
    unfinished = [launch for launch in launches if launch.asked.keys() & left and launch.left(done) & left] or launches[-1:]
    return list(dict.fromkeys(_words(folder, launch) for launch in unfinished))


def _words(folder: SweepFolder, launch: Launch) -> Typed:
    if launch.typed is None:
        raise ResultsError(
            f"{folder.name}: the words of the launch of {launch.at:%Y-%m-%d %H:%M} were not kept (an older version launched it). "
            f"Type its launch command, with sweep={folder.name}"
        )
    return _into(folder, launch.header.sweep, launch.typed)


def _into(folder: SweepFolder, sweep: str, typed: Typed) -> Typed:
    """The words with the folder that was named, where it is another than they lead to: a copy, or one that was renamed or moved.

    sweep: the name that the launch had.
    """
    places = [word.partition("=")[2] for word in typed.words if _key(word) == "results_dir"]
    where = Path(typed.folder, (places or ["results"])[-1].strip("'\"")).expanduser().resolve()
    here = folder.path.resolve().parent
    given = {"sweep": folder.name} if sweep != folder.name else {}
    given |= {"results_dir": str(here)} if where != here else {}
    kept = tuple(word for word in typed.words if _key(word) not in given)
    return replace(typed, words=(*kept, *(f"{key}={value}" for key, value in given.items())))


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def launch_again(typed: Typed, output: TextIO) -> int:
    """Run `launch.py` with these words where they were typed; its exit status.  Ctrl-C goes to it, and it says how it ends."""
    if not Path(typed.folder).is_dir():
        raise ResultsError(f"the folder in which this was typed is gone: {typed.folder}. Type it elsewhere: {typed.command}")
    command = [sys.executable, str(product_root() / "launch.py"), *typed.words]
    process = subprocess.Popen(command, cwd=typed.folder, stdout=output.fileno(), env={**os.environ, KEEP_DROPPED: "1"})
    with _passing_on(process):
        return process.wait()


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """The launch says how it ends: a Ctrl-C it has from the terminal, other signals from here."""
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], object]] = {
        signal.SIGINT: lambda number, frame: None,
        signal.SIGTERM: lambda number, frame: process.send_signal(number),
        signal.SIGHUP: lambda number, frame: process.send_signal(number),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
