"""`quantsweep plan +sweeps=quickstart model=… [--json]`: the dry run of `python launch.py -m …`, same words, same code."""

from __future__ import annotations

import argparse
import json

from omegaconf import OmegaConf

from quantsweep import slurm
from quantsweep.errors import SlurmError
from quantsweep.hydra_plugin.composition import compose_base, expand_shorthand, search_folders
from quantsweep.hydra_plugin.prepare import Prepared, prepare
from quantsweep.launching.cluster import array_size, group_shards
from quantsweep.messages import plan_text


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("overrides", nargs="*", help="as after `python launch.py -m`: +sweeps=quickstart, bit_width=3,4, cluster=…")
    parser.add_argument("--json", action="store_true", help="print counts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; nothing is written or submitted."""
    overrides = expand_shorthand(arguments.overrides)
    cfg = compose_base(overrides)
    prepared = prepare(cfg, search_folders(cfg.hydra), overrides)
    unknown = None
    try:
        arrays = _num_arrays(prepared)
    except SlurmError as error:
        arrays, unknown = None, str(error)
    if arguments.json:
        plan = prepared.plan
        skipped = {reason: count for reason, (count, _) in plan.expansion.skipped.items()}
        facts = {
            **plan.counts(),
            "array_tasks": len(plan.shards) if arrays is not None else 0,
            "arrays": arrays or 0,
            "skipped_reasons": skipped,
            "unpinned": list(plan.unpinned),
            "predicted_worker_hours": plan.predicted_hours(),
            "sweep": plan.sweep,
            "folder": str(prepared.folder.path),
        }
        print(json.dumps(facts, indent=2))
        return 0
    print(plan_text(prepared.plan, title=prepared.title, folder=prepared.folder.path))
    if arrays:
        print(f"  arrays      {arrays:>9,}   on {OmegaConf.select(cfg, 'hydra.runtime.choices.cluster')}")
    if unknown:
        print("  arrays      unknown: no Slurm cluster answers here (launch from a login node, or leave out cluster=…)")
        print(f"              {unknown}")
    return 0


def _num_arrays(prepared: Prepared) -> int | None:
    """How many Slurm arrays a launch would submit; None on this machine."""
    if prepared.cluster.kind != "slurm":
        return None
    limits = slurm.read_limits(prepared.cluster.account, prepared.cluster.qos, prepared.cluster.partition)
    shards = [(shard.shard_id, prepared.cluster.resources(shard.resources)) for shard in prepared.plan.shards]
    return len(group_shards(shards, array_size(prepared.cluster, limits)))
