"""The cluster of these tests is a real one: it runs arrays, keeps accounts, refuses and requeues."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import TEMPORARY_PREFIX, Cluster, ClusterError, reap_orphans

pytestmark = pytest.mark.slurm


def _processes_naming(text: str) -> list[str]:
    """Return the command lines of all live processes whose arguments or environment hold a text."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in arguments + environment:
            found.append(arguments.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_smoke(in_cluster: Cluster, tmp_path: Path) -> None:
    """Nodes are idle, an array runs on them with its GPU, and the accounts know how each task ended."""
    states = in_cluster.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %t %c %G"]).stdout.split("\n")
    job = in_cluster.submit(
        "--array=0-3", "--gres=gpu:1", f"--output={tmp_path}/%a", script="echo gpu $CUDA_VISIBLE_DEVICES; exit $SLURM_ARRAY_TASK_ID"
    )  # fmt: skip
    show = ["sacct", "-nPX", f"--jobs={job}", "--format=JobID,State,ExitCode"]
    in_cluster.wait_until(lambda: in_cluster.run(show).stdout.count("|FAILED|") == 3, "three failed tasks in sacct")
    assert states[:4] == [f"n{index} idle 8 gpu:2" for index in range(4)]
    assert sorted(in_cluster.run(show).stdout.split()) == [
        f"{job}_0|COMPLETED|0:0", f"{job}_1|FAILED|1:0", f"{job}_2|FAILED|2:0", f"{job}_3|FAILED|3:0",
    ]  # fmt: skip
    assert all((tmp_path / str(task)).read_text() in ("gpu 0\n", "gpu 1\n") for task in range(4))


@pytest.mark.long
def test_an_index_beyond_max_array_size_is_refused(in_cluster: Cluster) -> None:
    refused = in_cluster.run(["sbatch", "--array=0-150", "--wrap", "true"], check=False)
    assert refused.returncode != 0
    assert "Invalid job array specification" in refused.stderr


@pytest.mark.long
@pytest.mark.parametrize("options", [pytest.param(["--qos=tight"], id="qos"), pytest.param(["--partition=limited"], id="partition-qos")])
def test_more_tasks_than_a_qos_allows_are_refused_not_queued(in_cluster: Cluster, options: list[str]) -> None:
    refused = in_cluster.run(["sbatch", *options, "--array=0-59", "--wrap", "true"], check=False)
    assert refused.returncode != 0
    assert "QOSMaxSubmitJobPerUserLimit" in refused.stderr
    in_cluster.submit(*options, "--hold", "--array=0-49", script="true")


@pytest.mark.long
def test_a_requeued_task_keeps_its_id_and_counts_its_restarts(in_cluster: Cluster, tmp_path: Path) -> None:
    job = in_cluster.submit(
        "--array=0-1", "--open-mode=append", f"--output={tmp_path}/%A_%a", script="echo restart=${SLURM_RESTART_COUNT:-0}; sleep 300"
    )  # fmt: skip
    log = tmp_path / f"{job}_1"
    in_cluster.wait_until(lambda: log.exists() and "restart=0" in log.read_text(), "the first run")
    in_cluster.run(["scontrol", "requeue", f"{job}_1"])
    in_cluster.wait_until(lambda: "restart=1" in log.read_text(), "the second run")


@pytest.mark.long
def test_a_job_of_high_priority_sends_one_of_low_back_to_the_queue(in_cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "low"
    options = ["--nodes=4", "--exclusive"]
    in_cluster.submit(
        *options, "--partition=low", "--open-mode=append", f"--output={log}", script="echo restart=${SLURM_RESTART_COUNT:-0}; sleep 300"
    )  # fmt: skip
    in_cluster.wait_until(lambda: log.exists() and "restart=0" in log.read_text(), "the first run")
    in_cluster.submit(*options, "--partition=high", script="sleep 1")
    in_cluster.wait_until(lambda: "restart=1" in log.read_text(), "the second run")
    assert "DUE TO PREEMPTION" in log.read_text()


@pytest.mark.long
def test_clusters_live_side_by_side_and_stop_leaves_no_process(in_cluster: Cluster, own_root: Path) -> None:
    root = own_root / "other"
    with Cluster(root=root, nodes=1, accounting=False) as other:
        other.submit(script="sleep 300")
        other.wait_until(lambda: "R" in other.run(["squeue", "-h", "-o", "%t"]).stdout, "a running job")
        assert _processes_naming(str(root))
        assert in_cluster.run(["squeue", "-h"]).stdout == ""
    assert _processes_naming(str(root)) == []


@pytest.mark.long
def test_the_command_starts_and_stops_one(in_cluster: Cluster, own_root: Path) -> None:
    root = own_root / "command"
    command = [sys.executable, "-m", "tests.slurm.cluster"]
    repository = Path(__file__).parents[2]
    printed = in_cluster.run([*command, "start", str(root), "--nodes=1", "--no-accounting"], env={"PYTHONPATH": str(repository)}).stdout
    assert printed == f"export SLURM_CONF={root}/slurm.conf\n"
    assert Cluster(root=root).run(["sinfo", "-h", "-o", "%t"]).stdout == "idle\n"
    in_cluster.run([*command, "stop", str(root)], env={"PYTHONPATH": str(repository)})
    assert _processes_naming(str(root)) == []


@pytest.mark.long
def test_a_cluster_whose_session_was_killed_is_found_and_stopped(own_root: Path) -> None:
    cluster = Cluster(root=own_root / f"{TEMPORARY_PREFIX}orphan", nodes=1, accounting=False).start()
    ended = subprocess.Popen(["true"])
    ended.wait()
    (cluster.root / "owner.pid").write_text(str(ended.pid))
    assert reap_orphans(own_root) == [cluster.root]
    assert _processes_naming(str(cluster.root)) == []


@pytest.mark.long
def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(own_root: Path) -> None:
    root = own_root / "broken"
    with pytest.raises(ClusterError, match="slurmctld"):
        Cluster(root=root, nodes=1, accounting=False, settings={"SelectType": "select/nonsense"}, timeout=5).start()
    assert _processes_naming(str(root)) == []


@pytest.mark.long
def test_a_root_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(ClusterError, match="Choose a shorter folder"):
        Cluster(root=Path("/tmp") / ("x" * 80))
