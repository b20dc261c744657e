"""Which trials are compared with each other.

A trial of A has the trial of B as its partner that agrees in every axis of which the two arms have a value in common.  Of
`bit_width=3` and `bit_width=4` that is everything but the bit width; of quantized trials and baselines it is the model; of two sweeps that
asked the same it is everything.  An axis of which they have no value in common is what the comparison is about.

Options and versions depend on other axes (floats have other exponent bits at other widths): they are asked to agree only among trials that
agree in all else, and only where these have a value in common.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence

import pandas as pd

from quantsweep.errors import ConfigurationError
from quantsweep.tables.records import IDENTITY
from quantsweep.words import count

_AXES = tuple(column.name for column in IDENTITY if column.name != "trial_id")
_DEPENDENT = ("_options", "_version")


def pair_trials(a: pd.DataFrame, b: pd.DataFrame) -> list[tuple[str, str]]:
    """The partners, (trial_id of A, trial_id of B).  a, b: any of the tables of results, rows of A and of B.

    Raises ConfigurationError where an arm is empty, nothing agrees, or several trials of A fit several of B.
    """
    a, b = a.drop_duplicates("trial_id"), b.drop_duplicates("trial_id")
    for name, rows in (("A", a), ("B", b)):
        if rows.empty:
            raise ConfigurationError(f"{name} has no trials with samples: nothing to compare")
    axes = shared_axes(a, b)
    first = [axis for axis in axes if not axis.endswith(_DEPENDENT)]
    pairs: list[tuple[str, str]] = []
    for left, right in _groups(a, b, first):
        second = [axis for axis in axes if axis.endswith(_DEPENDENT) and set(_texts(left, axis)) & set(_texts(right, axis))]
        for one, other in _groups(left, right, second):
            _refuse_many(one, other)
            pairs += itertools.product(map(str, one["trial_id"]), map(str, other["trial_id"]))
    if not pairs:
        raise ConfigurationError(
            f"no trial of A has a partner in B that agrees in {', '.join(axes) or 'anything'}. "
            "Compare trials of the same models and settings"
        )
    return sorted(pairs)


def shared_axes(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """The axes of trials of which A and B have a value in common."""
    return [axis for axis in _known(a, b) if set(_texts(a, axis)) & set(_texts(b, axis))]


def differing_axes(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[list[str], list[str]]]:
    """The axes of which they have none in common, each with the values of A and of B."""
    shared = shared_axes(a, b)
    return {axis: (sorted(set(_texts(a, axis))), sorted(set(_texts(b, axis)))) for axis in _known(a, b) if axis not in shared}


def differing_versions(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[list[str], list[str]]]:
    """The libraries of which A and B were made with other versions, each with those of A and of B; columns `versions`, JSON."""
    of_a, of_b = ([json.loads(text) for text in set(rows["versions"].dropna())] if "versions" in rows else [] for rows in (a, b))
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name in sorted({name for versions in (*of_a, *of_b) for name in versions}):
        left, right = ({str(versions.get(name)) for versions in arm} for arm in (of_a, of_b))
        if left and right and left != right:
            found[name] = sorted(left), sorted(right)
    return found


def _known(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    return [axis for axis in _AXES if axis in a and axis in b]


def _texts(rows: pd.DataFrame, axis: str) -> list[str]:
    """The values as text: null is one, and numbers are written one way whatever column they stand in."""
    return ["null" if pd.isna(value) else str(value).removesuffix(".0") for value in rows[axis]]


def _groups(a: pd.DataFrame, b: pd.DataFrame, axes: Sequence[str]) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """The trials of A and of B that agree in `axes`, group by group."""
    of_a, of_b = (_places(rows, axes) for rows in (a, b))
    for key in of_a.keys() & of_b.keys():
        yield a.iloc[of_a[key]], b.iloc[of_b[key]]


def _places(rows: pd.DataFrame, axes: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
    found: dict[tuple[str, ...], list[int]] = {}
    keys = zip(*(_texts(rows, axis) for axis in axes), strict=True) if axes else [()] * len(rows)
    for place, key in enumerate(keys):
        found.setdefault(tuple(key), []).append(place)
    return found


def _refuse_many(a: pd.DataFrame, b: pd.DataFrame) -> None:
    if len(a) > 1 and len(b) > 1:
        apart = [axis for axis in _known(a, b) if len(set(_texts(a, axis))) > 1 or len(set(_texts(b, axis))) > 1]
        raise ConfigurationError(
            f"{count(len(a), 'trial')} of A and {len(b)} of B fit each other alike (they differ in {', '.join(apart)}). "
            f"Name what is to be compared in A and in B, such as {apart[0] if apart else 'bit_width'}=…"
        )
