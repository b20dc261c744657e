"""From the chosen components of a candidate to one QuantizationSpec, every default written out, and the reason why it means nothing.

What moves nothing is left out, so that equal trials are equal: a step at the values that its yaml calls `no_op`, 16-bit codes of
round to nearest, activations of 16 bits, and whatever belongs to a rounding where there is none.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantsweep.convert import Config, convert_value
from quantsweep.errors import ConfigurationError
from quantsweep.planning.compositions import step_names
from quantsweep.trial.canonical import options_tuple
from quantsweep.trial.constraints import place_of, problem_of_levels, reason_to_skip
from quantsweep.trial.quantization import (
    BASELINE_BITS,
    CHANNEL_NEEDS_INPUT,
    DEFAULT_STEPS,
    LEVELS,
    NONE,
    OF_WEIGHTS,
    ROUND_TO_NEAREST,
    ActivationSpec,
    BlockAxis,
    BlockSize,
    QuantizationSpec,
    StepSpec,
)

AUTO = "auto"
"""The block size that means the data type's own (null means one scale an output channel)."""
ACTIVATIONS = ("activation", "kv_cache")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a candidate chose, as the yamls of components with everything set that is to be set.

    scalars: the keys of the weights' format.  steps: factor to step, but for transforms, which are a list.
    formats: the data type of each of ACTIVATIONS that has one.  untouched: the rounding `none`.
    """

    rounding: Config
    data_type: Config
    scalars: Config
    untouched: Config
    transforms: Sequence[Config] = ()
    steps: Mapping[str, Config] = field(default_factory=dict)
    formats: Mapping[str, Config] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A spec, why it means nothing (None if it does), and its steps that look at calibration text, use a seed or need a model's anatomy."""

    spec: QuantizationSpec
    reason: str | None
    calibrated: tuple[str, ...] = ()
    seeded: tuple[str, ...] = ()
    anatomical: tuple[str, ...] = ()


def build_quantization(parts: Parts) -> Quantization:
    """The quantization of one combination; raises ConfigurationError for values that cannot be."""
    chosen: dict[str, Config] = {}  # the steps that do something, by the place of their options
    weights, reason = _weights(parts)
    rounds = weights["rounding"].name != NONE
    if rounds:
        chosen["rounding"] = parts.rounding
    fields: dict[str, Any] = {}
    for factor in OF_WEIGHTS:
        config = parts.steps.get(factor)
        if config is not None and rounds and (step := _effective(factor, config)) is not None:
            fields[factor], chosen[factor] = step, config
    transforms = [(config, step) for config in parts.transforms if (step := _effective("transform", config)) is not None]
    chosen |= {place_of("transform", step.name): config for config, step in transforms}
    for factor in ACTIVATIONS:
        if factor in parts.formats and (spec := _activation(factor, parts.steps[factor], parts.formats[factor])) is not None:
            fields[factor], chosen[factor] = spec, parts.steps[factor]
    scope = tuple(sorted((str(k), str(v)) for k, v in (parts.steps["scope"].get("layers") or {}).items())) if "scope" in parts.steps else ()
    quantization = QuantizationSpec(**weights, **fields, transforms=tuple(step for _, step in transforms), scope=scope)
    capabilities = {place: config["capabilities"] for place, config in chosen.items()}
    return Quantization(
        spec=quantization,
        reason=reason
        or reason_to_skip(
            quantization,
            parts.data_type["capabilities"],
            capabilities,
            {factor: config["capabilities"] for factor, config in parts.formats.items()},
        ),
        calibrated=tuple(f"{_factor(place)} {c['name']}" for place, c in chosen.items() if c["capabilities"]["needs_calibration"]),
        seeded=tuple(f"{_factor(place)} {c['name']}" for place, c in chosen.items() if c["capabilities"]["uses_seed"]),
        anatomical=tuple(f"{_factor(place)} {c['name']}" for place, c in chosen.items() if c["capabilities"].get("needs_anatomy")),
    )


def chosen_steps(spec: QuantizationSpec) -> dict[str, tuple[str, ...]]:
    """The names of each factor's steps, as `Composition.steps` has them; a scope is told by its own name."""
    found = {factor: tuple(step.name for step in steps) for factor, steps in spec.steps.items()}
    return {factor: step_names(factor, default) for factor, default in DEFAULT_STEPS.items()} | found


