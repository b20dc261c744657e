"""What a trial is, as frozen dataclasses: the nouns that every other module speaks in.

    TrialSpec  = ModelSpec × QuantizationSpec × CalibrationSpec × seed          one configuration
    evaluation = one TrialSpec × one TaskSpec                                   one row group of the results

Identity.  `TrialSpec.trial_id` is a hash of the canonical JSON of everything that can change a
number, and of nothing else: model content (pinned commit or hash of the weight files), compute
dtype, the quantization spec with every default written out, calibration, seed (only where
something is random), and the hand-raised `version` of each method and data type.  Not in it: code
commit, library versions, hardware, batch size, paths, resources, labels.  Fields that come later
enter where they are set (`set_fields`): one more option leaves the ids of all trials without it.
`TaskSpec.task_key` identifies a task the same way: name, version, few-shot count, limit.

Every class validates itself; errors name the thing, the value, the choices and the remedy.
Options of methods and data types are mappings held as sorted tuples, so that specs are hashable.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, cast, get_args

from quantsweep.checks import LARGEST_LONG, positive_number, whole_number, whole_seed
from quantsweep.errors import ConfigurationError

Option = bool | int | float | str | None | tuple[Any, ...]
Options = tuple[tuple[str, Option], ...]
BlockSize = int | Literal["tensor"] | None
"""Weights that share a scale: a count, "tensor" (all of them), or None (one scale an output channel)."""

DTYPES = ("float16", "bfloat16", "float32")
SCALE_DTYPES = (*DTYPES, "e8m0", "e4m3")
"""What scales may be stored in: a dtype, or one of the 8-bit types of MX (powers of two) and NVFP4."""
LEVELS = "levels"
"""The option that makes a data type a codebook: see `quantsweep.trial.registry.data_type_of`."""
BlockAxis = Literal["flat", "input"]
"""The direction in which blocks run."""
BLOCK_AXES = get_args(BlockAxis)

CHANNEL_NEEDS_INPUT = (
    "block_size=null means one scale an output channel, which needs block_axis=input; with block_axis=flat give a number or 'tensor'"
)
BASELINE_BITS = 16
"""The bit width that means the baseline, and that is counted for what is not quantized."""
LM_EVAL_FEWSHOT_SEED = 1234
"""lm-eval draws few-shot examples with this seed."""
BASELINE = "none"
"""The method that changes nothing: the 16-bit baseline."""
ROUND_TO_NEAREST = "round_to_nearest"
"""The method that changes nothing either once its codes have 16 bits: there it is the baseline."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, on every machine."""
    return _ENCODER.encode(value)


def content_hash(value: Any, length: int = 16) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def options_tuple(options: Mapping[str, Any] | None) -> Options:
    """A mapping as a sorted, hashable tuple; lists become tuples."""
    frozen = ((key, tuple(value) if isinstance(value, list) else value) for key, value in (options or {}).items())
    return tuple(sorted(frozen))


