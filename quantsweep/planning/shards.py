"""A plan's trials to shards: same model together, one resource class, bounded by predicted minutes.

The prediction is a floor from arithmetic, not a measurement: a forward pass costs 2 operations a
parameter and token, so   minutes = 2 · parameters · tokens / (operations a second · 60) + overhead.
It only has to be right about proportions: it decides how many trials share a worker.  Where there are
past trials, `quantsweep.operations.prediction` knows better, and `cut` is given its minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any, Protocol

from quantsweep.trial.specs import PERPLEXITY, ModelSpec, PlannedTrial, Resources, Shard, TaskSpec, canonical_json

EXAMPLES_OF_A_TASK = 2_000
"""Assumed where a task has no limit."""
TOKENS_AN_EXAMPLE = 150
"""Assumed: four continuations of some 40 tokens, or one document window."""
WINDOWS_OF_A_TEXT = 256
"""Assumed of a perplexity: as many as C4 is measured on; WikiText-2 has some 160."""
TOKENS_A_WINDOW = 2_048
"""Assumed of a perplexity; models of a shorter context have shorter ones, and more of them."""
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
SHARES = 3
"""A local worker's next shard is this part of its share of what is left: shards shrink, so that none idles at the end; but to none
shorter than loading its model, which another worker would have to do for it."""


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
    """Predicts trials (`quantsweep.operations.prediction`)."""

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
    if task.kind == PERPLEXITY:
        return (task.limit or WINDOWS_OF_A_TEXT) * (task.window or TOKENS_A_WINDOW)
    return (task.limit or EXAMPLES_OF_A_TASK) * TOKENS_AN_EXAMPLE


def cut(
    trials: Iterable[PlannedTrial], *, max_minutes: float, workers: int | None = None, minutes: Minutes = predicted_minutes
) -> tuple[Shard, ...]:
    """Cut trials into shards, small models first.

    max_minutes: predicted bound of a shard (a single longer trial is a shard of its own).
    workers: for local runs, how many work side by side; shards then shrink towards the end, to keep them all busy.  None: on Slurm.
    minutes: predicts one trial.
    """
    costed = [(planned, minutes(planned)) for planned in sorted(trials, key=_order)]
    left = sum(cost for _, cost in costed)
    if workers is None:
        max_minutes = min(max_minutes, max(SLURM_MINUTES, left / SLURM_SHARDS))
    pieces: list[tuple[Resources, tuple[PlannedTrial, ...]]] = []
    for model, group in groupby(costed, key=lambda item: item[0].trial.model):
        of_model = list(group)
        if workers is None:
            bound = _equal_parts(of_model, max_minutes)
        else:
            bound = partial(_shrinking, left=left, workers=workers, least=load_minutes(of_model[0][0]), most=max_minutes)
        pieces += [(model.resources, tuple(chunk)) for chunk in _chunks(of_model, bound)]
        left -= sum(cost for _, cost in of_model)
    return tuple(Shard(shard_id=number, resources=resources, trials=chunk) for number, (resources, chunk) in enumerate(pieces))


def _order(planned: PlannedTrial) -> tuple[Any, ...]:
    """Small models first (early answers), what is loaded together stays together, its baseline before everything else.

    What a worker has to load is the whole of a ModelSpec, planted outliers too; after that come calibrations, one after the other.
    """
    trial = planned.trial
    calibrated = "" if trial.calibration is None else repr(trial.calibration)
    return (*_load_order(trial.model), not trial.quantization.is_baseline, calibrated)


@cache
def _load_order(model: ModelSpec) -> tuple[Any, ...]:
    return model.parameters or UNKNOWN_PARAMETERS, model.name, canonical_json(asdict(model))


Costed = tuple[PlannedTrial, float]
"""A trial and its predicted minutes."""


def _equal_parts(trials: Sequence[Costed], max_minutes: float) -> Callable[[float], float]:
    """Bounds that cut trials into as few parts of about equal length as `max_minutes` allows."""
    total = sum(cost for _, cost in trials)
    parts = max(1, -(-total // max_minutes)) if max_minutes > 0 else len(trials)
    return lambda cut_off: total / parts


def _shrinking(cut_off: float, *, left: float, workers: int, least: float, most: float) -> float:
    """Of what is left after `cut_off` a part of each worker's share; all of it where nobody shares."""
    return most if workers == 1 else min(most, max(least, (left - cut_off) / (workers * SHARES)))


def _chunks(trials: Sequence[Costed], bound: Callable[[float], float]) -> Iterable[list[PlannedTrial]]:
    """Consecutive runs, none longer than its bound unless a single trial is; bound: minutes that are cut off already → minutes."""
    chunk: list[PlannedTrial] = []
    minutes = cut_off = 0.0
    most = bound(0.0)
    for trial, cost in trials:
        if chunk and minutes + cost > most * (1 + 1e-9):
            yield chunk
            cut_off += minutes
            chunk, minutes, most = [], 0.0, bound(cut_off)
        chunk.append(trial)
        minutes += cost
    if chunk:
        yield chunk
