"""The plan: candidates − meaningless − duplicates − done − in flight.

Building a plan submits nothing and writes nothing.  `write_plan` makes it one Parquet file, one row
a trial, which is all that a worker needs: it reads the rows of its shard and asks nobody else.
Trials that are already done stay in the file, without a shard.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from quantsweep.errors import ConfigurationError, ConfigurationErrors, ResultsError
from quantsweep.planning.conditions import facts_of
from quantsweep.planning.grid import Grid
from quantsweep.planning.schema import Schema
from quantsweep.planning.shards import Arithmetic, Forecast, Predictor, cut
from quantsweep.planning.typed import Typed
from quantsweep.storage.files import checked_file, filesystem_now, write_table
from quantsweep.trial.specs import (
    LaunchSettings,
    ModelSpec,
    PlannedTrial,
    RunSettings,
    Shard,
    TaskSpec,
    TrialSpec,
    asked_otherwise,
    canonical_json,
    other_key,
)

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

Done = frozenset[tuple[str, str]]
"""Pairs (trial_id, task_key) that have a durable row."""


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """What the grids came to, before anything is known of what is done.

    duplicates: candidates that were equal to an earlier one.  skipped: reason → (count, an example).
    changes: what was typed over a study, in words, grid by grid.
    """

    trials: tuple[PlannedTrial, ...]
    duplicates: int
    skipped: Mapping[str, tuple[int, str]]
    candidates: int
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked, what is left of it, and how the rest is cut into shards."""

    sweep: str
    expansion: Expansion
    done: Done
    in_flight: frozenset[str]
    shards: tuple[Shard, ...]
    settings: RunSettings = field(default_factory=RunSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    forecast: Forecast | None = None
    """Worker time of what is to run."""
    workers: int | None = None
    """Workers side by side on this machine; None on Slurm."""
    gpu_minutes: float = 0.0
    """Predicted GPU-minutes of what is to run."""
    minutes: Mapping[str, float] = field(default_factory=dict)
    """Predicted minutes of each trial that is to run, by trial id."""

    @property
    def trials(self) -> tuple[PlannedTrial, ...]:
        """Every distinct trial that was asked for."""
        return self.expansion.trials

    @property
    def asked(self) -> dict[str, tuple[str, ...]]:
        """Trial id to task keys of everything that was asked for."""
        return {p.trial.trial_id: tuple(task.task_key for task in p.tasks) for p in self.trials}

    @property
    def unpinned(self) -> tuple[str, ...]:
        """Names of models with trials to run whose content identity is not known."""
        names = {p.trial.model.name for shard in self.shards for p in shard.trials if p.trial.model.content is None}
        return tuple(sorted(names))

    def is_done(self, planned: PlannedTrial) -> bool:
        """True if every task that is asked of this trial has a row."""
        return not remaining_tasks(planned, self.done).tasks

    def counts(self) -> dict[str, int]:
        """The numbers that `quantsweep plan --json` prints; trials unless the key says otherwise."""
        done = [p for p in self.trials if self.is_done(p)]
        flying = [p for p in self.trials if p.trial.trial_id in self.in_flight and not self.is_done(p)]
        to_run = sum(len(shard.trials) for shard in self.shards)
        return {
            "trials": len(self.trials),
            "evaluations": sum(len(p.tasks) for p in self.trials),
            "skipped": sum(count for count, _ in self.expansion.skipped.values()),
            "duplicates": self.expansion.duplicates,
            "done": len(done),
            "in_flight": len(flying),
            "to_run": to_run,
            "evaluations_to_run": sum(len(p.tasks) for shard in self.shards for p in shard.trials),
            "shards": len(self.shards),
        }


# --- building ---------------------------------------------------------------------------------------------------------


def expand(schema: Schema, grids: Iterable[Grid]) -> Expansion:
    """All distinct trials of the grids; raises ConfigurationErrors with everything that is wrong at once."""
    found: dict[str, PlannedTrial] = {}
    skipped: dict[str, tuple[int, str]] = {}
    problems: list[str] = []
    duplicates = candidates = 0
    all_verdicts: list[_Verdicts] = []
    for grid in grids:
        skipped |= {exclusion.reason: (0, "nothing") for exclusion in grid.exclusions if exclusion.reason not in skipped}
        all_verdicts.append(verdicts := _Verdicts(grid))
        for candidate in grid.candidates():
            candidates += 1
            try:
                resolved = schema.resolve(candidate)
            except ConfigurationError as error:
                problems.append(f"{error} ({grid.origin})")
                continue
            verdicts.note(candidate, resolved.reason)
            reason = resolved.reason or _excluded(grid, resolved.trial)
            if resolved.reason is not None and not grid.axes:
                problems.append(resolved.reason)  # nobody asked for anything else
            if resolved.trial is None or reason is not None:
                reason = str(reason)
                count, example = skipped.get(reason, (0, ""))
                skipped[reason] = (count + 1, example if count else resolved.description)
                continue
            planned = PlannedTrial(trial=resolved.trial, tasks=resolved.tasks)
            known = found.get(planned.trial.trial_id)
            merged = planned if known is None else _with_tasks(known, planned)
            duplicates += known is not None and merged.tasks == known.tasks
            found[planned.trial.trial_id] = merged
    useful = {item for verdicts in all_verdicts for item in verdicts.useful}
    for verdicts in all_verdicts:
        problems.extend(verdicts.problems(schema, useful))
    problems.extend(_namesakes(planned.trial.model for planned in found.values()))
    if problems:
        raise ConfigurationErrors(problems)
    return Expansion(trials=tuple(found.values()), duplicates=duplicates, skipped=skipped, candidates=candidates)


def _excluded(grid: Grid, trial: TrialSpec | None) -> str | None:
    """Why the study's author leaves a trial out; None if nobody does."""
    if trial is None or not grid.exclusions:
        return None
    facts = facts_of(trial)
    return next((exclusion.reason for exclusion in grid.exclusions if exclusion.holds(facts)), None)


def _namesakes(models: Iterable[ModelSpec]) -> Iterator[str]:
    """A message for each name of several checkpoints: rows say it in the column `model`, and a mean over a model would be one over all."""
    sources: dict[str, dict[tuple[str | None, ...], str]] = {}
    for model in {id(model): model for model in models}.values():  # a dozen, each the same object in all its trials
        sources.setdefault(model.name, {}).setdefault(model.checkpoint, model.source)
    for name, found in sources.items():
        if len(found) > 1:
            yield (
                f"{' and '.join(found.values())} are different models of one name, {name}, by which tables and figures tell them apart. "
                "Rename a folder, or plan them one after the other, each with a name of its own (model.name=…)"
            )


def _with_tasks(known: PlannedTrial, other: PlannedTrial) -> PlannedTrial:
    """All tasks of both, each evaluation once: a few-shot count of null and the task's own count are the same."""
    keys = {task.task_key for task in known.tasks}
    return replace(known, tasks=(*known.tasks, *(task for task in other.tasks if not {task.task_key, other_key(task)} & keys)))


class _Verdicts:
    """Finds axis values that lead nowhere: every candidate with them is meaningless, so they are mistakes.

    Where an axis of a study was replaced from the command line, other axes' values may mean nothing with the new ones (a 5-bit
    exponent with bit_width=4): they are skipped and counted.  Mistakes there are typed values that lead nowhere in the whole study.
    A model leaves no value of another axis without meaning, and a glob asks for none of its values in particular.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.useful: set[tuple[str, Any]] = set()
        self._found = frozenset(axis.key for axis in grid.axes if axis.is_found)
        self._typed = frozenset(key for key in grid.typed if key.split(".")[0] != "model")
        self._reasons: dict[tuple[str, Any], str] = {}

    def note(self, candidate: Mapping[str, Any], reason: str | None) -> None:
        """Record what became of a candidate; a model that cannot be had says nothing about the other axes."""
        for item in candidate.items():
            if reason is None or "unavailable" in reason:
                self.useful.add(item)
            else:
                self._reasons.setdefault(item, reason)

    def problems(self, schema: Schema, useful: Collection[tuple[str, Any]]) -> list[str]:
        """Messages for useless values and for dotted keys that no candidate has; `useful`: the useful values of all grids."""
        bad = [item for item in self._reasons if item not in self.useful]
        has_use = {key for key, _ in self.useful}
        bad = [item for item in bad if item[0] not in self._found & has_use]
        keys = [key for key in self.grid.keys if "." in key and key not in schema.seen_keys]
        if self._typed:
            bad = [item for item in bad if item[0] in self._typed and item not in useful]
            keys = [key for key in keys if key in self.grid.typed]
        # When all candidates of a grid are refused for one value, the other axes' values look useless too:
        # the reason names the culprit, and one message a reason is enough.
        reasons = dict.fromkeys(f"{self._reasons[item]} ({self.grid.origin})" for item in bad)
        return [*reasons, *(f"no candidate of this grid has the key '{k}' ({self.grid.origin})" for k in keys)]


def remaining_tasks(planned: PlannedTrial, done: Done) -> PlannedTrial:
    """The same trial with those tasks only that have no row yet, under whichever of their keys."""
    trial_id = planned.trial.trial_id
    tasks = tuple(task for task in planned.tasks if (trial_id, task.task_key) not in done and (trial_id, other_key(task)) not in done)
    return planned if len(tasks) == len(planned.tasks) else replace(planned, tasks=tasks)


def _as_done(planned: PlannedTrial, done: Done) -> PlannedTrial:
    """The same trial with each task in the words by which it has its row, so that whoever looks for that finds it."""
    trial_id = planned.trial.trial_id

    def as_done(task: TaskSpec) -> TaskSpec:
        other = asked_otherwise(task)
        is_other = other is not None and (trial_id, task.task_key) not in done and (trial_id, other.task_key) in done
        return other if is_other and other is not None else task

    tasks = tuple(as_done(task) for task in planned.tasks)
    return planned if tasks == planned.tasks else replace(planned, tasks=tasks)


def build_plan(
    expansion: Expansion,
    *,
    sweep: str,
    done: Done,
    in_flight: frozenset[str],
    settings: RunSettings,
    launch: LaunchSettings | None = None,
    workers: int | None,
    predictor: Predictor | None = None,
) -> Plan:
    """Subtract what is done and what is in flight, and cut the rest into shards."""
    expansion = replace(expansion, trials=tuple(_as_done(planned, done) for planned in expansion.trials))
    left = (remaining_tasks(planned, done) for planned in expansion.trials)
    to_run = [planned for planned in left if planned.tasks and planned.trial.trial_id not in in_flight]
    launch = launch or LaunchSettings()
    predictor = predictor or Arithmetic()
    shards = cut(to_run, max_minutes=launch.shard_minutes, workers=workers, minutes=predictor.minutes)
    return Plan(
        sweep=sweep,
        expansion=expansion,
        done=done,
        in_flight=in_flight,
        shards=shards,
        settings=settings,
        launch=launch,
        forecast=predictor.forecast(
            to_run,
            loads=(shard.trials[0] for shard in shards),
            starts=len(shards) if workers is None else min(workers, len(shards)),
        ),
        workers=workers,
        gpu_minutes=sum(predictor.minutes(planned) * planned.trial.model.resources.gpus for planned in to_run),
        minutes={planned.trial.trial_id: predictor.minutes(planned) for planned in to_run},
    )


# --- the file -----------------------------------------------------------------------------------------------------------

_NUMBERED = re.compile(r"(plan|fence)-(\d{5,})-[0-9T]+-[0-9a-f]+\.parquet")
ROWS_A_GROUP = 2_000
"""Rows of one Parquet row group: a worker reads the groups that hold its shard, not the whole plan."""


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
    """A name with the next number: greater than that of every plan and every fence (`quantsweep.tables.forgetting`) so far.

    Plans are named under the launch lock.  A fence named at the same moment may get the same number: it is in force for that plan.
    """
    filesystem_now(folder)  # what other hosts have named is seen now
    numbers = (int(match[2]) for match in (_NUMBERED.fullmatch(path.name) for path in folder.iterdir()) if match)
    return f"{kind}-{1 + max(numbers, default=0):05d}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}.parquet"


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
    try:
        metadata = json.loads(pq.read_schema(checked_file(path)).metadata[b"quantsweep"])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is not a plan of quantsweep: {error}. {_REMEDY}") from error
    typed = metadata.get("typed")
    return PlanHeader(
        name=path.name,
        sweep=metadata["sweep"],
        root=metadata["root"],
        settings=RunSettings.from_dict(metadata["settings"]),
        launch=LaunchSettings.from_dict(metadata["launch"]),
        typed=None if typed is None else Typed(tuple(typed["words"]), typed["folder"]),
    )


def read_headers(folder: Path) -> dict[str, PlanHeader]:
    """All plans' headers by name, oldest first."""
    return {path.name: read_header(path) for path in plan_files(folder)}


def read_asked(folder: Path) -> list[PlannedTrial]:
    """Everything that was ever asked of a sweep: the union of its plans, tasks of equal trials together."""
    asked: dict[str, PlannedTrial] = {}
    for path in plan_files(folder):
        table = _read(path, ["trial_id", "planned"])
        for trial_id, text in zip(table.column("trial_id").to_pylist(), table.column("planned").to_pylist(), strict=True):
            planned = PlannedTrial.from_json(text)
            asked[trial_id] = _with_tasks(asked[trial_id], planned) if trial_id in asked else planned
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
    table = _read(path, ["trial_id", "tasks"])
    return {
        trial_id: tuple(tasks) for trial_id, tasks in zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)
    }


