"""Hydra's launcher: shards on this machine or on Slurm, whichever `cluster=` names.

Shards of our sweeper run on local worker processes, or are submitted to Slurm and left there; there,
`hydra.launcher.wait=true` only waits for their end (their results are in the tables).  On this
machine, and for jobs that are not shards, it makes each job a submitit job that runs the task
function as Hydra would, and returns what it returned.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from quantsweep.composing.cluster import cluster_spec
from quantsweep.crew.local import num_workers, run_local
from quantsweep.errors import ResultsError
from quantsweep.exit_status import ExitStatus
from quantsweep.hydra_plugin.mistakes import shown_plainly
from quantsweep.launching import cluster as slurm_cluster
from quantsweep.launching.advance import step
from quantsweep.launching.cluster import RefusedError
from quantsweep.launching.refill import submit_waiting
from quantsweep.launching.settle import settle
from quantsweep.operations.messages import local_text, submitted_text
from quantsweep.planning.plan_files import read_header
from quantsweep.slurm import SlurmUnavailable
from quantsweep.storage.files import OTHERS_MAY_WRITE, own_umask
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import ClusterSpec, Resources

WAIT_SECONDS = 30.0
"""Between two looks at the queue while waiting: each is a request to a daemon that the whole site shares."""


class QuantsweepLauncher(Launcher):
    """Runs or submits what the sweeper planned."""

    def __init__(self, wait: bool) -> None:
        self._wait = wait
        self._config: DictConfig | None = None
        self._context: HydraContext | None = None
        self._task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self._context, self._task_function, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch jobs; shards are detached (Slurm) or worked off here (local), everything else is waited for."""
        assert self._config is not None
        shards = [_shard_of(overrides) for overrides in job_overrides]
        plans = {shard[0] for shard in shards if shard is not None}
        cluster = _cluster(self._config)
        is_plan = None not in shards and len(plans) == 1
        if not is_plan or (self._wait and cluster.kind == "local"):
            return self._launch_and_wait(job_overrides, initial_job_idx, cluster)
        ids = [shard[1] for shard in shards if shard is not None]
        with shown_plainly():
            _launch_shards(Path(plans.pop()), ids, cluster, self._config, wait=self._wait)
        return []

    def _launch_and_wait(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, cluster: ClusterSpec) -> Sequence[JobReturn]:
        assert self._config is not None
        setup_globals()
        folder = Path(str(self._config.hydra.sweep.dir)) / ".submitit" / "%j"
        _check_own(folder.parent)
        executor = _executor(folder, cluster)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        jobs = executor.map_array(
            self._run_job, [list(o) for o in job_overrides], list(numbers), [Singleton.get_state()] * len(job_overrides)
        )
        return [job.results()[0] for job in jobs]

    def _run_job(self, overrides: list[str], number: int, state: dict[Any, Any]) -> JobReturn:
        """One Hydra job, in the process that runs it."""
        assert self._config is not None
        assert self._context is not None
        assert self._task_function is not None
        Singleton.set_state(state)
        setup_globals()
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config.hydra.job):
            config.hydra.job.id = submitit.JobEnvironment().job_id
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        return run_job(
            hydra_context=self._context,
            task_function=self._task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _cluster(config: DictConfig) -> ClusterSpec:
    """The cluster that was asked for; other people's applications have none and run here."""
    if "cluster" not in config:
        return ClusterSpec()
    return cluster_spec(dict(OmegaConf.to_container(config.cluster, resolve=True)))  # type: ignore[arg-type]


def _shard_of(overrides: Sequence[str]) -> tuple[str, int] | None:
    """(plan, shard) if these overrides are a shard of our sweeper."""
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(overrides))}
    return (str(parsed["plan_path"]), int(str(parsed["shard_id"]))) if set(parsed) == {"plan_path", "shard_id"} else None


def _launch_shards(plan: Path, ids: Sequence[int], cluster: ClusterSpec, config: DictConfig, *, wait: bool) -> None:
    if cluster.kind == "slurm":
        folder = SweepFolder(plan.parent.parent)
        try:
            summary = submit_waiting(folder, settle(folder), fresh_limits=True)
        except RefusedError:
            plan.unlink()  # nothing of it was accepted, nor will be: nobody waits for it
            raise
        print(submitted_text(summary, sweep=str(config.sweep)), flush=True)
        if wait:
            wait_for_end(folder)
        return
    device = read_header(plan).settings.device
    done = run_local(plan, ids, workers=num_workers(config.workers, device), device=device)
    print(local_text(done, sweep=str(config.sweep), folder=plan.parent.parent), flush=True)
    if done.problems:
        raise ResultsError("; ".join(done.problems))
    if done.interrupted:
        raise SystemExit(ExitStatus.STOPPED)
    if done.superseded and not done.failed:
        raise SystemExit(ExitStatus.SUPERSEDED)


def wait_for_end(folder: SweepFolder) -> None:
    """Until nothing runs and nothing waits; takes the sweep's steps, since nobody else can while this process holds the launch lock."""
    busy = True
    while busy:
        time.sleep(WAIT_SECONDS)
        try:
            summary = step(folder)
        except SlurmUnavailable as error:
            print(f"{error}; asking again in {WAIT_SECONDS:.0f} s", flush=True)
            continue
        busy = bool(summary.in_flight or summary.unknown or summary.submitted.shards or summary.is_stuck)


def _check_own(folder: Path) -> None:
    """Make the folder of submitit's pickles, which run what is in them; raises ResultsError if others could have put some there."""
    own_umask()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (folder, folder.parent):
        status = place.stat()
        if status.st_mode & OTHERS_MAY_WRITE or status.st_uid not in (os.getuid(), 0):
            raise ResultsError(
                f"{place} is somebody else's, or others may write in it, and jobs run what lies there. "
                f"Run: chmod go-w '{place}', or give another with hydra.sweep.dir=…"
            )


def _executor(folder: Path, cluster: ClusterSpec) -> submitit.Executor:
    if cluster.kind == "slurm":
        executor: submitit.Executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**slurm_cluster.sbatch_parameters(cluster, cluster.resources(Resources()), "quantsweep"))
        return executor
    return submitit.LocalExecutor(folder=folder)
