"""A model that is given several GPUs is spread over them, and gives the very numbers that it gives on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import quantsweep
from tests.conftest import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

METHODS = "method=round_to_nearest,centering,outlier_dependent"  # the last looks at layers that lie on the other GPU
TRIALS = ("model=mini-neox-0.3m,mini-opt-0.4m", METHODS, "bit_width=3,16", "task=mini", "limit=10", "device=cuda")


def launch(folder: Path, sweep: str, *extra: str, **environment: str) -> pd.DataFrame:
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *TRIALS, f"sweep={sweep}", f"results_dir={folder}", *extra]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return quantsweep.load_results(folder / sweep).set_index(["trial_id", "task", "metric"]).sort_index()


def test_two_gpus_give_what_one_gives(tmp_path: Path) -> None:
    one = launch(tmp_path, "one", CUDA_VISIBLE_DEVICES="0")
    two = launch(tmp_path, "two", "model.resources.gpus=2", CUDA_VISIBLE_DEVICES="0,1")
    assert len(two) == len(one) > 0
    assert (two.value == one.value).all()


def test_its_layers_lie_on_both() -> None:
    from quantsweep.models.loading import load_model
    from quantsweep.trial.specs import ModelSpec, Resources

    path = "package:quantsweep/mini/models/mini-neox-6.0m"
    for gpus, devices in ((1, {0}), (2, {0, 1})):
        spec = ModelSpec(name="mini", family="mini", path=path, dtype="float32", resources=Resources(gpus=gpus))
        assert {layer.device.index for layer in load_model(spec, "cuda").layers.values()} == devices
