"""Whether a worker's work is still wanted of it: looked at before each trial and between two tasks.

    plan/                         a newer plan gave the trial to a shard of its own; a fence (`quantsweep rerun`) names it
    holds/                        a hold names it
    workers/<worker>.closed       somebody took this worker for gone and wrote its last word

A worker may have been frozen for days in the middle of anything, and wake up when its trials are done, mended and run again.
What it is at then is in rows that stand behind newer ones (`quantsweep.tables.order`); what comes after it leaves alone.

Three listings, of names alone: no table is read, and a plan or a fence once, when its name is new.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from quantsweep.errors import ResultsError
from quantsweep.failures.causes import is_disk_full
from quantsweep.failures.holds import Hold, hold_files, holding, read_holds
from quantsweep.planning.plan_files import PlanHeader, plan_owners, plan_sequence
from quantsweep.storage.files import filesystem_now
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import closing_word
from quantsweep.tables.forgetting import Fence, Forgotten, read_fence
from quantsweep.trial.specs import PlannedTrial

T = TypeVar("T")
LOOK_SHARE = 0.01
"""Looking takes at most this share of a worker's time: where listing is slow and trials are quick, not every trial is looked up."""


class Wanted:
    """What a worker knows of the sweep around it, as of the last look."""

    def __init__(self, folder: SweepFolder, header: PlanHeader, worker: str) -> None:
        self._folder, self._header, self._worker = folder, header, worker
        self._owners: dict[str, frozenset[str]] = {}
        self._fences: dict[str, Fence] = {}
        self._hold_files: frozenset[tuple[str, int, int]] = frozenset()
        self._holds: list[Hold] = []
        self._next = 0.0
        self.closed: str | None = None
        """The word that somebody else wrote for this worker; None while nobody did."""

    def look(self) -> None:
        """Look, unless the last look was a moment ago (LOOK_SHARE).

        Where the file system fails for a moment, what was seen last holds until the next look; OSError: the disk is full.
        """
        began = time.monotonic()
        if began < self._next:
            return
        try:
            self._see()
        except OSError as error:
            if is_disk_full(error):
                raise
        ended = time.monotonic()
        self._next = ended + (ended - began) / LOOK_SHARE

    def _see(self) -> None:
        for room in (self._folder.plan, self._folder.holds, self._folder.workers):
            filesystem_now(room)  # what other hosts have put there is seen now
        names = [path.name for path in self._folder.plan.iterdir()]
        newer = {name for name in names if name.startswith("plan-") and plan_sequence(name) > self._header.sequence}
        self._owners = _known(self._owners, newer, self._folder.plan, plan_owners)
        self._fences = _known(self._fences, {name for name in names if name.startswith("fence-")}, self._folder.plan, read_fence)
        files = hold_files(self._folder)  # before they are read: one that comes in between is seen next time
        if files != self._hold_files:
            self._hold_files, self._holds = files, read_holds(self._folder)
        self.closed = closing_word(self._folder, self._worker)

    def superseded(self, planned: PlannedTrial) -> str | None:
        """Why a trial is somebody else's by now, in words; None if it is still this worker's."""
        owner = next((name for name, trials in self._owners.items() if planned.trial.trial_id in trials), None)
        if owner is not None:
            return f"plan {plan_sequence(owner)} has it, which is newer"
        if not self.still_asked(planned).tasks:
            return "it was forgotten since (quantsweep rerun); the launch command runs it again"
        return None

    def still_asked(self, planned: PlannedTrial) -> PlannedTrial:
        """The trial with those tasks only that were not forgotten since it was asked for."""
        return Forgotten(self._fences.values()).still_asked(planned, self._header.launched)

    def is_held(self, planned: PlannedTrial) -> bool:
        """True if a hold is in force for the trial."""
        return holding(self._holds, planned, self._header.root) is not None


def _known(known: Mapping[str, T], names: Iterable[str], room: Path, read: Callable[[Path], T]) -> dict[str, T]:
    """Name → what its file says, read where the name is new; a plan that was taken back (Slurm refused it) is left out."""
    found: dict[str, T] = {}
    for name in names:
        try:
            found[name] = known[name] if name in known else read(room / name)
        except ResultsError:
            if (room / name).exists():
                raise
    return found
