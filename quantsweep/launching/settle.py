"""Writing down what became of tasks that have ended, and of the trials that were lost with them.

    task ended, its worker's record has not       → the trial at hand gets its row in `trials`: failed, with Slurm's cause
    task ended, no worker came to a trial          → each unfinished trial of its shards does, unless somebody cancelled the job
    receipt lost, job found in the queue           → the receipt is written now
    receipt lost, job not found                    → the array is abandoned; its shards wait again
    all arrays of a submission over                → closed, never asked about again

Everything here may be interrupted and done again: rows carry an id that is derived from the worker and
the trial, so the same loss counts once.  Only the holder of the launch lock settles: anybody else
might have looked between an intent and its receipt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantsweep import slurm
from quantsweep.errors import LockedError
from quantsweep.failures import classes
from quantsweep.launching.charges import charges
from quantsweep.launching.submissions import Submission, read_submissions
from quantsweep.launching.tasks import Observation, Task, observe
from quantsweep.planning.plan import remaining_tasks
from quantsweep.planning.plan_files import plan_files, read_numbered_trials
from quantsweep.running.attempts import completed_rows, lost_row
from quantsweep.storage.lock import check_not_lost, launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import ENDED_BY_SLURM, ENDED_WITH_ERROR, Heard, WorkerRecord, close_record
from quantsweep.tables import records
from quantsweep.trial.specs import PlannedTrial, content_hash

LOCK_SECONDS = 10.0
"""How long a command waits for a launch that is at work."""

BLAMELESS = frozenset({"CANCELLED"})
"""Ends that say nothing of a trial: somebody wanted the job gone."""
NOT_BY_ITSELF = frozenset({"CANCELLED", "DISK_FULL"})
"""Ends after which nothing is submitted again until somebody types the launch command."""
DISK_FULL = "DISK_FULL"
OUTPUT_TAIL = 2_000


def settle(folder: SweepFolder, *, assume_dead: bool = False) -> Observation:
    """Look, write down what has ended, and return what was seen, as it is written now (its in_flight is what may still run)."""
    seen = observe(folder, assume_dead=assume_dead)
    check_not_lost(folder.plan / "launch.lock")
    slurm.cancel([task.job_id for task in seen.ended if task.to_cancel])
    _settle_tasks(folder, seen)
    _settle_local(folder, seen.records)
    seen = _with_own_words(seen)
    flying = {task.submission for task in seen.in_flight}
    ended, spent = _words(seen), charges(folder, seen)
    check_not_lost(folder.plan / "launch.lock")
    written = (one if one.closed else _close(one, ended, spent, is_flying=one.path in flying) for one in seen.submissions)
    return replace(seen, submissions=tuple(written))


def cancel_tasks(folder: SweepFolder, tasks: Sequence[Task], *, purpose: str, others: Iterable[str] = ()) -> None:
    """Take tasks out of Slurm's queue, and write that down; `others`: ids of further jobs.  Raises SlurmError."""
    slurm.cancel([*(task.job_id for task in tasks), *others])
    if tasks:
        # Whoever holds the lock for long (wait=true) writes it down with its own next look.
        with contextlib.suppress(LockedError), launch_lock(folder.plan / "launch.lock", purpose=purpose, wait_seconds=LOCK_SECONDS):
            _write_cancelled(folder, tasks)


def _write_cancelled(folder: SweepFolder, tasks: Iterable[Task]) -> None:
    """Tasks that were cancelled while they were pending never ran: written down at once, before Slurm may forget them."""
    words: dict[tuple[Path, int], dict[int, str]] = {}
    for task in tasks:
        if task.state is slurm.State.PENDING:
            words.setdefault((task.submission, task.array), {})[task.index] = slurm.State.CANCELLED.word
    check_not_lost(folder.plan / "launch.lock")
    for submission in read_submissions(folder):
        arrays = tuple(
            replace(array, ended={**words.get((submission.path, number), {}), **array.ended})
            for number, array in enumerate(submission.arrays)
        )
        if arrays != submission.arrays:
            replace(submission, arrays=arrays).save()


