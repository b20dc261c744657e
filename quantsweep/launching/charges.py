"""What jobs that have ended occupied, in GPU-seconds: Slurm's word for it, since a job may end before its worker writes one.

sacct knows the job                     what it says has elapsed
it has a worker's record                nothing here: the record says it (`quantsweep.launching.budget`)
it never had a node                     0
Slurm ended it at its time limit        that limit
nothing more is known                   the time since it was submitted, at most its time limit
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from pathlib import Path

from quantsweep import slurm
from quantsweep.launching.submissions import SubmittedArray
from quantsweep.launching.tasks import Observation, Task
from quantsweep.storage.files import filesystem_now
from quantsweep.storage.paths import SweepFolder


def charges(folder: SweepFolder, seen: Observation) -> dict[tuple[Path, int], dict[int, float]]:
    """(submission, array) → task → GPU-seconds, of tasks under a budget that have just ended; at most one sacct call."""
    by_path = {submission.path: submission for submission in seen.submissions}
    recorded = {heard.record.job for heard in seen.records}
    ended = [(task, by_path[task.submission], by_path[task.submission].arrays[task.array]) for task in seen.ended]
    charged = [one for one in ended if one[2].gpus and one[2].gpu_seconds]
    if not charged:
        return {}
    now = filesystem_now(folder.plan)
    accounts = _accounts((array for _, _, array in charged), min(submission.declared for _, submission, _ in charged))
    found: dict[tuple[Path, int], dict[int, float]] = {}
    for task, submission, array in charged:
        seconds = _elapsed(task, array, accounts, recorded, now - submission.declared)
        found.setdefault((submission.path, task.array), {})[task.index] = seconds * array.gpus
    return found


def _accounts(arrays: Iterable[SubmittedArray], since: float) -> dict[tuple[int, int | None], slurm.AccountedTask]:
    numbers = {array.array_job_id for array in arrays if array.array_job_id is not None}
    try:
        return slurm.accounting(numbers, datetime.fromtimestamp(since).astimezone()) or {}
    except slurm.SlurmUnavailable:
        return {}  # the database is away: the submission's own times have to do


def _elapsed(
    task: Task,
    array: SubmittedArray,
    accounts: dict[tuple[int, int | None], slurm.AccountedTask],
    recorded: Collection[str | None],
    age: float,
) -> float:
    assert array.array_job_id is not None
    limit = array.resources.minutes * 60.0
    account = accounts.get((array.array_job_id, task.index))
    if account is not None and (account.state.is_finished or account.elapsed_seconds):  # the accounts lag behind the queue
        return float(account.elapsed_seconds)
    if task.job_id in recorded or (not task.node and task.ended != slurm.State.UNKNOWN.word):
        return 0.0
    return limit if task.ended == slurm.State.TIMEOUT.word else min(max(age, 0.0), limit)
