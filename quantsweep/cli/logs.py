"""`quantsweep logs TRIAL`: that trial's part of the log, also when many trials shared one worker."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantsweep.cli._sweep import add_sweep, find_sweep, sweep_names
from quantsweep.errors import ResultsError
from quantsweep.launching.settle import job_logs
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import order, records
from quantsweep.tables.effective import effective
from quantsweep.words import count

MAX_SHOWN = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("trial", help="trial id, or the beginning of one")
    add_sweep(parser, option=True)
    parser.add_argument("--json", action="store_true", help="print the log and whose it is as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the log of the trial's latest attempt; of one that no worker came to, what its job printed."""
    row, folder = _find(arguments)
    path, start, size = _place(row, folder)
    try:
        with path.open("rb") as log:
            log.seek(start)
            said = log.read(size).decode(errors="replace")
    except OSError as error:
        raise ResultsError(f"{row['label']} {row['status']}{_reason(row)}; its log {path} cannot be read: {error.strerror}") from error
    if arguments.json:
        whose = {key: row[key] for key in ("trial_id", "label", "status", "host")}
        print(json.dumps({**whose, "sweep": folder.name, "file": str(path), "text": said}))
        return 0
    print(f"{row['label']}   {row['status']}   {row['host']}   {path}", file=sys.stderr)
    sys.stdout.write(said)
    return 0


def _place(row: Mapping[str, Any], folder: SweepFolder) -> tuple[Path, int, int]:
    """(file, where the attempt's part begins, how long it is); -1 for all of it."""
    if row["log"]:
        return folder.logs / row["log"], row["log_start"], row["log_end"] - row["log_start"]
    if found := job_logs(folder, str(row["slurm_job"])):
        return found[0], 0, -1
    raise ResultsError(f"{row['label']} {row['status']}{_reason(row)}; no worker came to it, and its job {row['slurm_job']} left no log")


def _reason(row: Mapping[str, Any]) -> str:
    return f" ({row['failure_class']}: {row['failure_message']})" if row["failure_class"] else ""


def _find(arguments: argparse.Namespace) -> tuple[dict[str, Any], SweepFolder]:
    names = sweep_names(arguments)
    folders = (
        [find_sweep(arguments)] if arguments.sweep else [SweepFolder((Path(arguments.results_dir) / name).resolve()) for name in names]
    )
    # One trial may have run in several sweeps: each has its own log.
    columns = [
        "trial_id",
        "label",
        "status",
        "config",
        "host",
        "log",
        "log_start",
        "log_end",
        "slurm_job",
        "failure_class",
        "failure_message",
        *order.COLUMNS,
    ]
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
