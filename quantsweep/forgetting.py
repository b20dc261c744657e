"""Results that no longer count: tombstones.

A bug in our own code must not leave its rows standing.  `quantsweep rerun` writes down what is
forgotten, one small Parquet file a time, before it touches anything else:

    plan/forgotten-<time>-<id>.parquet      attempt, trial_id, task_key, kind

From then on every reader leaves these rows out; compaction removes them from the files in its own
time.  A tombstone names exact attempts, so the next attempt at the same trial counts again, and it
stays for good: a worker that was thought dead may still put an old row back.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quantsweep.errors import ResultsError
from quantsweep.files import write_table
from quantsweep.paths import SweepFolder

SCHEMA = pa.schema([("attempt", pa.string()), ("trial_id", pa.string()), ("task_key", pa.string()), ("kind", pa.string())])


class Kind(StrEnum):
    """How much of an attempt is forgotten."""

    ATTEMPT = "attempt"
    """All of it, in every table, also what it has yet to write."""
    EVALUATION = "evaluation"
    """One task of it: rows of metrics and samples."""
    FAILURE = "failure"
    """That it failed: its row in trials; evaluations that it completed stay."""


TABLES_OF = {
    Kind.ATTEMPT: frozenset({"trials", "metrics", "samples", "layers"}),
    Kind.EVALUATION: frozenset({"metrics", "samples"}),
    Kind.FAILURE: frozenset({"trials"}),
}


class Tombstone(NamedTuple):
    """One thing that is forgotten; `task_key` with kind `evaluation` only.  (A tuple: there may be 100,000 of them.)"""

    attempt: str
    trial_id: str
    task_key: str | None
    kind: str


class Forgotten:
    """All tombstones of a sweep, ready to be asked."""

    def __init__(self, tombstones: Iterable[Tombstone] = ()) -> None:
        self._attempts: Mapping[str, set[tuple[str, str]]] = {kind: set() for kind in Kind}
        self._evaluations: set[tuple[str, str, str | None]] = set()
        for attempt, trial_id, task_key, kind in tombstones:
            if kind == Kind.EVALUATION:
                self._evaluations.add((attempt, trial_id, task_key))
            else:
                self._attempts[kind].add((attempt, trial_id))

    def columns(self, table: str) -> tuple[str, ...]:
        """The columns of a table that `mask` needs; none if nothing of this table is forgotten."""
        single = self._evaluations and table in TABLES_OF[Kind.EVALUATION]
        if single or any(self._attempts[kind] and table in TABLES_OF[kind] for kind in Kind):
            return ("attempt", "trial_id", "task_key") if single else ("attempt", "trial_id")
        return ()

    def mask(self, table: str, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """One flag a row: True where it is forgotten."""
        found = np.zeros(rows.num_rows, np.bool_)
        columns = self.columns(table)
        if not columns or not rows.num_rows:
            return found
        # A first sieve by attempt alone, in Arrow: nearly always nothing passes it.
        names = self._names(table)
        near = np.flatnonzero(pc.is_in(rows.column("attempt").cast(pa.string()), value_set=names).to_numpy())
        whole = set().union(*(self._attempts[kind] for kind in (Kind.ATTEMPT, Kind.FAILURE) if table in TABLES_OF[kind]))
        single = self._evaluations if "task_key" in columns else set()
        suspects = rows.select(list(columns)).take(pa.array(near)).to_pydict()
        tasks = suspects.get("task_key", [None] * len(near))
        for place, attempt, trial_id, task_key in zip(near, suspects["attempt"], suspects["trial_id"], tasks, strict=True):
            found[place] = (attempt, trial_id) in whole or (attempt, trial_id, task_key) in single
        return found

    def _names(self, table: str) -> pa.Array:
        names = {attempt for kind in Kind if table in TABLES_OF[kind] for attempt, _ in self._attempts[kind]}
        if table in TABLES_OF[Kind.EVALUATION]:
            names |= {attempt for attempt, _, _ in self._evaluations}
        return pa.array(sorted(names), pa.string())


def write_tombstones(folder: SweepFolder, tombstones: Iterable[Tombstone]) -> None:
    """Forget these, durably, from the moment this returns; raises OSError (a full disk, say) with nothing forgotten."""
    rows = [stone._asdict() for stone in tombstones]
    if rows:
        name = f"forgotten-{time.time_ns():016x}-{secrets.token_hex(4)}.parquet"
        write_table(folder.plan / name, pa.Table.from_pylist(rows, schema=SCHEMA))


def forgotten_since(folder: Path, plan: Path) -> frozenset[str]:
    """Trials of which something was forgotten after a plan was written: the plan's own code must not bring it back."""
    written = plan.stat().st_mtime
    files = [path for path in (folder / "plan").glob("forgotten-*.parquet") if path.stat().st_mtime >= written]
    return frozenset(trial_id for path in files for trial_id in pq.read_table(path, columns=["trial_id"]).column("trial_id").to_pylist())


def read_tombstones(folder: Path) -> Forgotten:
    """Everything that is forgotten of a sweep; raises ResultsError for a damaged file (the rows that it names would come back)."""
    tombstones: list[Tombstone] = []
    for path in sorted((folder / "plan").glob("forgotten-*.parquet")):
        try:
            columns = pq.read_table(path, schema=SCHEMA).to_pydict()
        except (OSError, pa.ArrowInvalid) as error:
            raise ResultsError(
                f"{path} cannot be read: {error}. It names results that were forgotten on purpose (quantsweep rerun); "
                "without it they count again. Move it away and repeat that rerun"
            ) from error
        tombstones += map(Tombstone, *(columns[name] for name in Tombstone._fields))
    return Forgotten(tombstones)