def set_fields(spec: Any, always: frozenset[str], never: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a dataclass that enter an identity: those of `always`, and of others (but `never`) those not at their default.

    Raises ConfigurationError for a field of neither kind that has no default, which would enter every id.
    """
    values, kind = vars(spec), cast("Any", type(spec))
    return {name: values[name] for name, default in _defaults(kind, always, never) if name in always or values[name] != default}


@lru_cache(maxsize=64)
def _defaults(cls: Any, always: frozenset[str], never: frozenset[str]) -> tuple[tuple[str, Any], ...]:
    found = tuple((each.name, each.default) for each in fields(cls) if each.name not in never)
    if needless := [name for name, default in found if default is MISSING and name not in always]:
        raise ConfigurationError(f"{cls.__name__}.{needless[0]} needs a default that leaves the ids of earlier trials as they are")
    return found


def is_plain(name: str) -> bool:
    """True for a name that cannot leave its folder or confuse a file system."""
    return _NAME.fullmatch(name) is not None


def check_name(kind: str, name: str) -> None:
    """Refuse a name that could leave its folder or confuse a file system."""
    if not is_plain(name):
        raise ConfigurationError(
            f"{kind} {name!r} is not a plain name: use letters, digits, '.', '_', '+', '-', and begin with a letter or digit"
        )


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
class PlantedOutliers:
    """Outlier channels planted into a model; what it computes stays what it was (`quantsweep.models.planting`).

    channels: how many, the same in every norm; scale: by how much they grow; seed: which ones.
    """

    channels: int
    scale: float
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("plant_outliers.channels", self.channels, otherwise=", or left out for the plain model")
        whole_seed("plant_outliers.seed", self.seed)
        if not 1 < self.scale < math.inf:
            raise ConfigurationError(f"plant_outliers.scale must be a number above 1, got {self.scale:g}; 1 is the plain model")

    @property
    def label(self) -> str:
        """A short text for people: `planted 4×16`, `planted 4×16 seed 1`."""
        return f"planted {self.channels}×{self.scale:g}" + (f" seed {self.seed}" if self.seed else "")

    def identity(self) -> dict[str, Any]:
        """As a part of the model's identity; `version` is raised when the same values plant something else."""
        return {"channels": self.channels, "scale": float(self.scale), "seed": self.seed, "version": 1}


_MODEL_ALWAYS = frozenset({"gguf_file", "dtype", "unquantized"})
_MODEL_NEVER = frozenset({"name", "family", "hub_id", "path", "revision", "parameters", "unavailable", "content", "resources"})
"""Labels, places and resources; the content stands for the place."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A language model: where it is, exactly which one, and how it is computed.

    Exactly one of `hub_id` and `path`.  `content` is the identity of the weights: the pinned hub
    commit, or the hash of the local files; None while it is not known (a plan may count such a
    model, submitting refuses it).  `unavailable` is the reason why the weights cannot be had.
    `parameters` counts all parameters, `embedding_parameters` those of input embeddings and untied
    output heads; both serve planning only: rows carry what was counted on the loaded model.
    `unquantized` lists name patterns (fnmatch) of linear layers kept at 16 bit.
    `plant_outliers`: outlier channels planted after loading; None for the model as it is.
    """

    name: str
    family: str
    hub_id: str | None = None
    path: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str = "float16"
    parameters: int | None = None
    unquantized: tuple[str, ...] = ()
    plant_outliers: PlantedOutliers | None = None
    unavailable: str | None = None
    content: str | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        check_name("model", self.name)
        if (self.hub_id is None) == (self.path is None) and self.unavailable is None:
            raise ConfigurationError(f"model {self.name}: give exactly one of hub_id and path (hub_id={self.hub_id!r}, path={self.path!r})")
        whole_number(f"model {self.name}: parameters", self.parameters, most=LARGEST_LONG, otherwise=", or null where it is not known")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"model {self.name}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.revision is not None and not _COMMIT.fullmatch(self.revision):
            raise ConfigurationError(
                f"model {self.name}: revision {self.revision!r} is not a full commit (40 hexadecimal digits); a branch or tag may move"
            )

    def identity(self) -> dict[str, Any]:
        """What of the model can change a number."""
        found = set_fields(self, _MODEL_ALWAYS, _MODEL_NEVER) | {
            "content": self.content or {"hub_id": self.hub_id, "path": self.path},
            "unquantized": sorted(self.unquantized),
        }
        return found if self.plant_outliers is None else found | {"plant_outliers": self.plant_outliers.identity()}

    @property
    def checkpoint(self) -> tuple[str | None, ...]:
        """Which weights these are, whatever is planted into them and whichever dtype they are computed in."""
        return self.content or self.hub_id or self.path, self.gguf_file

    @property
    def source(self) -> str:
        """Where the weights come from, for people."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.path or self.hub_id}{revision}" + (f" ({self.gguf_file})" if self.gguf_file else "")

    @property
    def label(self) -> str:
        """The name, and what was planted: `mini-neox-6.0m`, `mini-neox-6.0m planted 4×16`."""
        return self.name if self.plant_outliers is None else f"{self.name} {self.plant_outliers.label}"


_QUANTIZATION_ALWAYS = frozenset(
    {
        *("method", "method_version", "method_options", "data_type", "data_type_version", "data_type_options"),
        *("bit_width", "block_size", "block_axis", "symmetric", "scale_dtype"),
    }
)


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """How weights are quantized; `method="none"` is the baseline and leaves everything else None, as methods without a data type do.

    bit_width: bits of one code.  block_size, block_axis: see the module `quantsweep.numerics.blocks`.
    scale_dtype: what scales are stored in (and rounded to before use).
    method_options, data_type_options: everything else that the component's yaml declares, with
    defaults written out.  method_version, data_type_version: raised by hand when numbers change.
    """

    method: str
    method_version: int
    method_options: Options = ()
    data_type: str | None = None
    data_type_version: int | None = None
    data_type_options: Options = ()
    bit_width: int | None = None
    block_size: BlockSize = None
    block_axis: str | None = None
    symmetric: bool | None = None
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.is_baseline or self.data_type is None:
            if any(
                v is not None for v in (self.data_type, self.bit_width, self.block_size, self.block_axis, self.symmetric, self.scale_dtype)
            ):
                whom = "is the unquantized baseline" if self.is_baseline else "needs a data_type, or is one that has none"
                raise ConfigurationError(
                    f"method {self.method} {whom}: without one there is no bit_width, block_size, block_axis, symmetric or scale_dtype"
                )
            return
        if self.bit_width is None:
            raise ConfigurationError(f"method {self.method} needs a bit_width beside its data_type")
        if self.bit_width < 1:
            raise ConfigurationError(f"bit_width must be at least 1, got {self.bit_width}")
        if self.block_axis not in BLOCK_AXES:
            raise ConfigurationError(f"block_axis {self.block_axis!r} is not one of {', '.join(BLOCK_AXES)}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ConfigurationError(f"scale_dtype {self.scale_dtype!r} is not one of {', '.join(SCALE_DTYPES)}")
        if isinstance(self.block_size, int):
            whole_number("block_size", self.block_size, 2, otherwise=", or 'tensor', or null (one scale an output channel)")
        if isinstance(self.block_size, str) and self.block_size != "tensor":
            raise ConfigurationError(f"block_size {self.block_size!r} is neither a number, nor 'tensor', nor null")
        if self.block_size is None and self.block_axis == "flat":
            raise ConfigurationError(CHANNEL_NEEDS_INPUT)

    @property
    def is_baseline(self) -> bool:
        """True for the unquantized baseline."""
        return self.method == BASELINE

    def identity(self) -> dict[str, Any]:
        """All of it: how weights become codes is numbers and nothing else."""
        return set_fields(self, _QUANTIZATION_ALWAYS)


_CALIBRATION_ALWAYS = frozenset({"name", "dataset", "num_samples", "sequence_length", "seed"})


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """Text that a calibrated method may look at; None where the method looks at none."""

    name: str
    dataset: str
    num_samples: int
    sequence_length: int
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """All of it: other text gives other numbers."""
        return set_fields(self, _CALIBRATION_ALWAYS)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One lm-eval task as it will be run.

    lm_eval_task: its name in lm-eval.  folder: where its YAML is: "mini" (bundled), or a folder
    below lm-eval's own tasks.  version: the task version that is expected; the worker refuses another.
    primary_metric: the headline; limit: the first `limit` examples only (None = all of them).
    default_num_fewshot: the few-shot count that `num_fewshot: null` comes to.
    fewshot_pool: how many documents lm-eval draws few-shot examples from, where these are the documents that are scored; None elsewhere.
    window: tokens of one window of a rolling task; None for the model's whole context.
    protocol: "lm_eval" for lm-eval's very numbers, its faults included (`quantsweep.evaluation.lm_eval_protocol`); None for ours.
    own_content: hash of the user's own definition (`task_path`), which is another task than the built-in one of that name.
    """

    name: str
    lm_eval_task: str
    folder: str
    version: str
    primary_metric: str
    higher_is_better: bool
    num_fewshot: int | None = None
    limit: int | None = None
    default_num_fewshot: int = 0
    fewshot_pool: int | None = None
    window: int | None = None
    protocol: Literal["lm_eval"] | None = None
    own_content: str | None = None

    def __post_init__(self) -> None:
        check_name("task", self.name)
        whole_number("window", self.window, 2, otherwise=", or null for the model's whole context")
        whole_number("limit", self.limit, otherwise=", or null for all examples")
        whole_number("num_fewshot", self.num_fewshot, 0, otherwise=", or null for the task's own")

    @property
    def task_key(self) -> str:
        """Identity of the task, readable: `mini_cloze@1.0`, `piqa@1.0+5shot+limit100`."""
        shots = f"+{self.num_fewshot}shot" if self.num_fewshot is not None else ""
        others = "+others" if self._replaces_own_answers else ""
        limit = f"+limit{self.limit}" if self.limit is not None else ""
        window = f"+window{self.window}" if self.window is not None else ""
        protocol = f"+{self.protocol}" if self.protocol is not None else ""
        own = f"+own{self.own_content}" if self.own_content is not None else ""
        return f"{self.name}@{self.version}{shots}{others}{limit}{window}{protocol}{own}"

    @property
    def _replaces_own_answers(self) -> bool:
        """True if some prompt that is scored would hold its own answer in lm-eval, and so is another one here."""
        shots = self.default_num_fewshot if self.num_fewshot is None else self.num_fewshot
        if self.fewshot_pool is None or not shots or self.protocol is not None:
            return False
        first = first_own_answer(self.fewshot_pool, shots)
        return first is not None and (self.limit is None or first < self.limit)


@lru_cache(maxsize=4096)
def asked_otherwise(task: TaskSpec) -> TaskSpec | None:
    """The same evaluation in other words: the task's own few-shot count in numbers, or as null; None if there are none."""
    if task.num_fewshot is None:
        return replace(task, num_fewshot=task.default_num_fewshot)
    return replace(task, num_fewshot=None) if task.num_fewshot == task.default_num_fewshot else None


def other_key(task: TaskSpec) -> str | None:
    """The key of the same evaluation asked in other words; None if there are none."""
    other = asked_otherwise(task)
    return None if other is None else other.task_key


@lru_cache
def first_own_answer(pool: int, num_fewshot: int) -> int | None:
    """The first document that lm-eval would draw as an example of its own prompt, of `pool` that are both; None if there is none."""
    if num_fewshot > pool:
        return None
    generator = random.Random(LM_EVAL_FEWSHOT_SEED)
    return next((document for document in range(pool) if document in generator.sample(range(pool), num_fewshot)), None)


_TRIAL_PARTS = frozenset({"model", "quantization", "calibration", "seed"})


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One configuration: what is quantized and how.  Tasks are asked of it, they are not part of it."""

    model: ModelSpec
    quantization: QuantizationSpec
    calibration: CalibrationSpec | None = None
    seed: int | None = None

    def identity(self) -> dict[str, Any]:
        """Everything that can change a number, as plain JSON values."""
        return set_fields(self, _TRIAL_PARTS) | {
            "model": self.model.identity() | ({"unquantized": []} if self.quantization.is_baseline else {}),
            "quantization": self.quantization.identity(),
            "calibration": None if self.calibration is None else self.calibration.identity(),
        }

    @cached_property
    def trial_id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of `identity()`."""
        return content_hash(self.identity())

    @property
    def label(self) -> str:
        """A short text for people: `mini-neox-6.0m round_to_nearest int 4-bit block 64 convention=kbit`."""
        q = self.quantization
        if q.is_baseline:
            return f"{self.model.label} baseline"
        method = q.method + "".join(f" {key}={value}" for key, value in q.method_options if value is not None)
        if q.data_type is None:
            return f"{self.model.label} {method}"
        block = "channel" if q.block_size is None else q.block_size
        options = "".join(f" {key}={value}" for key, value in q.data_type_options if value is not None and key != LEVELS)
        return f"{self.model.label} {method} {q.data_type} {q.bit_width}-bit block {block}{options}"


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A trial and the tasks that are asked of it."""

    trial: TrialSpec
    tasks: tuple[TaskSpec, ...]

    def to_json(self) -> str:
        """Text from which `from_json` makes an equal object; the form in which plans travel."""
        trial = self.trial
        planted = trial.model.plant_outliers
        data = {
            "model": {
                **vars(trial.model),
                "resources": vars(trial.model.resources),
                "plant_outliers": None if planted is None else vars(planted),
            },
            "quantization": vars(trial.quantization),
            "calibration": None if trial.calibration is None else vars(trial.calibration),
            "seed": trial.seed,
        }
        return canonical_json({"trial": data, "tasks": [vars(task) for task in self.tasks]})

    @classmethod
    def from_json(cls, text: str) -> PlannedTrial:
        """The inverse of `to_json`."""
        data = json.loads(text)
        trial, tasks = data["trial"], data["tasks"]
        model, quantization, calibration = trial["model"], trial["quantization"], trial["calibration"]
        options = {key: options_tuple(dict(quantization[key])) for key in ("method_options", "data_type_options")}
        return cls(
            trial=TrialSpec(
                model=_model_from(_frozen(model)),
                quantization=QuantizationSpec(**{**quantization, **options}),
                calibration=None if calibration is None else CalibrationSpec(**calibration),
                seed=trial["seed"],
            ),
            tasks=tuple(_task_from(_frozen(task)) for task in tasks),
        )


# A plan of 43,000 trials has a dozen models and tasks: each is built once, and equal ones are the same object.


def _frozen(data: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (key, tuple(value) if isinstance(value, list) else tuple(value.items()) if isinstance(value, dict) else value)
        for key, value in data.items()
    )


@lru_cache(maxsize=4096)
def _model_from(items: tuple[tuple[str, Any], ...]) -> ModelSpec:
    data = dict(items)
    planted = data.get("plant_outliers")  # plans from before there was such a thing lack it
    return ModelSpec(
        **{
            **data,
            "resources": Resources(**dict(data["resources"])),
            "plant_outliers": None if planted is None else PlantedOutliers(**dict(planted)),
        }
    )


@lru_cache(maxsize=4096)
def _task_from(items: tuple[tuple[str, Any], ...]) -> TaskSpec:
    return TaskSpec(**dict(items))


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


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Trials for one worker: one model, one resource class, bounded by predicted cost."""

    shard_id: int
    resources: Resources
    trials: tuple[PlannedTrial, ...]
