"""Each fault of the chaos driver does to a plain job what it would do to a sweep's, and to nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.chaos import BOOT_SECONDS, FAULTS, Chaos, is_python
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

# Stands in for a worker and its child: a Python process, and one that it starts; each run of the task adds a line.
CHILD = "import time; time.sleep(600)"
WORKER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{CHILD}', 'quantsweep.running.child', '7'])"


def start_tasks(cluster: Cluster, folder: Path, count: int = 4, *, partition: str = "main") -> int:
    """Submit tasks that run until something ends them, and wait until all run."""
    log = f"{folder}/$SLURM_ARRAY_TASK_ID"
    worker = f'{sys.executable} -c "{WORKER}" quantsweep.crew.slurm_job task'
    script = f"echo restart=${{SLURM_RESTART_COUNT:-0}} on $SLURMD_NODENAME >> {log}; {worker}; echo ended $? >> {log}"
    options = (f"--array=0-{count - 1}", "--requeue", "--exclusive", "--output=/dev/null", f"--partition={partition}")
    job = cluster.submit(*options, script=script)
    cluster.wait_until(lambda: len(children(cluster)) == count, "all tasks to have a child")
    return job


def children(cluster: Cluster) -> list[int]:
    """Pids of the stand-ins for children."""
    return [pid for pid in cluster.job_processes() if is_python(pid, "quantsweep.running.child 7") and not is_python(pid, "slurm_job")]


def said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.iterdir()))


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture
def chaos(in_cluster: Cluster, tmp_path: Path) -> Iterator[Chaos]:
    """A driver that does what it is told, and nothing by itself; everything is back afterwards."""
    driver = Chaos(cluster=in_cluster, log=tmp_path / "chaos.jsonl", down=(1, 2))
    yield driver
    driver.stop()
    in_cluster.run(["scancel", "--user", "root"])
    for orphan in children(in_cluster):  # a child whose parent was killed while it began outlives its job
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)
    in_cluster.wait_until(
        lambda: in_cluster.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"]).stdout.split() == ["idle"] * 4, "idle nodes"
    )


def test_with_nothing_to_strike_nothing_happens_and_it_says_so(chaos: Chaos) -> None:
    kinds = [kind for kind in FAULTS if kind != "controller_restart"]
    assert [chaos.strike(kind) for kind in kinds] == [None] * len(kinds)
    assert not chaos.counts()
    assert [json.loads(line)["result"] for line in chaos.log.read_text().splitlines()] == ["nothing to strike"] * len(kinds)


@pytest.mark.long
def test_processes_are_killed_only_if_they_are_the_clusters(chaos: Chaos, in_cluster: Cluster, logs: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "quantsweep.running.child", "7"])
    try:
        start_tasks(in_cluster, logs, 2)
        assert chaos.strike("kill_child")
        in_cluster.wait_until(lambda: len(children(in_cluster)) == 1, "a child less")
        assert chaos.strike("kill_worker")
        in_cluster.wait_until(lambda: "ended 137" in said(logs), "a worker less")
        while chaos.strike("kill_child"):
            time.sleep(0.2)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.long
@pytest.mark.parametrize("fault", ["requeue", "node_lost", "node_down", "preempt"])
def test_a_task_comes_back(chaos: Chaos, in_cluster: Cluster, logs: Path, fault: str) -> None:
    """Slurm runs it once more, under its own id; where power was lost, the first run could not say a word."""
    start_tasks(in_cluster, logs, partition="low" if fault == "preempt" else "main")
    assert chaos.strike(fault)
    time.sleep(BOOT_SECONDS if fault == "node_lost" else 1)
    chaos.bring_back()
    in_cluster.wait_until(lambda: "restart=1" in said(logs), "a second run", timeout=120)
    assert fault != "node_lost" or "ended" not in said(logs)


@pytest.mark.long
def test_a_cancelled_task_is_gone(chaos: Chaos, in_cluster: Cluster, logs: Path) -> None:
    job = start_tasks(in_cluster, logs)
    task = str(chaos.strike("cancel"))
    in_cluster.wait_until(lambda: len(children(in_cluster)) == 3, "a child less")
    show = ["sacct", "-nPX", f"--jobs={job}", "--format=JobID,State,ExitCode"]
    in_cluster.wait_until(lambda: f"{task}|CANCELLED" in in_cluster.run(show).stdout, "the end in sacct")


@pytest.mark.long
@pytest.mark.parametrize("fault", ["node_crash", "controller_restart"])
def test_tasks_outlive_a_daemon(chaos: Chaos, in_cluster: Cluster, logs: Path, fault: str) -> None:
    start_tasks(in_cluster, logs)
    assert chaos.strike(fault)
    assert chaos.strike(fault) is None, "one at a time"
    time.sleep(3)
    chaos.stop()
    assert len(children(in_cluster)) == 4
    assert said(logs).count("restart=0") == 4
    assert in_cluster.run(["squeue", "-h", "-r", "-t", "R"]).stdout.count("\n") == 4


@pytest.mark.long
def test_the_driver_strikes_by_itself_and_leaves_a_whole_cluster(in_cluster: Cluster, logs: Path, tmp_path: Path) -> None:
    start_tasks(in_cluster, logs)
    log = tmp_path / "driver.jsonl"
    command = [sys.executable, "-m", "tests.slurm.chaos", str(in_cluster.root), f"--log={log}", "--every=1", "--seed=3"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2])
    in_cluster.wait_until(lambda: log.exists() and log.read_text().count('"done"') >= 6, "six faults", timeout=120)
    os.kill(driver.pid, signal.SIGTERM)
    counts = json.loads(driver.communicate()[0])
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert driver.returncode == 0
    assert sum(counts.values()) >= 3
    for away, back in (("node_crash", "node_back"), ("node_down", "node_resumed"), ("controller_restart", "controller_back")):
        struck = [event["target"] for event in events if event["kind"] == away and event["result"] == "done"]
        returned = [event["target"] for event in events if event["kind"] == back]
        assert set(struck) <= set(returned)
    in_cluster.cancel_all()
    in_cluster.wait_until(
        lambda: in_cluster.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"]).stdout.split() == ["idle"] * 4, "idle nodes"
    )
