"""How trials are run, where, and within which bounds: the settings of a launch, never part of a trial's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quantsweep.checks import positive_number, whole_number
from quantsweep.errors import ConfigurationError
from quantsweep.trial.canonical import Options, options_tuple


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one shard of this model needs from a cluster; equal resources share a Slurm array.

    gpus: GPUs for one worker; cpus: cores; memory_gb: host memory; minutes: time limit.
    raised: a retry asked for more than the model's yaml says, so the cluster's own numbers are no upper bound.
    """

    gpus: int = 0
    cpus: int = 1
    memory_gb: int = 4
    minutes: int = 240
    raised: bool = False

    def __post_init__(self) -> None:
        for name, least in (("gpus", 0), ("cpus", 1), ("memory_gb", 1), ("minutes", 1)):
            whole_number(f"resources.{name}", getattr(self, name), least)

    @property
    def name(self) -> str:
        """A short label such as `1gpu-8cpu-64G`."""
        return f"{self.gpus}gpu-{self.cpus}cpu-{self.memory_gb}G-{self.minutes}min"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How trials are run; never part of their identity.

    device: "auto" (a GPU if there is one), "cpu" or "cuda".  batch_size: sequences a forward pass, or
    None for a choice by the evaluator.  task_path: a folder of lm-eval YAMLs searched first.
    trial_timeout_minutes: how long a trial may be silent before it is killed, or None for the
    rule (10: everything long gives signs of life).  tracking: the configuration of the tracking service.
    data_revisions: (task, revision of its data) as `quantsweep prewarm` pinned them; other data are refused.
    """

    device: str = "auto"
    batch_size: int | None = None
    task_path: str | None = None
    trial_timeout_minutes: float | None = None
    tracking: Options = ()
    data_revisions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigurationError(f"device {self.device!r} is not one of auto, cpu, cuda")
        whole_number("batch_size", self.batch_size, otherwise=", or null")
        positive_number("trial_timeout_minutes", self.trial_timeout_minutes, otherwise=", or null for the rule")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSettings:
        """The inverse of `dataclasses.asdict` after JSON; plans of earlier versions have no data_revisions."""
        revisions = tuple((str(name), str(revision)) for name, revision in data.get("data_revisions", ()))
        return cls(**{**data, "tracking": options_tuple(dict(data["tracking"])), "data_revisions": revisions})


_CLUSTER_NUMBERS = (
    *("minutes", "memory_gb", "cpus", "node_gpus", "node_cpus", "max_gpus", "max_memory_gb", "max_minutes"),
    *("max_array_size", "max_parallel", "max_submitted", "signal_seconds"),
)


MEMORY = frozenset({"mem", "mem_per_cpu", "mem_per_gpu"})
"""Options of sbatch that exclude each other; where one is in additional_parameters, jobs are not told memory_gb."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Where shards run: this machine (`kind="local"`) or a Slurm cluster; the fields are those of conf/cluster/slurm.yaml.

    allocation: "gpu" gives each shard a job of its own; "node" takes whole nodes and runs node_gpus / resources.gpus workers
    (node_cpus / resources.cpus for models without GPU) side by side in one job.
    max_gpus, max_memory_gb, max_minutes: how far a retry after a lack of them may go.
    submit_from_nodes: whether sbatch works on the nodes: then the running sweep submits what is left and what may be retried.
    signal_seconds: how long before the time limit Slurm warns a job.
    """

    kind: Literal["local", "slurm"] = "local"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gpu_option: Literal["gres", "gpus"] = "gres"
    setup: tuple[str, ...] = ()
    python: str | None = None
    minutes: int | None = None
    memory_gb: int | None = None
    cpus: int | None = None
    allocation: Literal["gpu", "node"] = "gpu"
    node_gpus: int | None = None
    node_cpus: int | None = None
    max_gpus: int = 8
    max_memory_gb: int = 512
    max_minutes: int = 2880
    max_array_size: int | None = None
    max_parallel: int | None = None
    max_submitted: int | None = None
    submit_from_nodes: bool = True
    signal_seconds: int = 120
    additional_parameters: Options = ()

    def __post_init__(self) -> None:
        if self.allocation == "node" and not (self.node_gpus or self.node_cpus):
            raise ConfigurationError("cluster.allocation=node needs cluster.node_gpus (or cluster.node_cpus for nodes without GPUs)")
        for name in _CLUSTER_NUMBERS:
            whole_number(f"cluster.{name}", getattr(self, name))

    @property
    def asks_for_memory(self) -> bool:
        """False where the site's own option says how much memory a job gets, or that it must not say."""
        return not MEMORY & dict(self.additional_parameters).keys()

    def resources(self, model: Resources) -> Resources:
        """What a shard asks for here: the model's resources, unless the cluster's configuration says otherwise."""
        return Resources(
            gpus=model.gpus,
            cpus=self.cpus or model.cpus,
            memory_gb=max(model.memory_gb, self.memory_gb or model.memory_gb) if model.raised else self.memory_gb or model.memory_gb,
            minutes=max(model.minutes, self.minutes or model.minutes) if model.raised else self.minutes or model.minutes,
            raised=model.raised,
        )

    def workers(self, needs: Resources) -> int:
        """How many workers one job runs side by side."""
        if self.allocation == "gpu":
            return 1
        if needs.gpus:
            return max(1, (self.node_gpus or needs.gpus) // needs.gpus)
        return max(1, (self.node_cpus or needs.cpus) // needs.cpus)


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """What one launch decided beside its trials; the retries that follow from it inherit it.

    gpu_hours: the budget, None for none.  max_retries: at most so many retries a trial and cause (None: each cause's own number).
    breaker_trials: so many trials failing in one place hold those that share the cause (None: never).
    shard_minutes: predicted bound of a shard.
    code: the snapshot that jobs run, a folder under code/ (None: the checkout itself, on this machine).
    sources: hash of the product's Python files at planning (environment.source_digest); what other code would run fails.
    variables: what workers find in their environment (the hub's offline switches, once everything is there or where a person set them).
    tag: a text of the person's own, kept in every row (None: none, as in plans of earlier versions).
    """

    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    gpu_hours: float | None = None
    max_retries: int | None = None
    breaker_trials: int | None = 10
    shard_minutes: float = 60.0
    code: str | None = None
    sources: str | None = None
    variables: tuple[tuple[str, str], ...] = ()
    tag: str | None = None

    def __post_init__(self) -> None:
        positive_number("budget.gpu_hours", self.gpu_hours, otherwise=", or null for none")
        positive_number("shard_minutes", self.shard_minutes)
        whole_number("max_retries", self.max_retries, 0, otherwise=", or null for each cause's own number")
        whole_number("breaker_trials", self.breaker_trials, 2, otherwise=", or null for never")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LaunchSettings:
        """The inverse of `dataclasses.asdict` after JSON."""
        cluster = dict(data["cluster"])
        cluster |= {"setup": tuple(cluster["setup"]), "additional_parameters": options_tuple(dict(cluster["additional_parameters"]))}
        variables = tuple((str(key), str(value)) for key, value in data["variables"])
        return cls(**{**data, "cluster": ClusterSpec(**cluster), "variables": variables})
