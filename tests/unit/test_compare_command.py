"""`quantsweep compare`: what its words mean, its exit statuses, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from quantsweep.cli.main import main
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.trial.specs import PlannedTrial
from tests.unit.engine_cases import TASKS, trial
from tests.unit.test_no_silent_fallback import trials as composed
from tests.unit.test_records import row

TASK = TASKS[0]
RIGHT = {3: [True] * 40 + [False] * 60, 4: [True] * 60 + [False] * 40, 5: [True] * 60 + [False] * 40}


def put(folder: SweepFolder, planned: PlannedTrial, correct: list[bool], *, attempt: str = "a", requests: str = "h", **axes: Any) -> None:
    """Metrics and samples of one evaluation."""
    about = {**records.identity_columns(planned.trial), **records.task_columns(TASK), "requests_hash": requests, **axes}
    about |= {"attempt": attempt, "versions": '{"torch": "2"}'}
    outcomes = {"correct": correct, "correct_norm": None, "loglikelihood": [-1.0 - right for right in correct], "num_bytes": None}
    value = {"metric": "acc", "value": float(np.mean(correct)), "is_primary": True, "num_samples": len(correct)}
    writer = records.Writer(folder, f"w{about['trial_id']}")
    writer.add("samples", [row("samples", **about, **outcomes)])
    writer.add("metrics", [row("metrics", **about, **value)])


@pytest.fixture
def compared(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    """A sweep of one model at 3, 4 and 5 bit, seen from its results folder's parent."""
    for bits, correct in RIGHT.items():
        put(sweep, trial(bits), correct)
    monkeypatch.chdir(sweep.path.parents[1])
    return sweep


