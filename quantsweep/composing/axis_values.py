"""The values of one axis, from Hydra's own grammar (`3,4,8`, `range(3,9)`, `glob(mini-*)`) or from a study's yaml."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, RangeSweep, Sweep
from hydra.errors import HydraException

from quantsweep.checkpoints.sources import folders_of, is_source
from quantsweep.errors import ConfigurationError

MOST_VALUES = 100_000
"""Of one range: more are a slip in its bounds."""


def yaml_values(key: str, value: Any, known: Sequence[str]) -> tuple[Any, ...]:
    """An axis in a study: a list, one value, or text in Hydra's sweep grammar."""
    if isinstance(value, str):
        return override_values(_parsed(key, value), known)
    values = value if isinstance(value, list) else [value]
    flat: list[Any] = []
    for item in values:
        is_sweep = isinstance(item, str) and "(" in item and "/" not in item
        flat += override_values(_parsed(key, item), known) if is_sweep else [hashable(item)]
    return _unique(key, flat)


def _parsed(key: str, text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        raise ConfigurationError(
            f"{key}: cannot read {text!r}; write a list, range(start,stop,step) or glob(pattern), in quotes where it stands in braces"
        ) from error


def is_found(text: object) -> bool:
    """True for a pattern: its values are whatever is there."""
    return isinstance(text, str) and text.startswith("glob(")


def override_values(override: Override, known: Iterable[str]) -> tuple[Any, ...]:
    """The values of one override, single or swept; a glob must match something."""
    key = override.key_or_group
    if not override.is_sweep_override():
        return (hashable(override.value()),)
    if not override.is_discrete_sweep():
        raise ConfigurationError(f"{override.input_line}: an interval has no end of values; give a list or range(start,stop,step)")
    parsed = override.value()
    if isinstance(parsed, Glob):
        if key == "model" and any(is_source(pattern) for pattern in parsed.include):
            return folders_of(parsed.include, parsed.exclude)
        names = parsed.filter(sorted(known))
        if not names:
            raise ConfigurationError(f"{override.input_line} matches no {key}. Available: {', '.join(sorted(known)) or '(none)'}")
        return tuple(names)
    if isinstance(parsed, RangeSweep):
        _check_range(override, parsed)
    values = [plain_element(value) for value in override.sweep_iterator()]
    if any(isinstance(value, (Sweep, Glob)) for value in values):
        raise ConfigurationError(
            f"{override.input_line}: a range, a choice or a glob cannot stand in a list with other values (Hydra's grammar); "
            f"write the values out: {key}=…,…"
        )
    return _unique(key, values)


def _check_range(override: Override, asked: RangeSweep) -> None:
    """Refuse a range that never ends or holds nothing; range(9,3) counts downwards only with a step below 0."""
    start, stop, step = (0 if bound is None else bound for bound in (asked.start, asked.stop, asked.step))
    if not all(math.isfinite(bound) for bound in (start, stop, step)) or step == 0:
        raise ConfigurationError(f"{override.input_line}: a range needs finite bounds and a step that is not 0: range(3,9), range(9,3,-1)")
    if (stop - start) / step > MOST_VALUES:
        raise ConfigurationError(f"{override.input_line}: more than {MOST_VALUES:,} values on one axis; give a larger step")
    if (stop - start) / step <= 0:
        raise ConfigurationError(f"{override.input_line} holds no value: it begins at {start} and ends before {stop}, in steps of {step}")


def plain_element(value: Any) -> Any:
    """One value of a sweep: quoted text without its quotes, a list as a tuple."""
    return value.text if isinstance(value, QuotedString) else hashable(value)


def hashable(value: Any) -> Any:
    """A value that can be one of an axis; raises ConfigurationError for a mapping."""
    if isinstance(value, list):
        return tuple(plain_element(item) for item in value)
    if isinstance(value, dict):
        raise ConfigurationError(f"an axis value must be a number, a text, a truth value, null or a list; got {value!r}")
    return value


def _unique(key: str, values: Iterable[Any]) -> tuple[Any, ...]:
    found = tuple(dict.fromkeys(values))
    if not found:
        raise ConfigurationError(f"axis {key} has no values")
    return found
