"""`quantsweep rerun SWEEP column=value …`: forget results, so that the launch command runs them again.

A bug in our own code must not leave its rows standing.  What matches is written down as forgotten
first (`quantsweep.tables.forgetting`), which every reader heeds at once; then the rows leave the files.
Nothing of it that was asked for before comes back, whoever is still at it: workers leave it alone, and
queued jobs that have nothing else to do leave the queue.

    model=… bit_width=…        everything of these trials: results and failures, also what has no row yet
    code_commit=…              every attempt that ran this code
    task=… (or --task)         these evaluations only
    status=failed, failure_class=…   that these attempts failed, so that their retries begin anew; what they completed stays
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quantsweep import slurm
from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.cli.compact import summary_text
from quantsweep.errors import ConfigurationError, LockedError, ResultsError, SlurmError
from quantsweep.launching.settle import cancel_tasks
from quantsweep.launching.tasks import Task, idle_tasks, observe
from quantsweep.planning.plan import remaining_tasks
from quantsweep.planning.plan_files import read_asked, read_headers
from quantsweep.storage.paths import TABLES, SweepFolder
from quantsweep.tables import records
from quantsweep.tables.compaction import compact
from quantsweep.tables.filters import OUTCOME_COLUMNS, PLAN_COLUMNS, TASK_COLUMNS, Filter, parse, planned_rows
from quantsweep.tables.forgetting import Fence, Forgotten, Kind, Tombstone, read_forgotten, write_fence
from quantsweep.words import count

NEXT = sys.maxsize
"""For counting: all that was ever asked for lies before what is forgotten now."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("filters", nargs="*", metavar="column=value", help="what to forget: model=mini-* bit_width=3,4 status=failed")
    parser.add_argument("--task", action="append", default=[], help="this task only (may be repeated): --task a --task b is task=a,b")
    parser.add_argument("--all", action="store_true", help="forget everything (needed where no column=value is given)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print what was forgotten as JSON; the words go to stderr")
    parser.epilog = __doc__.partition("\n\n")[2] if __doc__ else None


def run(arguments: argparse.Namespace) -> int:
    """Forget what matches, after asking; returns 1 if the answer was no."""
    if not arguments.json:
        return forget(arguments)[0]
    with contextlib.redirect_stdout(sys.stderr):
        status, selection = forget(arguments)
    counts = {name: getattr(selection, name) for name in ("trials", "evaluations", "failures", "planned")}
    print(json.dumps({"sweep": arguments.sweep, "forgotten": status == 0, **counts}))
    return status


