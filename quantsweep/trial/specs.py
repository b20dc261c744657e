"""What a trial is, as frozen dataclasses: the nouns that every other module speaks in.

    TrialSpec  = ModelSpec × QuantizationSpec × CalibrationSpec × seed          one configuration
    evaluation = one TrialSpec × one TaskSpec                                   one row group of the results

Identity.  `TrialSpec.trial_id` is a hash of the canonical JSON of everything that can change a
number, and of nothing else: model content (pinned commit or hash of the weight files), compute
dtype, the quantization spec with every default written out, calibration, seed (only where
something is random), and the hand-raised `version` of each step and data type.  Not in it: code
commit, library versions, hardware, batch size, paths, resources, labels.  Fields that come later
enter where they are set (`set_fields`): one more option leaves the ids of all trials without it.
`TaskSpec.task_key` identifies a task the same way: name, version, few-shot count, limit.

Every class validates itself; errors name the thing, the value, the choices and the remedy.  This module is the door to all of them:
what quantizes, the calibration and the settings of a launch have modules of their own.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

from quantsweep.checks import LARGEST_LONG, whole_number, whole_seed
from quantsweep.errors import ConfigurationError
from quantsweep.trial.canonical import (
    Option,
    canonical_json,
    check_name,
    content_hash,
    is_plain,
    options_tuple,
    set_fields,
)
from quantsweep.trial.quantization import (
    BASELINE,
    BASELINE_BITS,
    CHANNEL_NEEDS_INPUT,
    DTYPES,
    LEVELS,
    ROUND_TO_NEAREST,
    SCALE_DTYPES,
    ActivationSpec,
    BlockAxis,
    BlockSize,
    QuantizationSpec,
    StepSpec,
)
from quantsweep.trial.settings import MEMORY, ClusterSpec, LaunchSettings, Resources, RunSettings
from quantsweep.trial.texts import PERPLEXITY, CalibrationSpec, PerplexityProtocol, TextSource

LM_EVAL_FEWSHOT_SEED = 1234
"""lm-eval draws few-shot examples with this seed."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


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


@dataclass(frozen=True, kw_only=True)
class TaskSpec(TextSource):
    """One task as it will be run: one of lm-eval's, or (`kind`) the perplexity of a text, which the fields of `TextSource` name.

    lm_eval_task: its name in lm-eval.  folder: where its YAML is: "mini" (bundled), or a folder
    below lm-eval's own tasks.  version: the task version that is expected; the worker refuses another.
    primary_metric: the headline; limit: the first `limit` examples only (None = all of them).
    default_num_fewshot: the few-shot count that `num_fewshot: null` comes to.
    fewshot_pool: how many documents lm-eval draws few-shot examples from, where these are the documents that are scored; None elsewhere.
    window: tokens of one window of a rolling task or a perplexity; None for the model's whole context (of a perplexity at most 2,048).
    protocol: "lm_eval" for lm-eval's very numbers, its faults included (`quantsweep.evaluation.lm_eval_protocol`); None for ours;
    of a perplexity how the text becomes a stream of tokens.
    own_content: hash of the user's own definition (`task_path`) or text (`path`), which is another task than the built-in one of that name.
    """

    name: str
    kind: Literal["lm_eval", "perplexity"] = "lm_eval"
    lm_eval_task: str = ""
    folder: str = ""
    version: str
    primary_metric: str
    higher_is_better: bool
    num_fewshot: int | None = None
    limit: int | None = None
    default_num_fewshot: int = 0
    fewshot_pool: int | None = None
    window: int | None = None
    protocol: Literal["lm_eval"] | PerplexityProtocol | None = None
    own_content: str | None = None

    def __post_init__(self) -> None:
        check_name("task", self.name)
        if self.kind == PERPLEXITY:
            self._check_perplexity()
        elif not self.lm_eval_task or not self.folder or self.protocol not in (None, "lm_eval"):
            raise ConfigurationError(
                f"task {self.name}: a task of lm-eval has lm_eval_task and folder, and the protocol null or lm_eval; got "
                f"lm_eval_task={self.lm_eval_task!r} folder={self.folder!r} protocol={self.protocol}"
            )
        whole_number("window", self.window, 2, otherwise=", or null for the model's whole context")
        whole_number("limit", self.limit, otherwise=", or null for all examples")
        whole_number("num_fewshot", self.num_fewshot, 0, otherwise=", or null for the task's own")

    def _check_perplexity(self) -> None:
        if self.protocol not in get_args(PerplexityProtocol):
            raise ConfigurationError(
                f"task {self.name}: the protocol of a perplexity is one of {', '.join(get_args(PerplexityProtocol))}, got {self.protocol!r}"
            )
        if self.path is None and (self.hub_id is None or self.files is None):
            raise ConfigurationError(f"task {self.name}: give a text, task.path=FILE (.txt, .jsonl, .parquet; also .gz)")
        if self.num_fewshot is not None:
            raise ConfigurationError(f"task {self.name}: a perplexity has no examples in its prompt; leave num_fewshot out")

    @property
    def task_key(self) -> str:
        """Identity of the task, readable: `mini_cloze@1.0`, `piqa@1.0+5shot+limit100`."""
        shots = f"+{self.num_fewshot}shot" if self.num_fewshot is not None else ""
        others = "+others" if self.replaces_own_answers else ""
        limit = f"+limit{self.limit}" if self.limit is not None else ""
        window = f"+window{self.window}" if self.window is not None else ""
        protocol = f"+{self.protocol}" if self.protocol is not None else ""
        own = f"+own{self.own_content}" if self.own_content is not None else ""
        return f"{self.name}@{self.version}{shots}{others}{limit}{window}{protocol}{own}"

    @property
    def replaces_own_answers(self) -> bool:
        """True if some prompt that is scored would hold its own answer in lm-eval, and so is another one here."""
        shots = self.default_num_fewshot if self.num_fewshot is None else self.num_fewshot
        if self.fewshot_pool is None or not shots or self.protocol is not None:
            return False
        first = first_own_answer(self.fewshot_pool, shots)
        return first is not None and (self.limit is None or first < self.limit)


