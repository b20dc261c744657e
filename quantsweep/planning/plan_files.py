"""Plan files: one Parquet file a launch or retry, written once and never changed, which is all that a worker needs.

    plan/plan-<number>-<time>-<id>.parquet      a row a trial (PLAN_SCHEMA); what else it says is its header (PlanHeader)

A worker reads the rows of its shard and asks nobody else.  Trials that are already done stay in the file, without a shard.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quantsweep.errors import ResultsError
from quantsweep.planning.plan import Plan, with_tasks
from quantsweep.planning.typed import Typed
from quantsweep.storage.files import checked_file, filesystem_now, write_table
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import LaunchSettings, PlannedTrial, RunSettings, Shard, canonical_json

T = TypeVar("T")
PLAN_SCHEMA = pa.schema(
    [
        ("trial_id", pa.string()),
        ("shard_id", pa.int32()),
        ("label", pa.string()),
        ("tasks", pa.list_(pa.string())),
        ("planned", pa.string()),
        ("to_run", pa.string()),
        ("minutes", pa.float32()),
    ]
)
"""trial_id; shard that runs it (null: nothing left to do); label; all task keys; PlannedTrial as JSON: whole, and what is left;
predicted minutes of what is left (null with the shard; older plans lack the column)."""

_NUMBERED = re.compile(r"(plan|fence)-(\d{5,})-[0-9T]+-[0-9a-f]+\.parquet")
_NAMED = re.compile(rf'"{_NUMBERED.pattern}"|"up_to": (\d+)')
"""How submissions and workers' records name plans, and holds their numbers."""
ROWS_A_GROUP = 2_000
"""Rows of one Parquet row group: a worker reads the groups that hold its shard, not the whole plan."""
KEPT = 64
"""Plans whose rows stay in memory, without the trials' specifications: who takes a step of the sweep asks for them a dozen times."""


@dataclass(frozen=True, kw_only=True)
class PlanHeader:
    """What a plan's file says besides its trials.

    sequence: plans of a sweep are numbered; a trial belongs to the newest plan that gave it a shard.
    root: the plan of the launch that a retry plan descends from (its own name for a launch).
    typed: the words of the launch; None for retries, and for launches of versions that did not keep them.
    """

    name: str
    sweep: str
    root: str
    settings: RunSettings
    launch: LaunchSettings
    typed: Typed | None = None

    @property
    def sequence(self) -> int:
        """The plan's number."""
        return plan_sequence(self.name)

    @property
    def launched(self) -> int:
        """The number of the launch that it descends from."""
        return plan_sequence(self.root)


def plan_sequence(name: str) -> int:
    """The number in a plan's name.

    >>> plan_sequence("plan-00007-20260101T000000-1a2b3c4d.parquet")
    7
    """
    match = _NUMBERED.fullmatch(name)
    if match is None:
        raise ResultsError(f"{name} is not the name of a plan, plan-<number>-<time>-<id>.parquet. Move it away, or give another sweep=…")
    return int(match[2])


def next_name(folder: Path, kind: Literal["plan", "fence"]) -> str:
    """A name with the next number: greater than that of every plan and every fence (`quantsweep.tables.forgetting`) that ever was.

    Somebody may have moved a plan away: what speaks of it stays, and means that plan.
    Plans are named under the launch lock.  A fence named at the same moment may get the same number: it is in force for that plan.
    """
    filesystem_now(folder)  # what other hosts have named is seen now
    number = 1 + max(_numbers(folder), default=0)
    return f"{kind}-{number:05d}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}.parquet"


def _numbers(plans: Path) -> Iterator[int]:
    """Numbers of plans and fences that are here, or that a submission, a worker's record or a hold speaks of."""
    for path in plans.iterdir():
        if match := _NUMBERED.fullmatch(path.name):
            yield int(match[2])
    folder = SweepFolder(plans.parent)
    speakers = (plans.glob("submission-*.json"), folder.workers.glob("*.json"), folder.holds.glob("*.json"))
    for path in chain.from_iterable(speakers):
        with contextlib.suppress(OSError):  # what cannot be read is said by whoever needs it
            yield from (int(named[2] or named[3]) for named in _NAMED.finditer(checked_file(path).read_text(errors="replace")))


def plan_files(folder: Path) -> list[Path]:
    """All plans of a sweep, oldest first."""
    return sorted(folder.glob("plan-*.parquet"), key=lambda path: (plan_sequence(path.name), path.name))


