"""`quantsweep show SWEEP [--json]`: what it asked, launch by launch, in the words that were typed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.operations.launches import Launch, read_launches
from quantsweep.operations.messages import show_text
from quantsweep.planning.plan import Done
from quantsweep.planning.plan_files import read_asked
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.tables.filters import planned_rows
from quantsweep.trial.quantization import DEFAULT_STEPS, FACTORS

AXES = ("model", "method", "data_type", "bit_width", "block_size", *FACTORS, "activation_bit_width", "plant_scale", "seed", "task_key")
"""Columns whose values say what a sweep is about."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the launches and what they come to."""
    facts = sweep_contents(find_sweep(arguments))
    print(json.dumps(facts, indent=2) if arguments.json else show_text(facts))
    return 0


def sweep_contents(folder: SweepFolder) -> dict[str, Any]:
    """The launches with their words, and the values that the sweep has in each column that says what it is about."""
    done = records.read_done(folder.path)
    values: dict[str, dict[Any, None]] = {column: {} for column in AXES}
    for planned in read_asked(folder.plan):
        for row in planned_rows(planned):
            for column, seen in values.items():
                seen[row[column]] = None
    return {
        "sweep": folder.name,
        "folder": str(folder.path),
        "launches": [_launch(launch, done) for launch in read_launches(folder)],
        "values": {column: _worth_saying(column, seen) for column, seen in values.items()},
    }


def _worth_saying(column: str, seen: Iterable[Any]) -> list[Any]:
    """The values of a column; none of a factor that no trial chose, or that the method says already."""
    values = [value for value in seen if value is not None]
    return [] if column == "rounding" or values == [DEFAULT_STEPS.get(column)] else values


def _launch(launch: Launch, done: Done) -> dict[str, Any]:
    typed = launch.typed
    return {
        "plan": launch.header.name,
        "launched": launch.at.isoformat(),
        "typed": None if typed is None else typed.command,
        "folder": None if typed is None else typed.folder,
        "trials": len(launch.asked),
        "done": len(launch.asked) - len(launch.left(done)),
    }
