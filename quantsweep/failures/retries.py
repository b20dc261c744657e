"""What becomes of a trial that failed: again, again with more, or not again by itself.

    cause                  retries   with                       why
    out_of_gpu_memory         3      twice the GPUs             the evaluator has tried smaller batches already
    out_of_host_memory        3      twice the memory
    killed                    3      twice the memory           mostly the kernel's own memory watch
    time_limit                3      twice the time
    preempted                 –      the same                   nobody's fault; never counted
    node_failure, lost       10      the same, another node     a trial that takes nodes down with it must end
    bad_node                 10      the same, that node excluded
    crashed, hung             1      the same                   a flipped bit or a stuck file system; twice is no accident
    not_started               2      the same
    no_answer                 3      the same                   a server that restarts, a stale handle
    disk_full, no_access      0      –                          making space, or opening a folder, is a person's work
    code_changed              0      –                          a launch plans with the code of its moment
    model_or_data, configuration, quantization, bug   0         the same input gives the same failure

"Not again by itself" is not for ever: the launch command, typed again, tries everything that is
missing or failed, since the person who types it has mended something.  Failures are counted since
that command, a trial and cause.  Pure functions: who calls them reads the tables and submits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantsweep.failures import classes
from quantsweep.trial.specs import ClusterSpec, Resources
from quantsweep.words import count

UNLIMITED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """retries: how often at most.  grow: which resource is doubled each time (None: the same again)."""

    retries: int
    grow: str | None = None


TREATMENTS: Mapping[str, Treatment] = {
    classes.OUT_OF_GPU_MEMORY: Treatment(retries=3, grow="gpus"),
    classes.OUT_OF_HOST_MEMORY: Treatment(retries=3, grow="memory_gb"),
    classes.KILLED: Treatment(retries=3, grow="memory_gb"),
    classes.TIME_LIMIT: Treatment(retries=3, grow="minutes"),
    classes.PREEMPTED: Treatment(retries=UNLIMITED),
    classes.NODE_FAILURE: Treatment(retries=10),
    classes.LOST: Treatment(retries=10),
    classes.BAD_NODE: Treatment(retries=10),
    classes.CRASHED: Treatment(retries=1),
    classes.HUNG: Treatment(retries=1),
    classes.NOT_STARTED: Treatment(retries=2),
    classes.NO_ANSWER: Treatment(retries=3),
    classes.NO_ACCESS: Treatment(retries=0),
    classes.DISK_FULL: Treatment(retries=0),
    classes.MODEL_OR_DATA: Treatment(retries=0),
    classes.CONFIGURATION: Treatment(retries=0),
    classes.QUANTIZATION: Treatment(retries=0),
    classes.CODE_CHANGED: Treatment(retries=0),
    classes.BUG: Treatment(retries=0),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with one trial: run it with `resources`, or (None) leave it, because of `reason`."""

    resources: Resources | None
    reason: str = ""


def decide(
    since_launch: Iterable[str], under_plan: Iterable[str], resources: Resources, cluster: ClusterSpec, max_retries: int | None = None
) -> Verdict:
    """The verdict on a trial that failed with these causes, one entry an attempt.

    since_launch: all causes since it was last launched by hand; these are counted.  under_plan: those since it was given
    `resources`; these decide what it gets more of.
    """
    counts = Counter(since_launch)
    for name, number in counts.items():
        allowed = TREATMENTS[name].retries
        if max_retries is not None and allowed != UNLIMITED:
            allowed = min(allowed, max_retries)
        if number > allowed:
            return Verdict(resources=None, reason=f"{name}: {count(number, 'time')}, {count(allowed, 'retry', 'retries')} allowed")
    grown = resources
    for name in sorted(set(under_plan)):
        key = TREATMENTS[name].grow
        if key is None:
            continue
        more = _doubled(grown, key, cluster)
        if more is grown:
            return Verdict(resources=None, reason=f"{name}: {key} is at its limit ({getattr(grown, key)}; cluster.max_{key})")
        grown = more
    return Verdict(resources=grown)


def _doubled(resources: Resources, key: str, cluster: ClusterSpec) -> Resources:
    """The same resources with twice as much of one of them, or the very same object if there is no more."""
    # A model that needs no GPU cannot be helped with more of them, nor a job whose memory the cluster's own parameters state.
    memory = cluster.max_memory_gb if cluster.asks_for_memory else 0
    most = {"gpus": cluster.max_gpus if resources.gpus else 0, "memory_gb": memory, "minutes": cluster.max_minutes}[key]
    base = cluster.resources(resources)  # all of it: what was not lacking stays what the cluster's yaml makes of it
    value = min(getattr(base, key) * 2, most)
    if value <= getattr(base, key):
        return resources
    changed: dict[str, Any] = {key: value}
    return replace(base, raised=True, **changed)
