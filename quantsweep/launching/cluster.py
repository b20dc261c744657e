"""Shards on Slurm, through submitit: one array a resource class, split where the cluster says so, then detached.

Limits are read, not guessed: an array holds at most MaxArraySize tasks, and no more tasks are
submitted than the tightest MaxSubmitJobs leaves room for; what does not fit follows with the next
launch, and the user is told.  submitit writes one pickle a task into the sweep's own folder, which
`SweepFolder.check` has found closed to others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from quantsweep import slurm
from quantsweep.errors import SlurmError
from quantsweep.launching.submissions import Submission, new_submission
from quantsweep.paths import SweepFolder, product_root
from quantsweep.plan import shard_resources
from quantsweep.specs import ClusterSpec, Resources
from quantsweep.worker import run_shard

HEADROOM = 0.9
"""Share of a submit limit that one sweep uses; the rest is for the user's other work."""
JOB_COUNT_SHARE = 0.5
"""Share of the cluster-wide MaxJobCount that one sweep fills at most: it belongs to everybody."""


class RefusedError(SlurmError):
    """Slurm said no, for a reason that is understood: nothing was accepted."""


@dataclass(frozen=True, kw_only=True)
class SubmitSummary:
    """What was submitted, and what has to wait for room."""

    shards: int
    array_job_ids: tuple[int, ...]
    waiting: int
    limits: slurm.Limits
    refusal: str | None = None


def group_shards(shards: Iterable[tuple[int, Resources]], array_size: int) -> list[tuple[Resources, tuple[int, ...]]]:
    """Shards of one resource class together, in arrays of at most `array_size` tasks.

    >>> one = Resources()
    >>> [ids for _, ids in group_shards([(0, one), (1, one), (2, one)], 2)]
    [(0, 1), (2,)]
    """
    classes: dict[Resources, list[int]] = {}
    for shard_id, resources in shards:
        classes.setdefault(resources, []).append(shard_id)
    return [(resources, tuple(ids[i : i + array_size])) for resources, ids in classes.items() for i in range(0, len(ids), array_size)]


def room(limits: slurm.Limits, queued: int) -> int:
    """How many more tasks may be submitted now, with head-room left."""
    bounds = [int(limits.max_job_count * JOB_COUNT_SHARE)]
    if limits.max_submit_jobs is not None:
        bounds.append(max(1, int(limits.max_submit_jobs * HEADROOM)))
    return max(0, min(bounds) - queued)


def array_size(cluster: ClusterSpec, limits: slurm.Limits) -> int:
    """Tasks that one array may have: the largest index stays below MaxArraySize."""
    return max(1, min(cluster.max_array_size or limits.max_array_size, limits.max_array_size))


def submit(plan_path: Path, shard_ids: Sequence[int], cluster: ClusterSpec) -> SubmitSummary:
    """Submit shards and return; raises SlurmError if not even the first array was accepted."""
    folder = SweepFolder(plan_path.resolve().parent.parent)
    folder.check()
    limits = slurm.read_limits(cluster.account, cluster.qos, cluster.partition)
    fits = list(shard_ids)[: room(limits, sum(task.state.is_active for task in slurm.queue()))]
    if not fits:
        why = ", ".join(limits.notes) or "MaxJobCount"
        raise SlurmError(f"no room in the queue now ({why}): nothing was submitted. The same command submits later")
    needs_of = shard_resources(plan_path)
    groups = group_shards([(shard_id, cluster.resources(needs_of[shard_id])) for shard_id in fits], array_size(cluster, limits))
    submission = new_submission(folder, plan_path, (ids for _, ids in groups))
    refusal: str | None = None
    for index, (needs, _) in enumerate(groups):
        try:
            submission = _submit_array(plan_path, folder, submission, index, needs, cluster)
        except SlurmError as error:
            if index == 0:
                if isinstance(error, RefusedError):  # anything else may have been accepted all the same: the intent stays open
                    replace(submission, closed=True).save()
                raise
            refusal = str(error)
            break
    submitted = [array for array in submission.arrays if array.array_job_id is not None]
    count = sum(len(array.shard_ids) for array in submitted)
    return SubmitSummary(
        shards=count,
        array_job_ids=tuple(array.array_job_id for array in submitted if array.array_job_id is not None),
        waiting=len(shard_ids) - count,
        limits=limits,
        refusal=refusal,
    )


def _submit_array(
    plan: Path, folder: SweepFolder, submission: Submission, index: int, needs: Resources, cluster: ClusterSpec
) -> Submission:
    array = submission.arrays[index]
    executor = submitit.SlurmExecutor(folder=folder.logs / "slurm" / array.job_name, **_interpreter(cluster))
    executor.update_parameters(**sbatch_parameters(cluster, needs, array.job_name, num_tasks=len(array.shard_ids)))
    try:
        jobs = executor.map_array(run_shard, [str(plan)] * len(array.shard_ids), list(array.shard_ids))
    except FailedJobError as error:
        raise _explained(error, f"array {array.job_name} of {len(array.shard_ids)} tasks") from error
    return submission.with_array(index, replace(array, array_job_id=int(jobs[0].job_id.split("_")[0])))


def _interpreter(cluster: ClusterSpec) -> dict[str, Any]:
    return {} if cluster.python is None else {"python": cluster.python}


def sbatch_parameters(cluster: ClusterSpec, needs: Resources, job_name: str, *, num_tasks: int) -> dict[str, Any]:
    """The options of one array, as submitit's SlurmExecutor names them."""
    parameters: dict[str, Any] = {
        "job_name": job_name,
        "time": needs.minutes,
        "mem": f"{needs.memory_gb}GB",
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": needs.cpus,
        "array_parallelism": cluster.max_parallel or num_tasks,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": [*cluster.setup, *_python_path(), f"export OMP_NUM_THREADS={needs.cpus} TOKENIZERS_PARALLELISM=false"],
        "additional_parameters": dict(cluster.additional_parameters),
    }
    optional = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
    if needs.gpus:
        key = "gres" if cluster.gpu_option == "gres" else "gpus_per_node"
        optional[key] = f"gpu:{needs.gpus}" if key == "gres" else needs.gpus
    return parameters | {key: value for key, value in optional.items() if value is not None}


def _python_path() -> list[str]:
    """Nodes import the checkout that launched, whether or not it is installed there."""
    return [f"export PYTHONPATH='{product_root()}'\"${{PYTHONPATH:+:$PYTHONPATH}}\""] if (product_root() / "launch.py").is_file() else []


def _explained(error: FailedJobError, what: str) -> SlurmError:
    text = " ".join(str(error).split())
    known = {
        "QOSMaxSubmitJobPerUserLimit": "you have as many jobs in the queue as your QOS allows; wait for some to end and launch again",
        "AssocMaxSubmitJobLimit": "your account has as many jobs in the queue as it may; wait for some to end and launch again",
        "Invalid job array specification": "the array is larger than MaxArraySize; set cluster.max_array_size",
        "Invalid account": "give cluster.account=… (see: sacctmgr show assoc user=$USER)",
        "invalid partition": "give cluster.partition=… (see: sinfo)",
        "Invalid qos": "give cluster.qos=… (see: sacctmgr show qos)",
    }
    for word, meaning in known.items():
        if word.lower() in text.lower():
            return RefusedError(f"Slurm refused {what}: {meaning} [{word}]")
    return SlurmError(f"submitting {what} failed, and it may have been accepted all the same: {text}")
