"""Results that no longer count: fences.

A bug in our own code must not leave its rows standing.  `quantsweep rerun` writes down what is
forgotten, one small Parquet file a time, before it touches anything else:

    plan/fence-<number>-<time>-<id>.parquet      attempt, trial_id, task_key, kind

A fence takes a number of the plans' own row of numbers.  What it names counts only where it was asked for by a later
launch: nothing that was asked for before is ever shown, whoever writes it and whenever, a worker that was thought dead
or a retry included; workers leave it alone, and the next launch plans it at once.  From then on every reader leaves
these rows out; compaction removes them from the files in its own time.  The file stays for good.

Older versions named exact attempts, in files plan/forgotten-<time>-<id>.parquet of the same columns: these are heeded too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quantsweep.errors import ResultsError
from quantsweep.planning.plan_files import next_name, plan_sequence
from quantsweep.storage.files import checked_file, write_table
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables.order import launches
from quantsweep.trial.specs import PlannedTrial

SCHEMA = pa.schema([("attempt", pa.string()), ("trial_id", pa.string()), ("task_key", pa.string()), ("kind", pa.string())])
FENCES, OLDER = "fence-*.parquet", "forgotten-*.parquet"


class Kind(StrEnum):
    """What a line of a fence says."""

    TRIAL = "trial"
    """Everything of a trial that was asked for before."""
    TASK = "task"
    """One task of a trial: rows of metrics and samples that were asked for before."""
    SPARED = "spared"
    """An attempt at such a trial (or task) that was there and was not meant (other code made it, say): it stays."""
    FAILURE = "failure"
    """That one attempt failed: its row in trials; evaluations that it completed stay."""
    ATTEMPT = "attempt"
    """One attempt, in every table, also what it has yet to write (older versions)."""
    EVALUATION = "evaluation"
    """One task of one attempt (older versions)."""


EVERY_TABLE = frozenset({"trials", "metrics", "samples", "layers"})
TABLES_OF = {
    Kind.TRIAL: EVERY_TABLE,
    Kind.TASK: frozenset({"metrics", "samples"}),
    Kind.FAILURE: frozenset({"trials"}),
    Kind.ATTEMPT: EVERY_TABLE,
    Kind.EVALUATION: frozenset({"metrics", "samples"}),
}


class Tombstone(NamedTuple):
    """One line; a trial, an attempt at it, one of its tasks, as its kind has them.  (A tuple: there may be 100,000 of them.)"""

    attempt: str | None
    trial_id: str
    task_key: str | None
    kind: str


@dataclass(frozen=True)
class Fence:
    """The lines of one file.  number: what was asked for up to it is forgotten (0 in older files: these name attempts alone)."""

    number: int
    lines: tuple[Tombstone, ...]

    def covers(self, trial_id: str, task_key: str, launch: int) -> bool:
        """True if what a launch asks of a trial and task is forgotten, whoever computes it yet."""
        return launch <= self.number and (trial_id in self.trials or (trial_id, task_key) in self.tasks)

    @cached_property
    def trials(self) -> frozenset[str]:
        """Trials of which everything is forgotten."""
        return frozenset(line.trial_id for line in self.lines if line.kind == Kind.TRIAL)

    @cached_property
    def tasks(self) -> frozenset[tuple[str, str | None]]:
        """(trial, task) of single tasks."""
        return frozenset((line.trial_id, line.task_key) for line in self.lines if line.kind == Kind.TASK)

    @cached_property
    def _spared(self) -> frozenset[tuple[str | None, str, str | None]]:
        return frozenset((line.attempt, line.trial_id, line.task_key) for line in self.lines if line.kind == Kind.SPARED)

    @cached_property
    def _exact(self) -> dict[str, frozenset[tuple[str | None, str, str | None]]]:
        """Table → (attempt, trial, task or None) that are forgotten by name."""
        kinds = (Kind.ATTEMPT, Kind.FAILURE, Kind.EVALUATION)
        named = [line for line in self.lines if line.kind in kinds]
        return {table: frozenset(line[:3] for line in named if table in TABLES_OF[Kind(line.kind)]) for table in EVERY_TABLE}

    def columns(self, table: str) -> tuple[str, ...]:
        """The columns of a table that `mask` needs; none if nothing of this table is forgotten."""
        if not (self.trials or self._exact[table] or (self.tasks and table in TABLES_OF[Kind.TASK])):
            return ()
        return ("attempt", "trial_id", "launch", "plan", *(("task_key",) if table in TABLES_OF[Kind.TASK] else ()))

    def mask(self, table: str, rows: pa.Table, launch: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """One flag a row: True where it is forgotten.  launch: that of each row."""
        # A first sieve in Arrow: where a sweep was run again, nearly nothing passes it.
        before = (launch <= self.number) & _is_in(rows, "trial_id", self._named(table))
        exact = self._exact[table]
        near = np.flatnonzero(before | _is_in(rows, "attempt", {attempt for attempt, _, _ in exact}))
        found = np.zeros(rows.num_rows, np.bool_)
        suspects = rows.select([name for name in ("attempt", "trial_id", "task_key") if name in rows.column_names]).take(pa.array(near))
        attempts, trials = suspects.column("attempt").to_pylist(), suspects.column("trial_id").to_pylist()
        tasks = suspects.column("task_key").to_pylist() if "task_key" in suspects.column_names else [None] * len(near)
        for place, attempt, trial, task in zip(near, attempts, trials, tasks, strict=True):
            whole, single = (attempt, trial, None), (attempt, trial, task)
            fenced = before[place] and (trial in self.trials or (trial, task) in self.tasks)
            spared = fenced and (whole in self._spared or single in self._spared)
            found[place] = (fenced and not spared) or whole in exact or single in exact
        return found

    def _named(self, table: str) -> set[str]:
        return {*self.trials, *(trial for trial, _ in self.tasks if table in TABLES_OF[Kind.TASK])}


class Forgotten:
    """All fences of a sweep, ready to be asked.  plans: the folder of its plans, by which older rows tell their launch."""

    def __init__(self, fences: Iterable[Fence] = (), plans: Path = Path()) -> None:
        self._fences, self._plans = tuple(fences), plans

    def __bool__(self) -> bool:
        return bool(self._fences)

    @property
    def in_part(self) -> frozenset[str]:
        """Trials of which single tasks were forgotten."""
        return frozenset(trial_id for fence in self._fences for trial_id, _ in fence.tasks)

    def covers(self, trial_id: str, task_key: str, launch: int) -> bool:
        """True if what a launch asks of a trial and task is forgotten: it is left alone by now, and a later launch plans it."""
        return any(fence.covers(trial_id, task_key, launch) for fence in self._fences)

    def still_asked(self, planned: PlannedTrial, launch: int) -> PlannedTrial:
        """The trial as a launch asks for it, with those tasks only that are not forgotten."""
        tasks = tuple(task for task in planned.tasks if not self.covers(planned.trial.trial_id, task.task_key, launch))
        return planned if len(tasks) == len(planned.tasks) else replace(planned, tasks=tasks)

    def columns(self, table: str) -> tuple[str, ...]:
        """The columns of a table that `mask` needs; none if nothing of this table is forgotten."""
        return tuple(dict.fromkeys(name for fence in self._fences for name in fence.columns(table)))

    def mask(self, table: str, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """One flag a row: True where it is forgotten."""
        found = np.zeros(rows.num_rows, np.bool_)
        if not rows.num_rows or not self.columns(table):
            return found
        launch = launches(rows, self._plans)
        for fence in self._fences:
            if fence.columns(table):
                found |= fence.mask(table, rows, launch)
        return found


def _is_in(rows: pa.Table, column: str, values: Iterable[str | None]) -> npt.NDArray[np.bool_]:
    wanted = pa.array(sorted(filter(None, values)), pa.string())
    return np.asarray(pc.is_in(rows.column(column).cast(pa.string()), value_set=wanted).to_numpy(), np.bool_)


def write_fence(folder: SweepFolder, lines: Iterable[Tombstone]) -> Path:
    """Forget these, durably, from the moment this returns; raises OSError (a full disk, say) with nothing forgotten."""
    rows = [line._asdict() for line in lines]
    path = folder.plan / next_name(folder.plan, "fence")
    write_table(path, pa.Table.from_pylist(rows, schema=SCHEMA))
    return path


def forgotten_since(folder: Path, plan: Path) -> frozenset[str]:
    """Trials of which an older version forgot something after a plan was written: the plan's own code must not bring it back."""
    written = plan.stat().st_mtime
    fences = (read_fence(path) for path in (folder / "plan").glob(OLDER) if path.lstat().st_mtime >= written)
    return frozenset(line.trial_id for fence in fences for line in fence.lines)


def read_forgotten(folder: Path) -> Forgotten:
    """Everything that is forgotten of a sweep; raises ResultsError for a damaged file (the rows that it names would come back)."""
    plans = folder / "plan"
    return Forgotten((read_fence(path) for pattern in (OLDER, FENCES) for path in sorted(plans.glob(pattern))), plans)


def read_fence(path: Path) -> Fence:
    """One file."""
    try:
        columns = pq.read_table(checked_file(path), columns=SCHEMA.names).cast(SCHEMA).to_pydict()
        if None in (*columns["trial_id"], *columns["kind"]):
            raise ValueError("it has lines that name no trial")
    except (OSError, pa.lib.ArrowException, ValueError, LookupError) as error:
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResultsError(
            f"{path} cannot be read: {words}. It names results that were forgotten on purpose (quantsweep rerun); "
            "without it they count again. Move it away and repeat that rerun"
        ) from error
    lines = tuple(map(Tombstone, *(columns[name] for name in Tombstone._fields)))
    return Fence(number=plan_sequence(path.name) if path.match(FENCES) else 0, lines=lines)