def read_minutes(path: Path) -> dict[str, tuple[int, float]]:
    """Trial id to (shard, predicted minutes) of what a plan is to run; minutes are equal where an older plan does not say them."""
    columns: list[str] = [name for name in ("trial_id", "shard_id", "minutes") if name in _names(path)]
    table = _read(path, columns, filters=[("shard_id", ">=", 0)])
    ids, shards = table.column("trial_id").to_pylist(), table.column("shard_id").to_pylist()
    minutes = table.column("minutes").to_pylist() if "minutes" in columns else [None] * len(ids)
    return {trial_id: (shard, 1.0 if m is None else m) for trial_id, shard, m in zip(ids, shards, minutes, strict=True)}


def read_owned_tasks(folder: Path) -> dict[str, tuple[tuple[str, int], tuple[str, ...]]]:
    """Trial id to ((plan, shard), task keys): the newest plan that gave the trial a shard, and all that it asks of it."""
    owned: dict[str, tuple[tuple[str, int], tuple[str, ...]]] = {}
    for path in plan_files(folder):
        table = _read(path, ["trial_id", "shard_id", "tasks"], filters=[("shard_id", ">=", 0)])
        columns = (table.column(name).to_pylist() for name in ("trial_id", "shard_id", "tasks"))
        for trial_id, shard_id, tasks in zip(*columns, strict=True):
            owned[trial_id] = ((path.name, shard_id), tuple(tasks))
    return owned


