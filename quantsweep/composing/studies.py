"""A study's grids, as its file says them, and what a command line makes of them.

An axis that is typed replaces that axis in every grid that has it.  `method` is read as it is meant: the typed methods take the
place of those that quantize, in every grid; baselines stay, since everything is compared with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from quantsweep.checkpoints.sources import is_source
from quantsweep.composing.axis_values import is_found, yaml_values
from quantsweep.composing.components import option_key, option_names
from quantsweep.composing.yaml_files import odd_key
from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.planning.conditions import FACTS, Exclusion
from quantsweep.planning.grid import Axis, Grid, refine
from quantsweep.planning.schema import AXIS_KEYS, SECTIONS, TASK_KEYS
from quantsweep.trial.quantization import BASELINE, BASELINE_BITS, FACTORS, ROUND_TO_NEAREST

STUDY_KEYS = ("title", "paper", "where", "grids")
GRID_KEYS = ("axes", "where")


def study_grids(study: Any, origin: str, folders: Sequence[Path], problems: list[str]) -> tuple[Grid, ...]:
    """The grids of a study (what stands under `study:`); what is wrong with them is added to `problems`."""
    if not isinstance(study, Mapping) or not isinstance(study.get("grids"), list) or not study["grids"]:
        problems.append(f"{origin}: study.grids must be a list of grids, each with its axes")
        return ()
    problems.extend(f"{origin}: {did_you_mean('key', key, STUDY_KEYS)}" for key in study if key not in STUDY_KEYS)
    everywhere = _exclusions(study.get("where"), origin, folders, problems)
    grids = (_grid(grid, f"{origin}, grid {number}", folders, problems) for number, grid in enumerate(study["grids"], 1))
    return tuple(replace(grid, exclusions=(*everywhere, *grid.exclusions)) for grid in grids)


def refine_study(grids: tuple[Grid, ...], overrides: Sequence[Axis], base_method: str) -> tuple[Grid, ...]:
    """The grids after what was typed; `base_method`: the method of grids that have no axis of it."""
    for methods in (axis.values for axis in overrides if axis.key == "method"):
        grids = tuple(part for grid in grids for part in _with_methods(grid, methods, base_method))
    for axis in (axis for axis in overrides if axis.key.partition(".")[0] in FACTORS):
        grids = tuple(part for grid in grids for part in _with_factor(grid, axis, grids, base_method))
    return refine(grids, [axis for axis in overrides if axis.key != "method" and axis.key.partition(".")[0] not in FACTORS])


def _with_factor(grid: Grid, axis: Axis, grids: Sequence[Grid], base_method: str) -> tuple[Grid, ...]:
    """A grid with a typed factor where it quantizes, in place of its own axis or, if no grid has one, beside the others; baselines stay."""
    if axis.key not in grid.keys and any(axis.key in other.keys for other in grids):
        return (grid,)
    methods = next((each.values for each in grid.axes if each.key == "method"), (base_method,))
    quantizing = tuple(name for name in methods if name != BASELINE)
    if axis.key in grid.keys or len(quantizing) == len(methods):
        return (grid.with_axis(axis),)
    if not quantizing:
        return (grid,)
    only = [
        replace(grid, axes=tuple(Axis(key="method", values=values) if each.key == "method" else each for each in grid.axes))
        for values in ((BASELINE,), quantizing)
    ]
    return only[0], only[1].with_axis(axis)


def _with_methods(grid: Grid, methods: tuple[Any, ...], base_method: str) -> tuple[Grid, ...]:
    """A grid with other methods where it quantizes: the baselines in it stay, as a grid of their own where they are 16-bit codes."""
    there = next((axis.values for axis in grid.axes if axis.key == "method"), (base_method,))
    if set(there) == {BASELINE}:
        return (grid,)
    baselines = tuple(name for name in there if name == BASELINE)
    axis = Axis(key="method", values=tuple(dict.fromkeys((*baselines, *methods))))
    widths = next((axis.values for axis in grid.axes if axis.key == "bit_width"), ())
    if BASELINE_BITS not in widths or ROUND_TO_NEAREST not in there:
        return (grid.with_axis(axis),)
    narrow = tuple(width for width in widths if width != BASELINE_BITS)
    wide = replace(grid, axes=(*(axis for axis in grid.axes if axis.key not in ("bit_width", "method")),))
    wide = replace(wide, axes=(*wide.axes, Axis(key="bit_width", values=(BASELINE_BITS,)), Axis(key="method", values=(ROUND_TO_NEAREST,))))
    rest = replace(grid, axes=tuple(Axis(key="bit_width", values=narrow) if axis.key == "bit_width" else axis for axis in grid.axes))
    return (rest.with_axis(axis), wide) if narrow else (wide,)


def changes(grids: Iterable[Grid], typed: Mapping[str, str]) -> tuple[str, ...]:
    """What a command line changed in a study, a line for what holds everywhere (`typed`: key to text) and one a grid; none if nothing."""
    everywhere = [", ".join(f"{key}={text}" for key, text in typed.items())] if typed else []
    lines = [f"{grid.origin}: {'; '.join(grid.changes) or 'nothing'}" for grid in grids]
    if not typed and not any(grid.changes for grid in grids):
        return ()
    return (*(f"every grid: {text}" for text in everywhere), *(lines if any(grid.changes for grid in grids) else ()))


def _grid(grid: Any, origin: str, folders: Sequence[Path], problems: list[str]) -> Grid:
    if not isinstance(grid, Mapping) or not {"axes"} <= set(grid) <= {*GRID_KEYS} or not isinstance(grid["axes"], Mapping):
        problems.append(f"{origin}: a grid has the key `axes`, with an axis a line, and may have `where`; got {grid!r}")
        return Grid(axes=(), origin=origin)
    axes: list[Axis] = []
    for written, value in grid["axes"].items():
        key = option_key(written) if isinstance(written, str) else written
        if not isinstance(key, str):
            problems.append(f"{origin}: {odd_key(key)}")
        elif key.split(".")[0] not in AXIS_KEYS:
            problems.append(f"{origin}: {did_you_mean('axis', key, AXIS_KEYS)}")
        elif (values := _values(str(key), value, origin, folders, problems)) is not None:
            axes.append(Axis(key=str(key), values=values, is_found=is_found(value)))
    return Grid(axes=tuple(axes), origin=origin, exclusions=_exclusions(grid.get("where"), origin, folders, problems))


def _values(key: str, value: Any, origin: str, folders: Sequence[Path], problems: list[str]) -> tuple[Any, ...] | None:
    """The values of an axis or of a condition; None, and a problem more, where they cannot be read."""
    known = option_names(key, folders)
    try:
        values = yaml_values(key, value, known)
    except (ConfigurationError, HydraException) as error:
        problems.append(f"{origin}: {error}")
        return None
    if key in SECTIONS:
        names = [name for value in values for name in (value if isinstance(value, tuple) else (value,))]
        problems.extend(f"{origin}: {did_you_mean(key, name, known)}" for name in names if name not in known and not is_source(name))
    return values


def _exclusions(where: Any, origin: str, folders: Sequence[Path], problems: list[str]) -> tuple[Exclusion, ...]:
    if where is None:
        return ()
    if not isinstance(where, list):
        problems.append(f"{origin}: `where` is a list of `exclude: {{KEY: VALUES, …}}` with `because: REASON`; got {where!r}")
        return ()
    found = (_exclusion(entry, f"{origin}, where {number}", folders, problems) for number, entry in enumerate(where, 1))
    return tuple(exclusion for exclusion in found if exclusion is not None)


def _exclusion(entry: Any, origin: str, folders: Sequence[Path], problems: list[str]) -> Exclusion | None:
    is_whole = isinstance(entry, Mapping) and set(entry) == {"exclude", "because"} and isinstance(entry["exclude"], Mapping)
    if not is_whole or not entry["exclude"] or not isinstance(entry["because"], str) or not entry["because"].strip():
        problems.append(f"{origin}: a condition has `exclude: {{KEY: VALUES, …}}` and `because: REASON`; got {entry!r}")
        return None
    conditions: list[tuple[str, tuple[Any, ...]]] = []
    for written, value in entry["exclude"].items():
        key = option_key(str(written))
        root, _, rest = key.partition(".")
        if root in ("task", *TASK_KEYS):
            problems.append(f"{origin}: {key} is asked of every trial and is no part of one; a condition names what a trial is")
        elif key not in FACTS and not (rest and root in SECTIONS):
            problems.append(f"{origin}: {did_you_mean('key of a condition', key, FACTS)}")
        elif (values := _values(str(key), value, origin, folders, problems)) is not None:
            conditions.append((str(key), values))
    return Exclusion(values=tuple(conditions), because=entry["because"].strip(), origin=origin)
