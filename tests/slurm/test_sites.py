"""What sites do to jobs: setup lines that fail, lists of partitions, folders with Slurm's own signs, no GPUs, preemption that cancels."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantsweep
from quantsweep.failures import classes
from quantsweep.launching.submissions import read_submissions
from tests.slurm.cluster import Cluster
from tests.slurm.studies import PAIR, Study

pytestmark = [pytest.mark.slurm, pytest.mark.long]

TWO = ("bit_width=4,8", "max_retries=0")


def failed(study: Study) -> list[tuple[str, str]]:
    """(cause, message) of each failed attempt."""
    trials = quantsweep.load_trials(study.folder.path, attempts=True)
    return [(row.failure_class, row.failure_message) for row in trials[trials.status == "failed"].itertuples()]


def test_a_setup_line_that_fails_is_submitted_once_and_said(engine: Cluster, tmp_path: Path) -> None:
    """In two partitions at once, and with results in a folder whose name Slurm would take for a pattern."""
    places = {"results": tmp_path / "50%_of_%u" / "%j", "arguments": (*TWO, f"cluster.partition='{PAIR},main'")}
    study = Study(cluster=engine, root=tmp_path, **places)  # type: ignore[arg-type]
    study.launch("cluster.setup=['no_such_module load cuda']")
    study.wait_until_idle()
    assert [cause for cause, _ in failed(study)] == [classes.NOT_STARTED] * 2
    assert all("no_such_module load cuda" in message for _, message in failed(study))
    arrays = [array for submission in read_submissions(study.folder) for array in submission.arrays]
    assert len(arrays) == 1, "max_retries=0"
    trial_id = quantsweep.load_trials(study.folder.path).trial_id[0]
    assert "no_such_module: command not found" in study.quantsweep("logs", trial_id)
    study.launch()
    study.wait_until_idle()
    assert study.check().rows == 2
    assert [path.name for path in tmp_path.glob("50*/*")] == ["%j"], "nothing is anywhere else"


def test_gpus_that_slurm_gives_and_torch_does_not_see_are_a_bad_node(engine: Cluster, tmp_path: Path) -> None:
    """The cluster's GPUs are /dev/null: what the CPU would compute in their place would be charged as theirs."""
    study = Study(cluster=engine, root=tmp_path, arguments=("bit_width=4", "max_retries=0", "model.resources.gpus=1", "device=auto"))
    study.launch()
    study.wait_until_idle()
    [(cause, message)] = failed(study)
    assert cause == classes.BAD_NODE
    assert "given 1 GPU, and torch sees 0" in message
    assert study.status()["done"] == 0


def test_preemption_that_cancels_is_submitted_again(engine: Cluster, tmp_path: Path) -> None:
    """Slurm's requeue does nothing there: the job is gone, and the sweep itself goes on."""
    slow = ("data_type=int,fp", "bit_width=4,8", "block_size=32,64", "limit=40", "model=mini-neox-2.2m", "shard_minutes=60")
    study = Study(cluster=engine, root=tmp_path, arguments=(*slow, "cluster.partition=cancel", "max_retries=0"))
    study.launch()
    study.wait_for_rows(2)
    engine.submit("--partition=high", "--array=0-1", "--cpus-per-task=8", "--output=/dev/null", script="sleep 3")
    study.wait_until_idle(600)
    assert study.check().rows == 8
    assert {cause for cause, _ in failed(study)} <= {classes.PREEMPTED}
    words = [word for submission in read_submissions(study.folder) for array in submission.arrays for word in array.ended.values()]
    assert "PREEMPTED" in words
