"""From plain configuration to specs: the one place where YAML becomes typed, checked objects.

Input is what Hydra composed, as plain dictionaries: the base configuration and the options of each
group that some axis names.  `Schema.resolve(candidate)` merges them as Hydra would have done for
that candidate alone (a test checks it against Hydra), fills every default in, and builds the specs.
Sections are memoised: a grid of 43,000 candidates builds each model, data type and task once.

A value that a section does not have is dropped from that candidate (16 bit has no block size, `int`
has no exponent bits); the plan counts what thereby became equal.  A key that no candidate of a
grid has is a mistake, and is answered with the nearest one.
"""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from quantsweep.checkpoints import headers
from quantsweep.checkpoints.pins import Pins
from quantsweep.checkpoints.sources import plain_name
from quantsweep.checks import whole_seed
from quantsweep.errors import ConfigurationError, EvaluationError, ModelError, TextError
from quantsweep.planning.convert import Config, T, convert, convert_value
from quantsweep.trial import identity
from quantsweep.trial.constraints import problem_of_levels, reason_to_skip
from quantsweep.trial.declared import CAPABILITIES, check_component
from quantsweep.trial.specs import (
    BASELINE,
    BASELINE_BITS,
    CHANNEL_NEEDS_INPUT,
    LEVELS,
    PERPLEXITY,
    ROUND_TO_NEAREST,
    BlockAxis,
    BlockSize,
    CalibrationSpec,
    ModelSpec,
    PlantedOutliers,
    QuantizationSpec,
    StepSpec,
    TaskSpec,
    TextSource,
    TrialSpec,
    content_hash,
    options_tuple,
)
from quantsweep.trial.task_identity import read_own_tasks

Text = typing.TypeVar("Text", bound=TextSource)

SECTIONS = ("model", "method", "data_type", "calibration", "task")
"""Groups that make up a trial and its tasks; each may be an axis."""

QUANTIZATION_KEYS = ("bit_width", "block_size", "block_axis", "symmetric", "scale_dtype")
TASK_KEYS = ("limit", "num_fewshot")
AXIS_KEYS = (*SECTIONS, *QUANTIZATION_KEYS, *TASK_KEYS, "seed")
"""What may vary inside a sweep (besides dotted keys of sections); the rest is set once a launch."""

NO_CALIBRATION = "none"
AUTO = "auto"
"""The block size that means the data type's own (null means one scale an output channel)."""


# --- a candidate --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What one candidate came to: a trial with its tasks, or the reason why it means nothing."""

    trial: TrialSpec | None
    tasks: tuple[TaskSpec, ...]
    reason: str | None
    description: str


