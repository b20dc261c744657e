"""`quantsweep cancel SWEEP`: take its jobs out of the Slurm queue; rows that are written stay, and a later launch resumes."""

from __future__ import annotations

import argparse

from quantsweep import slurm
from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.launching.submissions import flying_tasks


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)


def run(arguments: argparse.Namespace) -> int:
    """Cancel every queued or running job of the sweep."""
    folder = find_sweep(arguments)
    tasks = flying_tasks(folder)
    slurm.cancel([task.job_id for task in tasks])
    print(f"cancelled {len(tasks)} jobs of {folder.name}; what is written stays, and the launch command resumes")
    return 0
