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
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import yaml

from quantsweep.checkpoints import headers, planned_layers
from quantsweep.checkpoints.pins import Pins
from quantsweep.checkpoints.sources import plain_name
from quantsweep.checks import whole_seed
from quantsweep.convert import Config, T, convert, type_name
from quantsweep.errors import ComponentError, ConfigurationError, EvaluationError, ModelError, TextError
from quantsweep.planning.compositions import Composition, composition_of, label, step_names
from quantsweep.planning.quantizations import ACTIVATIONS, Parts, Quantization, build_quantization, chosen_steps
from quantsweep.storage.paths import product_root
from quantsweep.trial import identity
from quantsweep.trial.declared import CAPABILITIES, check_component
from quantsweep.trial.quantization import FACTORS, FORMAT, NONE
from quantsweep.trial.specs import (
    PERPLEXITY,
    CalibrationSpec,
    ModelSpec,
    PlantedOutliers,
    TaskSpec,
    TextSource,
    TrialSpec,
    content_hash,
)
from quantsweep.trial.task_identity import read_own_tasks

Text = typing.TypeVar("Text", bound=TextSource)

SECTIONS = ("model", "method", *FACTORS, "data_type", "calibration", "task")
"""Groups that make up a trial and its tasks; each may be an axis."""

LIST_KEY = "transform"
"""The section of which a value is a list of options."""
TASK_KEYS = ("limit", "num_fewshot")
AXIS_KEYS = (*SECTIONS, *FORMAT, *TASK_KEYS, "seed")
"""What may vary inside a sweep (besides dotted keys of sections); the rest is set once a launch."""

