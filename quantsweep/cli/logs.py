"""`quantsweep logs TRIAL`: that trial's part of the log, also when many trials shared one worker."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from quantsweep import records
from quantsweep.cli._sweep import add_sweep, find_sweep, sweep_names
from quantsweep.errors import ResultsError
from quantsweep.paths import SweepFolder


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("trial", help="trial id, or the beginning of one")
    add_sweep(parser, option=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the log of the trial's latest attempt."""
    row, folder = _find(arguments)
    with (folder.logs / row["log"]).open("rb") as log:
        log.seek(row["log_start"])
        text = log.read(row["log_end"] - row["log_start"])
    print(f"{row['label']}   {row['status']}   {row['host']}   {folder.logs / row['log']}", file=sys.stderr)
    sys.stdout.write(text.decode(errors="replace"))
    return 0


def _find(arguments: argparse.Namespace) -> tuple[dict[str, Any], SweepFolder]:
    names = sweep_names(arguments)
    folders = (
        [find_sweep(arguments)] if arguments.sweep else [SweepFolder((Path(arguments.results_dir) / name).resolve()) for name in names]
    )
    columns = ["trial_id", "label", "status", "host", "log", "log_start", "log_end", "finished_at", "attempt"]
    found: dict[str, tuple[dict[str, Any], SweepFolder]] = {}
    for folder in folders:
        for row in records.latest(records.read_table(folder.path, "trials", columns), ("trial_id",)).to_pylist():
            if row["trial_id"].startswith(arguments.trial):
                found[row["trial_id"]] = (row, folder)
    if len(found) != 1:
        what = "no trial that has ended" if not found else f"{len(found)} trials"
        places = ", ".join(str(folder.path) for folder in folders) or arguments.results_dir
        raise ResultsError(f"{what} begins with '{arguments.trial}' in {places}; trial ids are in the column trial_id")
    return next(iter(found.values()))
