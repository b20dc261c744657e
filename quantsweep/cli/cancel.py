"""`quantsweep cancel SWEEP [column=value …]`: stop it, or those of its trials that a filter names; rows that are written stay.

Without a filter every job leaves the queue.  With one, jobs all of whose trials it names leave the queue, and the
other workers skip what it names.  Nothing cancelled is submitted again until the launch command is typed.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from quantsweep import filters, records, slurm
from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.errors import LockedError
from quantsweep.holds import cancelled
from quantsweep.launching.lock import launch_lock
from quantsweep.launching.settle import write_cancelled
from quantsweep.launching.tasks import Task, observe
from quantsweep.paths import SweepFolder
from quantsweep.plan import read_numbered_trials, remaining_tasks

LOCK_SECONDS = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("filters", nargs="*", help="which trials: model=mini-* bit_width=3,4 (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Hold what is named first, so that nothing submits it again, then take its jobs out of the queue."""
    folder = find_sweep(arguments)
    chosen = filters.parse(arguments.filters, filters.PLAN_COLUMNS)
    hold = cancelled(arguments.filters, folder)
    hold.save(folder)
    flying = observe(folder).in_flight
    tasks = _named(folder, flying, chosen) if chosen.terms else list(flying)
    slurm.cancel([task.job_id for task in tasks])
    if tasks:
        # Whoever holds the lock for long (wait=true) writes it down with its own next look.
        with contextlib.suppress(LockedError), launch_lock(folder.plan / "launch.lock", purpose="cancel", wait_seconds=LOCK_SECONDS):
            write_cancelled(folder, tasks)
    print(f"cancelled {len(tasks)} jobs of {folder.name} ({hold.words}); what is written stays, and the launch command resumes")
    return 0


def _named(folder: SweepFolder, tasks: Sequence[Task], chosen: filters.Filter) -> list[Task]:
    """Tasks all of whose trials that are left to run are named by the filter."""
    done = records.read_done(folder.path)
    by_plan: dict[str, set[int]] = {}
    for task in tasks:
        by_plan.setdefault(task.plan, set()).update(task.shard_ids)
    others = {
        (plan, shard_id)
        for plan, ids in by_plan.items()
        for shard_id, planned in read_numbered_trials(folder.plan / plan, ids)
        if (left := remaining_tasks(planned, done)).tasks and not chosen.matches_planned(left)
    }
    return [task for task in tasks if not any((task.plan, shard_id) in others for shard_id in task.shard_ids)]
