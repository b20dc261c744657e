"""True faults of a GPU cost one trial: a device-side assert (the CUDA context is lost) and an allocation that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantsweep
from quantsweep.exit_status import ExitStatus
from quantsweep.failures import classes
from tests.conftest import ROOT
from tests.slurm import ledger
from tests.slurm.ledger import Fault, FaultPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

AXES = ("model=mini-neox-0.3m", "data_type=int,fp,quantile", "bit_width=4,8", "block_size=64,128")
FIXED = ("task=mini_ppl", "limit=2", "device=cuda", "workers=1")


def launch(folder: Path, *extra: str, expect: int = 0, **environment: str) -> None:
    place = (f"results_dir={folder / 'results'}", *(extra or ("sweep=cuda",)))
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *AXES, *FIXED, *place]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}, timeout=400, check=False)
    assert done.returncode == expect, done.stdout + done.stderr


def test_a_device_assert_and_a_lack_of_gpu_memory_cost_those_trials_only(tmp_path: Path) -> None:
    launch(tmp_path, "sweep=ids")
    trials = quantsweep.load_trials(tmp_path / "results" / "ids").sort_values("started_at")
    asserted, starved = list(trials.trial_id)[3], list(trials.trial_id)[7]
    faults = FaultPlan(
        faults=(Fault(kind="cuda_assert", trials=(asserted,)), Fault(kind="cuda_memory", trials=(starved,))), state=tmp_path / "struck"
    )
    faults.write(tmp_path / "faults")
    inside = ledger.environment(record=tmp_path / "ledger", faults=tmp_path / "faults")
    launch(tmp_path, expect=ExitStatus.FAILED, **inside)
    folder = tmp_path / "results" / "cuda"
    seen = quantsweep.load_trials(folder).set_index("trial_id")
    assert dict(seen[seen.status == "failed"].failure_class) == {asserted: classes.BUG, starved: classes.OUT_OF_GPU_MEMORY}
    assert "device-side assert" in seen.loc[asserted].failure_message
    assert (seen.status == "done").sum() == len(trials) - 2
    launch(tmp_path, **inside)
    report = ledger.check(ledger.read(tmp_path / "ledger"), folder)
    assert (report.problems(), report.rows, report.repeated) == ([], len(trials), {})
    mine, alone = (quantsweep.load_results(tmp_path / "results" / name).set_index(["trial_id", "metric"]).value for name in ("cuda", "ids"))
    assert (mine.sort_index() == alone.sort_index()).all(), "no trial met another's broken context"
