"""`quantsweep logs TRIAL`: that trial's part of the log, also when many trials shared one worker."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantsweep import order, records
from quantsweep.cli._sweep import add_sweep, find_sweep, sweep_names
from quantsweep.effective import effective
from quantsweep.errors import ResultsError
from quantsweep.paths import SweepFolder
from quantsweep.words import count

MAX_SHOWN = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("trial", help="trial id, or the beginning of one")
    add_sweep(parser, option=True)
    parser.add_argument("--json", action="store_true", help="print the log and whose it is as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the log of the trial's latest attempt."""
    row, folder = _find(arguments)
    with (folder.logs / row["log"]).open("rb") as log:
        log.seek(row["log_start"])
        text = log.read(row["log_end"] - row["log_start"])
    said = text.decode(errors="replace")
    if arguments.json:
        whose = {key: row[key] for key in ("trial_id", "label", "status", "host")}
        print(json.dumps({**whose, "sweep": folder.name, "file": str(folder.logs / row["log"]), "text": said}))
        return 0
    print(f"{row['label']}   {row['status']}   {row['host']}   {folder.logs / row['log']}", file=sys.stderr)
    sys.stdout.write(said)
    return 0


def _find(arguments: argparse.Namespace) -> tuple[dict[str, Any], SweepFolder]:
    names = sweep_names(arguments)
    folders = (
        [find_sweep(arguments)] if arguments.sweep else [SweepFolder((Path(arguments.results_dir) / name).resolve()) for name in names]
    )
    # One trial may have run in several sweeps: each has its own log.
    columns = ["trial_id", "label", "status", "config", "host", "log", "log_start", "log_end", *order.COLUMNS]
    found: list[tuple[dict[str, Any], SweepFolder]] = []
    for folder in folders:
        rows = effective(folder.path, "trials", records.read_table(folder.path, "trials", columns)).to_pylist()
        found += [(row, folder) for row in rows if row["trial_id"].startswith(arguments.trial)]
    if len(found) != 1:
        places = ", ".join(str(folder.path) for folder in folders) or arguments.results_dir
        raise ResultsError(_not_one(arguments.trial, found, places))
    return found[0]


def _not_one(wanted: str, found: Sequence[tuple[dict[str, Any], SweepFolder]], places: str) -> str:
    """Why no log is shown, where not exactly one trial of one sweep is meant."""
    ids = sorted({row["trial_id"] for row, _ in found})
    names = sorted(folder.name for _, folder in found)
    if not ids:
        return f"no trial that has ended begins with '{wanted}' in {places}; trial ids are in the column trial_id"
    if len(ids) == 1:
        return f"trial {ids[0]} is in {count(len(names), 'sweep')}: {', '.join(names)}. Choose one: --sweep {names[0]}"
    shown = ", ".join([*ids[:MAX_SHOWN], *(["…"] if len(ids) > MAX_SHOWN else [])])
    return f"{len(ids):,} trials begin with '{wanted}': {shown}. Give more of the id"
