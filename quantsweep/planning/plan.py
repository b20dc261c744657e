"""The plan: candidates − meaningless − duplicates − done − in flight.

Building a plan submits nothing and writes nothing; `quantsweep.planning.plan_files` makes it a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quantsweep.errors import ComponentError, ConfigurationError, ConfigurationErrors
from quantsweep.planning.conditions import facts_of
from quantsweep.planning.grid import Grid
from quantsweep.planning.schema import Schema
from quantsweep.planning.shards import Arithmetic, Forecast, Predictor, cut
from quantsweep.trial.specs import (
    PERPLEXITY,
    LaunchSettings,
    ModelSpec,
    PlannedTrial,
    RunSettings,
    Shard,
    TaskSpec,
    asked_otherwise,
    other_key,
)

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
        """Models, and texts of the hub, that trials to run need and whose content identity is not known."""
        planned = [p for shard in self.shards for p in shard.trials]
        names = {p.trial.model.name for p in planned if p.trial.model.content is None}
        names |= {f"calibration {c.name}" for p in planned if (c := p.trial.calibration) is not None and c.content is None}
        suites = {p.tasks for p in planned}
        names |= {f"task {t.name}" for tasks in suites for t in tasks if t.kind == PERPLEXITY and t.content is None}
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
    seen: set[str] = set()
    all_verdicts: list[_Verdicts] = []
    for grid in grids:
        skipped |= {exclusion.reason: (0, "nothing") for exclusion in grid.exclusions if exclusion.reason not in skipped}
        all_verdicts.append(verdicts := _Verdicts(grid))
        for candidate in grid.candidates():
            candidates += 1
            try:
                resolved = schema.resolve(candidate)
            except ConfigurationError as error:
                if isinstance(error, ComponentError) and error.kind in verdicts.found:
                    verdicts.note(candidate, str(error))
                    count, example = skipped.get(str(error), (0, f"{error.kind}={candidate[error.kind]}"))
                    skipped[str(error)] = (count + 1, example)
                else:
                    problems.append(f"{error} ({grid.origin})")
                continue
            verdicts.note(candidate, resolved.reason)
            facts = facts_of(resolved.trial) if resolved.trial is not None and grid.exclusions else {}
            seen.update(facts)
            reason = resolved.reason or next((exclusion.reason for exclusion in grid.exclusions if exclusion.holds(facts)), None)
            if resolved.reason is not None and not grid.axes:
                problems.append(resolved.reason)  # nobody asked for anything else
            if resolved.trial is None or reason is not None:
                reason = str(reason)
                count, example = skipped.get(reason, (0, ""))
                skipped[reason] = (count + 1, example if count else resolved.description)
                continue
            planned = PlannedTrial(trial=resolved.trial, tasks=resolved.tasks)
            known = found.get(planned.trial.trial_id)
            merged = planned if known is None else with_tasks(known, planned)
            duplicates += known is not None and merged.tasks == known.tasks
            found[planned.trial.trial_id] = merged
    useful = {item for verdicts in all_verdicts for item in verdicts.useful}
    for verdicts in all_verdicts:
        problems.extend(verdicts.problems(schema, useful))
        problems.extend(_conditions_on_nothing(verdicts.grid, seen))
    problems.extend(_namesakes(planned.trial.model for planned in found.values()))
    if problems:
        raise ConfigurationErrors(problems)
    return Expansion(trials=tuple(found.values()), duplicates=duplicates, skipped=skipped, candidates=candidates)


def _conditions_on_nothing(grid: Grid, facts: Collection[str]) -> Iterator[str]:
    """A message for each condition on a key that no trial of the study has; what was typed over a study may leave such keys out."""
    for exclusion in () if grid.typed else grid.exclusions:
        for key, _ in exclusion.values:
            if "." in key and key not in facts:
                yield f"{exclusion.origin}: no trial has the key '{key}', so that the condition leaves nothing out"


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


def with_tasks(known: PlannedTrial, other: PlannedTrial) -> PlannedTrial:
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
        self.found = frozenset(axis.key for axis in grid.axes if axis.is_found)
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
        bad = [item for item in bad if item[0] not in self.found & has_use]
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


# --- words --------------------------------------------------------------------------------------------------------------


def skipped_summary(expansion: Expansion) -> list[str]:
    """One line a reason, the most frequent first."""
    counts = Counter({reason: count for reason, (count, _) in expansion.skipped.items()})
    return [f"{count:,} × {reason} (for example {expansion.skipped[reason][1]})" for reason, count in counts.most_common()]
