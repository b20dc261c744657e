"""The launches of a sweep: what each asked for, in the words that were typed, and what is left of it.

    plan-00001-…  launch     typed: -m +sweeps=quickstart        174 of 175 done
    plan-00002-…  retry      (of plan 1: belongs to its launch)
    plan-00003-…  launch     typed: -m +sweeps=quickstart bit_width=5

Read from files alone: nobody asks Slurm here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from quantsweep.exit_status import ExitStatus, of_trials
from quantsweep.failures.holds import Hold, holding, read_holds
from quantsweep.planning.plan import Done
from quantsweep.planning.plan_files import PlanHeader, read_asked, read_headers, read_owners, read_plan_tasks
from quantsweep.planning.typed import Typed
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.tables.effective import TRIAL_COLUMNS, effective
from quantsweep.trial.specs import PlannedTrial

KEEP_DROPPED = "QUANTSWEEP_KEEP_DROPPED"
"""Set in the environment of a launch that `quantsweep resume` types again: what was dropped since stays dropped."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch: the header of its plan, and trial id to task keys of all that it asked for."""

    header: PlanHeader
    asked: Mapping[str, tuple[str, ...]]

    @property
    def typed(self) -> Typed | None:
        """The words; None where a version launched it that did not keep them."""
        return self.header.typed

    @property
    def at(self) -> datetime:
        """When its plan was written, by the launching host's clock."""
        return datetime.strptime(self.header.name.split("-")[2], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)

    def left(self, done: Done) -> set[str]:
        """Trials of which an evaluation is missing."""
        return left_of(self.asked, done)


def read_launches(folder: SweepFolder) -> list[Launch]:
    """Every launch that had something to run, oldest first."""
    headers = (header for header in read_headers(folder.plan).values() if header.root == header.name)
    return [Launch(header=header, asked=read_plan_tasks(folder.plan / header.name)) for header in headers]


def left_of(asked: Mapping[str, Collection[str]], done: Done) -> set[str]:
    """Trials of which an evaluation is missing; asked: trial id to task keys."""
    return {trial_id for trial_id, tasks in asked.items() if any((trial_id, task) not in done for task in tasks)}


def held_trials(folder: SweepFolder, trial_ids: Collection[str]) -> dict[str, Hold]:
    """Those of the trials that a hold is in force for, each with its hold; what was dropped counts as dropped, whatever else holds it."""
    holds = sorted(read_holds(folder), key=lambda hold: hold.by != "drop")
    if not holds or not trial_ids:
        return {}
    roots = {name: header.root for name, header in read_headers(folder.plan).items()}
    owners = read_owners(folder.plan)
    mine = (planned for planned in read_asked(folder.plan) if planned.trial.trial_id in trial_ids and planned.trial.trial_id in owners)
    found = ((p.trial.trial_id, holding(holds, p, roots[owners[p.trial.trial_id][0]])) for p in mine)
    return {trial_id: hold for trial_id, hold in found if hold is not None}


def without_dropped(folder: SweepFolder, trials: tuple[PlannedTrial, ...]) -> tuple[PlannedTrial, ...]:
    """The trials, in a launch that `quantsweep resume` types again without those that were dropped; else all of them."""
    if KEEP_DROPPED not in os.environ or not folder.plan.is_dir():
        return trials
    dropped = dropped_trials(held_trials(folder, {planned.trial.trial_id for planned in trials}))
    return tuple(planned for planned in trials if planned.trial.trial_id not in dropped)


def dropped_trials(held: Mapping[str, Hold]) -> set[str]:
    """Those of held trials that nobody wants any more (`quantsweep cancel --drop`)."""
    return {trial_id for trial_id, hold in held.items() if hold.by == "drop"}


def ending(folder: SweepFolder, asked: Mapping[str, Collection[str]], *, has_budget: bool) -> ExitStatus:
    """How a launch ended whose workers have all ended, told from the tables.  asked: trial id to task keys."""
    left = left_of(asked, records.read_done(folder.path))
    if not left:
        return ExitStatus.DONE
    held = held_trials(folder, left)
    not_run = left - held.keys()
    attempts = effective(folder.path, "trials", records.read_table(folder.path, "trials", TRIAL_COLUMNS))
    failed = {row["trial_id"] for row in attempts.to_pylist() if row["status"] == "failed"} & left
    return of_trials(failed=len(failed) or (0 if has_budget else len(not_run)), held=len(held), budget_spent=bool(not_run))
