"""`quantsweep cancel SWEEP [column=value …]`: stop it, or those of its trials that a filter names; rows that are written stay.

Without a filter every job leaves the queue.  With one, jobs all of whose trials it names leave the queue, and the
other workers skip what it names.  Nothing cancelled is submitted again until the launch command is typed.
"""

from __future__ import annotations

import argparse

from quantsweep import filters, records, slurm
from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.holds import cancelled
from quantsweep.launching.tasks import Task, observe
from quantsweep.paths import SweepFolder
from quantsweep.plan import read_shard_trials, remaining_tasks


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("filters", nargs="*", help="which trials: model=mini-* bit_width=3,4 (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Hold what is named first, so that nothing submits it again, then take its jobs out of the queue."""
    folder = find_sweep(arguments)
    chosen = filters.parse(arguments.filters, filters.PLAN_COLUMNS)
    hold = cancelled(arguments.filters)
    hold.save(folder)
    tasks = [task for task in observe(folder).in_flight if not chosen.terms or _is_all(folder, task, chosen)]
    slurm.cancel([task.job_id for task in tasks])
    print(f"cancelled {len(tasks)} jobs of {folder.name} ({hold.words}); what is written stays, and the launch command resumes")
    return 0


def _is_all(folder: SweepFolder, task: Task, chosen: filters.Filter) -> bool:
    """True if the filter names every trial that the task still has to run."""
    done = records.read_done(folder.path)
    left = (remaining_tasks(planned, done) for planned in read_shard_trials(folder.plan / task.plan, task.shard_ids))
    return all(chosen.matches_planned(planned) for planned in left if planned.tasks)