class Schema:
    """Turns candidates into trials.

    base: the composed configuration with everything typed as a single value already in it.
    options: for each section, the yaml of each option that an axis names (and each task of a suite).
    typed: single values typed on the command line, by dotted key; they also apply to the options of an axis.
    pins: the commits that models of the hub stand for where their yaml names none.
    """

    def __init__(self, base: Config, options: Mapping[str, Mapping[str, Config]], typed: Config, pins: Pins | None = None) -> None:
        self._pins = pins or Pins()
        self._base = base
        self._options = options
        self._typed = {key: value for key, value in typed.items() if "." in key}
        self._memo: dict[tuple[Any, ...], Any] = {}
        self.seen_keys: set[str] = set()
        """Dotted axis keys that some candidate had; the plan refuses those that none had."""

    # Section configuration -------------------------------------------------------------------------------------------

    def section(self, name: str, candidate: Config) -> Config:
        """The configuration of one section for one candidate, merged as Hydra would."""
        dotted = tuple((key, candidate[key]) for key in self._dotted_keys(name, tuple(candidate)))
        memo_key = ("section", name, candidate.get(name), dotted)
        found = self._memo.get(memo_key)
        if found is None:
            found = self._memo[memo_key] = self._merge_section(name, candidate.get(name), dotted)
        merged, seen = found
        if seen:
            self.seen_keys.update(seen)
        return typing.cast("Config", merged)

    def _dotted_keys(self, name: str, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Those keys of a candidate that reach into a section; all candidates of a grid have the same keys."""
        return self._memoised(("dotted", name, keys), lambda: tuple(key for key in keys if key.startswith(f"{name}.")))

    def _merge_section(self, name: str, option: str | None, dotted: tuple[tuple[str, Any], ...]) -> tuple[Config, tuple[str, ...]]:
        config = copy.deepcopy(dict(self._base[name] if option is None else self._options[name][option]))
        if name in CAPABILITIES:
            check_component(name, config)
        typed = () if option is None else tuple((k, v) for k, v in self._typed.items() if k.startswith(f"{name}."))
        axis_keys = {key for key, _ in dotted}
        applied = [
            key for key, value in (*(t for t in typed if t[0] not in axis_keys), *dotted) if _set_path(config, key.split(".")[1:], value)
        ]
        return config, tuple(applied)

    def _value(self, key: str, candidate: Config) -> Any:
        return candidate[key] if key in candidate else self._base[key]

    # Specs -----------------------------------------------------------------------------------------------------------

    def resolve(self, candidate: Config) -> Resolved:
        """The trial and tasks of one candidate; raises ConfigurationError for values that cannot be."""
        model = self.model(candidate)
        quantization, reason = self.quantization(candidate)
        tasks = self.tasks(candidate)
        if model.unavailable is not None:
            reason = f"model {model.name} is unavailable: {model.unavailable}"
        method = self.section("method", candidate)
        trial = TrialSpec(
            model=model,
            quantization=quantization,
            calibration=self.calibration(candidate, method["name"]) if method["capabilities"]["needs_calibration"] else None,
            seed=self._seed(candidate, method),
        )
        return Resolved(trial=None if reason else trial, tasks=tasks, reason=reason, description=trial.label)

    def model(self, candidate: Config) -> ModelSpec:
        """The model of a candidate, with the identity of its content where that is known."""
        config = self.section("model", candidate)
        return self._memoised(("model", id(config)), lambda: build_model(config, self._pins))

    def quantization(self, candidate: Config) -> tuple[QuantizationSpec, str | None]:
        """How a candidate quantizes, and the reason why that means nothing (None if it does)."""
        method, data_type = self.section("method", candidate), self.section("data_type", candidate)
        scalars = {key: self._value(key, candidate) for key in QUANTIZATION_KEYS}
        none = self._options["method"][BASELINE]
        key = ("quantization", id(method), id(data_type), *scalars.values())
        return self._memoised(key, lambda: build_quantization(method, data_type, scalars, none))

    def calibration(self, candidate: Config, method: str) -> CalibrationSpec:
        """The calibration text of a candidate, which its method needs."""
        config = self.section("calibration", candidate)
        if config.get("name") == NO_CALIBRATION:
            raise ConfigurationError(f"method {method} needs calibration text, got calibration={NO_CALIBRATION}; give calibration=…")
        return self._memoised(("calibration", id(config)), lambda: build_calibration(config, self._pins))

    def tasks(self, candidate: Config) -> tuple[TaskSpec, ...]:
        """The tasks of a candidate: one, or those of a suite, with the run's limit and few-shot count."""
        config = self.section("task", candidate)
        overrides = {key: self._value(key, candidate) for key in TASK_KEYS}
        return self._memoised(("tasks", id(config), *overrides.values()), lambda: self._build_tasks(config, overrides))

    def _seed(self, candidate: Config, method: Config) -> int | None:
        """The seed of a candidate where its method uses one; what is no seed is a mistake under any method."""
        seed = self._value("seed", candidate)
        whole_seed("seed", seed)
        if not method["capabilities"]["uses_seed"]:
            return None
        if seed is None:
            raise ConfigurationError(f"method {method['name']} needs a seed, got null; write seed=0")
        return typing.cast("int", seed)

    def _build_tasks(self, config: Config, overrides: Config) -> tuple[TaskSpec, ...]:
        """The tasks of a suite, each once, or the one that `config` is."""
        members = [self._options["task"][name] for name in suite_members(config)] or [config]
        own = self._own_contents()
        tasks = [build_task(member, overrides, own.get(str(member.get("lm_eval_task"))), self._pins) for member in members]
        return tuple({task.task_key: task for task in tasks}.values())

    def _own_contents(self) -> dict[str, str]:
        """The identity of those tasks that the user's folder defines; all of a launch are read at once, since that loads their data."""
        if not self._base["task_path"]:
            return {}
        asked = [
            str(config["lm_eval_task"]) for config in (self._base["task"], *self._options["task"].values()) if config.get("lm_eval_task")
        ]
        folder = Path(str(self._base["task_path"])).expanduser()

        def read() -> dict[str, str]:
            try:
                return read_own_tasks(folder).contents(dict.fromkeys(asked))
            except EvaluationError as error:
                raise ConfigurationError(str(error)) from error

        return self._memoised(("own tasks",), read)

    def _memoised(self, key: tuple[Any, ...], build: typing.Callable[[], T]) -> T:
        # Sections come out of `section` as the same objects again and again: their identity is a
        # sound and fast part of a key, since the memo keeps them alive.
        if key not in self._memo:
            self._memo[key] = build()
        return typing.cast("T", self._memo[key])


def _set_path(config: dict[str, Any], path: list[str], value: Any) -> bool:
    """Set a nested value if its place exists; False (and nothing changed) if it does not."""
    node: Any = config
    for part in path[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or path[-1] not in node:
        return False
    node[path[-1]] = list(value) if isinstance(value, tuple) else value
    return True


# --- builders -------------------------------------------------------------------------------------------------------------


def build_model(config: Config, pins: Pins | None = None) -> ModelSpec:
    """A ModelSpec from a model yaml; hashes local weight files (remembered between runs), and fills a pinned commit in."""
    data = dict(config)
    if data.get("name") is None:
        data["name"] = _model_name(data)
    data["plant_outliers"] = _planted(data.get("plant_outliers"))
    spec = convert(ModelSpec, data, f"model {data['name']}")
    if spec.unavailable is not None:
        return spec
    revision = spec.revision
    if revision is None and spec.hub_id is not None and pins is not None:
        revision = pins.revision(spec.hub_id)
    content = _content(spec.path, spec.gguf_file, spec.hub_id, revision)
    found = {"revision": revision, "content": content, "path": _anywhere(spec.path)}
    return ModelSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)} | found)


