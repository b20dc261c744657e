"""What `launch.py` runs once Hydra has composed a configuration: a shard of a plan, or one trial here and now."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from quantsweep.composing.command_line import as_one_trial, check_command_line, help_text, refuse_sweeps, spread_options
from quantsweep.composing.composition import search_folders
from quantsweep.composing.prepare import Prepared, prepare, refuse_unpinned
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.crew.local import run_local
from quantsweep.errors import QuantsweepError, ResultsError
from quantsweep.exit_status import ExitStatus, of_trials
from quantsweep.hydra_plugin.flags import AS_THEY_ARE, MULTIRUN, SHOWS, split_flags, without_axes
from quantsweep.hydra_plugin.mistakes import shown_plainly
from quantsweep.operations.rows import results_text
from quantsweep.planning.plan_files import write_plan
from quantsweep.planning.typed import remember, typed
from quantsweep.running.worker import run_shard
from quantsweep.storage.files import own_umask
from quantsweep.storage.lock import RUN, launch_lock


def checked_arguments(arguments: list[str]) -> list[str]:
    """The command line with shorthand written out; ends the program with all that is wrong, before Hydra stops at the first."""
    own_umask()
    words, flags = split_flags(arguments)
    if {"--help", "-h"} & set(flags):
        print(help_text())
        sys.exit(0)
    if AS_THEY_ARE & set(flags):
        return arguments
    try:
        remember(arguments)
        words = expand_shorthand(words)
        check_command_line([*words, *(flag for flag in flags if flag.startswith("-"))])
        if SHOWS & set(flags):
            return [*as_one_trial(without_axes(words)), *(flag for flag in flags if flag not in MULTIRUN)]
        if not MULTIRUN & set(flags):
            refuse_sweeps(words)
            return [*as_one_trial(words), *flags]
    except QuantsweepError as error:
        sys.exit(str(error))
    return [*spread_options(words), *flags]


def run(cfg: DictConfig) -> Any:
    """Run the shard that the sweeper named, or the one trial that was typed; returns plain counts."""
    if cfg.plan_path is not None:
        return asdict(run_shard(cfg.plan_path, cfg.shard_id))
    with shown_plainly():
        return _run_one(cfg)


def _run_one(cfg: DictConfig) -> dict[str, int]:
    """One trial on this machine, whatever the cluster: plan it, run what is missing of it, print its rows."""
    hydra = HydraConfig.get()
    prepared = prepare(cfg, search_folders(hydra), list(hydra.overrides.task))
    refuse_unpinned(prepared.plan)
    prepared.folder.create()
    with launch_lock(prepared.folder.plan / "launch.lock", purpose=RUN):
        status = _run_here(prepared)
    print(results_text(prepared.folder.path, prepared.plan.asked))
    if status is not ExitStatus.DONE:
        raise SystemExit(status)
    return prepared.plan.counts()


def _run_here(prepared: Prepared) -> ExitStatus:
    """Run what is missing, and say how that ended."""
    plan = prepared.plan
    if not plan.shards:
        print(f"already done, in {prepared.folder.path}:")
        return ExitStatus.DONE
    print("\n".join(f"{p.trial.label}: {', '.join(task.task_key for task in p.tasks)}" for p in plan.trials), flush=True)
    ids = [shard.shard_id for shard in plan.shards]
    path = write_plan(prepared.folder.plan, plan, typed=typed(HydraConfig.get().overrides.task))
    summary = run_local(path, ids, workers=prepared.workers, device=plan.settings.device)
    if summary.problems:
        raise ResultsError("; ".join(summary.problems))
    if summary.interrupted:
        raise SystemExit(ExitStatus.STOPPED)
    return of_trials(failed=summary.failed, held=summary.held, budget_spent=summary.budget_spent)
