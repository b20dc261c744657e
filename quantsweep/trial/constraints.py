"""Which combinations mean nothing, and why: pure predicates over what the yamls declare.

Planning asks `reason_to_skip` for every candidate; it imports no torch.  A data type's capabilities are

    bit_widths, block_axes, symmetric, scale_dtypes, options     lists of allowed values (an option's list may be null: any)
    block_axis, block_size, scale_dtype                          the data type's own, where nothing else is asked
    rules                                          [{when: {key: values, …}, need: {key: values, …}, because: text}]

where the keys of a rule are bit_width, block_size, block_axis, symmetric, scale_dtype and the names
of options.  A rule applies when every `when` holds, and is broken when some `need` does not.  A step's are

    data_types                     of a rounding: those that it works with (null: all)
    options                        {option: values that it may have}
    ranges, bounds                 {option: [low, high]}, both ends excluded; both ends included, null for no end
    needs, excludes                [{key: values, …, because: text}], keys: factors (steps by name), the weights' format, and
                                   options.<name> of the step itself; `when: {key: values, …}` of an entry says where it holds
    needs_anatomy                  true: of models whose blocks are described only (planning asks it of each model)

Levels that a yaml lists (`quantsweep.data_types.codebook`) are checked here too.

The same limits stand in the code of each data type, which refuses by itself; a contract test holds
the two against each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantsweep.trial.quantization import BASELINE_BITS, DEFAULT_STEPS, FORMAT, LEVELS, NONE, ActivationSpec, QuantizationSpec, StepSpec

Capabilities = Mapping[str, Any]
_NOTHING: Capabilities = {}
_UNQUANTIZED = f"{BASELINE_BITS} bits are the unquantized baseline, method={NONE}"


def reason_to_skip(
    quantization: QuantizationSpec,
    data_type: Capabilities,
    steps: Mapping[str, Capabilities],
    activations: Mapping[str, Capabilities] = _NOTHING,
) -> str | None:
    """A sentence that says why this combination means nothing, or None if it can be run.

    data_type: capabilities of the weights' data type; activations: the same for the factors activation and kv_cache.
    steps: capabilities of each step, by the place of its options: `rounding`, `transform.smooth`.

    >>> reason_to_skip(spec, data_type["capabilities"], {"rounding": rounding["capabilities"]})
    "data_type 'int' supports bit_width 2–8; got 1. Nearest: bit_width=2"
    """
    if quantization.is_baseline:
        return None
    facts = _facts_of_factors(quantization)
    for factor, chosen in quantization.steps.items():
        for step in chosen:
            place = place_of(factor, step.name)
            reason = _step_reason(factor, step, place, steps.get(place, _NOTHING), facts)
            if reason is not None:
                return reason
    if quantization.data_type is not None and (reason := _data_type_reason(quantization, data_type)) is not None:
        return reason
    formats = ((key, getattr(quantization, key)) for key in ("activation", "kv_cache"))
    reasons = (_activation_reason(key, spec, activations.get(key, _NOTHING)) for key, spec in formats if spec is not None)
    return next((reason for reason in reasons if reason is not None), None)


def place_of(factor: str, name: str) -> str:
    """Under which key the options of a step are typed: transforms are a list, so their names stand between."""
    return f"{factor}.{name}" if factor == "transform" else factor


def problem_of_levels(levels: object, bit_width: int | None = None) -> str | None:
    """What is wrong with the levels of a codebook (at `bit_width`, if given), as a sentence; None if nothing is.

    >>> problem_of_levels((-1.0, 0.0, 0.5, 1.0), 3)
    'its 4 levels are codes of 2 bits; got bit_width=3'
    """
    if not isinstance(levels, list | tuple) or not all(_is_number(level) and math.isfinite(level) for level in levels):
        return f"levels must be a list of numbers, got {levels!r}"
    falling = next(((a, b) for a, b in itertools.pairwise(levels) if a >= b), None)
    if falling:
        return f"levels must rise from one to the next, got {falling[0]} before {falling[1]}"
    if 0 not in levels:
        return "levels must contain 0, so that zeros stay zeros"
    if max(-levels[0], levels[-1]) != 1:
        return f"the largest magnitude of the levels must be 1, got {max(-levels[0], levels[-1])}: divide all of them by it"
    code_bits = (len(levels) - 1).bit_length()
    if bit_width not in (None, code_bits):
        return f"its {len(levels)} levels are codes of {code_bits} bits; got bit_width={bit_width}"
    return None


def _step_reason(factor: str, step: StepSpec, place: str, capabilities: Capabilities, facts: Mapping[str, tuple[Any, ...]]) -> str | None:
    whom = f"{factor} '{step.name}'"
    return (
        _option_reason(whom, place, dict(step.options), capabilities)
        or _data_types_reason(whom, capabilities.get("data_types"), facts)
        or _company_reason(whom, capabilities, {**facts, **{f"options.{key}": (value,) for key, value in step.options}})
    )


def _option_reason(whom: str, place: str, options: Mapping[str, Any], capabilities: Capabilities) -> str | None:
    for option, values in (capabilities.get("options") or {}).items():
        if values is not None and options[option] not in values:
            return f"{whom} supports {place}.options.{option} {_listed(values)}; got {_shown(options[option])}"
    for option, (low, high) in (capabilities.get("ranges") or {}).items():
        value = options[option]
        if not _is_number(value) or not low < value < high:
            return f"{whom} needs {place}.options.{option} above {low} and below {high}; got {_shown(value)}"
    for option, (low, high) in (capabilities.get("bounds") or {}).items():
        value = options[option]
        least, most = -math.inf if low is None else low, math.inf if high is None else high
        if not _is_number(value) or not least <= value <= most:
            ends = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
            return f"{whom} needs {place}.options.{option} {' and '.join(ends) or 'to be a number'}; got {_shown(value)}"
    return None


def _data_types_reason(whom: str, allowed: Sequence[str] | None, facts: Mapping[str, tuple[Any, ...]]) -> str | None:
    (data_type,) = facts["data_type"]
    if allowed is None or data_type is None or data_type in allowed:
        return None
    return f"{whom} works with data_type {_listed(allowed)}; got {_shown(data_type)}"


def _company_reason(whom: str, capabilities: Capabilities, facts: Mapping[str, tuple[Any, ...]]) -> str | None:
    """Why a step cannot be beside another, or without it."""
    for entry in _that_hold(capabilities.get("needs"), facts):
        for key, values in _conditions(entry):
            if not _common(facts[key], values):
                return f"{whom}{_case(entry, facts)} needs {key} {_listed(values)}; got {_together(facts[key])}: {entry['because']}"
    for entry in _that_hold(capabilities.get("excludes"), facts):
        for key, values in _conditions(entry):
            if both := _common(facts[key], values):
                baseline = f" ({_UNQUANTIZED})" if (key, both) == ("rounding", [NONE]) else ""
                return f"{whom}{_case(entry, facts)} excludes {key} {_listed(both)}{baseline}: {entry['because']}"
    return None


def _that_hold(entries: Sequence[Mapping[str, Any]] | None, facts: Mapping[str, tuple[Any, ...]]) -> list[Mapping[str, Any]]:
    """The entries without a `when`, and those of which every condition holds."""
    return [each for each in entries or () if all(_common(facts[key], values) for key, values in each.get("when", {}).items())]


def _conditions(entry: Mapping[str, Any]) -> list[tuple[str, Sequence[Any]]]:
    return [(key, values) for key, values in entry.items() if key not in ("when", "because")]


def _common(found: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    return [value for value in found if value in values]


def _case(entry: Mapping[str, Any], facts: Mapping[str, tuple[Any, ...]]) -> str:
    case = ", ".join(f"{key}={_together(facts[key])}" for key in entry.get("when", {}))
    return f" with {case}" if case else ""


def _together(values: Sequence[Any]) -> str:
    return " and ".join(map(_shown, values))


def _facts_of_factors(quantization: QuantizationSpec) -> dict[str, tuple[Any, ...]]:
    """The names of each factor's steps, and the weights' format, as `needs` and `excludes` ask for them."""
    chosen = quantization.steps
    facts: dict[str, tuple[Any, ...]] = {
        factor: tuple(step.name for step in chosen[factor]) if factor in chosen else (default if factor != "rounding" else NONE,)
        for factor, default in DEFAULT_STEPS.items()
    }
    return facts | {key: (getattr(quantization, key),) for key in ("data_type", *FORMAT)}


def _data_type_reason(quantization: QuantizationSpec, capabilities: Capabilities) -> str | None:
    facts = {**dict(quantization.data_type_options), **{key: getattr(quantization, key) for key in FORMAT}}
    return _format_reason(f"data_type '{quantization.data_type}'", facts, capabilities, FORMAT)


def _activation_reason(factor: str, spec: ActivationSpec, capabilities: Capabilities) -> str | None:
    facts = {**dict(spec.data_type_options), "bit_width": spec.bit_width, "symmetric": spec.symmetric, "block_size": spec.block_size}
    return _format_reason(f"{factor} '{spec.step.name}' in data_type '{spec.data_type}'", facts, capabilities, ("bit_width", "symmetric"))


_ALLOWED = {"bit_width": "bit_widths", "block_axis": "block_axes", "symmetric": "symmetric", "scale_dtype": "scale_dtypes"}


def _format_reason(whom: str, facts: Mapping[str, Any], capabilities: Capabilities, keys: Sequence[str]) -> str | None:
    """What a data type cannot do of what is asked of it; `keys`: those of the format that are asked."""
    if LEVELS in facts and (problem := problem_of_levels(facts[LEVELS], facts["bit_width"])):
        return f"{whom}: {problem}"
    allowed = {key: capabilities[word] for key, word in _ALLOWED.items() if key in keys} | (capabilities.get("options") or {})
    for key, values in allowed.items():
        if values is not None and facts.get(key) not in values:
            return f"{whom} supports {key} {_listed(values)}; got {_shown(facts.get(key))}.{_nearest(key, facts.get(key), values)}"
    return next((reason for rule in capabilities.get("rules") or () if (reason := _broken(rule, facts, whom))), None)


def _broken(rule: Mapping[str, Any], facts: Mapping[str, Any], whom: str) -> str | None:
    if not all(facts.get(key) in values for key, values in rule["when"].items()):
        return None
    for key, values in rule["need"].items():
        if facts.get(key) not in values:
            case = ", ".join(f"{when}={_shown(facts.get(when))}" for when in rule["when"])
            return f"{whom} with {case} supports {key} {_listed(values)}; got {_shown(facts.get(key))}: {rule['because']}"
    return None


def _nearest(key: str, value: Any, choices: Sequence[Any]) -> str:
    if key == "bit_width" and value == BASELINE_BITS:
        return f" {_UNQUANTIZED}"
    numbers = [choice for choice in choices if _is_number(choice)]
    if not _is_number(value) or not numbers:
        return ""
    distance: Callable[[Any], float] = lambda choice: abs(choice - value)  # noqa: E731 - a name for the type checker
    return f" Nearest: {key}={min(numbers, key=distance)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(values: Sequence[Any]) -> str:
    """`2–8` for a run of integers, otherwise `a, b or c`."""
    if len(values) > 2 and all(_is_number(v) for v in values) and list(values) == list(range(values[0], values[0] + len(values))):
        return f"{values[0]}–{values[-1]}"
    shown = [_shown(value) for value in values]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _shown(value: Any) -> str:
    """A value as it is typed: null, true, 3, gptq."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
