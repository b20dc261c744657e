"""`quantsweep cancel SWEEP [column=value …]`: stop it, or those of its trials that a filter names; rows that are written stay.

Without a filter every job leaves the queue.  With one, jobs all of whose trials it names leave the queue, and the
other workers skip what it names.  Nothing cancelled is submitted again until the launch command is typed.  With --drop
nobody waits for it any more either: `status` no longer counts it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.errors import ConfigurationError
from quantsweep.failures.holds import cancelled
from quantsweep.launching.settle import cancel_tasks
from quantsweep.launching.tasks import Task, idle_tasks, observe
from quantsweep.planning.plan import remaining_tasks
from quantsweep.planning.plan_files import read_asked
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import filters, records
from quantsweep.trial.specs import PlannedTrial
from quantsweep.words import count


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("filters", nargs="*", help="which trials: model=mini-* bit_width=3,4 (default: all)")
    parser.add_argument(
        "--drop",
        action="store_true",
        help="nobody wants them any more: status and resume leave them out, until a launch is typed that asks for them",
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Hold what is named first, so that nothing submits it again, then take its jobs out of the queue."""
    folder = find_sweep(arguments)
    chosen = filters.parse(arguments.filters, filters.PLAN_COLUMNS)
    num_named = _num_named(folder, chosen)
    hold = cancelled(arguments.filters, folder, drop=arguments.drop)
    if num_named:  # else it would catch what a later `rerun` brings back
        hold.save(folder)
    seen = observe(folder)
    tasks = _named(folder, seen.in_flight, chosen) if chosen.terms else list(seen.in_flight)
    # Where everything is cancelled nothing is left to look after either.
    collectors = [] if chosen.terms else [task.job_id for task in seen.collectors]
    cancel_tasks(folder, tasks, purpose="cancel", others=collectors)
    if arguments.json:
        print(json.dumps({"sweep": folder.name, "trials": num_named, "jobs": len(tasks), "dropped": arguments.drop}))
        return 0
    done, then = (
        ("dropped", "a launch that asks for them again brings them back") if arguments.drop else ("held", "the launch command resumes")
    )
    print(
        f"{folder.name}: {count(num_named, 'trial')} {done} ({hold.words}), {count(len(tasks), 'job')} taken out of the queue; "
        f"what is written stays, and {then}"
        + ("" if num_named else "\nwhat the filters name is done already: `quantsweep rerun` forgets results")
    )
    return 0


def _num_named(folder: SweepFolder, chosen: filters.Filter) -> int:
    """How many trials that are not done the filter names; raises ConfigurationError if it, or one of its values, names none of any."""
    done = records.read_done(folder.path)
    asked = read_asked(folder.plan)
    there: dict[str, set[Any]] = {column: set() for column in chosen.columns}
    for planned in asked:
        for row in filters.planned_rows(planned):
            for column, values in there.items():
                values.add(row[column])
    chosen.refuse_unmet(there, folder.name)
    named = [planned for planned in asked if chosen.matches_planned(planned)]
    if not named:
        raise ConfigurationError(f"no trial of {folder.name} matches {chosen}")
    return sum(bool(remaining_tasks(planned, done).tasks) for planned in named)


def _named(folder: SweepFolder, tasks: Sequence[Task], chosen: filters.Filter) -> list[Task]:
    """Tasks all of whose trials that are left to run are named by the filter."""
    done = records.read_done(folder.path)

    def is_another(_: str, planned: PlannedTrial) -> bool:
        left = remaining_tasks(planned, done)
        return bool(left.tasks) and not chosen.matches_planned(left)

    return idle_tasks(folder, tasks, is_another)
