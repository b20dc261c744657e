"""An independent record of what was evaluated, and what it says of the product's tables.

    environment = ledger.environment(record=tmp_path / "ledger", faults=plan, kill=[point])
    launch(…, env=environment)                  # jobs inherit it; or: cluster.setup=[…] from ledger.setup_lines(environment)
    …
    report = ledger.check(ledger.read(tmp_path / "ledger"), folder)
    assert report.problems() == []

The product's tables say what the product believes.  Here each process writes down itself when an evaluation
begins and ends (`inside/sitecustomize.py`), in a file of the test's that the product does not know.
Then a row without an evaluation is invented, an evaluation that ended and has no row is lost, and one
that ended twice was paid for twice.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq

import quantsweep
from tests.slurm.ledger.inside.qs_faults import Fault, FaultPlan
from tests.slurm.ledger.inside.qs_hooks import KillPoint, fired

__all__ = [
    "Evaluation",
    "Event",
    "Fault",
    "FaultPlan",
    "KillPoint",
    "Ledger",
    "Report",
    "check",
    "environment",
    "fired",
    "read",
    "setup_lines",
]

INSIDE = Path(__file__).resolve().parent / "inside"
EVENTS = ("begin", "end", "error", "fault")

Evaluation = tuple[str, str]
"""trial_id, task_key"""


class LedgerError(Exception):
    """The record itself is not to be trusted, so it proves nothing."""


# -- for processes ------------------------------------------------------------------------------------


def environment(
    *, record: Path | None = None, faults: Path | None = None, kill: Sequence[KillPoint] = (), state: Path | None = None
) -> dict[str, str]:
    """Variables for a launcher (its jobs inherit them): what to record, which faults, where to die.

    record: a file on a local disk; faults: a file that `FaultPlan.write` wrote; state: a folder, needed with `kill`.
    """
    if kill and state is None:
        raise ValueError("kill points need state=: a folder that remembers which have fired")
    path = os.pathsep.join(filter(None, [str(INSIDE), os.environ.get("PYTHONPATH")]))
    variables = {
        "QS_TEST_LEDGER": record,
        "QS_TEST_FAULTS": faults,
        "QS_TEST_KILL": " ".join(map(str, kill)) or None,
        "QS_TEST_KILL_STATE": state if kill else None,
    }
    return {"PYTHONPATH": path, **{key: str(value) for key, value in variables.items() if value is not None}}


def setup_lines(variables: Mapping[str, str]) -> list[str]:
    """The same as lines of a job script, for a product that hands its environment on only in part."""
    lines = [f"export {key}={shlex.quote(value)}" for key, value in variables.items() if key != "PYTHONPATH"]
    return [*lines, f'export PYTHONPATH={shlex.quote(str(INSIDE))}"${{PYTHONPATH:+:$PYTHONPATH}}"']


# -- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line: what happened, when (seconds since 1970), in which process and job, to which evaluation."""

    event: str
    time: float
    pid: int
    job: str
    trial: str
    task: str
    detail: str | None = None

    @property
    def evaluation(self) -> Evaluation:
        """What it happened to."""
        return (self.trial, self.task)


@dataclass(frozen=True)
class Ledger:
    """Everything that was recorded, in the order in which it was written."""

    events: tuple[Event, ...]

    @cached_property
    def begun(self) -> Counter[Evaluation]:
        """How often each evaluation was begun."""
        return self._count("begin")

    @cached_property
    def ended(self) -> Counter[Evaluation]:
        """How often each evaluation came to its end, with a result."""
        return self._count("end")

    @cached_property
    def repeated(self) -> dict[Evaluation, int]:
        """Evaluations that ended more than once, and how often."""
        return {evaluation: count for evaluation, count in self.ended.items() if count > 1}

    @cached_property
    def in_flight(self) -> list[Event]:
        """The beginnings without an end: evaluations that some fault cut off (or that are still running)."""
        last: dict[int, Event] = {}
        cut: list[Event] = []
        for event in self.events:
            if event.event == "begin":
                cut += [last[event.pid]] if event.pid in last else []  # the number was given to a new process
                last[event.pid] = event
            elif event.event in ("end", "error"):
                last.pop(event.pid, None)
        return cut + list(last.values())

    @cached_property
    def faults(self) -> Counter[str]:
        """How often each kind of injected fault struck."""
        return Counter(str(event.detail) for event in self.events if event.event == "fault")

    def _count(self, kind: str) -> Counter[Evaluation]:
        return Counter(event.evaluation for event in self.events if event.event == kind)


def read(path: Path) -> Ledger:
    """Read a record; raises LedgerError for a line that is none, or an evaluation of which the trial is not known."""
    text = path.read_text()
    if text and not text.endswith("\n"):
        raise LedgerError(f"{path} ends in the middle of a line: {text.splitlines()[-1]!r}")
    return Ledger(tuple(_parse(line, path) for line in text.splitlines()))


