"""Which combinations mean nothing, and why: pure predicates over what the yamls declare.

Planning asks `reason_to_skip` for every candidate; it imports no torch.  A data type's capabilities are

    bit_widths, block_axes, symmetric, scale_dtypes, options     lists of allowed values (an option's list may be null: any)
    block_axis, block_size, scale_dtype                          the data type's own, where nothing else is asked
    rules                                          [{when: {key: values, …}, need: {key: values, …}, because: text}]

where the keys of a rule are bit_width, block_size, block_axis, symmetric, scale_dtype and the names
of options.  A rule applies when every `when` holds, and is broken when some `need` does not.  A
method's capabilities name the data types that it works with (`data_types`, null: all), and may bound
its options (`ranges`: {option: [low, high]}, both ends excluded).  Levels that a yaml lists
(`quantsweep.data_types.codebook`) are checked here too.

The same limits stand in the code of each data type, which refuses by itself; a contract test holds
the two against each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantsweep.trial.specs import LEVELS, QuantizationSpec

Capabilities = Mapping[str, Any]


def reason_to_skip(quantization: QuantizationSpec, data_type_capabilities: Capabilities, method_capabilities: Capabilities) -> str | None:
    """A sentence that says why this combination means nothing, or None if it can be run.

    >>> reason_to_skip(spec, data_type["capabilities"], method["capabilities"])
    "data_type 'int' supports bit_width 2–8; got 1. Nearest: bit_width=2"
    """
    if quantization.is_baseline:
        return None
    reason = _method_reason(quantization, method_capabilities)
    return reason if reason or quantization.data_type is None else _data_type_reason(quantization, data_type_capabilities)


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


def _method_reason(quantization: QuantizationSpec, capabilities: Capabilities) -> str | None:
    whom = f"method '{quantization.rounding.name}'"
    options = dict(quantization.rounding.options)
    for option, (low, high) in (capabilities.get("ranges") or {}).items():
        value = options[option]
        if not _is_number(value) or not low < value < high:
            return f"{whom} needs method.options.{option} above {low} and below {high}; got {_shown(value)}"
    allowed = capabilities.get("data_types")
    if allowed is None or quantization.data_type is None or quantization.data_type in allowed:
        return None
    return f"{whom} works with data_type {_listed(allowed)}; got {_shown(quantization.data_type)}"


def _data_type_reason(quantization: QuantizationSpec, capabilities: Capabilities) -> str | None:
    facts = _facts(quantization)
    if LEVELS in facts and (problem := problem_of_levels(facts[LEVELS], quantization.bit_width)):
        return f"data_type '{quantization.data_type}': {problem}"
    allowed = {
        "bit_width": capabilities["bit_widths"],
        "block_axis": capabilities["block_axes"],
        "symmetric": capabilities["symmetric"],
        "scale_dtype": capabilities["scale_dtypes"],
        **(capabilities.get("options") or {}),
    }
    whom = f"data_type '{quantization.data_type}'"
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


def _facts(quantization: QuantizationSpec) -> dict[str, Any]:
    return {
        **dict(quantization.data_type_options),
        "bit_width": quantization.bit_width,
        "block_size": quantization.block_size,
        "block_axis": quantization.block_axis,
        "symmetric": quantization.symmetric,
        "scale_dtype": quantization.scale_dtype,
    }


def _nearest(key: str, value: Any, choices: Sequence[Any]) -> str:
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