def slurm_log(folder: SweepFolder, job_name: str, job_id: str) -> Path:
    """Where a task's own output goes (submitit's naming)."""
    return folder.logs / "slurm" / job_name / f"{job_id}_0_log.out"


def job_logs(folder: SweepFolder, job_id: str) -> list[Path]:
    """The output of a task whose array's name is not known."""
    return sorted((folder.logs / "slurm").glob(f"*/{job_id}_0_log.out"))


def _close(
    submission: Submission,
    ended: Mapping[tuple[Path, int], dict[int, str]],
    spent: Mapping[tuple[Path, int], dict[int, float]],
    *,
    is_flying: bool,
) -> Submission:
    arrays = tuple(
        replace(array, abandoned=True)
        if array.array_job_id is None
        else replace(
            array,
            ended={**array.ended, **ended.get((submission.path, number), {})},
            spent={**array.spent, **spent.get((submission.path, number), {})},
        )
        for number, array in enumerate(submission.arrays)
    )
    return replace(submission, arrays=arrays, closed=not is_flying and all(array.is_over for array in arrays)).save()


def _with_own_words(seen: Observation) -> Observation:
    """The same with the worker's own word for the end of a task where it says more than Slurm's."""
    full = {heard.record.job for heard in seen.records if heard.record.ended == DISK_FULL}
    tasks = (replace(task, ended=DISK_FULL) if task.ended is not None and task.job_id in full else task for task in seen.tasks)
    return replace(seen, tasks=tuple(tasks))


def _words(seen: Observation) -> dict[tuple[Path, int], dict[int, str]]:
    """(submission, array) → task → the word to write down."""
    words: dict[tuple[Path, int], dict[int, str]] = {}
    for task in seen.ended:
        words.setdefault((task.submission, task.array), {})[task.index] = task.ended or ""
    return words


# --- lost trials ------------------------------------------------------------------------------------------------------------


def _settle_tasks(folder: SweepFolder, seen: Observation) -> None:
    by_job: dict[str, list[WorkerRecord]] = {}
    for heard in seen.records:
        if heard.record.job is not None:
            by_job.setdefault(heard.record.job, []).append(heard.record)
    rows: list[dict[str, Any]] = []
    over: dict[str, str] = {}
    unfinished = _Unfinished(folder, seen.ended)
    names = {(s.path, n): array.job_name for s in seen.submissions for n, array in enumerate(s.arrays)}
    for task in seen.ended:
        own = by_job.get(task.job_id, [])
        if task.ended not in NOT_BY_ITSELF and _came_to_nothing(own):
            rows += _not_started(folder, unfinished, task, own, names[task.submission, task.array])
        for record in own:
            if record.ended in (None, ENDED_BY_SLURM):
                rows += _lost(folder, unfinished, record, task.ended or "UNKNOWN")
                over[record.worker] = f"lost: {task.ended}"
    check_not_lost(folder.plan / "launch.lock")
    _write_new(folder, rows)
    for worker, word in over.items():
        close_record(folder, worker, word)


def _write_new(folder: SweepFolder, rows: list[dict[str, Any]]) -> None:
    """Write the rows of attempts that have none: neither their worker's own, nor that of a settling that was interrupted."""
    names = ("trial_id", "log", "log_start")
    known = records.read_table(folder.path, "trials", ["attempt", *names]).to_pylist() if rows else []
    attempts = {row["attempt"] for row in known}
    places = {tuple(row[name] for name in names) for row in known if row["log"]}
    new = [row for row in rows if row["attempt"] not in attempts and tuple(row[name] for name in names) not in places]
    records.write_rows(folder, "trials", new, f"settled-{content_hash([row['attempt'] for row in new])}")


