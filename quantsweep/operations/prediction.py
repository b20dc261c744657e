"""How long trials will take, told by past trials on the same hardware.

A trial's time has two parts that grow with different things, and past rows hold both:

    an evaluation           told by parameters · tokens
    everything else         told by parameters, for each method: quantizing, restoring, writing

Both are read off between the medians of what ran (`quantsweep.operations.medians`).  A model that ran before is scaled by the
median ratio of what it took to that: its own past is the best predictor.  What remains unexplained, as the spread of
measured / predicted from trial to trial and from launch to launch, becomes the interval.

Hardware is told by the rows' `device`; processors and GPUs are never mixed.  With fewer than
MIN_TRIALS past trials, and for models far larger than any that ran there, the arithmetic of
`quantsweep.planning.shards` stands in, and the basis says so.
Loading a model, once a shard, and the start of workers are added to a sweep's forecast.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, hypot
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quantsweep.errors import ResultsError
from quantsweep.operations.medians import Floats, Medians, median_ratio, medians, spread
from quantsweep.planning.shards import (
    ARITHMETIC,
    ARITHMETIC_RANGE,
    EXAMPLES_OF_A_TASK,
    START_MINUTES,
    UNKNOWN_PARAMETERS,
    Forecast,
    assumed_tokens,
    load_minutes,
    predicted_minutes,
)
from quantsweep.tables import records
from quantsweep.trial.specs import PlannedTrial, TaskSpec

MIN_TRIALS = 20
"""Fewer past trials on a device say nothing about it."""
MIN_TRIALS_OF_A_MODEL = 5
"""From so many past trials on, a model is scaled by its own past."""
FARTHEST = 10.0
"""Of models more times as large as the largest that ran the past says nothing: how well does a billion parameters fill a GPU?"""
MAX_TRIALS = 40_000
"""Past trials that are looked at, newest sweeps first: planning must stay cheap however much was run."""
TWO_SIDED_90 = 1.645
"""Standard deviations on either side that hold 90 % of a normal distribution."""

FEW_LAUNCHES = 0.1
"""Spread from launch to launch that is assumed where fewer than three have been seen."""
FEW_MODELS = 0.3
"""The same from model to model."""
BEFORE_FACTOR = 3.0
"""Around what is assumed of starts and loads."""
LEAST_LOAD_SECONDS = 0.01

_TRIALS = ("attempt", "model", "method", "device", "driver", "status", "finished_at", "num_parameters", "plan", "load_seconds")
_REST = ("quantize_seconds", "restore_seconds", "write_seconds")
_METRICS = ("attempt", "model", "task", "task_key", "num_fewshot", "limit", "num_samples", "num_input_tokens", "num_parameters")


@dataclass(frozen=True, kw_only=True)
class _Hardware:
    """What past trials on one device came to; `rest` is by method, under None for all methods together.

    largest: parameters of the largest model that ran.  models, loads: by name, measured / predicted, and seconds to load it.
    spread: of log(measured / predicted) of a launch as a whole, and of its trials; spread_of_models: from one model to the next.
    """

    spread_of_models: float
    device: str
    num_trials: int
    largest: float
    evaluation: Medians
    rest: Mapping[str | None, Medians]
    models: Mapping[str, float]
    spread: float
    loads: Mapping[str, float]

    def range(self, *, is_known: bool) -> tuple[float, float]:
        """The interval of measured over predicted; is_known: of models that ran before."""
        spread = self.spread if is_known else hypot(self.spread, self.spread_of_models)
        factor = exp(TWO_SIDED_90 * spread)
        return 1 / factor, factor


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Tokens that went through a model, by (model, task key), by task key, and an example's by (task, num_fewshot).

    all_examples: examples of a task that ran without a limit.
    """

    of_model: Mapping[tuple[str, str], float] = field(default_factory=dict)
    of_task: Mapping[str, float] = field(default_factory=dict)
    an_example: Mapping[tuple[str, int | None], float] = field(default_factory=dict)
    all_examples: Mapping[str, int] = field(default_factory=dict)

    def expected(self, model: str, task: TaskSpec) -> float:
        """The best guess for one evaluation: the same model, any model, the same task at another limit, or an assumption."""
        known = self.of_model.get((model, task.task_key)) or self.of_task.get(task.task_key)
        if known is not None:
            return known
        an_example = self.an_example.get((task.name, task.num_fewshot))
        if an_example is None:
            return assumed_tokens(task)
        whole = self.all_examples.get(task.name)
        examples = whole or task.limit or EXAMPLES_OF_A_TASK
        return an_example * (min(examples, task.limit) if task.limit is not None else examples)


