"""Which trials are compared with each other.

A trial of A has the trial of B as its partner that agrees in every axis of which the two arms have a value in common.  Of
`bit_width=3` and `bit_width=4` that is everything but the bit width; of two sweeps that asked the same it is everything.  An axis of which
they have no value in common is what the comparison is about.

Where one arm is baselines, every quantized trial of the other has that of its model as its partner: the axes that count are then those of
the model alone (its weights, what was planted into them, its dtype).  A baseline has no compensation, calibration or bit width, and is
the partner of trials that have them as of those that have none.

Options and versions depend on other axes (floats have other exponent bits at other widths): they are asked to agree only among trials that
agree in all else, and only where these have a value in common.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from analysis.selection import BASELINE
from quantsweep.errors import ConfigurationError
from quantsweep.tables.records import IDENTITY
from quantsweep.words import count

_AXES = tuple(column.name for column in IDENTITY if column.name != "trial_id")
_DEPENDENT = ("_options", "_version")
_MODEL_AXES = ("model", "model_content", "dtype", "plant_channels", "plant_scale", "plant_seed")


def pair_trials(a: pd.DataFrame, b: pd.DataFrame) -> list[tuple[str, str]]:
    """The partners, (trial_id of A, trial_id of B).  a, b: any of the tables of results, rows of A and of B.

    Raises ConfigurationError where an arm is empty, nothing agrees, or several trials of A fit several of B.
    """
    a, b = a.drop_duplicates("trial_id"), b.drop_duplicates("trial_id")
    for name, rows in (("A", a), ("B", b)):
        if rows.empty:
            raise ConfigurationError(f"{name} has no trials with samples: nothing to compare")
    a, b, axes = _comparable(a, b)
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


def without_partner(a: pd.DataFrame, b: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """{"a": {trial_id: why}, "b": …}: the trials that are in none of the `pairs` that were compared."""
    fitting = pair_trials(a, b)
    a, b = a.drop_duplicates("trial_id"), b.drop_duplicates("trial_id")
    *able, axes = _comparable(a, b)
    found: dict[str, dict[str, str]] = {}
    for side, (name, other, rows) in enumerate((("a", "B", a), ("b", "A", b))):
        fits, used = ({ids[side] for ids in some} for some in (fitting, pairs))
        reasons = dict.fromkeys(rows["trial_id"].astype(str), "a baseline itself")
        reasons |= _apart(able[side][~able[side]["trial_id"].isin(fits)], able[1 - side], axes, other)
        reasons |= dict.fromkeys(fits, f"answered no task that its partner in {other} did")
        found[name] = {trial: reason for trial, reason in reasons.items() if trial not in used}
    return found


def differing_axes(a: pd.DataFrame, b: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> dict[str, tuple[list[str], list[str]]]:
    """The axes in which partners differ, each with the values that the trials of `pairs` have in A and in B."""
    left, right = (
        rows.drop_duplicates("trial_id").set_index("trial_id").loc[[ids[side] for ids in pairs]] for side, rows in enumerate((a, b))
    )
    values = {axis: (_texts(left, axis), _texts(right, axis)) for axis in _known(a, b)}
    return {axis: (sorted(set(of_a)), sorted(set(of_b))) for axis, (of_a, of_b) in values.items() if of_a != of_b}


def differing_versions(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[list[str], list[str]]]:
    """The libraries of which A and B were made with other versions, each with those of A and of B; columns `versions`, JSON."""
    of_a, of_b = ([json.loads(text) for text in set(rows["versions"].dropna())] if "versions" in rows else [] for rows in (a, b))
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name in sorted({name for versions in (*of_a, *of_b) for name in versions}):
        left, right = ({str(versions.get(name)) for versions in arm} for arm in (of_a, of_b))
        if left and right and left != right:
            found[name] = sorted(left), sorted(right)
    return found


def _comparable(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The trials of A and of B that can have partners, and the axes in which these agree."""
    of_a, of_b = (_is_baseline(rows) for rows in (a, b))
    if of_a.all() == of_b.all():
        return a, b, _shared_axes(a, b)
    a, b = (a, b[~of_b]) if of_a.all() else (a[~of_a], b)
    return a, b, [axis for axis in _shared_axes(a, b) if axis in _MODEL_AXES]


def _is_baseline(rows: pd.DataFrame) -> pd.Series[bool]:
    return rows["method"] == BASELINE if "method" in rows else pd.Series(data=False, index=rows.index)


def _shared_axes(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """The axes of trials of which A and B have a value in common."""
    return [axis for axis in _known(a, b) if set(_texts(a, axis)) & set(_texts(b, axis))]


def _apart(rows: pd.DataFrame, others: pd.DataFrame, axes: Sequence[str], other: str) -> dict[str, str]:
    """{trial_id: in what it differs from the one of the others that agrees with it in most axes}."""
    mine, theirs = (list(zip(*(_texts(arm, axis) for axis in axes), strict=True)) for arm in (rows, others))
    codes = np.array([pd.factorize(np.array(values, dtype=object))[0] for values in zip(*mine, *theirs, strict=True)])
    found = {}
    for k, (trial, values) in enumerate(zip(rows["trial_id"], mine, strict=True)):
        nearest = theirs[int((codes[:, len(rows) :] == codes[:, k, None]).sum(axis=0).argmax())]
        told = [f"{axis} {one} against {near}" for axis, one, near in zip(axes, values, nearest, strict=True) if one != near]
        found[str(trial)] = f"differs from the nearest of {other} in {', '.join(told)}"
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