def _settle_local(folder: SweepFolder, heard: Iterable[Heard]) -> None:
    """Workers of this machine that were killed: nobody's fault, the trial at hand simply runs again."""
    lost = [one.record for one in heard if one.record.job is None and one.record.ended is None and not one.is_alive]
    _write_new(folder, [row for record in lost for row in completed_rows(folder, record)])
    for record in lost:
        close_record(folder, record.worker, "lost")


def _lost(folder: SweepFolder, unfinished: _Unfinished, record: WorkerRecord, state: str) -> list[dict[str, Any]]:
    """The row of the trial that a worker was at when it was lost; none if it was between trials, or the loss was wanted."""
    if record.trial_id is None or record.shard_id is None:
        return []
    planned = next((planned for planned in unfinished.of(record.plan, record.shard_id) if planned.trial.trial_id == record.trial_id), None)
    if planned is None:
        return completed_rows(folder, record)
    if state in BLAMELESS:
        return []
    failure = classes.of_lost_job(state, planned.trial.label)
    return [lost_row(folder, record, planned, failure)]


def _came_to_nothing(own: Sequence[WorkerRecord]) -> bool:
    """True if no worker of a job had begun a trial when Slurm ended it, or all ended with an error of their own."""
    return all(record.shard_id is None and record.ended in (None, ENDED_BY_SLURM) for record in own) or all(
        str(record.ended).startswith(ENDED_WITH_ERROR) for record in own
    )


def _not_started(
    folder: SweepFolder, unfinished: _Unfinished, task: Task, own: Sequence[WorkerRecord], job_name: str
) -> list[dict[str, Any]]:
    """The rows of every trial that a job was to run and did not."""
    log = slurm_log(folder, job_name, task.job_id)
    text = log.read_text(errors="replace")[-OUTPUT_TAIL:] if log.is_file() else ""
    failure = classes.not_started(task.ended or "", text, next((record.ended for record in own if record.ended), None))
    rows = []
    for shard_id in task.shard_ids:
        record = WorkerRecord(worker=task.job_id, host=task.node, pid=0, plan=task.plan, node=task.node, job=task.job_id, shard_id=shard_id)
        left = (planned for planned in unfinished.of(task.plan, shard_id) if not unfinished.has_failed(task.plan, planned))
        rows += [lost_row(folder, record, planned, failure) for planned in left]
    return rows


class _Unfinished:
    """What is left of the shards of some tasks; each table is read once, and not before somebody asks."""

    def __init__(self, folder: SweepFolder, tasks: Iterable[Task]) -> None:
        self._folder = folder
        self._shards: dict[str, set[int]] = {}
        for task in tasks:
            self._shards.setdefault(task.plan, set()).update(task.shard_ids)

    def of(self, plan: str, shard_id: int) -> list[PlannedTrial]:
        """Trials of one shard with the tasks that have no row."""
        return self._left.get((plan, shard_id), [])

    def has_failed(self, plan: str, planned: PlannedTrial) -> bool:
        """True if a job of this plan has written why the trial failed: its record may be lost, and its rows say more."""
        return (plan, planned.trial.trial_id) in self._failed

    @cached_property
    def _failed(self) -> set[tuple[str, str]]:
        rows = records.read_table(self._folder.path, "trials", ["plan", "trial_id", "status"]).to_pylist()
        return {(row["plan"], row["trial_id"]) for row in rows if row["status"] == "failed"}

    @cached_property
    def _left(self) -> dict[tuple[str, int], list[PlannedTrial]]:
        done = records.read_done(self._folder.path)
        left: dict[tuple[str, int], list[PlannedTrial]] = {}
        for path in plan_files(self._folder.plan):
            for shard_id, planned in read_numbered_trials(path, self._shards.get(path.name, ())):
                rest = remaining_tasks(planned, done)
                if rest.tasks:
                    left.setdefault((path.name, shard_id), []).append(rest)
        return left