class Predictor:
    """Predicts trials from past ones; without any, from arithmetic.

    gpu: whether trials will run on a GPU; None: those whose model asks for one do.
    """

    def __init__(
        self,
        hardware: Mapping[bool, _Hardware] | None = None,
        *,
        tokens: _Tokens | None = None,
        parameters: Mapping[str, int] | None = None,
        unreadable: Sequence[str] = (),
        gpu: bool | None = None,
    ) -> None:
        self._hardware = hardware or {}
        self._tokens = tokens or _Tokens()
        self._parameters = parameters or {}
        self._unreadable = tuple(unreadable)
        self._gpu = gpu
        self._memo: dict[tuple[Any, ...], float] = {}

    @classmethod
    def from_tables(cls, folders: Iterable[Path], *, device_hint: str | None = None, gpu: bool | None = None) -> Predictor:
        """Learn from the tables of some sweeps, newest first (see `sweep_folders`).

        device_hint: a part of a device's name, such as "H100"; None: the device that was used last.  A
        sweep that cannot be read is left out, and the basis of each forecast names it.
        """
        trials, metrics, unreadable = _read(folders)
        if trials.num_rows == 0:
            return cls(unreadable=unreadable, gpu=gpu)
        hardware = {}
        for is_gpu in (False, True):
            device = _device(trials, is_gpu, device_hint)
            if device is not None:
                hardware[is_gpu] = _learn(device, trials.filter(pc.equal(trials.column("device"), device)), metrics)
        parameters = _means(trials, ("model",), "num_parameters")
        counted = {model: int(number) for (model,), number in parameters.items()}
        return cls(hardware, tokens=_learn_tokens(metrics), parameters=counted, unreadable=unreadable, gpu=gpu)

    def minutes(self, planned: PlannedTrial) -> float:
        """Predicted duration of one trial on one worker, in minutes."""
        model = planned.trial.model
        key = (model.name, model.parameters, self._on_gpu(planned), planned.trial.quantization.method, planned.tasks)
        known = self._memo.get(key)
        if known is None:
            known = self._memo[key] = self._predict(planned)
        return known

    def forecast(self, trials: Iterable[PlannedTrial], *, loads: Iterable[PlannedTrial] = (), starts: int = 0) -> Forecast:
        """The worker time of all these trials together, loads and starts of workers included, with its interval and its basis."""
        sums: dict[tuple[bool | None, bool], float] = {}
        strange: set[str] = set()
        for planned in trials:
            kind = self._kind(planned)
            part = (kind, kind is not None and planned.trial.model.name in self._hardware[kind].models)
            sums[part] = sums.get(part, 0.0) + self.minutes(planned)
            if kind is not None and planned.trial.quantization.method not in self._hardware[kind].rest:
                strange.add(planned.trial.quantization.method)
        ranges = {part: ARITHMETIC_RANGE if part[0] is None else self._hardware[part[0]].range(is_known=part[1]) for part in sums}
        before = starts * START_MINUTES + sum(map(self._load, loads))
        return Forecast(
            minutes=sum(sums.values()) + before,
            # What is wrong with one trial of a kind is likely wrong with all of them: errors are not averaged away.
            low=sum(total * ranges[part][0] for part, total in sums.items()) + before / BEFORE_FACTOR,
            high=sum(total * ranges[part][1] for part, total in sums.items()) + before * BEFORE_FACTOR,
            basis=self._basis({kind for kind, _ in sums}, strange),
        )

    def _load(self, planned: PlannedTrial) -> float:
        hardware = self._hardware.get(self._on_gpu(planned))
        known = hardware.loads.get(planned.trial.model.name) if hardware is not None else None
        return load_minutes(planned) if known is None else known / 60

    def _on_gpu(self, planned: PlannedTrial) -> bool:
        return planned.trial.model.resources.gpus > 0 if self._gpu is None else self._gpu

    def _kind(self, planned: PlannedTrial) -> bool | None:
        """Of which hardware the past foretells this trial; None if none does."""
        on_gpu = self._on_gpu(planned)
        hardware = self._hardware.get(on_gpu)
        return on_gpu if hardware is not None and self._num_parameters(planned) <= FARTHEST * hardware.largest else None

    def _num_parameters(self, planned: PlannedTrial) -> int:
        model = planned.trial.model
        return self._parameters.get(model.name) or model.parameters or UNKNOWN_PARAMETERS

    def _predict(self, planned: PlannedTrial) -> float:
        kind = self._kind(planned)
        if kind is None:
            return predicted_minutes(planned, gpu=self._gpu)
        hardware, model, parameters = self._hardware[kind], planned.trial.model, self._num_parameters(planned)
        evaluations = sum(hardware.evaluation(parameters * self._tokens.expected(model.name, task)) for task in planned.tasks)
        rest = hardware.rest.get(planned.trial.quantization.method, hardware.rest[None])(parameters)
        return float((evaluations + rest) * hardware.models.get(model.name, 1.0) / 60)

    def _basis(self, kinds: Collection[bool | None], strange: Iterable[str]) -> str:
        known = [self._hardware[kind] for kind in kinds if kind is not None]
        parts = [f"from {hardware.num_trials:,} past trials on {hardware.device}" for hardware in known]
        parts += [f"none of them with method {method}" for method in sorted(strange)]
        parts += [ARITHMETIC] if None in kinds or not kinds else []
        parts += [f"not readable: {', '.join(self._unreadable)}"] if self._unreadable else []
        return "; ".join(parts)


