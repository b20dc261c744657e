"""A trial that eats the machine's memory is killed by the kernel, alone, and the row says why: a real control group with a limit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantsweep
from quantsweep.exit_status import ExitStatus
from quantsweep.failures import classes
from tests.conftest import ROOT
from tests.slurm import ledger
from tests.slurm.ledger import Fault, FaultPlan

pytestmark = [pytest.mark.slurm, pytest.mark.long]

LIMIT_BYTES = 1_600_000_000
ONE, TWO = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of LIMIT_BYTES without swap, of whichever version this machine has."""
    name = f"quantsweep-{os.getpid()}"
    group, limit = (ONE / name, "memory.limit_in_bytes") if ONE.is_dir() else (TWO / name, "memory.max")
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT_BYTES))
    except OSError as error:
        if os.environ.get("QUANTSWEEP_REQUIRE_SLURM"):
            pytest.fail(f"QUANTSWEEP_REQUIRE_SLURM is set, but no control group can be made: {error}")
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


def test_the_kernel_kills_the_trial_and_the_row_says_so(tmp_path: Path, small_group: Path) -> None:
    arguments = ("model=mini-neox-0.3m", "data_type=int,fp", "bit_width=4,8", "task=mini_ppl", "limit=1", "workers=1")
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *arguments, f"results_dir={tmp_path / 'results'}"]

    def run(sweep: str, expect: int = 0, **variables: str) -> None:
        inside = f'echo $$ > {small_group / "cgroup.procs"} && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", inside, "sh", *command, f"sweep={sweep}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
            check=False,
            env={**os.environ, **variables},
        )
        assert done.returncode == expect, done.stdout + done.stderr

    run("calm")
    hungry = sorted(quantsweep.load_trials(tmp_path / "results" / "calm").trial_id)[1]
    faults = FaultPlan(faults=(Fault(kind="host_memory", trials=(hungry,), megabytes=4_000),), state=tmp_path / "struck")
    faults.write(tmp_path / "faults")
    run("memory", ExitStatus.FAILED, **ledger.environment(record=tmp_path / "ledger", faults=tmp_path / "faults"))
    trials = quantsweep.load_trials(tmp_path / "results" / "memory").set_index("trial_id")
    assert dict(trials[trials.status == "failed"].failure_class) == {hungry: classes.OUT_OF_HOST_MEMORY}
    assert (trials.status == "done").sum() == 3
