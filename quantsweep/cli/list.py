"""`quantsweep list [--results-dir results] [--json]`: the sweeps here, how much of each is done, and the words of its last launch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quantsweep.cli._sweep import add_results_dir, sweep_names
from quantsweep.errors import QuantsweepError
from quantsweep.operations.launches import dropped_trials, held_trials, left_of, read_launches
from quantsweep.operations.messages import sweeps_text
from quantsweep.planning.plan_files import read_asked_tasks
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_results_dir(parser)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print one line a sweep, the one that was launched last at the end."""
    sweeps = [sweep_facts(SweepFolder((Path(arguments.results_dir) / name).resolve())) for name in sweep_names(arguments)]
    sweeps.sort(key=lambda facts: facts["launched"] or "")
    print(json.dumps(sweeps, indent=2) if arguments.json else sweeps_text(sweeps, arguments.results_dir))
    return 0


def sweep_facts(folder: SweepFolder) -> dict[str, Any]:
    """What `list` says of one sweep; `problem` says why nothing else could be read of it."""
    facts: dict[str, Any] = {"sweep": folder.name, "trials": 0, "done": 0, "launched": None, "typed": None, "problem": None}
    try:
        asked = read_asked_tasks(folder.plan)
        left = left_of(asked, records.read_done(folder.path))
        dropped = dropped_trials(held_trials(folder, left))
        launches = read_launches(folder)
    except (QuantsweepError, OSError) as error:  # one foreign folder must not hide the others
        return facts | {"problem": str(error)}
    facts |= {"trials": len(asked) - len(dropped), "done": len(asked) - len(left)}
    if launches:
        typed = launches[-1].typed
        facts |= {"launched": launches[-1].at.isoformat(), "typed": None if typed is None else typed.command}
    return facts