NO_CALIBRATION = "none"


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
    fixed: keys that the command line or a study's file gives one value: a method supplies nothing there.
    pins: the commits that models of the hub stand for where their yaml names none.
    """

    def __init__(
        self,
        base: Config,
        options: Mapping[str, Mapping[str, Config]],
        typed: Config,
        pins: Pins | None = None,
        fixed: Collection[str] = (),
    ) -> None:
        self._pins = pins or Pins()
        self._base = base
        self._fixed = frozenset(fixed)
        self._options = options
        self._typed = {key: value for key, value in typed.items() if "." in key}
        self._memo: dict[tuple[Any, ...], Any] = {}
        self.seen_keys: set[str] = set()
        """Dotted axis keys that some candidate had; the plan refuses those that none had."""

    # Section configuration -------------------------------------------------------------------------------------------

    def section(self, name: str, candidate: Config) -> Config:
        """The configuration of one section for one candidate, merged as Hydra would."""
        return self._part(name, name, candidate.get(name), candidate)

    def _part(self, place: str, name: str, option: str | None, candidate: Config) -> Config:
        """An option of a section (None: the base's) with what the candidate sets of it; place: under which its keys stand."""
        dotted = tuple((key, candidate[key]) for key in self._dotted_keys(place, tuple(candidate)))
        memo_key = ("section", place, option, dotted)
        found = self._memo.get(memo_key)
        if found is None:
            found = self._memo[memo_key] = self._merge_section(place, name, option, dotted)
        merged, seen = found
        if seen:
            self.seen_keys.update(seen)
        return typing.cast("Config", merged)

    def _dotted_keys(self, place: str, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Those keys of a candidate that reach into a section; all candidates of a grid have the same keys."""
        return self._memoised(("dotted", place, keys), lambda: tuple(key for key in keys if key.startswith(f"{place}.")))

    def _merge_section(
        self, place: str, name: str, option: str | None, dotted: tuple[tuple[str, Any], ...]
    ) -> tuple[Config, tuple[str, ...]]:
        config = copy.deepcopy(dict(self._base[name] if option is None else self._options[name][option]))
        if name in CAPABILITIES:
            try:
                check_component(name, config)
            except ConfigurationError as error:
                raise ComponentError(name, str(error)) from error
        typed = () if option is None else tuple((k, v) for k, v in self._typed.items() if k.startswith(f"{place}."))
        axis_keys = {key for key, _ in dotted}
        settings = (*(t for t in typed if t[0] not in axis_keys), *dotted)
        as_default = _as_default if name in FACTORS else _as_typed
        applied = [key for key, value in settings if _set_path(config, key, place, value, as_default)]
        return config, tuple(applied)

    def _value(self, key: str, candidate: Config) -> Any:
        return candidate[key] if key in candidate else self._base[key]

    # Specs -----------------------------------------------------------------------------------------------------------

    def resolve(self, candidate: Config) -> Resolved:
        """The trial and tasks of one candidate; raises ConfigurationError for values that cannot be."""
        model = self.model(candidate)
        whole = self.whole(candidate)
        quantization = self.quantization(whole)
        tasks = self.tasks(candidate)
        calibration = self.calibration(whole, quantization.calibrated) if quantization.calibrated else None
        reason = quantization.reason if model.unavailable is None else f"model {model.name} is unavailable: {model.unavailable}"
        trial = TrialSpec(
            model=model,
            quantization=quantization.spec,
            calibration=calibration,
            seed=self._seed(candidate, quantization.seeded),
        )
        reason = reason or planned_layers.problem_of_model(model, calibration, quantization.anatomical)
        return Resolved(trial=None if reason else trial, tasks=tasks, reason=reason, description=trial.label)

    def whole(self, candidate: Config) -> Config:
        """A candidate with what its method supplies of what nobody else chose."""
        method = self.method(candidate)
        return {**method.supplied(candidate, self._fixed), **candidate}

    def method(self, candidate: Config) -> Composition:
        """The composition behind a candidate's method."""
        config = self.section("method", candidate)
        return self._memoised(("method", id(config)), lambda: composition_of(config))

    def model(self, candidate: Config) -> ModelSpec:
        """The model of a candidate, with the identity of its content where that is known."""
        config = self.section("model", candidate)
        return self._memoised(("model", id(config)), lambda: build_model(config, self._pins))

    def quantization(self, candidate: Config) -> Quantization:
        """How a candidate (`whole`) quantizes, named as it was chosen."""
        steps = {factor: self.section(factor, candidate) for factor in FACTORS if factor != "transform"}
        data_type, transforms = self.section("data_type", candidate), self._transforms(candidate)
        scalars = {key: self._value(key, candidate) for key in FORMAT}
        named = self.method(candidate) if "method" in candidate or "method" in self._fixed else None
        key = ("quantization", id(named), id(data_type), *map(id, steps.values()), *map(id, transforms), *scalars.values())
        return self._memoised(key, lambda: self._build_quantization(named, steps, transforms, data_type, scalars))

    def _build_quantization(
        self, named: Composition | None, steps: dict[str, Config], transforms: tuple[Config, ...], data_type: Config, scalars: Config
    ) -> Quantization:
        formats = {
            factor: self._options["data_type"][str(steps[factor]["data_type"])] for factor in ACTIVATIONS if steps[factor]["name"] != NONE
        }
        found = build_quantization(
            Parts(
                rounding=steps.pop("rounding"),
                data_type=data_type,
                scalars=scalars,
                untouched=self._options["rounding"][NONE],
                transforms=transforms,
                steps=steps,
                formats=formats,
            )
        )
        return found if found.spec.is_baseline else replace(found, spec=found.spec.named(label(named, chosen_steps(found.spec))))

    def _transforms(self, candidate: Config) -> tuple[Config, ...]:
        """The rewritings of a candidate, in order; each is a section of its own, since their options are told apart by name."""
        names = step_names("transform", candidate.get("transform", self._base["transform"]["name"]))
        if len(set(names)) < len(names):
            raise ConfigurationError(f"transform={list(names)} names a step twice: each has one place in the order")
        return tuple(self._part(f"transform.{name}", "transform", name, candidate) for name in names)

    def calibration(self, candidate: Config, steps: Sequence[str]) -> CalibrationSpec:
        """The calibration text of a candidate, which some of its steps need."""
        config = self.section("calibration", candidate)
        if config.get("name") == NO_CALIBRATION:
            whom = f"{' and '.join(steps)} {'needs' if len(steps) == 1 else 'need'}"
            raise ConfigurationError(f"{whom} calibration text, got calibration={NO_CALIBRATION}; give calibration=…")
        return self._memoised(("calibration", id(config)), lambda: build_calibration(config, self._pins))

    def tasks(self, candidate: Config) -> tuple[TaskSpec, ...]:
        """The tasks of a candidate: one, or those of a suite, with the run's limit and few-shot count."""
        config = self.section("task", candidate)
        overrides = {key: self._value(key, candidate) for key in TASK_KEYS}
        return self._memoised(("tasks", id(config), *overrides.values()), lambda: self._build_tasks(config, overrides))

    def _seed(self, candidate: Config, steps: Sequence[str]) -> int | None:
        """The seed of a candidate where one of its steps draws; what is no seed is a mistake anywhere."""
        seed = self._value("seed", candidate)
        whole_seed("seed", seed)
        if not steps:
            return None
        if seed is None:
            raise ConfigurationError(f"{' and '.join(steps)} {'needs' if len(steps) == 1 else 'need'} a seed, got null; write seed=0")
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


def _set_path(config: dict[str, Any], key: str, place: str, value: Any, as_type: Callable[[str, Any, Any], Any]) -> bool:
    """Set a nested value if its place exists; False (and nothing changed) if it does not."""
    node: Any = config
    path = key.removeprefix(f"{place}.").split(".")
    for part in path[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or path[-1] not in node:
        return False
    node[path[-1]] = as_type(key, value, node[path[-1]])
    return True


def _as_typed(key: str, value: Any, default: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_default(key: str, value: Any, default: Any) -> Any:
    """A value of a step in the type of its default, so that equal trials are equal (1 is 1.0); null goes anywhere, and takes anything."""
    if default is None or value is None:
        return _as_typed(key, value, default)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, list):
        return list(value) if isinstance(value, tuple) else [value]
    if type(value) is not type(default):
        raise ConfigurationError(f"{key} must be {type_name(type(default))}, got {value!r} ({type(value).__name__})")
    return value


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
    parameters = spec.parameters if spec.parameters or spec.path is None or spec.gguf_file else _num_parameters(spec.path)
    found = {"revision": revision, "content": content, "path": _anywhere(spec.path), "parameters": parameters}
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
def _num_parameters(path: str) -> int:
    """How many parameters the weight files of a local folder say that they hold; for planning only."""
    return sum(prod(tensor.shape) for tensor in headers.read_tensors(identity.resolve_path(path)).values())


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
    if spec.path is not None and not spec.path.startswith(identity.PACKAGE_SCHEME):
        return replace(known, own_content=content_hash([known.content, known.column], 8))
    words = {key: getattr(spec, key) for key in _TEXT_WORDS}
    return known if words == _shipped_text(spec.name) else replace(known, own_content=content_hash(words, 8))


_TEXT_WORDS = ("hub_id", "files", "branch", "revision", "path", "column")
"""What says which text a perplexity is measured on."""


@cache
def _shipped_text(name: str) -> Config:
    """The text of the product's own task of this name; empty where there is none."""
    file = product_root() / "conf" / "task" / f"{name}.yaml"
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: found[key] for key in _TEXT_WORDS if key in found}


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
