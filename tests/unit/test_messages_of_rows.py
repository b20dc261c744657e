"""What is said of the rows of a trial that was typed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantsweep.operations.messages import results_text
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