def test_filters_trials_and_sweeps_are_arms(compared: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    three, four = (trial(bits).trial.trial_id for bits in (3, 4))
    for left, right in (("sweep bit_width=3", "bit_width=4"), (three, four[:8]), ("bit_width=3 data_type=*", f"sweep {four}")):
        assert main(["compare", left, right, "--json"]) == 11
        said = json.loads(capsys.readouterr().out)
        assert (said["a"]["trials"], said["b"]["trials"]) == (1, 1)
        assert said["differ_in"] == {"bit_width": [["3"], ["4"]]}
        (found,) = said["comparisons"]
        assert (found["difference"], found["gained"], found["lost"], found["verdict"]) == (pytest.approx(-0.2), 0, 20, "worse")


def test_the_exit_status_is_the_verdict(compared: SweepFolder) -> None:
    assert main(["compare", "bit_width=4", "bit_width=3"]) == 0
    assert main(["compare", "bit_width=3", "bit_width=4"]) == 11
    assert main(["compare", "bit_width=4", "bit_width=5"]) == 12
    assert main(["compare", "bit_width=4", "bit_width=5", "--margin", "0.1"]) == 10


def test_a_sweep_is_set_against_its_baselines_by_model(compared: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    put(compared, trial(4), RIGHT[4], trial_id="f" * 16, method="none", bit_width=None)
    main(["compare", "sweep"])
    said = capsys.readouterr().out
    assert "A: sweep (3 trials)" in said
    assert "B: baseline of sweep (1 trial)" in said
    assert "100 examples, 3 pairs of trials" in said


def test_every_quantized_trial_of_a_model_is_set_against_its_baseline(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a baseline leaves at none (compensation, transform, calibration) is no reason to be no partner."""
    axes = ("method=none,round_to_nearest,gptq,awq", "compensation=none,lorc", "calibration=mini")
    right: dict[str, int] = {}
    for k, one in enumerate(composed("model=mini-neox-0.3m", "bit_width=3", *axes)):
        right[one.trial_id] = 60 if one.quantization.is_baseline else 20 + 5 * k
        put(sweep, PlannedTrial(trial=one, tasks=TASKS), [True] * right[one.trial_id] + [False] * (100 - right[one.trial_id]))
    lowered = [number - 60 for number in right.values() if number != 60]
    assert len(lowered) == 6
    monkeypatch.chdir(sweep.path.parents[1])
    for words, number in (("sweep", 6), ("sweep compensation=lorc", 3), ("sweep calibration=mini", 4)):
        main(["compare", words, "--json"])
        said = json.loads(capsys.readouterr().out)
        assert (said["comparisons"][0]["num_pairs"], said["a"]["alone"], said["b"]["alone"]) == (number, {}, {})
    main(["compare", "sweep method=none", "bit_width=3", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["comparisons"][0]["difference"] == pytest.approx(-np.mean(lowered) / 100)
    assert said["differ_in"]["compensation"] == [["none"], ["lorc", "none"]]
    main(["compare", "sweep", "sweep method=none"])
    (baseline,) = (trial_id for trial_id, number in right.items() if number == 60)
    printed = capsys.readouterr().out
    assert f"A: sweep (7 trials, 1 of them without a partner)\n   without a partner: {baseline} (a baseline itself)\n" in printed
    assert "compensation lorc, none against none" in printed


def test_trials_without_a_partner_are_named_with_the_reason(compared: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    left, right, lonely = trial(3, block=128), trial(4, block=128), trial(4, model=1)
    for one in (left, right, lonely):
        put(compared, one, RIGHT[4])
    put(compared, trial(3, block=32), RIGHT[3])
    main(["compare", "sweep bit_width=3", "sweep bit_width=4", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["comparisons"][0]["num_pairs"] == 2
    assert said["a"]["alone"] == {trial(3, block=32).trial.trial_id: "differs from the nearest of B in block_size 32 against 64"}
    assert list(said["b"]["alone"]) == [lonely.trial.trial_id]
    assert "model m1 against m0" in said["b"]["alone"][lonely.trial.trial_id]
    assert said["differ_in"] == {"bit_width": [["3"], ["4"]]}


def test_a_sweep_without_a_baseline_is_told_how_to_get_one(compared: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "sweep"]) == 1
    said = capsys.readouterr().err
    assert "sweep has no baseline" in said
    assert "launch the same words once more with method=none" in said
    assert "unknown method" not in said


def test_flips_are_listed_and_clusters_read(compared: SweepFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "bit_width=4", "bit_width=3", "--flips"])
    assert f"right only in A (20): {', '.join(map(str, range(40, 60)))}" in capsys.readouterr().out
    table = pd.DataFrame({"task": TASK.name, "document": range(100), "cluster": np.arange(100) // 20})
    for path, write in ((tmp_path / "c.csv", table.to_csv), (tmp_path / "c.parquet", table.to_parquet)):
        write(path)
        assert main(["compare", "bit_width=4", "bit_width=3", "--clusters", str(path)]) == 12  # one text of five that differs
        assert "100 examples in 5 clusters" in capsys.readouterr().out


def test_replicates_of_another_sweep_make_the_floor(compared: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    other = SweepFolder(compared.path.parent / "other")
    other.create()
    for bits, correct in RIGHT.items():
        put(other, trial(bits), [*correct[1:], bits == 3], attempt="b")
    assert main(["compare", "sweep bit_width=4", "bit_width=3", "--replicates", "other"]) == 0
    assert "numerical floor 0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch"], "unknown sweep 'nosuch'"),
        (["bit_width=7", "bit_width=4"], "unknown bit_width '7'"),
        (["bit_wdth=3", "bit_width=4"], "Did you mean 'bit_width'"),
        (["bit_width=3"], "sweep has no baseline"),
        (["sweep sweep"], "names two sweeps"),
        (["abcdef0123", "bit_width=3"], "no trial that begins with 'abcdef0123'"),
        (["bit_width=3", "bit_width=4", "--task", "nosuch"], "unknown task 'nosuch'"),
        (["bit_width=3", "bit_width=4", "--metric", "bleu"], "unknown metric 'bleu'"),
        (["bit_width=3", "bit_width=4", "--margin", "-1"], "margin -1 is no size of a difference"),
        (["bit_width=3", "bit_width=4", "--clusters", "nosuch.csv"], "--clusters nosuch.csv cannot be read"),
        (["bit_width=3", "bit_width=4", "--replicates", "nosuch"], "unknown sweep 'nosuch'"),
    ],
)
def test_what_cannot_be_compared_is_one_message(
    compared: SweepFolder, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["compare", *words]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err


def test_other_requests_are_refused(compared: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    put(compared, trial(6), RIGHT[4], requests="other")
    assert main(["compare", "bit_width=6", "bit_width=4"]) == 1
    assert "answered different requests" in capsys.readouterr().err


def test_two_sweeps_that_could_be_meant_are_asked_for(compared: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    other = SweepFolder(compared.path.parent / "other")
    other.create()
    assert main(["compare", "bit_width=3", "bit_width=4"]) == 1
    assert "Name one: --sweep other" in capsys.readouterr().err
    assert main(["compare", "bit_width=3", "bit_width=4", "--sweep", "sweep"]) == 11
