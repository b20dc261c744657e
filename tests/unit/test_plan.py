"""Plans and shards: every trial in exactly one shard, nothing that is done, nothing that is in flight."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsweep.errors import ResultsError
from quantsweep.plan import Expansion, Plan, build_plan, read_asked, read_settings, read_shard, shard_trials, write_plan
from quantsweep.shards import cut, predicted_minutes
from quantsweep.specs import ModelSpec, PlannedTrial, Resources, RunSettings, TaskSpec, TrialSpec, options_tuple
from tests.unit.test_specs import QUANTIZATION

TASKS = tuple(
    TaskSpec(name=name, lm_eval_task=name, folder="mini", version="1.0", primary_metric="acc", higher_is_better=True, limit=10)
    for name in ("t", "u")
)


def trial(model: int, bits: int, tasks: tuple[TaskSpec, ...] = TASKS) -> PlannedTrial:
    spec = ModelSpec(
        name=f"m{model}",
        family="f",
        path=f"/{model}",
        content=f"sha256:{model}",
        parameters=10 ** (5 + model % 5),
        resources=Resources(gpus=model % 2),
    )
    return PlannedTrial(trial=TrialSpec(model=spec, quantization=dataclasses.replace(QUANTIZATION, bit_width=bits)), tasks=tasks)


trials = st.lists(st.builds(trial, st.integers(0, 6), st.integers(2, 8)), min_size=0, max_size=40, unique_by=lambda p: p.trial.trial_id)


@settings(deadline=None)
@given(trials, st.floats(0.0001, 10), st.none() | st.integers(1, 8))
def test_every_trial_is_in_exactly_one_shard_of_its_model(planned: list[PlannedTrial], minutes: float, workers: int | None) -> None:
    shards = cut(planned, max_minutes=minutes, workers=workers)
    assert [shard.shard_id for shard in shards] == list(range(len(shards)))
    inside = [p.trial.trial_id for shard in shards for p in shard.trials]
    assert sorted(inside) == sorted(p.trial.trial_id for p in planned)
    for shard in shards:
        assert len({p.trial.model for p in shard.trials}) == 1
        assert shard.resources == shard.trials[0].trial.model.resources
        assert len(shard.trials) == 1 or sum(map(predicted_minutes, shard.trials)) <= minutes * (1 + 1e-6)


def plan(planned: list[PlannedTrial], **changes: object) -> Plan:
    expansion = Expansion(trials=tuple(planned), duplicates=0, skipped={}, candidates=len(planned))
    arguments = {
        "sweep": "s",
        "done": frozenset(),
        "in_flight": frozenset(),
        "settings": RunSettings(),
        "shard_minutes": 60.0,
        "workers": None,
    }
    return build_plan(expansion, **{**arguments, **changes})  # type: ignore[arg-type]


def test_done_tasks_are_not_run_again_and_in_flight_trials_are_left_alone() -> None:
    planned = [trial(0, bits) for bits in (2, 3, 4)]
    ids = [p.trial.trial_id for p in planned]
    done = frozenset({(ids[0], "t@1.0+limit10"), (ids[0], "u@1.0+limit10"), (ids[1], "t@1.0+limit10")})
    made = plan(planned, done=done, in_flight=frozenset({ids[2]}))
    [shard] = made.shards
    assert [(p.trial.trial_id, [t.name for t in p.tasks]) for p in shard.trials] == [(ids[1], ["u"])]
    counts = made.counts()
    assert (counts["done"], counts["in_flight"], counts["to_run"], counts["evaluations_to_run"]) == (1, 1, 1, 1)


def test_a_plan_file_is_all_that_a_worker_needs(tmp_path: Path) -> None:
    planned = [trial(model, bits) for model in range(3) for bits in (2, 3)]
    settings_ = RunSettings(device="cpu", batch_size=4, tracking=options_tuple({"kind": "wandb", "project": "p"}))
    made = plan(planned, settings=settings_, done=frozenset((planned[0].trial.trial_id, t.task_key) for t in TASKS))
    path = write_plan(tmp_path, made)
    assert read_settings(path) == settings_
    assert set(read_asked(tmp_path)) == set(planned), "what is done stays in the plan"
    for shard in made.shards:
        assert set(read_shard(path, shard.shard_id).trials) == set(shard.trials)
        assert shard_trials(path, [shard.shard_id]) == {p.trial.trial_id for p in shard.trials}
    with pytest.raises(ResultsError, match="no shard 99"):
        read_shard(path, 99)
    (tmp_path / "plan-broken.parquet").write_bytes(b"x")
    with pytest.raises(ResultsError, match="plan-broken"):
        read_shard(tmp_path / "plan-broken.parquet", 0)


def test_small_models_come_first() -> None:
    shards = cut([trial(4, 4), trial(0, 4), trial(2, 4)], max_minutes=60)
    assert [shard.trials[0].trial.model.parameters for shard in shards] == [10**5, 10**7, 10**9]