def write_plan(folder: Path, plan: Plan, *, root: str | None = None, typed: Typed | None = None) -> Path:
    """Write the plan as `plan-<number>-<time>-<id>.parquet`, durably; returns its path.  root, typed: see PlanHeader."""
    shard_of = {p.trial.trial_id: (shard.shard_id, p) for shard in plan.shards for p in shard.trials}
    rows = []
    for planned in plan.trials:
        shard_id, left = shard_of.get(planned.trial.trial_id, (None, None))
        rows.append(
            {
                "trial_id": planned.trial.trial_id,
                "shard_id": shard_id,
                "label": planned.trial.label,
                "tasks": [task.task_key for task in planned.tasks],
                "planned": (text := planned.to_json()),
                "to_run": None if left is None else text if left == planned else left.to_json(),
                "minutes": None if left is None else plan.minutes.get(planned.trial.trial_id),
            }
        )
    rows.sort(key=lambda row: -1 if row["shard_id"] is None else row["shard_id"])
    name = next_name(folder, "plan")
    metadata = {
        "sweep": plan.sweep,
        "root": root or name,
        "settings": asdict(plan.settings),
        "launch": asdict(plan.launch),
        "counts": plan.counts(),
        "typed": None if typed is None else asdict(typed),
    }
    table = pa.Table.from_pylist(rows, schema=PLAN_SCHEMA).replace_schema_metadata({"quantsweep": canonical_json(metadata)})
    write_table(folder / name, table, row_group_size=ROWS_A_GROUP)
    return folder / name


def read_header(path: Path) -> PlanHeader:
    """What the plan says besides its trials."""
    return _read(path, _header)


def read_headers(folder: Path) -> dict[str, PlanHeader]:
    """All plans' headers by name, oldest first."""
    return {path.name: read_header(path) for path in plan_files(folder)}


def read_asked(folder: Path) -> list[PlannedTrial]:
    """Everything that was ever asked of a sweep: the union of its plans, tasks of equal trials together."""
    asked: dict[str, PlannedTrial] = {}
    for path in plan_files(folder):
        for trial_id, text in _columns(_specifications(path, ["trial_id", "planned"]), "trial_id", "planned"):
            planned = PlannedTrial.from_json(text)
            asked[trial_id] = with_tasks(asked[trial_id], planned) if trial_id in asked else planned
    return list(asked.values())


def read_asked_tasks(folder: Path) -> dict[str, tuple[str, ...]]:
    """Trial id to task keys of everything that was ever asked: `read_asked` without building any trial."""
    asked: dict[str, tuple[str, ...]] = {}
    for path in plan_files(folder):
        for trial_id, tasks in read_plan_tasks(path).items():
            known = asked.get(trial_id)
            asked[trial_id] = tasks if known is None else tuple(dict.fromkeys((*known, *tasks)))
    return asked


def read_plan_tasks(path: Path) -> dict[str, tuple[str, ...]]:
    """Trial id to task keys of one plan, done or not."""
    return {trial_id: tuple(tasks) for trial_id, tasks in _columns(_read(path, _rows), "trial_id", "tasks")}


def read_minutes(path: Path) -> dict[str, tuple[int, float]]:
    """Trial id to (shard, predicted minutes) of what a plan is to run; minutes are equal where an older plan does not say them."""
    rows = _columns(_to_run(path), "trial_id", "shard_id", "minutes")
    return {trial_id: (shard, 1.0 if minutes is None else minutes) for trial_id, shard, minutes in rows}


def read_owned_tasks(folder: Path) -> dict[str, tuple[tuple[str, int], tuple[str, ...]]]:
    """Trial id to ((plan, shard), task keys): the newest plan that gave the trial a shard, and all that it asks of it."""
    owned: dict[str, tuple[tuple[str, int], tuple[str, ...]]] = {}
    for path in plan_files(folder):
        for trial_id, shard_id, tasks in _columns(_to_run(path), "trial_id", "shard_id", "tasks"):
            owned[trial_id] = ((path.name, shard_id), tuple(tasks))
    return owned


def read_owners(folder: Path) -> dict[str, tuple[str, int]]:
    """Trial id to (plan, shard): the newest plan that gave the trial a shard."""
    owners: dict[str, tuple[str, int]] = {}
    for path in plan_files(folder):
        owners.update((trial_id, (path.name, shard_id)) for trial_id, shard_id in _columns(_to_run(path), "trial_id", "shard_id"))
    return owners


def plan_owners(path: Path) -> frozenset[str]:
    """The trials that one plan gave a shard."""
    return frozenset(_to_run(path).column("trial_id").to_pylist())


