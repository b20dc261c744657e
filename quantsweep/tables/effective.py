"""The rows that count: of several attempts at one thing, one, the same one in every table.

    metrics   a pair (trial, task) has the rows of one attempt: the greatest in the order (`quantsweep.tables.order`)
    samples   those of the same attempt; samples whose metrics were never written are left out
    layers    a trial's are those of one attempt, of one whose metrics count if there is any
    trials    a trial's greatest attempt, but that a failure does not count once all that it was to evaluate has its row, and that one
              that was done is called forgotten while an evaluation of it is (`quantsweep rerun task=…`)

`load_results` and its like, `status`, `logs` and messages all read here, so that they cannot contradict each other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from quantsweep.planning.plan import remaining_tasks
from quantsweep.tables import order, records
from quantsweep.tables.forgetting import read_forgotten
from quantsweep.trial.specs import PlannedTrial

PAIR = ("trial_id", "task_key")
TRIAL_COLUMNS = ("trial_id", "status", "config", *order.COLUMNS)
"""What `effective` needs of the table of trials."""
FORGOTTEN = "forgotten"
"""Status of a trial whose attempt was done, and of which an evaluation was forgotten since."""
_KEYS = {"metrics": (*PAIR, "metric"), "samples": PAIR, "layers": ("trial_id", "layer"), "trials": ("trial_id",)}


def effective(folder: Path, table: str, rows: pa.Table) -> pa.Table:
    """Those rows of a table of the sweep in `folder` that count, in the order in which they come.

    rows: what `records.read_table` or `read_encoded` gave of whole trials, with order.COLUMNS and the table's keys (trials:
    TRIAL_COLUMNS).
    """
    if table == "metrics":
        return _of_one_attempt(rows, PAIR, _KEYS[table])
    if table == "trials":
        return _trials(folder, rows)
    counting = _of_one_attempt(records.read_encoded(folder, "metrics", [*PAIR, *order.COLUMNS]), PAIR, PAIR)
    if table == "samples":
        return _of_one_attempt(rows.filter(pa.array(_are_in(rows, counting, (*PAIR, "attempt")))), PAIR, PAIR)
    return _of_one_attempt(rows, ("trial_id",), _KEYS[table], first=_are_in(rows, counting, ("trial_id", "attempt")))


def _of_one_attempt(rows: pa.Table, groups: tuple[str, ...], keys: tuple[str, ...], first: npt.NDArray[np.bool_] | None = None) -> pa.Table:
    """Of each group the rows of its greatest attempt, each once (copies agree in `keys`).  first: rows that go before all others."""
    codes, count = records.row_codes(rows, groups)
    attempts, _ = records.row_codes(rows, (*groups, "attempt"))
    single, _ = records.row_codes(rows, keys)
    if len(np.unique(attempts)) == len(np.unique(codes)) and len(np.unique(single)) == rows.num_rows:
        return rows  # the rule: nothing stands twice
    ranks = order.ranks(rows) + (0 if first is None else first.astype(np.int64) * rows.num_rows)
    kept = attempts == attempts[order.best(codes, ranks, count)[codes]]
    places = np.flatnonzero(kept)
    once = np.zeros(rows.num_rows, np.bool_)
    once[places[np.unique(single[places], return_index=True)[1]]] = True
    return rows.filter(pa.array(once))


def _are_in(rows: pa.Table, other: pa.Table, keys: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """One flag a row: True where `other` has a row that agrees in `keys`."""
    code = pa.dictionary(pa.int32(), pa.string())
    columns = [pa.chunked_array([*_texts(rows, key, code).chunks, *_texts(other, key, code).chunks], code) for key in keys]
    codes, _ = records.row_codes(pa.table(columns, names=list(keys)), keys)
    return np.isin(codes[: rows.num_rows], codes[rows.num_rows :])


def _texts(rows: pa.Table, key: str, code: pa.DataType) -> pa.ChunkedArray:
    column = rows.column(key)
    return column if column.type == code else column.cast(pa.string()).dictionary_encode().cast(code)


def _trials(folder: Path, rows: pa.Table) -> pa.Table:
    """One row a trial; where its failures do not count any more its greatest attempt that was done, or the failure, called done."""
    codes, count = records.row_codes(rows, ("trial_id",))
    ranks = order.ranks(rows)
    chosen = order.best(codes, ranks, count)
    failed = pc.equal(rows.column("status").cast(pa.string()), "failed").to_numpy()
    if failed[chosen[chosen >= 0]].any():
        moot = _are_whole(folder, rows, np.flatnonzero(failed & np.isin(codes, codes[chosen[(chosen >= 0) & failed[chosen]]])))
        chosen = order.best(codes, ranks - moot.astype(np.int64) * rows.num_rows, count)
        rows = _called(rows, moot, "done")
    kept = np.zeros(rows.num_rows, np.bool_)
    kept[chosen[chosen >= 0]] = True
    rows = rows if kept.all() else rows.filter(pa.array(kept))
    in_part = read_forgotten(folder).in_part
    return _less_what_is_forgotten(folder, rows, in_part) if in_part else rows


def _less_what_is_forgotten(folder: Path, rows: pa.Table, in_part: frozenset[str]) -> pa.Table:
    done = pc.equal(rows.column("status").cast(pa.string()), "done").to_numpy()
    done &= pc.is_in(rows.column("trial_id").cast(pa.string()), value_set=pa.array(sorted(in_part))).to_numpy()
    return _called(rows, done & ~_are_whole(folder, rows, np.flatnonzero(done)), FORGOTTEN)


def _are_whole(folder: Path, rows: pa.Table, places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """One flag a row, True for those of `places` (attempts) all of whose evaluations have a row by now."""
    done = records.read_done(folder)
    with_rows = {trial_id for trial_id, _ in done}
    found = np.zeros(rows.num_rows, np.bool_)
    some = rows.select(["trial_id", "config"]).take(pa.array(places)).to_pydict()
    for place, trial_id, config in zip(places, some["trial_id"], some["config"], strict=True):
        if trial_id in with_rows:
            found[place] = not remaining_tasks(PlannedTrial.from_json(config), done).tasks
    return found


def _called(rows: pa.Table, which: npt.NDArray[np.bool_], word: str) -> pa.Table:
    """The rows, of which some have another status."""
    place, column = rows.column_names.index("status"), rows.column("status")
    texts = pc.if_else(pa.array(which), word, column.cast(pa.string()))
    return rows.set_column(place, "status", texts.dictionary_encode() if pa.types.is_dictionary(column.type) else texts)
