"""Which row counts where several stand for one thing: order without clocks.

What is asked has a number that only grows: that of its plan, which the launch lock gives out, and which a fence
(`quantsweep.tables.forgetting`) takes one of too.  A row is ordered by

    launch      the number of the launch that asked for it (of the plan that its own plan descends from)
    plan        its own plan's number
    life        how often Slurm had started its job again
    done        before failed
    attempt     for a definite answer where all else is equal

and the greatest counts.  Hosts' clocks, and when a row was made, decide nothing: they are for people.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from quantsweep.errors import ResultsError
from quantsweep.planning.plan_files import plan_sequence, read_header

COLUMNS = ("launch", "plan", "life", "attempt")
"""What a row's rank is read from; `status` too, where a table has it."""


def launch_number(plans: Path, name: str) -> int:
    """The number of the launch that a plan descends from; 0 for what is no plan's name, its own number where its file is gone."""
    return plan_sequence(read_header(plans / name).root) if (plans / name).exists() else _own_number(name)


def launches(rows: pa.Table, plans: Path) -> npt.NDArray[np.int64]:
    """The launch of each row; rows of older versions have no such column, and are told by the plan that they name."""
    column = rows.column("launch")
    numbers: npt.NDArray[np.int64] = pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    if not column.null_count:
        return numbers
    places = np.flatnonzero(numbers < 0)
    found = by_value(rows.column("plan").take(pa.array(places)), lambda name: launch_number(plans, name))
    whole = numbers.copy()
    whole[places] = found
    return whole


def ranks(rows: pa.Table) -> npt.NDArray[np.int64]:
    """The place of each row in the order; equal rows get different places.  `launch` must be filled (`launches`)."""
    size = rows.num_rows
    attempts = rows.column("attempt").cast(pa.string())  # dictionaries do not sort
    by_name = np.empty(size, np.int64)
    by_name[pc.sort_indices(attempts).to_numpy()] = np.arange(size)
    keys = [
        by_name,
        *([pc.equal(rows.column("status").cast(pa.string()), "done").to_numpy()] if "status" in rows.column_names else []),
        pc.fill_null(rows.column("life").cast(pa.int64()), 0).to_numpy(),
        by_value(rows.column("plan"), _own_number),
        pc.fill_null(rows.column("launch").cast(pa.int64()), 0).to_numpy(),
    ]
    found = np.empty(size, np.int64)
    found[np.lexsort(keys)] = np.arange(size)
    return found


def best(codes: npt.NDArray[np.int64], ranks: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """For each group (codes 0 … count - 1) the place of its row with the greatest rank; -1 for a group without rows."""
    order = np.argsort(ranks)
    places = np.full(count, -1, np.int64)
    places[codes[order]] = order  # of several assignments to one place, the last stands
    return places


def by_value(column: pa.ChunkedArray, number: Callable[[str], int]) -> npt.NDArray[np.int64]:
    """A number for each row, computed once for each distinct text; 0 for null."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    found = [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        values = np.array([*(number(text) for text in chunk.dictionary.to_pylist()), 0], np.int64)
        found.append(values[pc.fill_null(chunk.indices.cast(pa.int64()), len(values) - 1).to_numpy(zero_copy_only=False)])
    return np.concatenate(found)


def _own_number(name: str) -> int:
    try:
        return plan_sequence(name)
    except ResultsError:
        return 0
