"""What is loaded together is run together, and no worker of this machine idles at the end."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from quantsweep.crew import local
from quantsweep.crew.local import _Todo
from quantsweep.planning.plan import expand
from quantsweep.planning.shards import cut, load_minutes, predicted_minutes
from quantsweep.running.child import TrialRunner
from quantsweep.trial.specs import CalibrationSpec, PlannedTrial, PlantedOutliers, RunSettings, Shard
from tests.unit.engine_cases import trial
from tests.unit.test_composition import schema_and_grids

PLANTED = ("model=mini-neox-0.3m,mini-opt-0.4m", "model.plant_outliers.channels=4", "bit_width=3,4", "model.plant_outliers.scale=1,4,16")


def loads(shards: tuple[Shard, ...]) -> int:
    """How often one worker loads a model that runs these shards."""
    models = [planned.trial.model for shard in shards for planned in shard.trials]
    return sum(before != after for before, after in zip([None, *models], models, strict=False))


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_a_model_is_loaded_once_also_when_the_scale_is_the_last_axis(workers: int | None) -> None:
    planned = list(expand(*schema_and_grids(*PLANTED)).trials)
    random.Random(0).shuffle(planned)
    shards = cut(planned, max_minutes=60, workers=workers)
    assert loads(shards) == 6, "two models at three scales"
    assert all(len({one.trial.model for one in shard.trials}) == 1 for shard in shards)


def test_loads_are_counted_where_they_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child's runner, real models: as many loads as there are models."""
    from quantsweep.models import loading

    counted: list[Any] = []
    genuine = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda spec, device: counted.append(spec) or genuine(spec, device))
    planned = expand(*schema_and_grids(*PLANTED, "task=mini_ppl", "limit=1")).trials
    runner = TrialRunner(lambda message: None)
    for shard in cut(planned, max_minutes=60, workers=1):
        for one in shard.trials:
            runner.run(one, RunSettings(device="cpu"))
    assert (len(planned), len(counted), len(set(counted))) == (12, 6, 6)


def test_a_difference_that_must_be_loaded_is_never_in_the_middle_of_a_shard() -> None:
    base = trial(4).trial.model
    models = [base, dataclasses.replace(base, path="/elsewhere"), dataclasses.replace(base, revision="a" * 40)]
    models += [dataclasses.replace(base, plant_outliers=PlantedOutliers(channels=2, scale=scale, seed=0)) for scale in (2.0, 8.0)]
    planned = [
        dataclasses.replace(trial(bits), trial=dataclasses.replace(trial(bits).trial, model=model))
        for bits in (3, 4, 5)
        for model in models
    ]
    assert loads(cut(planned, max_minutes=60)) == len(models)


def test_calibrations_come_one_after_the_other() -> None:
    a = CalibrationSpec(name="a", path="/d.txt", num_samples=8, sequence_length=64)
    calibrations = [dataclasses.replace(a, seed=1), None, a]
    planned = [
        dataclasses.replace(trial(bits), trial=dataclasses.replace(trial(bits).trial, calibration=calibration))
        for bits in (3, 4, 5)
        for calibration in calibrations
    ]
    [shard] = cut(planned, max_minutes=60)
    seeds = [None if one.trial.calibration is None else one.trial.calibration.seed for one in shard.trials]
    assert seeds == [None] * 3 + [0] * 3 + [1] * 3


def crew(shards: tuple[Shard, ...], workers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], int]:
    """Virtual minutes at which each worker ends, and how many models were loaded, for a crew that takes shards as ours does."""
    todo = _Todo({shard.shard_id: shard.trials[0].trial.model for shard in shards})
    ends, loaded, count = [0.0] * workers, [None] * workers, 0
    busy = set(range(workers))
    while busy:
        worker = min(busy, key=lambda one: ends[one])
        monkeypatch.setattr(local.threading, "get_ident", lambda worker=worker: worker)
        shard_id = todo.take()
        if shard_id is None:
            busy.discard(worker)
            continue
        shard = shards[shard_id]
        model = shard.trials[0].trial.model
        if loaded[worker] != model:
            loaded[worker], count = model, count + 1  # type: ignore[call-overload]
            ends[worker] += load_minutes(shard.trials[0])
        ends[worker] += sum(map(predicted_minutes, shard.trials))
    return ends, count


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_no_worker_idles_at_the_end_and_few_models_are_loaded_twice(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = expand(*schema_and_grids("+sweeps=quickstart")).trials
    shards = cut(planned, max_minutes=60, workers=workers)
    ends, count = crew(shards, workers, monkeypatch)
    longest = max(map(predicted_minutes, planned))
    assert max(ends) - min(ends) <= 2 * longest
    models = len({one.trial.model for one in planned})
    assert count <= models + 3 * (workers - 1)
    assert len(shards) < len(planned) / 2


def test_a_model_that_takes_long_to_load_is_not_shared_for_less_than_its_load() -> None:
    large = dataclasses.replace(trial(4).trial.model, parameters=66_000_000_000)
    planned = [dataclasses.replace(trial(bits), trial=dataclasses.replace(trial(bits).trial, model=large)) for bits in range(2, 9)]
    shards = cut(planned, max_minutes=60, workers=2, minutes=lambda one: 1.0)
    assert load_minutes(planned[0]) > 2
    assert [len(shard.trials) for shard in shards] == [4, 3]


def test_the_tail_of_one_model_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's last 25 trials ran on one of two cores."""
    planned: list[PlannedTrial] = [trial(bits, block=block) for bits in range(2, 9) for block in (16, 32, 64, 128)]
    shards = cut(planned, max_minutes=60, workers=2)
    ends, count = crew(shards, 2, monkeypatch)
    assert abs(ends[0] - ends[1]) <= 2 * predicted_minutes(planned[0])
    assert count == 2
