"""One array of shards to sbatch, through submitit: its options, its script, and what a refusal means.

submitit knows how sbatch is told things; its pickles are left out, since a plan and a submission are files
already: each task runs `python -m quantsweep.crew.slurm_job`, reads which shards are its own, and nothing that
others could have written is ever unpickled.  The interpreter replaces the batch script (`exec`), so
that the warning before the time limit (`--signal=B:USR2@…`) reaches it.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import CommandFunction, FailedJobError

from quantsweep import slurm
from quantsweep.checkpoints.pins import OFFLINE
from quantsweep.errors import SlurmError
from quantsweep.launching.submissions import SubmittedArray
from quantsweep.storage.paths import SweepFolder, product_root
from quantsweep.trial.specs import MEMORY, ClusterSpec, LaunchSettings, Resources
from quantsweep.words import count

VISIBLE_SECONDS = 90
"""For so long another host's new file may stay unseen on a network file system."""
COLLECTOR_MINUTES = 30
"""Time limit of a collector: it reads tables and submits, a minute or so for a very large sweep."""


VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Which GPUs a process may see; Slurm sets them in each job that has some."""
OF_GPUS = frozenset({"gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket", "cpus_per_gpu", "mem_per_gpu", "gpu_bind", "gpu_freq"})
"""Options that Slurm refuses, or grants GPUs for, where a job needs none."""


class RefusedError(SlurmError):
    """Slurm said no, for a reason that is understood: nothing was accepted."""


class NoRoomError(RefusedError):
    """Slurm said no for now: a limit on submitted jobs is reached, or it is busy."""


class ShardExecutor(submitit.SlurmExecutor):
    """submitit's Slurm executor for a command that every task of an array runs."""

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        # sbatch hands its environment on to the job, and obeys SBATCH_…: what belongs to a job that submits, or would quietly
        # overrule the cluster's configuration, stays here.  So do the hub's switches: those of the plan stand in the script
        # (`LaunchSettings.variables`), and the job that submits may belong to another plan.
        # And which GPUs a job sees is Slurm's word: a job without any would see those of the job that submits it.
        ours = [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_")) and key != "SLURM_CONF"]
        return ["env", *(f"--unset={key}" for key in (*ours, *OFFLINE, *VISIBLE_GPUS)), "sbatch", str(submission_file_path)]

    @classmethod
    def affinity(cls) -> int:
        """Always here: submitit looks for srun, which no job of ours needs."""
        return 2

    def _submit_command(self, command: str) -> submitit.SlurmJob[Any]:
        # submitit's own reads %j and the like in the folder's name as patterns, and writes the script somewhere above it.
        self.folder.mkdir(parents=True, exist_ok=True)
        script = self.folder / f"submission-{secrets.token_hex(4)}.sh"
        script.write_text(self._make_submission_file_text(command, script.stem))
        answer = CommandFunction(self._make_submission_command(script), verbose=False)()
        return submitit.SlurmJob(folder=self.folder, job_id=self._get_job_id_from_submission_command(answer), tasks=[0])

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        place = str(self.folder).replace("%", "%%")  # Slurm reads %u, %j and the like as patterns too
        given = self.parameters.get("additional_parameters") or {}
        self.parameters["additional_parameters"] = {**given, "output": f"{place}/%A_%a_0_log.out"}
        return super()._make_submission_file_text(command, uid)

    def submit_tasks(self, command: str, num_tasks: int) -> int:
        """Submit `command` as an array of tasks 0 … num_tasks−1; returns the array's job id.

        Raises RefusedError or SlurmError (then it may have been accepted all the same).
        """
        self.parameters["map_count"] = num_tasks
        try:
            return int(self._submit_command(command).job_id)
        except FailedJobError as error:
            raise _explained(error, f"an array of {count(num_tasks, 'task')}") from error


def within_nodes(cluster: ClusterSpec) -> ClusterSpec:
    """The cluster with retries bounded by what its largest node has: more is refused for good."""
    memory_mb, gpus = slurm.largest_node(cluster.partition)
    return replace(
        cluster,
        max_memory_gb=min(cluster.max_memory_gb, memory_mb // 1024) if memory_mb >= 1024 else cluster.max_memory_gb,
        max_gpus=min(cluster.max_gpus, gpus) if gpus else cluster.max_gpus,
    )


def submit_array(
    folder: SweepFolder, submission: Path, index: int, array: SubmittedArray, launch: LaunchSettings, excluded: Sequence[str] = ()
) -> int:
    """sbatch one array of a submission; returns its job id."""
    cluster = launch.cluster
    executor = ShardExecutor(folder=folder.logs / "slurm" / array.job_name, **_interpreter(cluster))
    parameters = sbatch_parameters(cluster, array.resources, array.job_name, workers=array.workers, code=_code(folder, launch))
    parameters["setup"] += [f"export {key}={shlex.quote(value)}" for key, value in launch.variables]
    executor.update_parameters(**_excluding(parameters, excluded), array_parallelism=cluster.max_parallel or len(array.tasks))
    command = f"exec {executor.python} -u -m quantsweep.crew.slurm_job task {shlex.quote(str(submission))} {index}"
    return executor.submit_tasks(command, len(array.tasks))


def submit_collector(
    folder: SweepFolder, job_name: str, launch: LaunchSettings, after: Sequence[int] = (), *, begin_minutes: int | None = None
) -> int:
    """sbatch the job that looks after the sweep once the arrays `after` have ended, however they ended (or in some minutes)."""
    cluster = launch.cluster
    executor = ShardExecutor(folder=folder.logs / "slurm" / "collector", **_interpreter(cluster))
    needs = Resources(gpus=0, cpus=1, memory_gb=4, minutes=min(COLLECTOR_MINUTES, cluster.minutes or COLLECTOR_MINUTES))
    # It computes nothing, and somebody must write down that the others' setup lines fail.
    parameters = sbatch_parameters(cluster, needs, job_name, code=_code(folder, launch), needs_setup=False)
    if begin_minutes is not None:
        parameters["additional_parameters"] |= {"begin": f"now+{begin_minutes}minutes"}
    executor.update_parameters(**parameters, array_parallelism=1, dependency=afterany(after) if after else None)
    return executor.submit_tasks(f"exec {executor.python} -u -m quantsweep.crew.slurm_job collect {shlex.quote(str(folder.path))}", 1)


_QUOTE = "'\\''"
"""A single quote within single quotes of the shell."""


def afterany(jobs: Sequence[int]) -> str:
    """Slurm's words for: once all of these have ended (afterok would wait for ever once one failed)."""
    return "afterany:" + ":".join(str(job) for job in jobs)


def _code(folder: SweepFolder, launch: LaunchSettings) -> Path | None:
    if launch.code is not None:
        return folder.code / launch.code
    return product_root() if (product_root() / "launch.py").is_file() else None


def _interpreter(cluster: ClusterSpec) -> dict[str, Any]:
    return {"python": cluster.python or shlex.quote(sys.executable)}


def _excluding(parameters: dict[str, Any], nodes: Sequence[str]) -> dict[str, Any]:
    listed = [*filter(None, [parameters.get("exclude")]), *nodes]
    return parameters | ({"exclude": ",".join(listed)} if listed else {})


def sbatch_parameters(
    cluster: ClusterSpec, needs: Resources, job_name: str, *, workers: int = 1, code: Path | None = None, needs_setup: bool = True
) -> dict[str, Any]:
    """The options of one array, as submitit's SlurmExecutor names them; `needs` is what one worker needs.

    needs_setup: the first setup line that fails ends the job.
    """
    whole = cluster.allocation == "node" and needs.memory_gb
    additional = _without_gpus(dict(cluster.additional_parameters)) if not needs.gpus else dict(cluster.additional_parameters)
    own: dict[str, Any] = {"signal": f"B:USR2@{warning_seconds(cluster, needs)}", "requeue": True}
    memory: dict[str, Any] = {} if MEMORY & additional.keys() else {"mem": "0" if whole else f"{needs.memory_gb * workers}GB"}
    parameters: dict[str, Any] = {
        "job_name": job_name,
        "time": needs.minutes,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": needs.cpus * workers,
        "stderr_to_stdout": True,
        "use_srun": False,
        "wckey": None,  # else submitit charges every job to a key of its own name
        "setup": [
            *(_checked(cluster.setup) if needs_setup else cluster.setup),
            *_python_path(code),
            f"export OMP_NUM_THREADS={needs.cpus} TOKENIZERS_PARALLELISM=false",
        ],
        "additional_parameters": _as_options({**own, **({"exclusive": True, **memory} if whole else {}), **additional}),
        **({} if whole else memory),
    }
    optional = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
    if needs.gpus:
        key = "gres" if cluster.gpu_option == "gres" else "gpus_per_node"
        gpus = needs.gpus * workers
        optional[key] = f"gpu:{gpus}" if key == "gres" else gpus
    return parameters | {key: value for key, value in optional.items() if value is not None}


def _without_gpus(additional: Mapping[str, Any]) -> dict[str, Any]:
    """Further options for a job that needs no GPU: the collector, and models without."""
    return {key: value for key, value in additional.items() if key not in OF_GPUS and not (key == "gres" and str(value).startswith("gpu"))}


def _as_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """null and false leave an option out; what Slurm has a word of its own for not doing is said with that."""
    options = {key: value for key, value in given.items() if value is not None and value is not False}
    return options | ({"no_requeue": True} if "requeue" in given and "requeue" not in options else {})


def _checked(setup: Sequence[str]) -> list[str]:
    """Setup lines of which the first that fails ends the job, as its last word; what they source may do as it likes inside."""
    if not setup:
        return []
    said = "echo \"a setup line failed with exit status $status (add '|| true' where it may): $BASH_COMMAND\" >&2"
    return [f"trap 'status=$?; [ ${{#BASH_SOURCE[@]}} -gt 1 ] || {{ {said.replace(chr(39), _QUOTE)}; exit 1; }}' ERR", *setup, "trap - ERR"]


def warning_seconds(cluster: ClusterSpec, needs: Resources) -> int:
    """How long before its time limit a job is warned: not in its first half, when a worker may not yet listen."""
    return min(cluster.signal_seconds, needs.minutes * 30)


def _python_path(code: Path | None) -> list[str]:
    """Nodes import the copy of the code that was made at launch, whether or not anything is installed there.

    PYTHONSAFEPATH: else `python -m` would look into the folder that sbatch was called in first, often the live checkout.
    A job that submits jobs hands its environment on: what PYTHONPATH was before us is kept aside, so that it does not grow.
    """
    if code is None:
        return []
    marker = shlex.quote(str(code / "quantsweep" / "crew" / "slurm_job.py"))
    return [
        f"for i in $(seq {VISIBLE_SECONDS}); do [ -e {marker} ] && break; sleep 1; done  # another host has just written it",
        'export QUANTSWEEP_PYTHONPATH="${QUANTSWEEP_PYTHONPATH-${PYTHONPATH-}}"',
        f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}"${{QUANTSWEEP_PYTHONPATH:+:$QUANTSWEEP_PYTHONPATH}}"',
    ]


REFUSALS: Mapping[str, tuple[type[RefusedError], str]] = {
    "QOSMaxSubmitJobPerUserLimit": (NoRoomError, "you have as many jobs in the queue as your QOS allows"),
    "AssocMaxSubmitJobLimit": (NoRoomError, "your account has as many jobs in the queue as it may"),
    "AssocGrpSubmitJobsLimit": (NoRoomError, "your account has as many jobs in the queue as it may"),
    "QOSGrpSubmitJobsLimit": (NoRoomError, "your QOS has as many jobs in the queue as it may"),
    "MaxSubmitJob": (NoRoomError, "a limit on submitted jobs is reached"),
    "temporarily unable to accept job": (NoRoomError, "the cluster has as many jobs as it can hold (MaxJobCount)"),
    "Job violates accounting/QOS policy": (RefusedError, "the job breaks a limit of your account or QOS (see: sacctmgr show qos, assoc)"),
    "Invalid job array specification": (RefusedError, "the array is larger than MaxArraySize; set cluster.max_array_size"),
    "Invalid account": (RefusedError, "give cluster.account=… (see: sacctmgr show assoc user=$USER)"),
    "invalid partition": (RefusedError, "give cluster.partition=… (see: sinfo)"),
    "Invalid qos": (RefusedError, "give cluster.qos=… (see: sacctmgr show qos)"),
    "Requested time limit is invalid": (RefusedError, "the partition's MaxTime is shorter; give cluster.minutes=… (see: sinfo -o '%P %l')"),
    "Requested node configuration is not available": (RefusedError, "no node of the partition has so many GPUs, cores, or so much memory"),
    "Memory specification can not be satisfied": (RefusedError, "no node has so much memory; give cluster.memory_gb=…"),
    "Invalid feature specification": (RefusedError, "no node has that feature; see cluster.constraint"),
    "Invalid generic resource": (RefusedError, "the cluster knows no such GPUs; see cluster.gpu_option"),
}
"""Words of sbatch, how they are to be taken, and what they mean."""


def _explained(error: FailedJobError, what: str) -> SlurmError:
    text = " ".join(str(error).split())
    for word, (kind, meaning) in REFUSALS.items():
        if word.lower() in text.lower():
            return kind(f"Slurm refused {what}: {meaning} [{word}]")
    return SlurmError(f"submitting {what} failed, and it may have been accepted all the same: {text}")
