"""Predictions: past trials on the same hardware give back the law that made them; without them, arithmetic says that it is that."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from quantsweep.operations.prediction import ARITHMETIC, MIN_TRIALS, Predictor, sweep_folders
from quantsweep.planning.shards import START_MINUTES, cut, predicted_minutes
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.trial.specs import ModelSpec, PlannedTrial, Resources, TaskSpec, TrialSpec
from tests.unit.test_records import NOW, row
from tests.unit.test_specs import QUANTIZATION

CPU, H100, A100 = "EPYC 9R14", "NVIDIA H100", "NVIDIA A100"
SIZES = {"small": 1_000_000, "middle": 30_000_000, "large": 1_000_000_000}
TASK = TaskSpec(name="t", lm_eval_task="t", folder="mini", version="1.0", primary_metric="acc", higher_is_better=True, limit=10)
TOKENS = 150
"""An example of TASK."""


def planned(
    model: str = "small", *, gpus: int = 0, tasks: tuple[TaskSpec, ...] = (TASK,), method: str = "round_to_nearest"
) -> PlannedTrial:
    spec = ModelSpec(
        name=model, family="f", path="/m", content="sha256:1", parameters=SIZES.get(model, 7_000_000_000), resources=Resources(gpus=gpus)
    )
    return PlannedTrial(trial=TrialSpec(model=spec, quantization=replace(QUANTIZATION, method=method)), tasks=tasks)


def law(parameters: float, tokens: float, *, speed: float = 1.0) -> tuple[float, float]:
    """Seconds of an evaluation, and of everything else."""
    return (0.2 + 2 * parameters * tokens / 1e11) / speed, (0.1 + parameters / 1e8) / speed


def write_past(
    folder: Path,
    *,
    device: str = CPU,
    trials_a_model: int = 40,
    models: Sequence[str] = ("small", "middle", "large"),
    limits: Sequence[int | None] = (10, 100),
    speed: float = 1.0,
    noise: Callable[[], float] = lambda: 1.0,
    load_seconds: float = 0.0,
    now: datetime = NOW,
) -> None:
    """A sweep whose trials took what `law` says, times noise."""
    sweep = SweepFolder(folder)
    sweep.create()
    trials: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    for model in models:
        for number in range(trials_a_model):
            limit = limits[number % len(limits)]
            task = replace(TASK, limit=limit)
            examples = limit or 300
            evaluate, rest = (part * noise() for part in law(SIZES[model], examples * TOKENS, speed=speed))
            common = {
                "attempt": f"{folder.name}-{model}-{number}",
                "model": model,
                "method": "round_to_nearest",
                "device": device,
                "plan": folder.name,
                "driver": "550" if "NVIDIA" in device else None,
                "num_parameters": SIZES[model],
                "finished_at": now,
                "evaluate_seconds": evaluate,
            }
            seconds = {"quantize_seconds": rest * 0.8, "restore_seconds": rest * 0.1, "write_seconds": rest * 0.1}
            trials.append(row("trials", **common, **seconds, load_seconds=load_seconds, status="done"))
            asked = {**records.task_columns(task), "num_samples": examples, "num_input_tokens": examples * TOKENS}
            metrics += [row("metrics", **common, **asked, metric=name, is_primary=name == "acc") for name in ("acc", "acc_norm")]
    for table, rows in (("trials", trials), ("metrics", metrics)):
        records.Writer(sweep, "w").add(table, rows)


def seconds_by_law(model: str, tokens: float, *, speed: float = 1.0) -> float:
    return sum(law(SIZES[model], tokens, speed=speed))


def test_the_law_behind_past_trials_is_found_through_noise_and_outliers(tmp_path: Path) -> None:
    rng = random.Random(0)
    write_past(tmp_path / "a", noise=lambda: rng.lognormvariate(0, 0.1) * (20 if rng.random() < 0.05 else 1))
    predictor = Predictor.from_tables([tmp_path / "a"])
    for model in SIZES:
        for limit in (10, 100):
            predicted = predictor.minutes(planned(model, tasks=(replace(TASK, limit=limit),))) * 60
            assert predicted == pytest.approx(seconds_by_law(model, limit * TOKENS), rel=0.15)


def test_what_never_ran_lies_on_the_same_line(tmp_path: Path) -> None:
    write_past(tmp_path / "a", models=("small", "large"))
    predictor = Predictor.from_tables([tmp_path / "a"])
    assert predictor.minutes(planned("middle")) * 60 == pytest.approx(seconds_by_law("middle", 10 * TOKENS), rel=0.05)
    # a limit that was never asked for: tokens an example are known
    unseen = planned("large", tasks=(replace(TASK, limit=50),))
    assert predictor.minutes(unseen) * 60 == pytest.approx(seconds_by_law("large", 50 * TOKENS), rel=0.05)


def test_a_task_without_limit_is_as_long_as_it_was(tmp_path: Path) -> None:
    write_past(tmp_path / "a", limits=(10, None))
    predictor = Predictor.from_tables([tmp_path / "a"])
    whole = seconds_by_law("large", 300 * TOKENS)
    assert predictor.minutes(planned("large", tasks=(replace(TASK, limit=None),))) * 60 == pytest.approx(whole, rel=0.05)
    # a limit beyond the end of the task asks for no more than all of it
    assert predictor.minutes(planned("large", tasks=(replace(TASK, limit=5_000),))) * 60 == pytest.approx(whole, rel=0.05)


def test_several_tasks_share_what_is_not_evaluation(tmp_path: Path) -> None:
    write_past(tmp_path / "a")
    predictor = Predictor.from_tables([tmp_path / "a"])
    evaluate, rest = law(SIZES["large"], 10 * TOKENS)
    assert predictor.minutes(planned("large")) * 60 == pytest.approx(evaluate + rest, rel=0.05)
    longer = sum(law(SIZES["large"], 100 * TOKENS)) - rest
    both = predictor.minutes(planned("large", tasks=(TASK, replace(TASK, limit=100)))) * 60
    assert both == pytest.approx(evaluate + longer + rest, rel=0.05)


def test_a_model_that_is_slower_than_its_size_is_predicted_by_its_own_past(tmp_path: Path) -> None:
    write_past(tmp_path / "a")
    write_past(tmp_path / "b", models=("middle",), trials_a_model=10, speed=0.25)
    slow = Predictor.from_tables([tmp_path / "b", tmp_path / "a"])
    write_past(tmp_path / "c", models=("small", "large"))
    own = Predictor.from_tables([tmp_path / "c", tmp_path / "b"])
    expected = seconds_by_law("middle", 10 * TOKENS, speed=0.25)
    assert own.minutes(planned("middle")) * 60 == pytest.approx(expected, rel=0.1)
    assert slow.minutes(planned("middle")) < own.minutes(planned("middle")), "the median of 40 fast and 10 slow trials is fast"


def test_too_few_past_trials_are_none(tmp_path: Path) -> None:
    write_past(tmp_path / "few", models=("small",), trials_a_model=MIN_TRIALS - 1)
    for predictor in (Predictor(), Predictor.from_tables([]), Predictor.from_tables([tmp_path / "few"])):
        trials = [planned(), planned("large")]
        forecast = predictor.forecast(trials)
        assert forecast.minutes == pytest.approx(sum(map(predicted_minutes, trials)))
        assert forecast.low < forecast.minutes < forecast.high
        assert forecast.basis == ARITHMETIC


def test_miniatures_say_nothing_of_models_a_thousand_times_as_large(tmp_path: Path) -> None:
    write_past(tmp_path / "a", models=("small",))
    predictor = Predictor.from_tables([tmp_path / "a"])
    assert predictor.minutes(planned("large")) == predicted_minutes(planned("large"))
    forecast = predictor.forecast([planned("small"), planned("large")])
    assert ARITHMETIC in forecast.basis
    assert f"from 40 past trials on {CPU}" in forecast.basis


def test_processors_and_gpus_are_never_mixed(tmp_path: Path) -> None:
    write_past(tmp_path / "cpu")
    write_past(tmp_path / "gpu", device=H100, speed=100)
    predictor = Predictor.from_tables([tmp_path / "cpu", tmp_path / "gpu"])
    on_cpu, on_gpu = planned("large"), planned("large", gpus=1)
    assert predictor.minutes(on_cpu) == pytest.approx(100 * predictor.minutes(on_gpu), rel=0.05)
    assert predictor.forecast([on_gpu]).basis == f"from 120 past trials on {H100}"
    basis = predictor.forecast([on_cpu, on_gpu]).basis
    assert f"from 120 past trials on {CPU}" in basis
    assert H100 in basis
    only_cpu = Predictor.from_tables([tmp_path / "cpu"])
    assert only_cpu.forecast([on_gpu]).basis == ARITHMETIC
    assert only_cpu.minutes(on_gpu) == predicted_minutes(on_gpu)
    # this machine's GPU runs everything, also what a cluster would give to a processor
    local = Predictor.from_tables([tmp_path / "cpu", tmp_path / "gpu"], gpu=True)
    assert local.minutes(on_cpu) == local.minutes(on_gpu) == predictor.minutes(on_gpu)


def test_the_hardware_that_was_used_last_counts_unless_another_is_named(tmp_path: Path) -> None:
    write_past(tmp_path / "old", device=A100, speed=10)
    write_past(tmp_path / "new", device=H100, speed=30, now=NOW + timedelta(days=1))
    write_past(tmp_path / "tried", device="NVIDIA L4", models=("small",), trials_a_model=3, now=NOW + timedelta(days=2))
    folders = [tmp_path / name for name in ("old", "new", "tried")]
    trial = planned("large", gpus=1)
    newest, named = Predictor.from_tables(folders), Predictor.from_tables(folders, device_hint="a100")
    assert H100 in newest.forecast([trial]).basis
    assert A100 in named.forecast([trial]).basis
    assert named.minutes(trial) == pytest.approx(3 * newest.minutes(trial), rel=0.05)
    assert Predictor.from_tables(folders, device_hint="MI300").forecast([trial]).basis == ARITHMETIC


def test_the_interval_holds_what_such_trials_took(tmp_path: Path) -> None:
    rng = random.Random(1)
    write_past(tmp_path / "noisy", noise=lambda: rng.lognormvariate(0, 0.3))
    write_past(tmp_path / "exact")
    trials = [planned("large"), planned("middle"), planned("small")]
    truth = sum(seconds_by_law(model, 10 * TOKENS) for model in SIZES) / 60
    noisy, exact = (Predictor.from_tables([tmp_path / name]).forecast(trials) for name in ("noisy", "exact"))
    for forecast in (noisy, exact):
        assert forecast.low < truth < forecast.high
    assert (noisy.high - noisy.low) > 2 * (exact.high - exact.low)
    single = Predictor.from_tables([tmp_path / "noisy"]).forecast([planned("large")])
    drawn = [sum(part * rng.lognormvariate(0, 0.3) for part in law(SIZES["large"], 10 * TOKENS)) / 60 for _ in range(400)]
    assert 0.75 < sum(single.low < minutes < single.high for minutes in drawn) / len(drawn) < 0.99


def test_a_method_that_never_ran_and_a_sweep_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_past(tmp_path / "good")
    (tmp_path / "bad" / "trials").mkdir(parents=True)
    (tmp_path / "bad" / "trials" / "x.parquet").write_bytes(b"not parquet")
    predictor = Predictor.from_tables([tmp_path / "bad", tmp_path / "good"])
    basis = predictor.forecast([planned(method="gptq")]).basis
    assert "from 120 past trials" in basis
    assert "none of them with method gptq" in basis
    assert "not readable: bad" in basis


def test_failed_trials_teach_nothing(tmp_path: Path) -> None:
    write_past(tmp_path / "a")
    before = Predictor.from_tables([tmp_path / "a"]).minutes(planned("large"))
    failed = [
        row("trials", attempt=str(n), model="large", status="failed", device=CPU, driver=None, finished_at=NOW, num_parameters=None)
        for n in range(500)
    ]
    records.Writer(SweepFolder(tmp_path / "a"), "failed").add("trials", failed)
    assert Predictor.from_tables([tmp_path / "a"]).minutes(planned("large")) == before


def test_sweeps_are_found_newest_first(tmp_path: Path) -> None:
    assert sweep_folders(tmp_path / "nothing") == []
    for age, name in enumerate(("c", "a", "b")):
        write_past(tmp_path / name, models=("small",), trials_a_model=1)
        os.utime(tmp_path / name / "trials", (1e9 - age, 1e9 - age))
    (tmp_path / "reference").mkdir()
    assert [folder.name for folder in sweep_folders(tmp_path)] == ["c", "a", "b"]


def test_shards_are_cut_by_what_was_measured(tmp_path: Path) -> None:
    write_past(tmp_path / "a")
    predictor = Predictor.from_tables([tmp_path / "a"])
    quantization = [replace(QUANTIZATION, bit_width=bits) for bits in range(2, 9)]
    trials = [replace(planned("large"), trial=replace(planned("large").trial, quantization=q)) for q in quantization]
    minutes = predictor.minutes(trials[0])
    shards = cut(trials, max_minutes=2.5 * minutes, minutes=predictor.minutes)
    assert [len(shard.trials) for shard in shards] == [2, 2, 2, 1]


def test_the_interval_holds_the_next_launch_though_whole_launches_differ(tmp_path: Path) -> None:
    """A machine is busier one day than the other: many trials of few launches must not pretend to know better."""
    rng = random.Random(3)
    held = 0
    for attempt in range(12):
        for launch in range(6):
            busy = rng.lognormvariate(0, 0.25)
            write_past(tmp_path / f"{attempt}-{launch}", noise=lambda busy=busy: busy * rng.lognormvariate(0, 0.03), trials_a_model=8)
        folders = [tmp_path / f"{attempt}-{launch}" for launch in range(6)]
        forecast = Predictor.from_tables(folders).forecast([planned("large")])
        truth = rng.lognormvariate(0, 0.25) * seconds_by_law("large", 10 * TOKENS) / 60
        held += forecast.low < truth < forecast.high
    assert held >= 9


def test_a_model_that_never_ran_has_a_wider_interval(tmp_path: Path) -> None:
    write_past(tmp_path / "a", models=("small", "large"))
    predictor = Predictor.from_tables([tmp_path / "a"])
    known, new = predictor.forecast([planned("large")]), predictor.forecast([planned("middle")])
    assert new.high / new.minutes > 1.2 * known.high / known.minutes


def test_loads_and_starts_of_workers_are_counted(tmp_path: Path) -> None:
    write_past(tmp_path / "a", load_seconds=30.0)
    predictor = Predictor.from_tables([tmp_path / "a"])
    plain, whole = (predictor.forecast([planned("large")] * 2, **more) for more in ({}, {"loads": [planned("large")], "starts": 2}))
    assert whole.minutes - plain.minutes == pytest.approx(0.5 + 2 * START_MINUTES)
    assert whole.high - whole.low > plain.high - plain.low
