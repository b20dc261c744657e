"""Single values that people type, and what they must be: each check raises a ConfigurationError with key, value and remedy.

Two traps of the language are why this is one place.  Every text but the empty one is true, so `bool("no")` is True.  And NaN is
neither below nor above anything, so `value <= 0` lets it pass: a bound is written as what must hold, never as what must not.
"""

from __future__ import annotations

import math

from quantsweep.errors import ConfigurationError

LARGEST = 2**31 - 1
"""The largest whole number that the results' columns of counts hold: a row with a larger one would be lost after its trial ran."""
LARGEST_LONG = 2**63 - 1
"""The same of their columns of seeds and parameters."""


def truth(name: str, value: object) -> bool:
    """True or false, and nothing that only counts as such."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be true or false, got {shown(value)}")
    return value


def text(name: str, value: object, remedy: str) -> str:
    """A name or a folder; a whole number is one too, but null and nothing are not, nor what a file's 1e5 has become."""
    if isinstance(value, float):
        raise ConfigurationError(f"{name} must be text; it was read as the number {value!r}: put it in quotes")
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ConfigurationError(f"{name} must be text that is not empty, got {shown(value)}; write {remedy}")
    return str(value)


def whole_number(name: str, value: object, least: int = 1, most: int = LARGEST, *, otherwise: str = "") -> None:
    """Refuse what is no whole number in these bounds; null is left to who calls, and `otherwise` says what else may be written."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        problem = "a whole number"
    elif value < least:
        problem = f"at least {least}"
    elif value > most:
        problem = f"at most {most}"
    else:
        return
    raise ConfigurationError(f"{name} must be {problem}{otherwise}; got {shown(value)}")


def positive_number(name: str, value: float | None, *, otherwise: str = "") -> None:
    """Refuse zero, what is negative, infinite or NaN; null is left to who calls, and `otherwise` says what else may be written."""
    if value is not None and not 0 < value < math.inf:
        raise ConfigurationError(f"{name} must be a number above 0{otherwise}; got {value}")


def whole_seed(name: str, value: object) -> None:
    """Refuse a seed that is no whole number; null is left to who calls."""
    whole_number(name, value, -LARGEST_LONG, LARGEST_LONG)


def shown(value: object) -> str:
    """A value as it is typed: null, true, 'no'."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
