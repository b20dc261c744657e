"""Faults on a real cluster: of trials, of processes, of nodes, of the scheduler, of the disk.

Each test ends with the ledger: one effective row an evaluation, none lost, none invented, and none begun again
whose row was already there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pyarrow.parquet import read_table

import quantsweep
from quantsweep.failures import classes
from quantsweep.launching.submissions import read_submissions
from quantsweep.storage.workers import read_records
from tests.slurm.cluster import Cluster
from tests.slurm.ledger import Fault, FaultPlan, KillPoint
from tests.slurm.scenarios import fill, small_file_system
from tests.slurm.studies import Study

pytestmark = [pytest.mark.slurm, pytest.mark.long]

SIXTY = ("data_type=int,fp,quantile,dynamic", "bit_width=range(4,8)", "block_size=32,64,128,256", "shard_minutes=0.05")
"""4 x 4 x 4 = 64 trials in three shards or so."""
GRID = ("data_type=int,fp,quantile,dynamic", "bit_width=4,8", "block_size=32,64,128,256")
SLOW = (*GRID, "shard_minutes=0.5", "model=mini-neox-2.2m", "limit=40")
"""32 trials of half a second or more, in two shards: long enough to be hit in the middle."""


def causes(study: Study) -> dict[str, int]:
    """Failed attempts by cause, each once."""
    trials = quantsweep.load_trials(study.folder.path, attempts=True)
    failed = trials[trials.status == "failed"].drop_duplicates("attempt")
    return {str(cause): int(count) for cause, count in failed.failure_class.value_counts().items()}


def test_faults_of_trials_cost_those_trials_and_are_treated_by_cause(engine: Cluster, tmp_path: Path) -> None:
    """One launch, nobody comes back: what may be retried is, with more where more helps; a bug is not."""
    kinds = ("out_of_gpu_memory", "segfault", "kill", "device_assert", "hang")
    faults = FaultPlan(faults=tuple(Fault(kind=kind, rate=0.03) for kind in kinds), state=tmp_path / "struck", seed=231)
    gpus = ("model.resources.gpus=1", "device=cpu", "trial_timeout_minutes=0.7", "breaker_trials=null")
    study = Study(cluster=engine, root=tmp_path, arguments=(*SIXTY, *gpus), faults=faults)
    study.launch()
    study.wait_until_idle(600)
    seen = causes(study)
    struck = {kind: sum(path.name.startswith(f"{n}-") for path in (tmp_path / "struck").iterdir()) for n, kind in enumerate(kinds)}
    assert all(struck.values()), f"the seed strikes with every kind: {struck}"
    assert seen[classes.OUT_OF_GPU_MEMORY] == struck["out_of_gpu_memory"]
    assert seen[classes.CRASHED] == struck["segfault"]
    assert seen[classes.KILLED] == struck["kill"]
    assert seen[classes.HUNG] == struck["hang"]
    assert seen[classes.BUG] == struck["device_assert"], "the same input fails again: not retried"
    status = study.status()
    assert (status["done"], status["failed"]) == (64 - struck["device_assert"], struck["device_assert"])
    retried = {array.resources.gpus for submission in read_submissions(study.folder) for array in submission.arrays}
    assert retried == {1, 2}, "out of GPU memory: tried again with twice the GPUs"
    study.launch()  # typed again: the rest is tried, and the fault does not strike twice
    study.wait_until_idle()
    assert study.check().rows == 64


@pytest.mark.parametrize("what", ["worker", "job", "requeue"])
def test_a_killed_worker_a_killed_job_a_requeue(engine: Cluster, tmp_path: Path, what: str) -> None:
    study = Study(cluster=engine, root=tmp_path, arguments=SLOW)
    study.launch()
    study.wait_for_rows(4)
    record = next(heard.record for heard in read_records(study.folder) if heard.record.trial_id is not None)
    if what == "worker":
        os.kill(record.pid, signal.SIGKILL)
    elif what == "job":
        engine.run(["scancel", "--signal=KILL", "--full", str(record.job)])
    else:
        engine.run(["scontrol", "requeue", str(record.job)])
    study.wait_until_idle(600)
    if what == "job":  # Slurm calls that CANCELLED: somebody wanted it gone, so nothing goes on until somebody says so
        assert study.status()["failed"] + study.status()["to_launch"] > 0
        study.launch()
        study.wait_until_idle(600)
    assert study.check().rows == 32
    if what == "requeue":
        assert study.status()["retried"] == {"requeued jobs": 1}
    else:
        assert causes(study) == ({classes.KILLED: 1} if what == "worker" else {}), (
            "the trial at hand was lost with its worker, and tried again"
        )


def test_cancel_half_way_and_resume(engine: Cluster, tmp_path: Path) -> None:
    """Sixteen trials of two seconds: what is written stays, what was cancelled is held, and the launch command goes on."""
    faults = FaultPlan(faults=(Fault(kind="slow", rate=1.0, times=None, seconds=2.0),), state=tmp_path / "struck")
    sixteen = ("data_type=int,fp", "bit_width=4,8", "block_size=32,64,128,256", "shard_minutes=1")
    study = Study(cluster=engine, root=tmp_path, arguments=sixteen, faults=faults)
    study.launch()
    study.wait_for_rows(3)
    assert "submitted" not in study.launch().stdout, "what is in flight is not submitted twice"
    assert "taken out of the queue" in study.quantsweep("cancel", study.name)
    study.wait_until_idle()
    status = study.status()
    assert 3 <= status["done"] < 16
    assert (status["held"], status["failed"], status["to_launch"]) == (16 - status["done"], 0, 0), "a cancelled trial is no failure"
    study.launch()
    study.wait_until_idle()
    report = study.check()
    assert (report.rows, report.repeated) == (16, {})


def test_preemption_puts_the_job_back_and_it_goes_on(engine: Cluster, tmp_path: Path) -> None:
    study = Study(cluster=engine, root=tmp_path, arguments=(*SLOW, "cluster.partition=low", "cluster.max_parallel=2"))
    study.launch()
    study.wait_for_rows(4)
    pushy = engine.submit("--partition=high", "--array=0-1", "--cpus-per-task=8", script="sleep 5")
    study.wait_until_idle(600)
    assert pushy
    assert study.check().rows == 32
    assert causes(study) == {}, "preemption is nobody's failure"


def test_a_lost_node_is_not_the_end(engine: Cluster, tmp_path: Path) -> None:
    study = Study(cluster=engine, root=tmp_path, arguments=SLOW)
    study.launch()
    study.wait_for_rows(4)
    record = next(heard.record for heard in read_records(study.folder) if heard.record.trial_id is not None)
    engine.run(["scontrol", "update", f"NodeName={record.node}", "State=DOWN", "Reason=test"])
    time.sleep(5)
    engine.run(["scontrol", "update", f"NodeName={record.node}", "State=RESUME"], check=False)  # it may be back by itself
    study.wait_until_idle(600)
    assert study.check().rows == 32


@pytest.mark.parametrize("warned", [True, False], ids=["warned", "without-a-warning"])
def test_the_time_limit_ends_no_sweep(engine: Cluster, tmp_path: Path, warned: bool) -> None:
    """A limit of one minute for eight trials of a quarter of one: requeued at the warning, or (without one) resubmitted.

    Slurm enforces the limit up to half a minute late: two minutes of work meet it for certain.
    """
    faults = FaultPlan(faults=(Fault(kind="slow", rate=1.0, times=None, seconds=15.0),), state=tmp_path / "struck")
    eight = ("data_type=int,fp", "bit_width=4,8", "block_size=32,64")
    # CONT is a signal that nobody minds.
    signal_ = "cluster.signal_seconds=20" if warned else "+cluster.additional_parameters.signal='B:CONT@1'"
    limit = ("cluster.minutes=1", signal_, "cluster.max_parallel=1", "shard_minutes=60")
    study = Study(cluster=engine, root=tmp_path, arguments=(*eight, *limit), faults=faults)
    study.launch()
    study.wait_until_idle(600)
    assert study.check().rows == 8
    if warned:
        assert study.status()["retried"].get("requeued jobs", 0) >= 1
        assert classes.TIME_LIMIT not in causes(study)
    else:
        assert causes(study).get(classes.TIME_LIMIT, 0) >= 1
        assert 2 in {array.resources.minutes for submission in read_submissions(study.folder) for array in submission.arrays}


def test_a_silent_controller_and_lost_accounts(engine: Cluster, tmp_path: Path) -> None:
    """While slurmctld or the database is away nothing is concluded and nothing is submitted twice."""
    study = Study(cluster=engine, root=tmp_path, arguments=SLOW)
    study.launch()
    study.wait_for_rows(2)
    engine.stop_controller()
    try:
        refused = study.launch(expect=1)
        assert "submitted" not in refused.stdout
        assert study.status()["slurm"] is not None
    finally:
        engine.start_controller()
    study.launch()
    study.wait_until_idle(600)
    study.launch()
    study.wait_until_idle(600)
    report = study.check()
    assert report.rows == 32
    assert len(report.repeated) <= 2, "at most what was in flight"


def test_a_killed_collector_loses_nothing(engine: Cluster, tmp_path: Path) -> None:
    """The collector dies before it resubmits what was lost: the launch command does it."""
    faults = FaultPlan(faults=(Fault(kind="kill", rate=0.1),), state=tmp_path / "struck", seed=3)
    point = KillPoint(module="quantsweep.launching.advance", function="plan_retries", moment="after", call=1, place="job")
    study = Study(cluster=engine, root=tmp_path, arguments=SIXTY, faults=faults)
    study.launch(kill=[point])
    study.wait_until_idle()
    study.launch()
    study.wait_until_idle()
    assert study.check().rows == 64


def test_a_full_disk_stops_the_shards_and_the_same_command_goes_on(engine: Cluster, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", megabytes=96) as disk:
        study = Study(cluster=engine, root=tmp_path, arguments=SLOW, results=disk)
        study.launch()
        study.wait_for_rows(4)
        ballast = fill(disk)
        study.wait_until_idle()
        status = study.status()
        assert 0 < status["done"] < 32
        assert status["failed"] + status["to_launch"] == 32 - status["done"], "nothing goes on by itself"
        ballast.unlink()
        study.launch()
        study.wait_until_idle()
        assert study.check().rows == 32


def test_a_damaged_result_file_is_named_and_its_evaluations_run_again(engine: Cluster, tmp_path: Path) -> None:
    study = Study(cluster=engine, root=tmp_path, arguments=SIXTY)
    study.launch()
    study.wait_until_idle()
    victim = next(file for file in sorted((study.folder.path / "metrics").glob("*.parquet")) if read_table(file).num_rows)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    refused = study.launch(expect=1)
    assert str(victim) in refused.stderr
    assert "Move it away" in refused.stderr
    victim.rename(tmp_path / "damaged.parquet")
    assert "submitted" in study.launch().stdout
    study.wait_until_idle()
    results = quantsweep.load_results(study.folder.path)
    assert results.trial_id.nunique() == 64
    assert not results.duplicated(["trial_id", "task_key", "metric"]).any()


def test_setup_lines_that_fail_are_said_and_do_not_loop(engine: Cluster, tmp_path: Path) -> None:
    """They fail the collector too, so nothing happens until somebody comes: then the reason is in the table, and in status."""
    study = Study(cluster=engine, root=tmp_path, arguments=("bit_width=4,8", "cluster.setup=[module load cuda/12 || exit 7]"))
    study.launch()
    study.wait_until_idle()
    assert study.status()["ended_jobs"] == {"FAILED": 1}
    study.launch()
    study.wait_until_idle()
    assert causes(study) == {classes.NOT_STARTED: 2}
    study.launch("cluster.setup=[]")
    study.wait_until_idle()
    assert study.check().rows == 2
    messages = quantsweep.load_trials(study.folder.path, attempts=True).failure_message.dropna()
    assert messages.str.contains("module: command not found").all()


def test_the_breaker_holds_what_shares_a_bug_and_the_rest_goes_on(engine: Cluster, tmp_path: Path) -> None:
    """A bug in one data type (all its trials raise): some fail, the others are held; the launch command lifts the hold."""
    arguments = (*SIXTY, "breaker_trials=4", "data_type=int,dynamic", "shard_minutes=0.3")
    study = Study(cluster=engine, root=tmp_path, arguments=arguments)
    ids = _ids_of(study, "dynamic")
    study.faults = FaultPlan(faults=(Fault(kind="bug", trials=tuple(ids), times=1),), state=tmp_path / "struck")
    study.faults.write(tmp_path / f"{study.name}.faults")
    study.launch()
    study.wait_until_idle()
    status = study.status()
    assert status["done"] == 16
    assert 4 <= status["failed"] <= 10
    assert status["failed"] + status["held"] >= 16
    assert "data_type=dynamic" in status["holds"][0]["words"]
    for _ in range(4):  # each trial's bug strikes once
        study.launch()
        study.wait_until_idle()
    assert study.check().rows == 32


def _ids_of(study: Study, data_type: str) -> list[str]:
    """Trial ids of one data type, from a local run of the same trials somewhere else."""
    command = [word for word in study.command() if not word.startswith(("cluster", "results_dir"))]
    other = study.root / "elsewhere"
    subprocess.run([*command, f"results_dir={other}", "workers=2"], check=True, capture_output=True, cwd=study.root, timeout=300)
    trials = quantsweep.load_trials(other / study.name)
    return list(trials[trials.data_type == data_type].trial_id)


def test_the_budget_ends_the_sweep_within_a_trial_a_worker(engine: Cluster, tmp_path: Path) -> None:
    gpus = ("model.resources.gpus=1", "device=cpu", "budget.gpu_hours=0.008", "cluster.max_parallel=1", "shard_minutes=60")
    study = Study(cluster=engine, root=tmp_path, arguments=(*SLOW, "limit=100", *gpus))
    study.launch()
    study.wait_until_idle()
    status = study.status()
    assert 0 < status["done"] < 32
    longest = quantsweep.load_trials(study.folder.path).evaluate_seconds.max()
    assert 0.008 * 0.9 < status["gpu_hours"] < 0.008 + (longest + 5) / 3600
    assert "the budget has no room" in study.launch().stdout
    study.launch("budget.gpu_hours=5")
    study.wait_until_idle(600)
    assert study.check().rows == 32


def test_whole_nodes_run_one_worker_a_gpu(engine: Cluster, tmp_path: Path) -> None:
    """allocation=node: one job holds both GPUs of a node and runs two workers side by side, each with its own."""
    node = ("cluster.allocation=node", "cluster.node_gpus=2", "model.resources.gpus=1", "cluster.partition=main")
    study = Study(cluster=engine, root=tmp_path, arguments=(*SIXTY, "device=cpu", "cluster.max_parallel=1", *node))
    study.launch()
    study.wait_until_idle()
    [submission] = [s for s in read_submissions(study.folder) if s.arrays]
    assert submission.arrays[0].workers == 2
    assert max(len(task) for task in submission.arrays[0].tasks) == 2
    by_job: dict[str, int] = {}
    for heard in read_records(study.folder):
        by_job[str(heard.record.job)] = by_job.get(str(heard.record.job), 0) + 1
    assert max(by_job.values()) == 2, "two workers in one job"
    assert study.check().rows == 64
