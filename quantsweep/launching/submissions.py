"""What was handed to Slurm: an intent before, a receipt after, one small JSON file a submission.

    plan/submission-<time>-<id>.json   {"user", "cluster", "arrays": [{"job_name", "plan", "tasks", "array_job_id", …}, …], "collector": …}

The life of an array, each step durable before the next is taken:

    intended     array_job_id is None      written before sbatch is called
    submitted    array_job_id is a number  sbatch's receipt
    abandoned    true                      sbatch refused, or nothing came of the call; its shards wait again
    ended        {task: state}             how each task ended, once that is known
    spent        {task: GPU-seconds}       what it occupied, its setup lines too, where it asked for GPUs
    closed       (the submission)          every array has ended or is abandoned

A launcher that dies between intent and receipt leaves the question whether sbatch was heard.  The
array's name is unique, so Slurm is asked for it: if it is there, the receipt is written late; if not,
the array is abandoned, and *only then* its shards wait again.  Should the job turn up all the same (an
sbatch that outlived its launcher), it reads that it is abandoned and ends without touching a trial.
So neither crash nor delay leads to lost or to double submission.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from quantsweep import slurm
from quantsweep.errors import ResultsError
from quantsweep.storage.files import checked_file, filesystem_now, write_text
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import Resources


@dataclass(frozen=True, kw_only=True)
class SubmittedArray:
    """One Slurm array: task i runs the shards tasks[i] of `plan` (several where a job has several workers).

    gpu_seconds: how much of the budget each task may use (empty: no budget).  See the module for the rest.
    """

    job_name: str
    plan: str
    tasks: tuple[tuple[int, ...], ...]
    resources: Resources
    workers: int = 1
    gpu_seconds: tuple[float, ...] = ()
    array_job_id: int | None = None
    abandoned: bool = False
    ended: Mapping[int, str] = field(default_factory=dict)
    spent: Mapping[int, float] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """GPUs of one task."""
        return self.resources.gpus * self.workers

    @property
    def is_over(self) -> bool:
        """True if nothing of it can run any more."""
        return self.abandoned or len(self.ended) == len(self.tasks)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """All arrays of one round of submitting, and the collector that comes after them.

    declared: when the intent was written, by the file system's clock (the file itself is replaced again and again).
    known_broken: nodes that were known to be broken: what waits is kept off them since, where any other is left.
    cluster: whose Slurm was asked ("" where it has no name): another one knows nothing of these jobs.
    """

    path: Path
    user: str
    cluster: str
    declared: float
    arrays: tuple[SubmittedArray, ...]
    known_broken: tuple[str, ...] = ()
    collector: int | None = None
    closed: bool = False

    def save(self) -> Submission:
        """Make the file durable; returns itself."""
        arrays = [asdict(array) for array in self.arrays]
        about = {"user": self.user, "cluster": self.cluster, "declared": self.declared, "closed": self.closed, "collector": self.collector}
        write_text(self.path, json.dumps({**about, "known_broken": self.known_broken, "arrays": arrays}))
        return self

    def with_array(self, index: int, array: SubmittedArray) -> Submission:
        """The same submission with one array replaced, saved."""
        return replace(self, arrays=(*self.arrays[:index], array, *self.arrays[index + 1 :])).save()

    def halved(self, index: int) -> Submission:
        """The same submission with one array's second half as an array of its own, saved."""
        array = self.arrays[index]
        middle = (len(array.tasks) + 1) // 2
        first = replace(array, tasks=array.tasks[:middle], gpu_seconds=array.gpu_seconds[:middle])
        stem = array.job_name.rpartition("-")[0]
        second = replace(array, job_name=f"{stem}-{len(self.arrays)}", tasks=array.tasks[middle:], gpu_seconds=array.gpu_seconds[middle:])
        return replace(self, arrays=(*self.arrays[:index], first, second, *self.arrays[index + 1 :])).save()

    def abandon(self) -> Submission:
        """Give up every array that has no receipt, saved."""
        return replace(self, arrays=tuple(a if a.array_job_id is not None else replace(a, abandoned=True) for a in self.arrays)).save()


def job_prefix(folder: SweepFolder) -> str:
    """How the names of all jobs of this sweep folder begin; no other folder's do."""
    place = hashlib.sha256(str(folder.path).encode()).hexdigest()[:6]
    return f"qs-{folder.name}-{place}-"


def new_submission(folder: SweepFolder, arrays: Iterable[SubmittedArray], known_broken: Iterable[str] = ()) -> Submission:
    """Declare what will be submitted (job names are filled in); durable when it returns."""
    identifier = secrets.token_hex(4)
    path = folder.plan / f"submission-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{identifier}.json"
    named = tuple(replace(array, job_name=f"{job_prefix(folder)}{identifier}-{n}") for n, array in enumerate(arrays))
    declared = filesystem_now(folder.plan)
    return Submission(
        path=path, user=slurm.user_name(), cluster=slurm.cluster_name(), declared=declared, arrays=named, known_broken=tuple(known_broken)
    ).save()


def read_submissions(folder: SweepFolder) -> list[Submission]:
    """All submissions of a sweep, oldest first."""
    found = [read_submission(path) for path in folder.plan.glob("submission-*.json")]
    return sorted(found, key=lambda submission: (submission.declared, submission.path.name))  # names count whole seconds


def read_submission(path: Path) -> Submission:
    """One submission; raises ResultsError for a file that is damaged."""
    try:
        content = json.loads(checked_file(path).read_text())
        return Submission(
            path=path,
            user=content["user"],
            cluster=content.get("cluster", ""),  # not there before clusters were told apart
            declared=float(content["declared"]),
            arrays=tuple(_array(data) for data in content["arrays"]),
            known_broken=tuple(content.get("known_broken", ())),
            collector=content["collector"],
            closed=content["closed"],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"submission {path} cannot be read ({error}): what is in the queue is therefore unknown. "
            "Look with squeue, then move the file away"
        ) from error


def spent_by_job(submissions: Iterable[Submission]) -> dict[str, float]:
    """Job → GPU-seconds that Slurm had it running, of those that have ended (`quantsweep.launching.budget`)."""
    return {
        f"{array.array_job_id}_{index}": seconds
        for submission in submissions
        for array in submission.arrays
        for index, seconds in array.spent.items()
    }


def _array(data: Mapping[str, object]) -> SubmittedArray:
    content = dict(data)
    content["tasks"] = tuple(tuple(ids) for ids in content["tasks"])  # type: ignore[attr-defined]
    content["resources"] = Resources(**content["resources"])  # type: ignore[arg-type]
    content["gpu_seconds"] = tuple(content["gpu_seconds"])  # type: ignore[arg-type]
    content["ended"] = {int(key): word for key, word in content["ended"].items()}  # type: ignore[attr-defined]
    content["spent"] = {int(key): float(seconds) for key, seconds in content.get("spent", {}).items()}  # type: ignore[attr-defined]
    return SubmittedArray(**content)  # type: ignore[arg-type]
