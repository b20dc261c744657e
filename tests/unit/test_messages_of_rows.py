"""What is said of the rows of a trial that was typed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantsweep.operations.messages import said_once
from quantsweep.operations.rows import MAX_ROWS_SHOWN, finished_text, results_text
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.trial.specs import ModelSpec, PlantedOutliers, QuantizationSpec, StepSpec, TrialSpec
from tests.unit.test_records import row

BASELINE = QuantizationSpec(rounding=StepSpec("none", 1))
INT = QuantizationSpec(
    rounding=StepSpec("round_to_nearest", 1), data_type="int", data_type_version=1, bit_width=3, block_size=64,
    block_axis="flat", symmetric=True, scale_dtype="float16")  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "quantization", "words"),
    [
        (None, BASELINE, "m baseline "),
        (None, INT, "m int 3-bit block 64 "),
        (
            None,
            replace(INT, method="outlier_dependent", rounding=StepSpec("outlier_dependent", 1, (("fraction", 0.05),))),
            "m outlier_dependent fraction=0.05 int 3-bit",
        ),
        (PlantedOutliers(channels=4, scale=16.0), BASELINE, "m planted 4×16 baseline "),
        (PlantedOutliers(channels=4, scale=1.5, seed=2), INT, "m planted 4×1.5 seed 2 int 3-bit block 64 "),
    ],
)
def test_a_row_tells_which_trial_it_is(tmp_path: Path, planted: PlantedOutliers | None, quantization: QuantizationSpec, words: str) -> None:
    model = ModelSpec(name="m", family="f", path="/m", plant_outliers=planted)
    trial = TrialSpec(model=model, quantization=quantization)
    folder = SweepFolder(tmp_path / "sweep")
    folder.create()
    columns: dict[str, Any] = records.identity_columns(trial)
    records.write_rows(folder, "metrics", [row("metrics", **columns)], "a")
    task_key = row("metrics")["task_key"]
    assert words in results_text(folder.path, {trial.trial_id: [task_key]}).splitlines()[1]
    assert len(results_text(folder.path, {trial.trial_id: ["another limit"]}).splitlines()) == 1


def grid_rows(folder: SweepFolder, widths: list[int], *, tasks: int = 1) -> dict[str, list[str]]:
    """Rows of trials in a grid, written in another order than they were asked for; returns what was asked."""
    folder.create()
    model = ModelSpec(name="a-model-of-a-long-name-1.5b", family="f", path="/m")
    trials = [TrialSpec(model=model, quantization=replace(INT, bit_width=bits)) for bits in widths]
    asked = {trial.trial_id: [f"t{n}" for n in range(tasks)] for trial in trials}
    rows = []
    for trial in trials:
        identity = records.identity_columns(trial)
        value = trial.quantization.bit_width / 7
        rows += [row("metrics", **identity, task=f"task_of_a_long_name_{key}", task_key=key, value=value) for key in asked[trial.trial_id]]
    for n, one in enumerate(reversed(rows)):
        records.write_rows(folder, "metrics", [one], f"w{n}")
    return asked


def test_rows_come_in_the_order_of_the_plan(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    asked = grid_rows(folder, [4, 2, 8, 3])
    assert [line.split("-bit")[0][-1] for line in results_text(folder.path, asked).splitlines()[1:]] == ["4", "2", "8", "3"]


def test_of_many_rows_the_best_and_worst_are_shown(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    asked = grid_rows(folder, [2, 3, 4, 5, 6, 7, 8], tasks=2)
    few = finished_text(folder, asked)
    assert few.count("\n") == 15
    many = {**asked, **{f"another{n}": ["t0"] for n in range(MAX_ROWS_SHOWN)}}
    text = finished_text(folder, many)
    assert text.count("the best 3 and the worst 3 of 7") == 2
    shown = [line.split("-bit")[0][-1] for line in text.splitlines() if "-bit" in line]
    assert sorted(shown[:3] + shown[3:6]) == ["2", "3", "4", "6", "7", "8"]
    assert f"{14 + MAX_ROWS_SHOWN} evaluations: table and figure: python -m analysis" in text


def test_a_table_is_no_wider_than_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    asked = grid_rows(folder, [2, 3])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    lines = results_text(folder.path, asked).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("task_of_a_long_name_t0   ")
    assert lines[2].startswith("a-model-of-")
    assert lines[2].split()[-1] == f"{row('metrics')['bits_per_weight']:.3f}", "numbers are whole"
    monkeypatch.setenv("COLUMNS", "200")
    assert max(map(len, results_text(folder.path, asked).splitlines())) > 80


def test_a_reason_that_many_share_is_said_once() -> None:
    lines = said_once([("oom: no room", "a"), ("bug: x", "b"), ("oom: no room", "c"), ("oom: no room", "d")])
    assert lines == ["failed: a and 2 others: oom: no room", "failed: b: bug: x"]