def _parse(line: str, path: Path) -> Event:
    words = line.split(" ")
    try:
        event, time, pid, job, trial, task, *detail = words
        if event not in EVENTS or len(detail) != (event == "fault") or trial == "unknown":
            raise ValueError
        return Event(
            event=event, time=float(time), pid=int(pid), job=job, trial=trial, task=task, detail=detail[0] if detail else None
        )  # fmt: skip
    except ValueError:
        raise LedgerError(f"{path}: {line!r} is not a line of the ledger") from None


# -- comparing ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the ledger says of a sweep's tables; evaluations, unless it says otherwise.

    asked, rows: how many, and how many have an effective row (of `load_results`).
    missing: asked, and without a row.  doubled: with two effective rows of one metric.  uneven: with fewer metrics than
    others on the same task.  strangers: with a row, and never asked.  invented: with a row, and never ended.
    lost: ended, and without a row.  repeated: ended more than once, and how often.  needless: begun after a row of an
    earlier evaluation was written, as far as its rows are still there (compaction drops them).  cut: begun, never ended.
    """

    asked: int
    rows: int
    missing: list[Evaluation] = field(default_factory=list)
    doubled: list[Evaluation] = field(default_factory=list)
    uneven: list[Evaluation] = field(default_factory=list)
    strangers: list[Evaluation] = field(default_factory=list)
    invented: list[Evaluation] = field(default_factory=list)
    lost: list[Evaluation] = field(default_factory=list)
    repeated: dict[Evaluation, int] = field(default_factory=dict)
    needless: list[Event] = field(default_factory=list)
    cut: list[Event] = field(default_factory=list)

    def problems(self) -> list[str]:
        """One line for each promise that is broken; a finished sweep has none.  Repeats are for the caller to judge."""
        kinds = ("missing", "doubled", "uneven", "strangers", "invented", "lost", "needless")
        found = {kind: getattr(self, kind) for kind in kinds}
        return [f"{len(items)} {kind}, such as {items[0]}" for kind, items in found.items() if items]

    def __str__(self) -> str:
        """The counts, for a log or a benchmark's table."""
        counts = {name: len(value) for name, value in vars(self).items() if isinstance(value, (list, dict))}
        return " ".join(f"{name}={count}" for name, count in ({"asked": self.asked, "rows": self.rows} | counts).items())


def check(record: Ledger, folder: Path, *, asked: Collection[Evaluation] | None = None) -> Report:
    """Hold a sweep's tables against the ledger.  asked: what was asked; by default, what the sweep's plans say."""
    wanted = set(_asked(folder) if asked is None else asked)
    rows = quantsweep.load_results(folder)
    metrics = Counter(zip(rows.trial_id, rows.task_key, rows.metric, strict=True))
    names: dict[Evaluation, set[str]] = defaultdict(set)
    of_task: dict[str, set[str]] = defaultdict(set)
    for trial, task, metric in metrics:
        names[trial, task].add(metric)
        of_task[task].add(metric)
    return Report(
        asked=len(wanted),
        rows=len(names),
        missing=sorted(wanted - set(names)),
        doubled=sorted({(trial, task) for (trial, task, _), count in metrics.items() if count > 1}),
        uneven=sorted(evaluation for evaluation, known in names.items() if known != of_task[evaluation[1]]),
        strangers=sorted(set(names) - wanted),
        invented=sorted(set(names) - set(record.ended)),
        lost=sorted(set(record.ended) - set(names)),
        repeated=record.repeated,
        needless=_needless(record, folder),
        cut=record.in_flight,
    )


def _asked(folder: Path) -> Iterable[Evaluation]:
    for path in sorted((folder / "plan").glob("plan-*.parquet")):
        table = pq.read_table(path, columns=["trial_id", "tasks"])
        for trial, tasks in zip(table.column("trial_id").to_pylist(), table.column("tasks").to_pylist(), strict=True):
            yield from ((trial, task) for task in tasks)


def _needless(record: Ledger, folder: Path) -> list[Event]:
    """Evaluations begun although a row was there: its time is earlier, it is the row of another evaluation, and nobody has asked since
    to run it again (`quantsweep rerun`)."""
    files = [str(path) for path in (folder / "metrics").rglob("*.parquet") if not path.name.startswith(".")]
    if not files:
        return []
    table = ds.dataset(files, format="parquet").to_table(columns=["trial_id", "task_key", "finished_at"])
    written: dict[Evaluation, list[float]] = defaultdict(list)
    for trial, task, time in zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True):
        written[trial, task].append(time.timestamp())
    asked_again = _asked_again(folder)

    def is_needless(event: Event) -> bool:
        before = [time for time in written[event.evaluation] if time < event.time]
        return any(not any(time <= again <= event.time for again in asked_again[event.trial]) for time in before)

    return [event for event in record.events if event.event == "begin" and is_needless(event)]


def _asked_again(folder: Path) -> dict[str, list[float]]:
    """Trial → when somebody asked to run it again, by the files that say so."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in (folder / "plan").glob("f*-*.parquet"):
        for trial in pq.read_table(path, columns=["trial_id"]).column("trial_id").to_pylist():
            found[trial].append(path.stat().st_mtime)
    return found