def sweep_folders(results_dir: Path) -> list[Path]:
    """The sweeps under a results folder that have tables, the one that was last written to first."""
    rooms = [path for path in results_dir.glob("*/trials") if path.is_dir()]
    return [room.parent for room in sorted(rooms, key=lambda room: room.stat().st_mtime, reverse=True)]


# --- reading --------------------------------------------------------------------------------------------------------------


def _read(folders: Iterable[Path]) -> tuple[pa.Table, pa.Table, list[str]]:
    """Trials that ended well, and one row for each of their evaluations; names of sweeps that cannot be read."""
    trials, metrics = [_empty("trials", (*_TRIALS, *_REST))], [_empty("metrics", (*_METRICS, "evaluate_seconds"))]
    unreadable: list[str] = []
    for folder in folders:
        if sum(table.num_rows for table in trials) >= MAX_TRIALS:
            break
        try:
            trials_here = records.read_table(folder, "trials", trials[0].column_names)
            metrics_here = records.read_table(folder, "metrics", [*metrics[0].column_names, "is_primary"])
        except ResultsError:
            unreadable.append(folder.name)
            continue
        trials.append(_complete(trials_here.filter(pc.equal(trials_here.column("status"), "done"))))
        metrics.append(metrics_here.filter(metrics_here.column("is_primary")).drop_columns(["is_primary"]))
    return pa.concat_tables(trials), pa.concat_tables(metrics), unreadable


def _complete(trials: pa.Table) -> pa.Table:
    """Trials whose measurements are all there."""
    for name in ("num_parameters", "load_seconds", *_REST):
        trials = trials.filter(pc.is_valid(trials.column(name)))
    return trials


def _empty(table: str, names: Iterable[str]) -> pa.Table:
    schema = records.arrow_schema(table)
    return pa.schema([schema.field(name) for name in names]).empty_table()


def _device(trials: pa.Table, is_gpu: bool, hint: str | None) -> str | None:
    """Of the devices that enough trials ran on, the one that was used last; a GPU is what has a driver."""
    driver = trials.column("driver")
    rows = trials.filter(pc.is_valid(driver) if is_gpu else pc.is_null(driver))
    used = rows.group_by("device").aggregate([("finished_at", "max"), ("attempt", "count")]).to_pylist()
    known = [
        (entry["finished_at_max"], entry["device"])
        for entry in used
        if entry["device"] is not None
        and entry["attempt_count"] >= MIN_TRIALS
        and (hint is None or hint.lower() in entry["device"].lower())
    ]
    return max(known)[1] if known else None


def _means(table: pa.Table, keys: Sequence[str], column: str) -> dict[tuple[Any, ...], float]:
    grouped = table.group_by(list(keys)).aggregate([(column, "mean")])
    names = zip(*(grouped.column(key).to_pylist() for key in keys), strict=True)
    return {name: mean for name, mean in zip(names, grouped.column(f"{column}_mean").to_pylist(), strict=True) if mean is not None}


