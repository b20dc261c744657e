"""Plain values of a yaml to typed, checked dataclasses: unknown, missing and mistyped keys are errors that name their place."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from quantsweep.errors import ConfigurationError, did_you_mean

T = TypeVar("T")
Config = Mapping[str, Any]


def convert(cls: type[T], data: Config, where: str) -> T:
    """Build the dataclass `cls` from a mapping; unknown, missing and mistyped keys are ConfigurationErrors that name `where`."""
    hints = typing.get_type_hints(cls)
    names = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise ConfigurationError(f"{where}: {did_you_mean('key', key, names)}")
    missing = [n for n, f in names.items() if n not in data and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigurationError(f"{where}: missing {', '.join(missing)}")
    values = {key: convert_value(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    return cls(**values)


def convert_value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` names: nested dataclasses, tuples from lists, unions, literals; only whole numbers become floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and (nested := [arg for arg in args if is_dataclass(arg)]):
        hint = nested[0]  # of "a dataclass or null": its own words tell more about a mapping than the union's
    if is_dataclass(hint) and isinstance(value, Mapping):
        return convert(typing.cast("type[Any]", hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(convert_value(args[0], item, where) for item in value)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value in args:
            return value
    elif isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise ConfigurationError(f"{where} must be {type_name(hint)}, got {value!r} ({type(value).__name__})")


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    for arg in args:
        if arg is type(None):
            if value is None:
                return None
            continue
        try:
            return convert_value(arg, value, where)
        except ConfigurationError:
            continue
    raise ConfigurationError(f"{where} must be {' or '.join(type_name(a) for a in args)}, got {value!r} ({type(value).__name__})")


def type_name(hint: Any) -> str:
    """A type in words: `a whole number`."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(a) for a in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))
