"""Hydra's sweeper: plans the whole grid in this process, then hands the launcher one override list a shard.

    ["plan_path=/…/plan-….parquet", "shard_id=7"]

That is all a launcher has to carry, so the stock ones (`hydra/launcher=basic`, submitit's) work too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from quantsweep.checkpoints.pins import own_switches
from quantsweep.checks import truth
from quantsweep.composing.cluster import unused_variables
from quantsweep.composing.composition import search_folders
from quantsweep.composing.prepare import Prepared, asked_folder, prepare, refuse_unpinned
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.exit_status import ExitStatus
from quantsweep.hydra_plugin.launcher import wait_for_end
from quantsweep.hydra_plugin.mistakes import shown_plainly
from quantsweep.launching import snapshot
from quantsweep.launching.cluster import within_nodes
from quantsweep.launching.refill import submit_waiting
from quantsweep.launching.settle import settle
from quantsweep.launching.tasks import Observation
from quantsweep.operations.launches import ending
from quantsweep.operations.messages import plan_text, submitted_text
from quantsweep.operations.rows import finished_text
from quantsweep.planning.plan import Plan
from quantsweep.planning.plan_files import plan_files, write_plan
from quantsweep.planning.typed import typed
from quantsweep.running.environment import running_package, source_digest
from quantsweep.storage.lock import RUN, check_held, launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import LaunchSettings

LOCK_SECONDS = 60.0
"""How long a launch waits for a worker or a collector that looks after the sweep this moment."""


class QuantsweepSweeper(Sweeper):
    """Plan, then launch what is left."""

    def __init__(self) -> None:
        self._config: DictConfig | None = None
        self._launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once everything is composed."""
        self._config = config
        self._launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Plan what the arguments ask for and launch it; a user's mistake is shown without a stack."""
        with shown_plainly():
            return self._sweep(expand_shorthand(arguments))

    def _sweep(self, arguments: list[str]) -> Sequence[Any]:
        assert self._config is not None
        assert self._launcher is not None
        folder = asked_folder(self._config)
        first = None
        if not folder.path.exists():  # a mistake, or nothing to do, makes no folder
            first = self._planned(folder, arguments)
            if not first.plan.shards:
                return []
        folder.create()
        return self._launch(folder, arguments, first)

    def _planned(self, folder: SweepFolder, arguments: list[str], seen: Observation | None = None) -> Prepared:
        """The plan, said; raises ConfigurationError where it cannot be launched."""
        assert self._config is not None
        prepared = prepare(self._config, search_folders(self._config.hydra), arguments, seen=seen)
        print(
            plan_text(prepared.plan, title=prepared.title, folder=folder.path, unseen=prepared.unseen, left_out=prepared.left_out),
            flush=True,
        )
        refuse_unpinned(prepared.plan)
        return prepared

    def _launch(self, folder: SweepFolder, arguments: list[str], first: Prepared | None) -> Sequence[Any]:
        """Launch what is left; `first`: the plan that was made when there was no folder yet, which holds if nobody planned since."""
        assert self._config is not None
        assert self._launcher is not None
        here = OmegaConf.select(self._config, "cluster.kind") == "local"
        with launch_lock(folder.plan / "launch.lock", purpose=RUN if here else "launch", wait_seconds=LOCK_SECONDS):
            seen = settle(folder, assume_dead=truth("assume_dead", self._config.assume_dead))
            prepared = first if first is not None and not plan_files(folder.plan) else self._planned(folder, arguments, seen)
            if not prepared.plan.shards:
                returned = self._submit_older(folder, seen, here=here)
                self._finish(folder, prepared.plan, here=here)
                return returned
            plan = prepared.plan if here else replace(prepared.plan, launch=_on_slurm(prepared.plan.launch, folder))
            check_held(folder.plan / "launch.lock")
            path = write_plan(folder.plan, plan, typed=typed(["-m", *arguments]))
            returned = self._launcher.launch([shard_overrides(path, shard.shard_id) for shard in plan.shards], initial_job_idx=0)
            self._finish(folder, plan, here=here)
            return returned

    def _finish(self, folder: SweepFolder, plan: Plan, *, here: bool) -> None:
        """Where the work itself has been waited for: its table and what to type next; ends the program unless all is done."""
        assert self._config is not None
        if not here and not OmegaConf.select(self._config, "hydra.launcher.wait"):
            return
        print(finished_text(folder, plan.asked), flush=True)
        status = ending(folder, plan.asked, has_budget=plan.launch.gpu_hours is not None)
        if status is not ExitStatus.DONE:
            raise SystemExit(status)  # an exit passes through Hydra untouched

    def _submit_older(self, folder: SweepFolder, seen: Observation, *, here: bool) -> Sequence[Any]:
        """Nothing new: shards of older launches may still wait for room in the queue, or run, and `wait=true` is for them too."""
        assert self._config is not None
        if not here:
            summary = submit_waiting(folder, seen, fresh_limits=True)
            if summary.shards or summary.waiting:
                print(submitted_text(summary, sweep=folder.name), flush=True)
            if OmegaConf.select(self._config, "hydra.launcher.wait") and (seen.in_flight or summary.shards or summary.waiting):
                wait_for_end(folder)
        return []


def _on_slurm(launch: LaunchSettings, folder: SweepFolder) -> LaunchSettings:
    """What jobs run, how far their retries may go, and whether they ask the hub is settled now, whoever submits them later."""
    if ignored := unused_variables():
        print(f"{', '.join(ignored)}: not used for the jobs of a sweep; give the options in cluster.additional_parameters", file=sys.stderr)
    variables = tuple(sorted({**own_switches(), **dict(launch.variables)}.items()))
    code = snapshot.take(folder)
    sources = source_digest(folder.code / code / running_package().name)
    return replace(launch, cluster=within_nodes(launch.cluster), code=code, sources=sources, variables=variables)


def shard_overrides(plan: Path, shard_id: int) -> list[str]:
    """What a launcher is given for one shard."""
    quoted = str(plan).replace("\\", "\\\\").replace("'", "\\'")
    return [f"plan_path='{quoted}'", f"shard_id={shard_id}"]