def count_assignments(folder: Path) -> dict[tuple[str, str], int]:
    """(trial id, root of the plan) to how many plans of that root have given the trial a shard."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in plan_files(folder):
        root = read_header(path).root
        counts.update((trial_id, root) for trial_id in plan_owners(path))
    return dict(counts)


def read_shard(path: Path, shard_id: int) -> Shard:
    """The trials of one shard, with those tasks that were left when the plan was made."""
    trials = read_shard_trials(path, [shard_id])
    if not trials:
        raise ResultsError(f"{path} has no shard {shard_id}")
    return Shard(shard_id=shard_id, resources=trials[0].trial.model.resources, trials=tuple(trials))


def read_shard_trials(path: Path, shard_ids: Iterable[int]) -> list[PlannedTrial]:
    """The trials of some shards, each with those tasks that were left when the plan was made."""
    return [planned for _, planned in read_numbered_trials(path, shard_ids)]


def read_numbered_trials(path: Path, shard_ids: Iterable[int]) -> list[tuple[int, PlannedTrial]]:
    """The same with the shard of each; nothing is read for no shards."""
    wanted = list(shard_ids)
    if not wanted:
        return []
    table = _specifications(path, ["shard_id", "to_run"], filters=[("shard_id", "in", wanted)])
    return [(shard_id, PlannedTrial.from_json(text)) for shard_id, text in _columns(table, "shard_id", "to_run")]


def shard_sizes(path: Path) -> dict[int, int]:
    """How many trials each shard has."""
    return dict(Counter(_to_run(path).column("shard_id").to_pylist()))


def shard_samples(path: Path) -> dict[int, PlannedTrial]:
    """One trial of each shard, which tells what the shard needs: all of them have one model."""
    table = _specifications(path, ["shard_id", "to_run"], filters=[("shard_id", ">=", 0)])
    last = dict(_columns(table, "shard_id", "to_run"))
    return {shard_id: PlannedTrial.from_json(text) for shard_id, text in sorted(last.items())}


def shard_trials(path: Path, shard_ids: Iterable[int]) -> frozenset[str]:
    """The trial ids of some shards."""
    wanted = set(shard_ids)
    return frozenset(trial_id for trial_id, shard_id in _columns(_to_run(path), "trial_id", "shard_id") if shard_id in wanted)


# --- reading a file -------------------------------------------------------------------------------------------------------

_Identity = tuple[int, int, int]
"""(inode, bytes, time of change in ns) of a plan, which is never written again."""


def _read(path: Path, read: Callable[[Path, _Identity], T]) -> T:
    """What `read` says of a plan, as the file is now; raises ResultsError with the remedy."""
    try:
        status = checked_file(path).stat()
        return read(path, (status.st_ino, status.st_size, status.st_mtime_ns))
    except (OSError, pa.lib.ArrowException, ValueError, LookupError, TypeError) as error:
        raise _unreadable(path, error) from error


@lru_cache(maxsize=4 * KEPT)
def _header(path: Path, _: _Identity) -> PlanHeader:
    schema = pq.read_schema(path)
    if schema.metadata is None or b"quantsweep" not in schema.metadata or "trial_id" not in schema.names:
        raise ValueError("quantsweep did not write it")
    metadata = json.loads(schema.metadata[b"quantsweep"])
    typed = metadata.get("typed")
    return PlanHeader(
        name=path.name,
        sweep=metadata["sweep"],
        root=metadata["root"],
        settings=RunSettings.from_dict(metadata["settings"]),
        launch=LaunchSettings.from_dict(metadata["launch"]),
        typed=None if typed is None else Typed(tuple(typed["words"]), typed["folder"]),
    )


_ROWS = ("trial_id", "shard_id", "tasks")


@lru_cache(maxsize=KEPT)
def _rows(path: Path, _: _Identity) -> pa.Table:
    """Trials, shards, task keys and minutes of a plan (minutes: null in plans of versions that did not keep them)."""
    rows = pq.ParquetFile(path).read([*_ROWS, "minutes"])  # names that are not there are left out
    if missing := [name for name in _ROWS if name not in rows.column_names]:
        raise ValueError(f"quantsweep did not write it: it has no {', '.join(missing)}")
    return rows if "minutes" in rows.column_names else rows.append_column("minutes", pa.nulls(rows.num_rows, pa.float32()))


def _to_run(path: Path) -> pa.Table:
    """Rows of the trials that have a shard."""
    rows = _read(path, _rows)
    return rows.filter(pc.is_valid(rows.column("shard_id")))


def _specifications(path: Path, columns: list[str], filters: Any = None) -> pa.Table:
    """Columns with whole trials, which are large: read anew each time."""
    return _read(path, lambda path, _: pq.read_table(path, columns=columns, filters=filters))


def _columns(table: pa.Table, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table.column(name).to_pylist() for name in names), strict=True)


def _unreadable(path: Path, error: Exception) -> ResultsError:
    """What is wrong with a plan, and what to do: jobs may be in the queue that are to read it."""
    words = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, PermissionError):
        return ResultsError(f"plan {path} cannot be read: {error.strerror}. Ask its owner for the right to read it")
    again = "what it alone asked for runs again once its launch is typed again"
    named = " and ".join(_open_submissions(path))
    if not named:
        remedy = f"Move it away; {again}"
    elif os.path.lexists(path):
        remedy = f"Its jobs may be in the queue: cancel them (scancel), and move it and {named} away; {again}"
    else:
        remedy = f"Its jobs may be in the queue: put it back; or cancel them (scancel), and move {named} away; {again}"
    return ResultsError(f"plan {path} cannot be read: {words}. {remedy}")


def _open_submissions(path: Path) -> Iterator[str]:
    """Names of the submissions that speak of a plan and whose jobs have not all ended."""
    for file in sorted(path.parent.glob("submission-*.json")):
        with contextlib.suppress(OSError):
            text = checked_file(file).read_text(errors="replace")
            if f'"{path.name}"' in text and '"closed": true' not in text:
                yield file.name
