"""The values of one axis, from Hydra's own grammar (`3,4,8`, `range(3,9)`, `glob(mini-*)`) or from a study's yaml."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, Sweep

from quantsweep.errors import ConfigurationError


def yaml_values(key: str, value: Any, known: Sequence[str]) -> tuple[Any, ...]:
    """An axis in a study: a list, one value, or text in Hydra's sweep grammar."""
    if isinstance(value, str):
        return override_values(OverridesParser.create().parse_override(f"{key}={value}"), known)
    values = value if isinstance(value, list) else [value]
    flat: list[Any] = []
    for item in values:
        is_sweep = isinstance(item, str) and "(" in item
        flat += override_values(OverridesParser.create().parse_override(f"{key}={item}"), known) if is_sweep else [hashable(item)]
    return _unique(key, flat)


def override_values(override: Override, known: Iterable[str]) -> tuple[Any, ...]:
    """The values of one override, single or swept; a glob must match something."""
    key = override.key_or_group
    if not override.is_sweep_override():
        return (hashable(override.value()),)
    if not override.is_discrete_sweep():
        raise ConfigurationError(f"{override.input_line}: an interval has no end of values; give a list or range(start,stop,step)")
    parsed = override.value()
    if isinstance(parsed, Glob):
        names = parsed.filter(sorted(known))
        if not names:
            raise ConfigurationError(f"{override.input_line} matches no {key}. Available: {', '.join(sorted(known)) or '(none)'}")
        return tuple(names)
    values = [plain_element(value) for value in override.sweep_iterator()]
    if any(isinstance(value, (Sweep, Glob)) for value in values):
        raise ConfigurationError(
            f"{override.input_line}: a range, a choice or a glob cannot stand in a list with other values (Hydra's grammar); "
            f"write the values out: {key}=…,…"
        )
    return _unique(key, values)


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
