"""`quantsweep.slurm` against a real Slurm: what the unit tests replay from records, seen live."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from quantsweep.errors import SlurmError
from quantsweep.slurm import (
    QueuedTask,
    SlurmUnavailable,
    State,
    accounting,
    available,
    cancel,
    partition_limits,
    queue,
    read_limits,
)
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def _states(name: str) -> dict[str, State]:
    return {task.job_id: task.state for task in queue([name])}


def test_available(in_cluster: Cluster) -> None:
    assert available()


def test_queue_shows_each_task_of_an_array(in_cluster: Cluster) -> None:
    job = in_cluster.submit("--array=0-4:2%2", "--job-name=sweep-a|b c", script="sleep 300")
    in_cluster.submit("--hold", "--job-name=sweep-b", script="true")
    in_cluster.wait_until(lambda: [t.state for t in queue(["sweep-a|b c"])].count(State.RUNNING) == 2, "two running tasks")
    tasks = {task.array_task_id: task for task in queue(prefix="sweep-a")}
    assert tasks[0].node.startswith("n")
    assert tasks[4] == QueuedTask(
        job_id=f"{job}_4", array_job_id=job, array_task_id=4, name="sweep-a|b c", state=State.PENDING,
        reason="JobArrayTaskLimit", node="",
    )  # fmt: skip
    assert {task.name for task in queue(prefix="sweep-")} == {"sweep-a|b c", "sweep-b"}
    assert queue(prefix="nobody-") == []


def test_states_of_a_task_that_is_suspended_held_and_cancelled(in_cluster: Cluster) -> None:
    job = str(in_cluster.submit("--job-name=states", script="sleep 300"))
    in_cluster.wait_until(lambda: _states("states")[job] is State.RUNNING, "a running job")
    in_cluster.run(["scontrol", "suspend", job])
    assert _states("states")[job] is State.SUSPENDED
    in_cluster.run(["scontrol", "resume", job])
    in_cluster.run(["scontrol", "requeuehold", job])
    in_cluster.wait_until(lambda: _states("states")[job] is State.PENDING, "the job back in the queue")
    cancel([job])
    in_cluster.wait_until(lambda: _states("states")[job] is State.CANCELLED, "the job's cancellation")


def test_tasks_cancelled_before_they_began_are_one_line_without_a_number(in_cluster: Cluster) -> None:
    """So it is for scancel by user, name or state, not by number; `quantsweep.launching.tasks` counts on it."""
    since = datetime.now()
    job = in_cluster.submit("--hold", "--array=0-9", "--job-name=unborn", script="true")
    in_cluster.run(["scancel", "--name=unborn"])
    assert [(task.array_job_id, task.array_task_id, task.state) for task in queue(["unborn"])] == [(job, None, State.CANCELLED)]

    def is_accounted() -> bool:
        found = accounting([job], since) or {}
        return list(found) == [(job, None)] and found[job, None].state is State.CANCELLED

    in_cluster.wait_until(is_accounted, "the array's one line in sacct")


def test_tasks_cancelled_alone_before_they_began_leave_no_trace(in_cluster: Cluster) -> None:
    since = datetime.now()
    job = in_cluster.submit("--hold", "--array=0-9", "--job-name=some", script="true")
    in_cluster.run(["scancel", f"{job}_[3-9]"])
    assert [task.array_task_id for task in queue(["some"])] == [0, 1, 2]
    in_cluster.wait_until(lambda: set(accounting([job], since) or {}) == {(job, 0), (job, 1), (job, 2)}, "what is left in sacct")


def test_accounting_tells_how_tasks_ended_and_expands_pending_ones(in_cluster: Cluster) -> None:
    since = datetime.now()
    ended = in_cluster.submit("--array=0-2", script="[ $SLURM_ARRAY_TASK_ID = 2 ] && kill -9 $$; exit $SLURM_ARRAY_TASK_ID")
    # Irregular and many: Slurm cuts such a list at 64 characters unless told otherwise.
    waiting = in_cluster.submit("--hold", "--array=" + ",".join(str(index) for index in range(100) if index % 5 in (0, 2)), script="true")
    single = in_cluster.submit("--hold", script="true")

    def all_known() -> bool:
        found = accounting([ended, waiting, single], since) or {}
        return len(found) == 3 + 40 + 1 and all(found[ended, task].state.is_finished for task in range(3))

    in_cluster.wait_until(all_known, "44 tasks in sacct")
    found = accounting([ended, waiting, single], since)
    assert found is not None
    assert [(found[ended, task].state, found[ended, task].exit_code, found[ended, task].signal) for task in range(3)] == [
        (State.COMPLETED, 0, 0), (State.FAILED, 1, 0), (State.FAILED, 0, 9),
    ]  # fmt: skip
    assert found[ended, 0].node.startswith("n")
    assert found[waiting, 97].state is State.PENDING
    assert found[single, None].node == ""


def test_accounting_says_nothing_of_jobs_it_does_not_know(in_cluster: Cluster) -> None:
    assert accounting([999_999], datetime.now() - timedelta(days=1)) == {}


def test_cancel_takes_arrays_tasks_and_ids_long_gone(in_cluster: Cluster) -> None:
    whole = in_cluster.submit("--hold", "--job-name=cancel", "--array=0-9", script="true")
    part = in_cluster.submit("--hold", "--job-name=cancel", "--array=0-9", script="true")
    cancel([str(whole), f"{part}_3", f"{part}_[5-7]", "999999", "999999_1"])
    active = {task.job_id for task in queue(["cancel"]) if task.state.is_active}
    assert active == {f"{part}_{task}" for task in (0, 1, 2, 4, 8, 9)}


def test_limits_are_read_as_they_are_set(in_cluster: Cluster) -> None:
    limits = read_limits()
    assert (limits.max_array_size, limits.max_job_count, limits.max_submit_jobs) == (101, 10_000, None)
    assert read_limits(qos="tight").max_submit_jobs == 50
    assert read_limits(partition="limited").notes == ("MaxSubmitJobsPerUser=50 of QOS tight",)


def test_a_partition_is_read_as_it_is_set(in_cluster: Cluster) -> None:
    assert partition_limits().name == "main"
    assert (partition_limits("limited").max_minutes, partition_limits("limited").num_nodes) == (None, 4)
    options = ["MaxTime=2-03:04:00", "DefaultTime=30", "MaxNodes=1", "OverSubscribe=EXCLUSIVE", "State=DRAIN", "DenyQos=tight"]
    in_cluster.run(["scontrol", "create", "PartitionName=short", "Nodes=n[0-1]", *options])
    try:
        short = partition_limits("short")
    finally:
        in_cluster.run(["scontrol", "delete", "PartitionName=short"])
    assert (short.max_minutes, short.default_minutes, short.max_nodes, short.num_nodes) == (2 * 1440 + 3 * 60 + 4, 30, 1, 2)
    assert (short.whole_nodes, short.state, short.allow_qos, short.deny_qos) == (True, "DRAIN", None, ("tight",))
    with pytest.raises(SlurmError, match="unknown partition 'short'"):
        partition_limits("short")


def test_the_limit_that_is_read_is_the_one_that_slurm_enforces(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit exactly as many tasks as `read_limits` allows, then one more, for each QOS in each partition.

    Of a QOS, a partition's QOS and an association, Slurm does not take the smallest number but the
    first that is set, in an order that the flag OverPartQOS turns round.
    """
    qos = {
        "wide": {"MaxSubmitJobsPerUser": "40"},
        "tight": {"MaxSubmitJobsPerUser": "10"},
        "over": {"MaxSubmitJobsPerUser": "30", "Flags": "OverPartQOS"},
        "group": {"GrpSubmitJobs": "15"},
        "account": {"MaxSubmitJobsPerAccount": "12"},
    }
    with Cluster(
        root=own_root / "limits", nodes=1, association={"MaxSubmitJobs": "20"}, qos=qos,
        partitions={"limited": "QOS=tight", "roomy": "QOS=wide"},
    ) as cluster:  # fmt: skip
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        wrong = []
        for name, partition in itertools.product([None, *qos], [None, "limited", "roomy"]):
            limits = read_limits(qos=name, partition=partition)
            fits, exceeds = (_is_accepted(cluster, (limits.max_submit_jobs or 0) + more, name, partition) for more in (0, 1))
            if not fits or exceeds:
                wrong.append((name, partition, limits))
        assert wrong == []


def _is_accepted(cluster: Cluster, tasks: int, qos: str | None, partition: str | None) -> bool:
    options = [f"--{key}={value}" for key, value in (("qos", qos), ("partition", partition)) if value]
    answer = cluster.run(["sbatch", "--hold", f"--array=0-{tasks - 1}", *options, "--wrap", "true"], check=False)
    cluster.cancel_all()
    return answer.returncode == 0


def test_without_accounting_limits_and_ends_are_unknown_and_a_silent_controller_raises(
    own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cluster(root=own_root / "bare", nodes=1, accounting=False) as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        job = cluster.submit("--hold", "--job-name=lone", script="true")
        assert accounting([job], datetime.now()) is None
        assert read_limits().max_submit_jobs is None
        cluster.stop_controller()
        with pytest.raises(SlurmUnavailable, match="the state of its jobs is unknown"):
            queue()
        with pytest.raises(SlurmUnavailable):
            cancel([str(job)])
        cluster.start_controller()
        assert _states("lone") == {str(job): State.PENDING}
