"""What is said to people: one is one, many are many, and little time is not said to be none."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from quantsweep.crew.local import LocalSummary
from quantsweep.launching.refill import SubmitSummary
from quantsweep.operations.messages import local_text, plan_text, submitted_text
from quantsweep.operations.prediction import Forecast, Predictor
from quantsweep.planning.plan import Expansion, build_plan
from quantsweep.trial.specs import ClusterSpec, LaunchSettings, PlannedTrial, RunSettings
from quantsweep.words import count, time_unit
from tests.unit.engine_cases import trial


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (0, ("shard",), "0 shards"),
        (1, ("shard",), "1 shard"),
        (62, ("shard",), "62 shards"),
        (35_000, ("trial",), "35,000 trials"),
        (1, ("retry", "retries"), "1 retry"),
        (2, ("retry", "retries"), "2 retries"),
    ],
)
def test_one_is_one_and_many_are_many(number: int, words: tuple[str, ...], said: str) -> None:
    assert count(number, *words) == said


@pytest.mark.parametrize(
    ("hours", "unit"), [(0.0, "hours"), (500.0, "hours"), (0.1, "hours"), (0.099, "minutes"), (1 / 60, "minutes"), (0.016, "seconds")]
)
def test_little_time_is_said_in_smaller_units(hours: float, unit: str) -> None:
    factor, word = time_unit(hours)
    assert word == unit
    assert hours == 0 or hours * factor >= 0.1
    assert factor == {"hours": 1, "minutes": 60, "seconds": 3600}[unit]


@pytest.mark.parametrize(
    ("minutes", "gpus", "said"),
    [
        (0.05, 0, "3   worker-seconds (1.5 to 6; by hand)"),
        (3.0, 0, "3   worker-minutes (1.5 to 6; by hand)"),
        (600.0, 0, "10   worker-hours (5 to 20; by hand)"),
        (0.05, 2, "6   GPU-seconds (3 to 12; by hand)"),
    ],
)
def test_a_tiny_sweep_is_not_predicted_to_take_no_time(tmp_path: Path, minutes: float, gpus: int, said: str) -> None:
    plan = build_plan(
        Expansion(trials=(trial(gpus=gpus),), duplicates=0, skipped={}, candidates=1),
        sweep="s",
        done=set(),
        in_flight=set(),
        settings=RunSettings(),
        launch=LaunchSettings(cluster=ClusterSpec(kind="slurm")),
        workers=None,
    )
    forecast = Forecast(minutes=minutes, low=minutes / 2, high=2 * minutes, basis="by hand")
    text = plan_text(
        dataclasses.replace(plan, forecast=forecast, gpu_minutes=minutes * gpus, minutes={"t": minutes}), title="t", folder=tmp_path
    )
    assert said in text


def test_a_plan_says_what_it_is_of(tmp_path: Path) -> None:
    def text(*trials: PlannedTrial) -> str:
        expansion = Expansion(trials=trials, duplicates=0, skipped={}, candidates=len(trials))
        plan = build_plan(expansion, sweep="s", done=set(), in_flight=set(), settings=RunSettings(), launch=LaunchSettings(), workers=None)
        return plan_text(plan, title="t", folder=tmp_path, left_out=["m: 11 tensors"])

    assert "  left out    m: 11 tensors" in text(trial(4))
    assert f"trial       {trial(4).trial.label}" in text(trial(4))
    assert "m0" in trial(4).trial.label
    assert "models      m0, m1\n" in text(trial(4), trial(3), trial(4, model=1))
    assert "models      m0, m1, m2, m3, m4, m5, … (8 in all)" in text(*(trial(4, model=number) for number in range(8)))


def test_one_shard_in_one_array() -> None:
    assert "submitted 1 shard in 1 array (7)" in submitted_text(SubmitSummary(shards=1, array_job_ids=(7,)), sweep="s")
    many = submitted_text(SubmitSummary(shards=62, array_job_ids=(7, 8), waiting=1), sweep="s")
    assert "submitted 62 shards in 2 arrays (7, 8)" in many
    assert "1 shard waits for room" in many


def test_one_trial_on_this_machine(tmp_path: Path) -> None:
    text = local_text(LocalSummary(done=1, evaluations=1, seconds=2.0, held=1), sweep="s", folder=tmp_path)
    assert text.startswith("1 trial done, 0 failed, 1 evaluation in 2 s")
    assert "1 trial is held" in text


def test_a_plan_for_this_machine_speaks_of_time_on_its_workers_and_a_plan_for_slurm_of_gpu_hours(tmp_path: Path) -> None:
    """A laptop has no GPU-hours, whatever its models would ask of a cluster, and is as slow as a laptop."""

    def text(workers: int | None) -> str:
        expansion = Expansion(trials=tuple(trial(bits, gpus=1) for bits in (2, 3, 4)), duplicates=0, skipped={}, candidates=3)
        predictor = Predictor(gpu=None if workers is None else False)
        plan = build_plan(
            expansion, sweep="s", done=frozenset(), in_flight=frozenset(), settings=RunSettings(), workers=workers, predictor=predictor
        )
        return plan_text(plan, title="t", folder=tmp_path)

    assert "GPU" not in text(2)
    assert re.search(r"shards +3   on 2 workers of this machine\n  predicted   about \d+ s \(.* to .*; arithmetic", text(2))
    assert re.search(r"predicted +[\d.]+   GPU-seconds", text(None))