def _anywhere(path: str | None) -> str | None:
    """A relative path as an absolute one, since jobs may start in another folder; others say where they are."""
    return path if path is None or path.startswith(("/", "~", "$", identity.PACKAGE_SCHEME)) else str(Path(path).absolute())


def _model_name(data: Config) -> str:
    source = data.get("path") or data.get("hub_id")
    if not source:
        raise ConfigurationError("model: give model.path=/folder/of/a/model or model.hub_id=organisation/name")
    return plain_name(Path(str(source)).name)


def _planted(config: Any) -> Any:
    """What of `plant_outliers` was given; None for the plain model, which a scale of 1 is too: equal trials are to be equal."""
    if not isinstance(config, Mapping):
        return config
    given = {key: value for key, value in config.items() if value is not None}
    if given.get("scale") != 1 or isinstance(given["scale"], bool):
        return given or None
    convert(PlantedOutliers, {"channels": 1, **given, "scale": 2.0}, "model.plant_outliers")  # the other values are checked all the same
    return None


@cache
def _content(path: str | None, gguf_file: str | None, hub_id: str | None, revision: str | None) -> str | None:
    if path is None:
        return identity.hub_content(typing.cast("str", hub_id), revision)
    try:
        folder = identity.resolve_path(path)
        if gguf_file is None:
            headers.check_folder(folder)
        return identity.local_content(folder, gguf_file)
    except ModelError as error:
        raise ConfigurationError(str(error)) from error
    except OSError as error:
        raise ConfigurationError(f"model folder {path} cannot be read: {error}") from error


def build_quantization(method: Config, data_type: Config, scalars: Config, none: Config) -> tuple[QuantizationSpec, str | None]:
    """The QuantizationSpec of one combination with every default written out, and the reason to skip it, if any."""
    bit_width = convert_value(int, scalars["bit_width"], "bit_width")
    if bit_width >= BASELINE_BITS and not bit_width == BASELINE_BITS:
        raise ConfigurationError(f"bit_width must be at most {BASELINE_BITS} (the unquantized baseline), got {bit_width}")
    if method["name"] == BASELINE:
        return QuantizationSpec(rounding=StepSpec(BASELINE, none["version"])), None
    if not method["capabilities"]["needs_data_type"]:
        alone = QuantizationSpec(rounding=_step(method))
        return alone, reason_to_skip(alone, {}, method["capabilities"])
    caps = data_type["capabilities"]
    if bit_width == BASELINE_BITS and method["name"] == ROUND_TO_NEAREST and BASELINE_BITS not in caps["bit_widths"]:
        return QuantizationSpec(rounding=StepSpec(BASELINE, none["version"])), None
    block_size = caps["block_size"] if scalars["block_size"] == AUTO else _block_size(scalars["block_size"])
    axis = caps["block_axis"] if scalars["block_axis"] is None else convert_value(BlockAxis, scalars["block_axis"], "block_axis")
    if block_size is None and axis == "flat":  # a combination that means nothing, like any other: what it would be, and why not
        described, _ = build_quantization(method, data_type, {**scalars, "block_axis": "input"}, none)
        return described, CHANNEL_NEEDS_INPUT
    spec = QuantizationSpec(
        rounding=_step(method),
        data_type=data_type["name"],
        data_type_version=data_type["version"],
        data_type_options=options_tuple(_option_defaults(data_type, bit_width)),
        bit_width=bit_width,
        block_size=block_size,
        # One scale for the whole tensor has no direction: written in one way, so that equal trials are equal.
        block_axis="flat" if block_size == "tensor" else axis,
        symmetric=caps["symmetric"][0] if scalars["symmetric"] is None else convert_value(bool, scalars["symmetric"], "symmetric"),
        scale_dtype=caps["scale_dtype"] if scalars["scale_dtype"] is None else convert_value(str, scalars["scale_dtype"], "scale_dtype"),
    )
    return spec, reason_to_skip(spec, caps, method["capabilities"])


