"""What was handed to Slurm: an intent before, a receipt after, one small JSON file a submission.

    plan/submission-<time>-<id>.json    {"plan": …, "arrays": [{"job_name", "shard_ids", "array_job_id"}, …]}

The file is written before the first sbatch (no array has a number yet) and again after each.  A job's
name is unique, so an array whose receipt was lost in a crash is still found in the queue.  What is in
flight is what Slurm says of these names; if Slurm does not answer, nothing is concluded.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quantsweep import slurm
from quantsweep.errors import ResultsError, SlurmError
from quantsweep.files import write_text
from quantsweep.paths import SweepFolder
from quantsweep.plan import shard_trials


@dataclass(frozen=True, kw_only=True)
class SubmittedArray:
    """One Slurm array: task i runs shard_ids[i].  array_job_id is None until sbatch has answered."""

    job_name: str
    shard_ids: tuple[int, ...]
    array_job_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """All arrays of one launch."""

    path: Path
    plan: str
    user: str
    arrays: tuple[SubmittedArray, ...]
    closed: bool = False

    def save(self) -> None:
        """Make the file durable."""
        content = {"plan": self.plan, "user": self.user, "closed": self.closed, "arrays": [asdict(array) for array in self.arrays]}
        write_text(self.path, json.dumps(content))

    def with_array(self, index: int, array: SubmittedArray) -> Submission:
        """The same submission with one array replaced, saved."""
        arrays = (*self.arrays[:index], array, *self.arrays[index + 1 :])
        changed = replace(self, arrays=arrays)
        changed.save()
        return changed


@dataclass(frozen=True, kw_only=True)
class FlyingTask:
    """One array task that Slurm still has, and the shard it runs."""

    job_id: str
    submission: Path
    plan: str
    shard_id: int
    state: slurm.State


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def new_submission(folder: SweepFolder, plan: Path, arrays: Iterable[tuple[int, ...]]) -> Submission:
    """Declare what will be submitted; durable when it returns."""
    identifier = secrets.token_hex(4)
    path = folder.plan / f"submission-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{identifier}.json"
    named = tuple(SubmittedArray(job_name=f"qs-{folder.name}-{identifier}-{n}", shard_ids=ids) for n, ids in enumerate(arrays))
    submission = Submission(path=path, plan=plan.name, user=_user(), arrays=named)
    submission.save()
    return submission


def read_submissions(folder: SweepFolder) -> list[Submission]:
    """All submissions of a sweep, oldest first."""
    return [_read(path) for path in sorted(folder.plan.glob("submission-*.json"))]


def _read(path: Path) -> Submission:
    try:
        content = json.loads(path.read_text())
        arrays = tuple(SubmittedArray(**{**a, "shard_ids": tuple(a["shard_ids"])}) for a in content["arrays"])
        return Submission(path=path, plan=content["plan"], user=content["user"], arrays=arrays, closed=content["closed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"submission {path} cannot be read ({error}): what is in the queue is therefore unknown. "
            "Look with squeue, then move the file away"
        ) from error


def flying_tasks(folder: SweepFolder) -> list[FlyingTask]:
    """Array tasks of this sweep that are queued or running: at most one call to Slurm, none if nothing was submitted.

    Raises SlurmError for a live submission of another user, whose jobs this user's squeue does not show.
    """
    open_ones = [submission for submission in read_submissions(folder) if not submission.closed]
    if not open_ones:
        return []
    strangers = {submission.user for submission in open_ones} - {_user()}
    if strangers:
        who = ", ".join(sorted(strangers))
        raise SlurmError(
            f"sweep {folder.name} has jobs submitted by {who}: whether they still run cannot be seen by {_user()}. "
            "Ask them for the state, or use a results_dir of your own"
        )
    names = [array.job_name for submission in open_ones for array in submission.arrays]
    queued = slurm.queue(names)
    return [task for submission in open_ones for task in _tasks_of(submission, queued)]


def close_finished(folder: SweepFolder, flying: Iterable[FlyingTask]) -> None:
    """Note which submissions have ended, so that they are not asked about again.

    Only the holder of the launch lock calls this: anybody else might have asked Slurm before the
    receipt was written, and would wipe it out.
    """
    live = {task.submission for task in flying}
    for submission in read_submissions(folder):
        if not submission.closed and submission.path not in live:
            replace(submission, closed=True).save()


def _tasks_of(submission: Submission, queued: Iterable[slurm.QueuedTask]) -> Iterable[FlyingTask]:
    arrays = {array.job_name: array for array in submission.arrays}
    for task in queued:
        array = arrays.get(task.name)
        if array is None or task.state.is_finished:
            continue
        # A task without an index is an array of one, as sbatch makes it of a single job.
        index = task.array_task_id or 0
        yield FlyingTask(
            job_id=task.job_id, submission=submission.path, plan=submission.plan, shard_id=array.shard_ids[index], state=task.state
        )


def in_flight_trials(folder: SweepFolder, flying: Iterable[FlyingTask]) -> frozenset[str]:
    """Trial ids that some queued or running task has in its shard."""
    by_plan: dict[str, set[int]] = {}
    for task in flying:
        by_plan.setdefault(task.plan, set()).add(task.shard_id)
    return frozenset().union(*(shard_trials(folder.plan / plan, ids) for plan, ids in by_plan.items()))