def read_owners(folder: Path) -> dict[str, tuple[str, int]]:
    """Trial id to (plan, shard): the newest plan that gave the trial a shard."""
    owners: dict[str, tuple[str, int]] = {}
    for path in plan_files(folder):
        table = _read(path, ["trial_id", "shard_id"], filters=[("shard_id", ">=", 0)])
        pairs = zip(table.column("trial_id").to_pylist(), table.column("shard_id").to_pylist(), strict=True)
        owners.update((trial_id, (path.name, shard_id)) for trial_id, shard_id in pairs)
    return owners


def plan_owners(path: Path) -> frozenset[str]:
    """The trials that one plan gave a shard."""
    return frozenset(_read(path, ["trial_id"], filters=[("shard_id", ">=", 0)]).column("trial_id").to_pylist())


def count_assignments(folder: Path) -> dict[tuple[str, str], int]:
    """(trial id, root of the plan) to how many plans of that root have given the trial a shard."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in plan_files(folder):
        root = read_header(path).root
        table = _read(path, ["trial_id", "shard_id"], filters=[("shard_id", ">=", 0)])
        counts.update((trial_id, root) for trial_id in table.column("trial_id").to_pylist())
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
    table = _read(path, ["shard_id", "to_run"], filters=[("shard_id", "in", wanted)])
    pairs = zip(table.column("shard_id").to_pylist(), table.column("to_run").to_pylist(), strict=True)
    return [(shard_id, PlannedTrial.from_json(text)) for shard_id, text in pairs]


def shard_sizes(path: Path) -> dict[int, int]:
    """How many trials each shard has."""
    return dict(Counter(number for number in _read(path, ["shard_id"]).column("shard_id").to_pylist() if number is not None))


def shard_samples(path: Path) -> dict[int, PlannedTrial]:
    """One trial of each shard, which tells what the shard needs: all of them have one model."""
    table = _read(path, ["shard_id", "to_run"], filters=[("shard_id", ">=", 0)])
    last = dict(zip(table.column("shard_id").to_pylist(), table.column("to_run").to_pylist(), strict=True))
    return {shard_id: PlannedTrial.from_json(text) for shard_id, text in sorted(last.items())}


def shard_trials(path: Path, shard_ids: Iterable[int]) -> frozenset[str]:
    """The trial ids of some shards."""
    table = _read(path, ["trial_id", "shard_id"], filters=[("shard_id", "in", list(shard_ids))])
    return frozenset(table.column("trial_id").to_pylist())


_REMEDY = "Move it away; what it alone asked for runs again once its launch is typed again"


def _names(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(checked_file(path)).names)
    except (OSError, pa.ArrowInvalid) as error:
        raise ResultsError(f"plan {path} cannot be read: {error}. {_REMEDY}") from error


def _read(path: Path, columns: list[str], filters: Any = None) -> pa.Table:
    try:
        return pq.read_table(checked_file(path), columns=columns, filters=filters)
    except (OSError, pa.ArrowInvalid) as error:
        raise ResultsError(f"plan {path} cannot be read: {error}. {_REMEDY}") from error


# --- words --------------------------------------------------------------------------------------------------------------


def skipped_summary(expansion: Expansion) -> list[str]:
    """One line a reason, the most frequent first."""
    counts = Counter({reason: count for reason, (count, _) in expansion.skipped.items()})
    return [f"{count:,} × {reason} (for example {expansion.skipped[reason][1]})" for reason, count in counts.most_common()]