def _step(config: Config) -> StepSpec:
    return StepSpec(config["name"], config["version"], options_tuple(config["options"]))


def _block_size(value: Any) -> BlockSize:
    try:
        return typing.cast("BlockSize", convert_value(BlockSize, value, "block_size"))
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}; {AUTO!r} is the data type's own") from error


def _option_defaults(data_type: Config, bit_width: int) -> dict[str, Any]:
    """Options with those defaults filled in that depend on the bit width (`defaults_by_bit_width` of the yaml)."""
    by_width = data_type["capabilities"].get("defaults_by_bit_width", {})
    return {
        key: by_width[key].get(bit_width) if value is None and key in by_width else _as_listed(key, value, data_type)
        for key, value in data_type["options"].items()
    }


def _as_listed(key: str, value: Any, data_type: Config) -> Any:
    """Refuse what only equals a listed value: 2.0 and true are not 2 and 1, and would make another trial of the same numbers."""
    if key == LEVELS:
        return _as_levels(value, data_type)
    allowed = data_type["capabilities"].get("options", {}).get(key) or ()
    if value in allowed and not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ConfigurationError(
            f"data_type.options.{key} must be one of {', '.join(map(str, allowed))}, got {value!r} ({type(value).__name__})"
        )
    return value


def _as_levels(value: Any, data_type: Config) -> tuple[float, ...]:
    """The levels of a codebook written in one way (1 is 1.0, -0.0 is 0.0), so that equal trials are equal."""
    if problem := problem_of_levels(value):
        raise ConfigurationError(f"data_type {data_type['name']}: {problem}")
    return tuple(float(level) + 0.0 for level in value)


def suite_members(config: Config) -> Sequence[str]:
    """Names of a suite's tasks; none for a task of its own.  A suite has nothing else: what is set of it would reach no task."""
    if "suite" not in config:
        return ()
    if not isinstance(config["suite"], list) or not config["suite"]:
        raise ConfigurationError(f"task.suite must be a list of tasks: task.suite=[mini_ppl,mini_cloze]; got {config['suite']!r}")
    if others := sorted(set(config) - {"suite"}):
        raise ConfigurationError(f"task: a suite of tasks has no {', '.join(others)}; limit=5 and num_fewshot=2 hold for all its tasks")
    return typing.cast("list[str]", config["suite"])


def build_task(config: Config, overrides: Config, own_content: str | None, pins: Pins) -> TaskSpec:
    """A TaskSpec from a task yaml; `limit` and `num_fewshot` of the run win over the yaml's where they are set."""
    data = {**config, **{key: value for key, value in overrides.items() if value is not None}}
    spec = convert(TaskSpec, {**data, "own_content": own_content}, f"task {config.get('name')}")
    if spec.kind != PERPLEXITY:
        return spec
    known = with_text(spec, pins)
    bundled = spec.path is None or spec.path.startswith(identity.PACKAGE_SCHEME)
    return known if bundled else replace(known, own_content=content_hash([known.content, known.column], 8))


def build_calibration(config: Config, pins: Pins) -> CalibrationSpec:
    """A CalibrationSpec from a yaml, with the identity of its text where that is known."""
    return with_text(convert(CalibrationSpec, config, f"calibration {config.get('name')}"), pins)


def with_text(spec: Text, pins: Pins) -> Text:
    """The spec with the identity of its text: the hash of a file (remembered between runs), or the commit that is pinned for a data set."""
    if spec.path is not None:
        return replace(spec, path=_anywhere(spec.path), content=_text_content(spec.path))
    revision = spec.revision or pins.text_revision(spec)
    return replace(spec, revision=revision, content=identity.hub_text_content(str(spec.hub_id), revision, str(spec.files)))


@cache
def _text_content(path: str) -> str:
    try:
        return identity.text_content(path)
    except TextError as error:
        raise ConfigurationError(str(error)) from error
    except OSError as error:
        raise ConfigurationError(f"text {path} cannot be read: {error}") from error


def unknown_key(key: str, known: typing.Iterable[str]) -> str:
    """The message for a key that the configuration does not have."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    hint = (
        f" Did you mean {' or '.join(repr(n) for n in near)}?"
        if near
        else f" Top-level keys: {', '.join(n for n in names if '.' not in n)}"
    )
    return f"unknown key '{key}'.{hint}"
