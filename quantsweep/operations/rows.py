"""The table that a grid ends with: its rows in the order of the plan, as wide as the terminal, or the best and worst of many.

mini_cloze   bits_per_byte   n 20                        what all rows share is said once
trial                                 value  ± stderr  bits a weight
mini-neox-0.3m baseline              1.5784    0.0210         16.000
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from quantsweep.operations.messages import said_once
from quantsweep.tables import records
from quantsweep.tables.effective import effective
from quantsweep.trial.quantization import BASELINE, NONE
from quantsweep.trial.specs import PlantedOutliers
from quantsweep.words import count

if TYPE_CHECKING:
    from quantsweep.storage.paths import SweepFolder

MAX_ROWS_SHOWN = 48
"""Evaluations of a grid whose rows are all printed at its end: more do not fit on a screen."""
NUM_EXTREME = 3
"""Of more, for each task so many of the best, and of the worst."""
MAX_TASKS = 6
LEAST_WORDS = 24
"""A trial's words are cut to fit the terminal, never shorter than this; numbers are never cut."""
HEADER = ("trial", "task", "metric", "value", "± stderr", "n", "bits a weight")
SHARED = (1, 2, 5)
"""Columns that are said once where all rows have the same in them."""


def finished_text(folder: SweepFolder, asked: Mapping[str, Collection[str]]) -> str:
    """The end of a grid that was waited for: its rows, or the best and worst of many, and what to type next.

    asked: trial id to task keys.
    """
    num_evaluations = sum(map(len, asked.values()))
    text = results_text(folder.path, asked) if num_evaluations <= MAX_ROWS_SHOWN else _extremes_text(folder.path, asked)
    more = "" if num_evaluations <= MAX_ROWS_SHOWN else f"{count(num_evaluations, 'evaluation')}: "
    name = folder.path
    return f"{text}\n  {more}table and figure: python -m analysis {name}   in Python: quantsweep.load_results({str(name)!r})"


def results_text(folder: Path, asked: Mapping[str, Collection[str]]) -> str:
    """The rows of some trials (trial id to task keys) as a table, in that order; what failed is said below it."""
    lines = table(HEADER, map(_cells, _rows(folder, asked)), width=_width())
    failed = [row for row in _effective(folder, "trials", asked) if row["status"] == "failed"]
    reasons = [(f"{row['failure_class']}: {row['failure_message']}", row["label"]) for row in failed]
    return "\n".join([*lines, *said_once(reasons)])


def _extremes_text(folder: Path, asked: Mapping[str, Collection[str]]) -> str:
    """The best and the worst by each task's own metric; metrics of more than MAX_TASKS tasks are left to the analysis."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in _rows(folder, asked):
        if row["is_primary"] and row["value"] is not None and isfinite(row["value"]):
            by_task.setdefault(row["task_key"], []).append(row)
    lines: list[str] = []
    for key, rows in list(by_task.items())[:MAX_TASKS]:
        rows.sort(key=lambda row: row["value"], reverse=bool(rows[0]["higher_is_better"]))
        worst = rows[max(NUM_EXTREME, len(rows) - NUM_EXTREME) :]
        shown = [*rows[:NUM_EXTREME], *worst]
        what = f"{key}: the best {len(rows[:NUM_EXTREME])} and the worst {len(worst)} of {len(rows):,}"
        lines += [what, *table(HEADER, map(_cells, shown), width=_width())]
    return "\n".join(lines)


def _rows(folder: Path, asked: Mapping[str, Collection[str]]) -> list[Mapping[str, Any]]:
    """Rows of metrics, in the order of the trials, of each trial's tasks, and of metrics by name, the headline first."""
    place = {(trial_id, key): (n, m) for n, (trial_id, keys) in enumerate(asked.items()) for m, key in enumerate(keys)}
    rows = [row for row in _effective(folder, "metrics", asked) if (row["trial_id"], row["task_key"]) in place]
    return sorted(rows, key=lambda row: (place[row["trial_id"], row["task_key"]], not row["is_primary"], row["metric"]))


def _effective(folder: Path, name: str, asked: Collection[str]) -> list[dict[str, Any]]:
    rows = records.read_table(folder, name)
    mine = rows.filter(pc.is_in(rows.column("trial_id"), value_set=pa.array(list(asked), pa.string())))
    found: list[dict[str, Any]] = effective(folder, name, mine).to_pylist()
    return found


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _trial_words(row),
        row["task"],
        row["metric"],
        _number(row["value"]),
        _number(row["stderr"]),
        str(row["num_samples"]),
        f"{row['bits_per_weight']:.3f}",
    )


def _trial_words(row: Mapping[str, Any]) -> str:
    channels, scale, seed = (row[f"plant_{key}"] for key in ("channels", "scale", "seed"))
    planted = "" if channels is None else f" {PlantedOutliers(channels=channels, scale=scale, seed=seed).label}"
    if row["method"] == BASELINE:
        return f"{row['model']}{planted} baseline"
    options = "".join(f" {key}={value}" for key, value in json.loads(row["method_options"]).items())
    method = "" if row["method"] == "round_to_nearest" else f" {row['method']}{options}"
    if row["activation"] != NONE:
        method += f" activations {row['activation_bit_width']}-bit"
    if row["data_type"] is None:
        return f"{row['model']}{planted}{method}"
    return (
        f"{row['model']}{planted}{method} {row['data_type']} {row['bit_width']}-bit {row['granularity']} {row['block_size'] or ''}".rstrip()
    )


def _of(rows: Any, trial_ids: list[str]) -> Any:
    import pyarrow as pa

    return rows.filter(pc.is_in(rows.column("trial_id"), value_set=pa.array(trial_ids, pa.string())))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _width() -> int | None:
    """Columns of the terminal; None where the table goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, width: int | None = None) -> list[str]:
    """Lines of a plain text table; columns after the first three are numbers and stand to the right.

    width: of the terminal.  Where the lines are wider, columns SHARED by all rows are said above, and then the first is cut.
    """
    everything = [header, *rows]
    lines = _lines(everything, tuple(range(len(header))))
    if width is None or max(map(len, lines)) <= width:
        return lines
    same = [n for n in SHARED if len({row[n] for row in everything[1:]}) == 1]
    columns = tuple(n for n in range(len(header)) if n not in same)
    above = ["   ".join(f"{header[n]} {everything[1][n]}" if n > 2 else everything[1][n] for n in same)] if same else []
    over = max(map(len, _lines(everything, columns))) - width
    room = max(LEAST_WORDS, max(len(row[0]) for row in everything) - max(0, over))
    cut = [(_shortened(row[0], room), *row[1:]) for row in everything]
    return [*above, *_lines(cut, columns)]


def _shortened(text: str, room: int) -> str:
    """A text with its middle cut: what models and settings are called differs at both ends."""
    return text if len(text) <= room else f"{text[: room // 2 - 1]}…{text[-(room - room // 2) :]}"


def _lines(everything: Sequence[tuple[str, ...]], columns: tuple[int, ...]) -> list[str]:
    widths = {i: max(len(row[i]) for row in everything) for i in columns}
    return ["  ".join(row[i].ljust(widths[i]) if i < 3 else row[i].rjust(widths[i]) for i in columns).rstrip() for row in everything]