@lru_cache(maxsize=4096)
def asked_otherwise(task: TaskSpec) -> TaskSpec | None:
    """The same evaluation in other words: the task's own few-shot count in numbers, or as null; None if there are none."""
    if task.kind == PERPLEXITY:
        return None
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
        return f"{self.model.label} {self.quantization.label}"


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A trial and the tasks that are asked of it."""

    trial: TrialSpec
    tasks: tuple[TaskSpec, ...]

    def to_json(self) -> str:
        """Text from which `from_json` makes an equal object; the form in which plans travel."""
        return canonical_json(self)

    @classmethod
    def from_json(cls, text: str) -> PlannedTrial:
        """The inverse of `to_json`, for plans of earlier versions too."""
        data = json.loads(text)
        trial = data["trial"]
        calibration = trial["calibration"]
        return cls(
            trial=TrialSpec(
                model=_model_from(_frozen(trial["model"])),
                quantization=_quantization_from(canonical_json(trial["quantization"])),
                calibration=None if calibration is None else CalibrationSpec(**calibration),
                seed=trial["seed"],
            ),
            tasks=tuple(_task_from(_frozen(task)) for task in data["tasks"]),
        )


# A plan of 43,000 trials has a dozen models and tasks, and far fewer ways to quantize than trials: each is built once.

Frozen = tuple[tuple[str, Any], ...]
"""A mapping of JSON as something that can be hashed, keys in the order of the file."""


def _frozen(data: Mapping[str, Any]) -> Frozen:
    return tuple((key, _frozen_value(value)) for key, value in data.items())


def _frozen_value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_frozen_value, value))
    return _frozen(value) if isinstance(value, dict) else value


@lru_cache(maxsize=4096)
def _model_from(items: Frozen) -> ModelSpec:
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
def _quantization_from(text: str) -> QuantizationSpec:
    data = dict(_frozen(json.loads(text)))  # keyed by text: as keys, options of 1, 1.0 and true would be one
    if "rounding" not in data:  # plans from before a trial had factors: the method was its rounding
        rounding = StepSpec(data["method"], data.pop("method_version"), data.pop("method_options"))
        return QuantizationSpec(**{**data, "rounding": rounding})
    steps = {key: _step_from(data[key]) for key in ("rounding", "clipping", "correction", "tuning", "compensation")}
    activations = {key: _activation_from(data[key]) for key in ("activation", "kv_cache")}
    return QuantizationSpec(**{**data, **steps, **activations, "transforms": tuple(map(_step_from, data["transforms"]))})


def _step_from(items: Frozen | None) -> Any:
    return None if items is None else StepSpec(**dict(items))


def _activation_from(items: Frozen | None) -> ActivationSpec | None:
    return None if items is None else ActivationSpec(**{**dict(items), "step": _step_from(dict(items)["step"])})


@lru_cache(maxsize=4096)
def _task_from(items: Frozen) -> TaskSpec:
    return TaskSpec(**dict(items))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Trials for one worker: one model, one resource class, bounded by predicted cost."""

    shard_id: int
    resources: Resources
    trials: tuple[PlannedTrial, ...]


__all__ = [
    "BASELINE",
    "BASELINE_BITS",
    "CHANNEL_NEEDS_INPUT",
    "DTYPES",
    "LEVELS",
    "LM_EVAL_FEWSHOT_SEED",
    "MEMORY",
    "PERPLEXITY",
    "ROUND_TO_NEAREST",
    "SCALE_DTYPES",
    "ActivationSpec",
    "BlockAxis",
    "BlockSize",
    "CalibrationSpec",
    "ClusterSpec",
    "LaunchSettings",
    "ModelSpec",
    "Option",
    "PerplexityProtocol",
    "PlannedTrial",
    "PlantedOutliers",
    "QuantizationSpec",
    "Resources",
    "RunSettings",
    "Shard",
    "StepSpec",
    "TaskSpec",
    "TextSource",
    "TrialSpec",
    "asked_otherwise",
    "canonical_json",
    "check_name",
    "content_hash",
    "first_own_answer",
    "is_plain",
    "options_tuple",
    "other_key",
]
