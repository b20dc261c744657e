"""A plan's trials to shards: same model together, one resource class, bounded by predicted minutes.

The prediction is a floor from arithmetic, not a measurement: a forward pass costs 2 operations a
parameter and token, so   minutes = 2 · parameters · tokens / (operations a second · 60) + overhead.
It only has to be right about proportions: it decides how many trials share a worker.  Where there are
past trials, `quantsweep.prediction` knows better, and `cut` is given its minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from quantsweep.specs import PlannedTrial, Resources, Shard, TaskSpec

EXAMPLES_OF_A_TASK = 2_000
"""Assumed where a task has no limit."""
TOKENS_AN_EXAMPLE = 150
"""Assumed: four continuations of some 40 tokens, or one document window."""
OPERATIONS_A_SECOND = {"cpu": 2e10, "gpu": 5e13}
"""Assumed sustained rate of one worker."""
SECONDS_A_TRIAL = 0.1
"""Assumed for quantizing, restoring and writing (the bundled models: 0.05)."""
START_MINUTES = 0.2
"""Assumed for a worker's start: the imports of its child."""
READ_BYTES_A_SECOND = 5e8
"""Assumed for loading a model from a shared file system."""
UNKNOWN_PARAMETERS = 1_000_000_000
"""Assumed where a model's yaml states no parameter count."""
Minutes = Callable[[PlannedTrial], float]
"""Predicts the duration of one trial on one worker, in minutes."""
SHARDS_A_WORKER = 4
"""Local workers get at least this many shards each (if there are trials enough), so that none idles at the end."""


ARITHMETIC_RANGE = (0.3, 10.0)
"""Assumed around a prediction without any measurement: it is a floor, more likely exceeded than undercut."""
ARITHMETIC = "arithmetic on model sizes, not a measurement"
SLURM_SHARDS = 64
"""A sweep on Slurm is cut into about so many shards at least, so that the scheduler can balance them …"""
SLURM_MINUTES = 5.0
"""… but into none predicted shorter than this: starting one costs half a minute."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The worker time of some trials: minutes, a 90 % interval (low, high) in minutes, and what it rests on, in words."""

    minutes: float
    low: float
    high: float
    basis: str


class Predictor(Protocol):
    """Predicts trials (`quantsweep.prediction`)."""

    def minutes(self, planned: PlannedTrial) -> float:
        """One trial on one worker."""

    def forecast(self, trials: Iterable[PlannedTrial], *, loads: Iterable[PlannedTrial] = (), starts: int = 0) -> Forecast:
        """All of them together, with one load of the model of each of `loads`, and `starts` workers that start."""


class Arithmetic:
    """A predictor that has seen nothing."""

    def minutes(self, planned: PlannedTrial) -> float:
        """The floor."""
        return predicted_minutes(planned)

    def forecast(self, trials: Iterable[PlannedTrial], *, loads: Iterable[PlannedTrial] = (), starts: int = 0) -> Forecast:
        """Its sum, with a wide interval."""
        total = sum(map(predicted_minutes, trials)) + sum(map(load_minutes, loads)) + starts * START_MINUTES
        return Forecast(minutes=total, low=total * ARITHMETIC_RANGE[0], high=total * ARITHMETIC_RANGE[1], basis=ARITHMETIC)


def predicted_minutes(planned: PlannedTrial, *, gpu: bool | None = None) -> float:
    """Predicted duration of one trial on one worker.  gpu: whether that has one; None: if its model asks for one."""
    model = planned.trial.model
    rate = OPERATIONS_A_SECOND["gpu" if (model.resources.gpus > 0 if gpu is None else gpu) else "cpu"]
    tokens = sum(assumed_tokens(task) for task in planned.tasks)
    return (2 * (model.parameters or UNKNOWN_PARAMETERS) * tokens / rate + SECONDS_A_TRIAL) / 60


def load_minutes(planned: PlannedTrial) -> float:
    """Predicted duration of loading a trial's model: its 16-bit weights, read once."""
    return (planned.trial.model.parameters or UNKNOWN_PARAMETERS) * 2 / READ_BYTES_A_SECOND / 60


def assumed_tokens(task: TaskSpec) -> int:
    """Tokens that one evaluation of a task is assumed to send through the model."""
    return (task.limit or EXAMPLES_OF_A_TASK) * TOKENS_AN_EXAMPLE


def cut(
    trials: Iterable[PlannedTrial], *, max_minutes: float, workers: int | None = None, minutes: Minutes = predicted_minutes
) -> tuple[Shard, ...]:
    """Cut trials into shards, small models first.

    max_minutes: predicted bound of a shard (a single longer trial is a shard of its own).
    workers: for local runs, how many work side by side; shards are then cut small enough to keep them all busy.  None: on Slurm.
    minutes: predicts one trial.
    """
    ordered = sorted(trials, key=_order)
    total = sum(map(minutes, ordered))
    if workers is not None:
        max_minutes = min(max_minutes, total / (workers * SHARDS_A_WORKER))
    else:
        max_minutes = min(max_minutes, max(SLURM_MINUTES, total / SLURM_SHARDS))
    pieces = [
        (resources, tuple(chunk))
        for (_, resources), group in groupby(ordered, key=_affinity)
        for chunk in _chunks([(trial, minutes(trial)) for trial in group], max_minutes)
    ]
    return tuple(Shard(shard_id=number, resources=resources, trials=chunk) for number, (resources, chunk) in enumerate(pieces))


def _order(planned: PlannedTrial) -> tuple[Any, ...]:
    """Small models first (early answers), what is loaded together stays together, its baseline before everything else."""
    model = planned.trial.model
    loaded = (model.name, model.content or "", model.dtype, model.unquantized, model.resources.name)
    return (model.parameters or UNKNOWN_PARAMETERS, *loaded, not planned.trial.quantization.is_baseline)


def _affinity(planned: PlannedTrial) -> tuple[object, Resources]:
    return _order(planned)[:-1], planned.trial.model.resources


def _chunks(trials: Sequence[tuple[PlannedTrial, float]], max_minutes: float) -> Iterable[list[PlannedTrial]]:
    """Consecutive runs of about equal predicted length, none above `max_minutes` unless a single trial is."""
    total = sum(cost for _, cost in trials)
    pieces = max(1, -(-total // max_minutes)) if max_minutes > 0 else len(trials)
    target = total / pieces
    chunk: list[PlannedTrial] = []
    minutes = 0.0
    for trial, cost in trials:
        if chunk and minutes + cost > target * (1 + 1e-9):
            yield chunk
            chunk, minutes = [], 0.0
        chunk.append(trial)
        minutes += cost
    if chunk:
        yield chunk