def _factor(place: str) -> str:
    return place.partition(".")[0]


def step_of(config: Config) -> StepSpec:
    """A step with all its options."""
    return StepSpec(config["name"], config["version"], options_tuple(config["options"]))


def _effective(factor: str, config: Config) -> StepSpec | None:
    """The step; None for the factor's default, and for one that moves nothing."""
    if config["name"] == DEFAULT_STEPS[factor]:
        return None
    idle: Mapping[str, Any] = config.get("no_op") or {}
    options = config["options"]
    if idle and all(options[key] == value and isinstance(options[key], bool) is isinstance(value, bool) for key, value in idle.items()):
        return None
    return step_of(config)


# --- the weights ----------------------------------------------------------------------------------------------------------


def _weights(parts: Parts) -> tuple[dict[str, Any], str | None]:
    """How weights become codes, as fields of a QuantizationSpec, and what is wrong with it that no spec can say."""
    rounding, data_type, scalars = parts.rounding, parts.data_type, parts.scalars
    bit_width = convert_value(int, scalars["bit_width"], "bit_width")
    if bit_width > BASELINE_BITS:
        raise ConfigurationError(f"bit_width must be at most {BASELINE_BITS} (the unquantized baseline), got {bit_width}")
    caps = data_type["capabilities"]
    is_idle = bit_width == BASELINE_BITS and rounding["name"] == ROUND_TO_NEAREST and BASELINE_BITS not in caps["bit_widths"]
    if rounding["name"] == NONE or is_idle:
        return {"rounding": step_of(parts.untouched)}, None
    if not rounding["capabilities"]["needs_data_type"]:
        return {"rounding": step_of(rounding)}, None
    block_size = caps["block_size"] if scalars["block_size"] == AUTO else _block_size(scalars["block_size"])
    axis = caps["block_axis"] if scalars["block_axis"] is None else convert_value(BlockAxis, scalars["block_axis"], "block_axis")
    needs_input = block_size is None and axis == "flat"  # a combination that means nothing, like any other: what it would be, and why not
    fields = {
        "rounding": step_of(rounding),
        **_format(data_type, bit_width),
        "bit_width": bit_width,
        "block_size": block_size,
        # One scale for the whole tensor has no direction: written in one way, so that equal trials are equal.
        "block_axis": "input" if needs_input else "flat" if block_size == "tensor" else axis,
        "symmetric": caps["symmetric"][0] if scalars["symmetric"] is None else convert_value(bool, scalars["symmetric"], "symmetric"),
        "scale_dtype": caps["scale_dtype"] if scalars["scale_dtype"] is None else convert_value(str, scalars["scale_dtype"], "scale_dtype"),
    }
    return fields, CHANNEL_NEEDS_INPUT if needs_input else None


def _format(data_type: Config, bit_width: int) -> dict[str, Any]:
    return {
        "data_type": data_type["name"],
        "data_type_version": data_type["version"],
        "data_type_options": options_tuple(_option_defaults(data_type, bit_width)),
    }


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


# --- activations ----------------------------------------------------------------------------------------------------------


def _activation(factor: str, config: Config, data_type: Config) -> ActivationSpec | None:
    """How activations become codes; None for 16 bits, which change nothing."""
    step = _effective(factor, config)
    bit_width = convert_value(int, config["bit_width"], f"{factor}.bit_width")
    if step is None or (bit_width == BASELINE_BITS and BASELINE_BITS not in data_type["capabilities"]["bit_widths"]):
        return None
    asked = {key: value for key, value in config["data_type_options"].items() if value is not None and key in data_type["options"]}
    typed = {**data_type, "options": {**data_type["options"], **asked}}
    return ActivationSpec(
        step=step,
        **_format(typed, bit_width),
        bit_width=bit_width,
        symmetric=convert_value(bool, config["symmetric"], f"{factor}.symmetric"),
        block_size=convert_value(int | None, config["block_size"], f"{factor}.block_size"),
        clip_percentile=convert_value(float | None, config["clip_percentile"], f"{factor}.clip_percentile"),
        # A set of places: written in one way, so that equal trials are equal.
        sites=tuple(sorted(set(convert_value(tuple[str, ...], config["sites"], f"{factor}.sites")))),
    )