def forget(arguments: argparse.Namespace) -> tuple[int, Selection]:
    """Forget, saying each step; the exit status, and what was meant."""
    folder = find_sweep(arguments)
    wanted = _filter(arguments)
    selection = select(folder, wanted)
    print(f"{folder.name}: {selection.text} to forget ({wanted})")
    if not arguments.yes and not _agreed():
        print("nothing was forgotten")
        return 1, selection
    if not arguments.yes and (now := select(folder, wanted)) != selection:
        selection = now
        print(f"meanwhile it is {selection.text}")
    write_fence(folder, selection.lines)
    print("forgotten, whoever may still write it; the launch command resumes: it runs again what is missing")
    for line in _taken_back(folder):
        print(line)
    try:
        print(summary_text(compact(folder, say=partial(print, file=sys.stderr))))
    except LockedError as error:
        print(f"{error}. Forgotten rows leave the files with the next compaction")
    return 0, selection


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is to be forgotten; trials, evaluations and failures count what stands of it in the tables now, planned what does not yet."""

    lines: tuple[Tombstone, ...]
    trials: int
    evaluations: int
    failures: int
    planned: int

    @property
    def text(self) -> str:
        """The counts in words."""
        text = f"{count(self.evaluations, 'evaluation')} and {count(self.failures, 'failed attempt')} of {count(self.trials, 'trial')}"
        return text + (f", and what was asked of {count(self.planned, 'trial')} without any result," if self.planned else "")


def select(folder: SweepFolder, wanted: Filter) -> Selection:
    """What a filter means in a sweep; ResultsError: nothing.  ConfigurationError: it cannot be told, or names what is not there."""
    outcome, task = wanted.columns & set(OUTCOME_COLUMNS), wanted.columns & set(TASK_COLUMNS)
    if outcome and task:
        raise ConfigurationError(
            f"{', '.join(sorted(outcome))} is said of a whole attempt, {', '.join(sorted(task))} of one evaluation: give one of them"
        )
    tables = ("trials",) if outcome else ("metrics", "samples") if task else TABLES
    met: set[_Part] = set()
    failed: set[_Part] = set()
    there: defaultdict[str, set[Any]] = defaultdict(set)
    for table in tables:
        rows = _rows(folder, table, wanted.columns)
        for column, values in wanted.values(rows).items():
            there[column].update(values)
        rows = rows.filter(pa.array(wanted.mask(rows)))
        met |= _parts(rows, by_task=bool(task))
        if outcome:
            failed |= _parts(rows.filter(pc.equal(rows.column("status").cast(pa.string()), "failed")), by_task=False)
    ahead = _planned(folder, wanted, there, by_task=bool(task)) if wanted.columns <= set(PLAN_COLUMNS) else set()
    wanted.refuse_unmet(there, folder.name)
    keys = {(trial, task_key) for _, trial, task_key in met} | ahead
    if not keys:
        raise ResultsError(f"nothing in {folder.name} matches {wanted}")
    # Axes and tasks name a trial or a task whole.  By what ran it, or by how it ended, some of its attempts are meant and others are not.
    others = set() if wanted.columns <= set(PLAN_COLUMNS) else _others(folder, keys, met - failed, by_task=bool(task))
    lines = [Tombstone(None, trial, task_key, (Kind.TASK if task else Kind.TRIAL).value) for trial, task_key in keys]
    lines += [Tombstone(*part, Kind.SPARED.value) for part in others]
    lines += [Tombstone(attempt, trial, None, Kind.FAILURE.value) for attempt, trial, _ in failed]
    return _counted(folder, lines, {trial for trial, _ in ahead} - {trial for _, trial, _ in met})


_Part = tuple[str, str, str | None]
"""attempt, trial, task (None: all of them)"""


def _rows(folder: SweepFolder, table: str, columns: Iterable[str] = ()) -> pa.Table:
    extra = {"task_key"} if table in ("metrics", "samples") else {"status"} if table == "trials" else set()
    return records.read_encoded(folder.path, table, sorted({"attempt", "trial_id", *extra, *columns}))


def _parts(rows: pa.Table, *, by_task: bool) -> set[_Part]:
    names = ["attempt", "trial_id", *(["task_key"] if by_task else [])]
    codes, _ = records.row_codes(rows, names)
    rows = rows.take(pa.array(np.unique(codes, return_index=True)[1]))
    columns = [rows.column(name).to_pylist() for name in names]
    return set(zip(*columns, *([] if by_task else [[None] * rows.num_rows]), strict=True))


def _planned(folder: SweepFolder, wanted: Filter, there: defaultdict[str, set[Any]], *, by_task: bool) -> set[tuple[str, str | None]]:
    """(trial, task or None) of what was asked and matches, whether or not it has a row yet: a queued job would still write it."""
    found: set[tuple[str, str | None]] = set()
    for planned in read_asked(folder.plan):
        for row in planned_rows(planned):
            for column in wanted.columns:
                there[column].add(row[column])
            if wanted.matches(row):
                found.add((row["trial_id"], row["task_key"] if by_task else None))
    return found


def _others(folder: SweepFolder, keys: set[tuple[str, str | None]], met: set[_Part], *, by_task: bool) -> set[_Part]:
    """Attempts at the same trials (or tasks) that are not meant."""
    tables = ("metrics", "samples") if by_task else TABLES
    there = set().union(*(_parts(_rows(folder, table), by_task=by_task) for table in tables))
    return {part for part in there if part[1:] in keys} - met


def _counted(folder: SweepFolder, lines: list[Tombstone], planned: set[str]) -> Selection:
    forgotten = Forgotten([Fence(number=NEXT, lines=tuple(lines))], folder.plan)

    def gone(table: str) -> pa.Table:
        rows = _rows(folder, table, forgotten.columns(table))
        return rows.filter(pa.array(forgotten.mask(table, rows)))

    metrics, trials = gone("metrics"), gone("trials")
    evaluations = set(zip(metrics.column("trial_id").to_pylist(), metrics.column("task_key").to_pylist(), strict=True))
    return Selection(
        lines=tuple(sorted(lines, key=lambda line: (line.trial_id, line.attempt or "", line.task_key or "", line.kind))),
        trials=len({line.trial_id for line in lines} - planned),
        evaluations=len(evaluations),
        failures=trials.column("status").to_pylist().count("failed"),
        planned=len(planned),
    )


def _filter(arguments: argparse.Namespace) -> Filter:
    texts = [*arguments.filters, *([f"task={','.join(arguments.task)}"] if arguments.task else [])]
    if not texts and not arguments.all:
        raise ConfigurationError("what is to be forgotten? Give column=value (model=mini-*, code_commit=3f9c, status=failed), or --all")
    if texts and arguments.all:
        raise ConfigurationError(f"--all and {' '.join(texts)}: give one of them")
    return parse(texts)


def _taken_back(folder: SweepFolder) -> Iterator[str]:
    """Queued jobs that have nothing left to do leave the queue; says so, and what becomes of the others."""
    try:
        seen = observe(folder)
        idle = _idle(folder, seen.in_flight)
        cancel_tasks(folder, idle, purpose="rerun")
    except SlurmError as error:
        yield f"{error}. Jobs that would still compute what is forgotten leave it alone by themselves"
        return
    if idle:
        yield f"{count(len(idle), 'queued job')} had nothing else to do and left the queue"
    if alive := sum(heard.is_alive for heard in seen.records):
        yield f"{count(alive, 'worker is', 'workers are')} at work, and will leave alone what is forgotten, from the next trial on"


def _idle(folder: SweepFolder, tasks: Iterable[Task]) -> list[Task]:
    """Pending tasks that have no trial left that is still asked of them."""
    pending = [task for task in tasks if task.state is slurm.State.PENDING]
    if not pending:
        return []
    done, forgotten, headers = records.read_done(folder.path), read_forgotten(folder.path), read_headers(folder.plan)
    return idle_tasks(
        folder, pending, lambda plan, planned: bool(forgotten.still_asked(remaining_tasks(planned, done), headers[plan].launched).tasks)
    )


def _agreed() -> bool:
    if not sys.stdin.isatty():
        print("not asked, since nobody is at the keyboard: add --yes")
        return False
    return input("Forget them? [y/N] ").strip().lower() in ("y", "yes")
