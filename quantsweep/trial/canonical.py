"""How values are written so that equal ones are equal everywhere: JSON, hashes, options, and which fields enter an identity."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any, cast

from quantsweep.errors import ConfigurationError

Option = bool | int | float | str | None | tuple[Any, ...]
Options = tuple[tuple[str, Option], ...]
"""Options of a component by name, sorted: a mapping that can be hashed."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _fields_of(spec: Any) -> dict[str, Any]:
    """A dataclass as a mapping, for JSON."""
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=_fields_of)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, on every machine.  Dataclasses are mappings of their fields."""
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
    found = ((name, getattr(spec, name), default) for name, default in _defaults(cast("Any", type(spec)), always, never))
    return {name: value for name, value, default in found if name in always or value != default}


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
