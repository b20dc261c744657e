"""The product on a real Slurm cluster: submit, detach, cancel half-way, resume, and submit nothing when all is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import quantsweep
from quantsweep.launching.submissions import read_submissions
from quantsweep.launching.tasks import observe
from quantsweep.storage.paths import SweepFolder
from tests.conftest import Launch
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm]
SLURM = ("cluster=slurm", "cluster.partition=main")


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.5)


def num_done(folder: Path) -> int:
    if not any((folder / "trials").glob("*.parquet")):
        return 0
    return int((quantsweep.load_trials(folder).status == "done").sum())


def diagnosis(folder: Path) -> str:
    logs = sorted(folder.glob("logs/slurm/*/*.out"))[:2] + sorted(folder.glob("logs/*.log"))[:2]
    return "\n".join(f"{log}:\n{log.read_text()[-1500:]}" for log in logs)


def test_a_small_sweep_runs_on_slurm_and_is_then_done(in_cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    """The smoke test of `make test`."""
    arguments = ("-m", "model=mini-neox-0.3m", "bit_width=4,8", "task=mini_ppl", "limit=4", "sweep=smoke", *SLURM)
    assert "submitted 1 shard in 1 array " in launch(*arguments).stdout
    folder = tmp_path / "results" / "smoke"
    wait_until(lambda: num_done(folder) == 2 or not observe(SweepFolder(folder)).in_flight, 180)
    assert num_done(folder) == 2, diagnosis(folder)
    trials = quantsweep.load_trials(folder)
    assert trials.slurm_job.str.fullmatch(r"\d+(_\d+)?").all()
    again = launch(*arguments)
    assert "nothing left to run" in again.stdout
    assert "submitted" not in again.stdout


@pytest.mark.long
def test_arrays_are_split_where_the_cluster_says(in_cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    """MaxArraySize is 101 here: 144 shards become two arrays, each numbered from 0."""
    arguments = (
        "-m",
        "model=mini-neox-0.3m",
        "data_type=int,fp,quantile,dynamic",
        "bit_width=range(3,9)",
        "block_size=range(32,224,32)",
        "limit=1",
        "task=mini_ppl",
        "shard_minutes=0.001",
        "sweep=split",
        "+cluster.additional_parameters.hold=true",
        *SLURM,
    )
    said = launch(*arguments).stdout
    assert "submitted 144 shards in 2 arrays" in said
    folder = SweepFolder(tmp_path / "results" / "split")
    [submission] = read_submissions(folder)
    assert [len(array.tasks) for array in submission.arrays] == [101, 43]
    assert len({task.job_id for task in observe(folder).in_flight}) == 144
    in_cluster.cancel_all()


@pytest.mark.long
def test_a_refusal_is_said_in_words_and_leaves_nothing_behind(in_cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    refused = launch(
        "-m", "model=mini-neox-0.3m", "bit_width=4,8", "limit=1", "sweep=refused", "cluster=slurm", "cluster.partition=nowhere", expect=1
    )
    assert "cluster.partition=" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert observe(SweepFolder(tmp_path / "results" / "refused")).in_flight == ()
    assert not list((tmp_path / "results" / "refused" / "plan").glob("plan-*.parquet")), "nobody waits for a plan that was refused"


@pytest.mark.long
def test_no_answer_from_slurm_is_not_an_empty_queue(in_cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    arguments = ("-m", "model=mini-neox-0.3m", "bit_width=4,8", "limit=1", "sweep=silent", *SLURM)
    launch(*arguments)
    in_cluster.stop_controller()
    try:
        refused = launch(*arguments, expect=1)
    finally:
        in_cluster.start_controller()
    assert "submitted" not in refused.stdout
    in_cluster.cancel_all()
