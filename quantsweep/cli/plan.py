"""`quantsweep plan +sweeps=quickstart model=… [--json]`: the dry run of `python launch.py -m …`, same words, same code."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from quantsweep import slurm
from quantsweep.checkpoints import planned_layers
from quantsweep.composing.composition import compose_base, search_folders
from quantsweep.composing.prepare import Prepared, prepare
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.errors import ModelError, SlurmError
from quantsweep.exit_status import ExitStatus
from quantsweep.launching.refill import array_size
from quantsweep.operations.messages import plan_text
from quantsweep.planning.plan import Plan
from quantsweep.trial.task_identity import read_own_tasks


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("overrides", nargs="*", help="as after `python launch.py -m`: +sweeps=quickstart, bit_width=3,4, cluster=…")
    parser.add_argument("-m", "--multirun", action="store_true", help="taken as at a launch")
    parser.add_argument("--json", action="store_true", help="print counts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; nothing is written or submitted.  REFUSED if documents of a task cannot be loaded: each trial would fail at it."""
    overrides = expand_shorthand(arguments.overrides)
    cfg = compose_base(overrides)
    prepared = prepare(cfg, search_folders(cfg.hydra), overrides)
    unknown = None
    try:
        arrays = _num_arrays(prepared)
    except SlurmError as error:
        arrays, unknown = None, str(error)
    unloadable = _unloadable(prepared.plan)
    status = ExitStatus.REFUSED if unloadable else ExitStatus.DONE
    if arguments.json:
        plan = prepared.plan
        skipped = {reason: count for reason, (count, _) in plan.expansion.skipped.items()}
        facts = {
            **plan.counts(),
            "array_tasks": len(plan.shards) if arrays is not None else 0,
            "arrays": arrays or 0,
            "skipped_reasons": skipped,
            "changes": list(plan.expansion.changes),
            "unpinned": list(plan.unpinned),
            "unseen": list(prepared.unseen),
            "left_out": list(prepared.left_out),
            "unloadable": unloadable,
            "layers": _layers(prepared),
            "predicted": _predicted(plan),
            "sweep": plan.sweep,
            "folder": str(prepared.folder.path),
        }
        print(json.dumps(facts, indent=2))
        return status
    print(plan_text(prepared.plan, title=prepared.title, folder=prepared.folder.path, unseen=prepared.unseen, left_out=prepared.left_out))
    for model, layers in _layers(prepared).items():
        print(f"  quantized   {model}: {layers}")
    if arrays:
        print(f"  arrays      {arrays:>9,}   on {OmegaConf.select(cfg, 'hydra.runtime.choices.cluster')}")
    if unknown:
        print("  arrays      unknown: no Slurm cluster answers here (launch from a login node, or leave out cluster=…)")
        print(f"              {unknown}")
    for name in unloadable:
        print(f"  task        {name}: its documents cannot be loaded here (said above), and each trial would fail at it")
    return status


def _unloadable(plan: Plan) -> list[str]:
    """Names of the user's own tasks whose documents could not be loaded."""
    if plan.settings.task_path is None:
        return []
    own = read_own_tasks(Path(plan.settings.task_path))
    tasks = {task for planned in plan.trials for task in planned.tasks}
    return sorted({task.name for task in tasks if own.is_unloadable(task.lm_eval_task, task.own_content)})


def _layers(prepared: Prepared) -> dict[str, str]:
    """Which layers would be quantized, by model, if anything would be."""
    models = {planned.trial.model for planned in prepared.plan.trials if not planned.trial.quantization.is_baseline}
    places = {model: folder for model, folder in prepared.models.items() if model in models}
    try:
        return planned_layers.listed(places)
    except ModelError as error:
        return {model.name: str(error) for model in places}


def _predicted(plan: Plan) -> dict[str, Any]:
    forecast = plan.forecast
    if forecast is None:
        return {}
    return {
        "worker_hours": forecast.minutes / 60,
        "worker_hours_low": forecast.low / 60,
        "worker_hours_high": forecast.high / 60,
        "gpu_hours": plan.gpu_minutes / 60,
        "basis": forecast.basis,
    }


def _num_arrays(prepared: Prepared) -> int | None:
    """How many Slurm arrays a launch would submit; None on this machine."""
    if prepared.cluster.kind != "slurm":
        return None
    cluster = prepared.cluster
    limits = slurm.read_limits(cluster.account, cluster.qos, cluster.partition)
    shards = Counter(cluster.resources(shard.resources) for shard in prepared.plan.shards)
    size = array_size(cluster, limits)
    return sum(ceil(ceil(count / cluster.workers(needs)) / size) for needs, count in shards.items())
