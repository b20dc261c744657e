"""`quantsweep rerun SWEEP column=value …`: forget results, so that the launch command runs them again.

A bug in our own code must not leave its rows standing.  What matches is written down as forgotten
first (`quantsweep.forgetting`), which every reader heeds at once; then the rows leave the files.

    model=… bit_width=…        every attempt at these trials: results and failures
    code_commit=…              every attempt that ran this code
    task=… (or --task)         these evaluations only
    status=failed, failure_class=…   that these attempts failed, so that their retries begin anew; what they completed stays
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from quantsweep import records
from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.cli.compact import summary_text
from quantsweep.errors import ConfigurationError, LockedError, ResultsError
from quantsweep.filters import OUTCOME_COLUMNS, TASK_COLUMNS, Filter, parse
from quantsweep.forgetting import Forgotten, Kind, Tombstone, write_tombstones
from quantsweep.launching.compaction import compact
from quantsweep.paths import SweepFolder
from quantsweep.words import count
from quantsweep.workers import read_records


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("filters", nargs="*", metavar="column=value", help="what to forget: model=mini-* bit_width=3,4 status=failed")
    parser.add_argument("--task", action="append", default=[], help="this task only (may be repeated): --task a --task b is task=a,b")
    parser.add_argument("--all", action="store_true", help="forget everything (needed where no column=value is given)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.epilog = __doc__.partition("\n\n")[2] if __doc__ else None


def run(arguments: argparse.Namespace) -> int:
    """Forget what matches, after asking; returns 1 if the answer was no."""
    folder = find_sweep(arguments)
    wanted = _filter(arguments)
    selection = select(folder, wanted)
    print(f"{folder.name}: {selection.text} to forget ({wanted})")
    _warn_of_workers(folder)
    if not arguments.yes and not _agreed():
        print("nothing was forgotten")
        return 1
    write_tombstones(folder, selection.tombstones)
    print("forgotten; the launch command resumes: it runs again what is missing")
    try:
        print(summary_text(compact(folder)))
    except LockedError as error:
        print(f"{error}. Forgotten rows leave the files with the next compaction")
    return 0


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is to be forgotten; trials, evaluations and failures count what stands of it in the tables now."""

    tombstones: tuple[Tombstone, ...]
    trials: int
    evaluations: int
    failures: int

    @property
    def text(self) -> str:
        """The counts in words."""
        return f"{count(self.evaluations, 'evaluation')} and {count(self.failures, 'failed attempt')} of {count(self.trials, 'trial')}"


def select(folder: SweepFolder, wanted: Filter) -> Selection:
    """What a filter means in a sweep; ResultsError: nothing.  ConfigurationError: it cannot be told, or names what is not there."""
    outcome, task = wanted.columns & set(OUTCOME_COLUMNS), wanted.columns & set(TASK_COLUMNS)
    if outcome and task:
        raise ConfigurationError(
            f"{', '.join(sorted(outcome))} is said of a whole attempt, {', '.join(sorted(task))} of one evaluation: give one of them"
        )
    tables = ("trials",) if outcome else ("metrics", "samples") if task else ("metrics", "trials", "samples", "layers")
    stones: set[Tombstone] = set()
    there: defaultdict[str, set[Any]] = defaultdict(set)
    for table in tables:
        rows = _rows(folder, table, wanted.columns)
        for column, values in wanted.values(rows).items():
            there[column].update(values)
        stones.update(_stones(rows.filter(pa.array(wanted.mask(rows))), by_task=bool(task), by_outcome=bool(outcome)))
    wanted.refuse_unmet(there, folder.name)
    if not stones:
        raise ResultsError(f"nothing in {folder.name} matches {wanted}")
    return _counted(folder, stones)


def _rows(folder: SweepFolder, table: str, columns: Iterable[str] = ()) -> pa.Table:
    extra = {"task_key"} if table in ("metrics", "samples") else {"status"} if table == "trials" else set()
    return records.read_encoded(folder.path, table, sorted({"attempt", "trial_id", *extra, *columns}))


def _stones(rows: pa.Table, *, by_task: bool, by_outcome: bool) -> Iterable[Tombstone]:
    codes, _ = records.row_codes(rows, ["attempt", "trial_id", *(["task_key"] if by_task else ["status"] if by_outcome else [])])
    rows = rows.take(pa.array(np.unique(codes, return_index=True)[1]))
    attempts, trials = rows.column("attempt").to_pylist(), rows.column("trial_id").to_pylist()
    if by_task:
        return (Tombstone(*row, Kind.EVALUATION.value) for row in zip(attempts, trials, rows.column("task_key").to_pylist(), strict=True))
    if by_outcome:
        kinds = [Kind.FAILURE if status == "failed" else Kind.ATTEMPT for status in rows.column("status").to_pylist()]
        return (Tombstone(attempt, trial, None, kind.value) for attempt, trial, kind in zip(attempts, trials, kinds, strict=True))
    return (Tombstone(attempt, trial, None, Kind.ATTEMPT.value) for attempt, trial in zip(attempts, trials, strict=True))


def _counted(folder: SweepFolder, stones: set[Tombstone]) -> Selection:
    forgotten = Forgotten(stones)
    metrics = _rows(folder, "metrics")
    metrics = metrics.filter(pa.array(forgotten.mask("metrics", metrics)))
    trials = _rows(folder, "trials")
    trials = trials.filter(pa.array(forgotten.mask("trials", trials)))
    evaluations = set(zip(metrics.column("trial_id").to_pylist(), metrics.column("task_key").to_pylist(), strict=True))
    return Selection(
        tombstones=tuple(sorted(stones, key=lambda stone: (stone.trial_id, stone.attempt, stone.task_key or ""))),
        trials=len({stone.trial_id for stone in stones}),
        evaluations=len(evaluations),
        failures=trials.column("status").to_pylist().count("failed"),
    )


def _filter(arguments: argparse.Namespace) -> Filter:
    texts = [*arguments.filters, *([f"task={','.join(arguments.task)}"] if arguments.task else [])]
    if not texts and not arguments.all:
        raise ConfigurationError("what is to be forgotten? Give column=value (model=mini-*, code_commit=3f9c, status=failed), or --all")
    if texts and arguments.all:
        raise ConfigurationError(f"--all and {' '.join(texts)}: give one of them")
    return parse(texts)


def _warn_of_workers(folder: SweepFolder) -> None:
    alive = [heard.record for heard in read_records(folder) if heard.is_alive]
    if alive:
        print(
            f"{count(len(alive), 'worker is', 'workers are')} at work. What is being run and has no row yet is not forgotten, and "
            f"workers run the code that they began with: after a change of code end them first (quantsweep cancel {folder.name})"
        )


def _agreed() -> bool:
    if not sys.stdin.isatty():
        print("not asked, since nobody is at the keyboard: add --yes")
        return False
    return input("Forget them? [y/N] ").strip().lower() in ("y", "yes")