def _learn_tokens(metrics: pa.Table) -> _Tokens:
    per_example = pc.divide(pc.cast(metrics.column("num_input_tokens"), pa.float64()), metrics.column("num_samples"))
    whole = metrics.filter(pc.is_null(metrics.column("limit")))
    return _Tokens(
        of_model={(model, task): n for (model, task), n in _means(metrics, ("model", "task_key"), "num_input_tokens").items()},
        of_task={task: n for (task,), n in _means(metrics, ("task_key",), "num_input_tokens").items()},
        an_example={
            (task, shots): n
            for (task, shots), n in _means(
                metrics.append_column("per_example", per_example), ("task", "num_fewshot"), "per_example"
            ).items()
        },
        all_examples={task: round(n) for (task,), n in _means(whole, ("task",), "num_samples").items()},
    )


# --- medians --------------------------------------------------------------------------------------------------------------


def _learn(device: str, trials: pa.Table, metrics: pa.Table) -> _Hardware:
    """What the trials of one device took."""
    evaluations = metrics.filter(pc.is_in(metrics.column("attempt"), value_set=trials.column("attempt").combine_chunks()))
    work = _floats(evaluations, "num_parameters") * _floats(evaluations, "num_input_tokens")
    evaluation = medians(work, _floats(evaluations, "evaluate_seconds"))
    parameters = _floats(trials, "num_parameters")
    rest_seconds = sum((_floats(trials, name) for name in _REST), np.zeros(trials.num_rows))
    methods = np.array(trials.column("method").to_pylist())
    rest: dict[str | None, Medians] = {None: medians(parameters, rest_seconds)}
    rest |= {str(m): medians(parameters[methods == m], rest_seconds[methods == m]) for m in np.unique(methods)}

    # The trial as a whole: its evaluations are found by their attempt.
    place = pc.index_in(evaluations.column("attempt"), value_set=trials.column("attempt").combine_chunks()).to_numpy()
    measured = rest_seconds + _sums(place, _floats(evaluations, "evaluate_seconds"), trials.num_rows)
    predicted = _sums(place, evaluation(work), trials.num_rows)
    for method in np.unique(methods):
        predicted[methods == method] += rest[str(method)](parameters[methods == method])
    models = _ratios(measured, predicted, trials.column("model").to_pylist())
    predicted = predicted * np.array([models.get(name, 1.0) for name in trials.column("model").to_pylist()])
    launches = _ratios(measured, predicted, trials.column("plan").to_pylist())
    return _Hardware(
        device=device,
        num_trials=trials.num_rows,
        largest=float(parameters.max()),
        evaluation=evaluation,
        rest=rest,
        models=models,
        spread=hypot(spread(np.maximum(measured, 1e-9) / np.maximum(predicted, 1e-9), 0.0), spread(launches.values(), FEW_LAUNCHES)),
        spread_of_models=spread(models.values(), FEW_MODELS),
        loads=_loads(trials),
    )


def _ratios(measured: Floats, predicted: Floats, names: Sequence[str]) -> dict[str, float]:
    """Name → median ratio of measured to predicted, of models (or launches: a machine is busier one day) with enough trials."""
    of = np.array(names)
    enough = (name for name in np.unique(of) if (of == name).sum() >= MIN_TRIALS_OF_A_MODEL)
    return {str(name): median_ratio(measured[of == name], predicted[of == name]) for name in enough}


def _loads(trials: pa.Table) -> dict[str, float]:
    """Seconds that each model took to load, by its name: those of trials that found it loaded say nothing."""
    seconds, names = _floats(trials, "load_seconds"), np.array(trials.column("model").to_pylist())
    loaded = seconds > LEAST_LOAD_SECONDS
    return {str(name): float(np.median(seconds[loaded & (names == name)])) for name in np.unique(names[loaded])}


def _floats(table: pa.Table, name: str) -> Floats:
    return np.asarray(table.column(name).to_numpy(), dtype=np.float64)


def _sums(place: Any, values: Floats, size: int) -> Floats:
    return np.asarray(np.bincount(place, weights=values, minlength=size), dtype=np.float64)
