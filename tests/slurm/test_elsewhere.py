"""Places that are not as one would like: no accounting, files that other hosts see late, clocks that differ, endless interruptions."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import quantsweep
from quantsweep.launching.tasks import observe
from quantsweep.storage.workers import read_records
from tests.slurm import ledger
from tests.slurm.cluster import Cluster
from tests.slurm.scenarios import late_hosts
from tests.slurm.studies import PAIR, Study

pytestmark = [pytest.mark.slurm, pytest.mark.long]

SIXTY = ("data_type=int,fp,quantile,dynamic", "bit_width=range(4,8)", "block_size=32,64,128,256", "shard_minutes=0.05")
SLOW = (
    "data_type=int,fp,quantile,dynamic",
    "bit_width=4,8",
    "block_size=32,64,128,256",
    "shard_minutes=0.5",
    "model=mini-neox-2.2m",
    "limit=40",
)
PARTITION = {PAIR: "MaxCPUsPerNode=1"}


@pytest.fixture(scope="module")
def bare(cluster_root: Path) -> Iterator[Cluster]:
    """A cluster that keeps no accounts, and forgets a job two seconds after its end."""
    with Cluster(root=cluster_root / "bare", nodes=2, accounting=False, partitions=PARTITION, settings={"MinJobAge": "2"}) as started:
        yield started


def test_without_accounting_a_sweep_survives_what_nobody_remembers(bare: Cluster, tmp_path: Path) -> None:
    """A worker is killed; Slurm forgets the job at once; the workers' records are all that is known of it."""
    study = Study(cluster=bare, root=tmp_path, arguments=SLOW)
    said = study.launch().stdout
    assert "submitted" in said
    study.wait_for_rows(4)
    record = next(heard.record for heard in read_records(study.folder) if heard.record.trial_id is not None)
    os.kill(record.pid, signal.SIGKILL)
    study.wait_until_only_collectors()
    time.sleep(3)
    study.wait_until_only_collectors()
    # Either the other worker saw how it ended, or nobody did in time, and it is held: then a person must say that it is gone.
    study.launch("assume_dead=true")
    study.wait_until_only_collectors()
    assert study.check().rows == 32
    assert study.status()["unknown"] == 0


def test_unknown_is_not_dead(bare: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that Slurm has never heard of and whose worker is silent are held, until somebody says that they are gone."""
    study = Study(cluster=bare, root=tmp_path, arguments=("bit_width=4,8",))
    study.launch("+cluster.additional_parameters.hold=true")
    bare.cancel_all()
    bare.wait_until(lambda: not bare.run(["squeue", "-h", "--states=all"]).stdout, "Slurm to forget its jobs", timeout=180)
    for name, value in bare.env.items():
        monkeypatch.setenv(name, value)
    assert {task.state.word for task in observe(study.folder).in_flight} == {"UNKNOWN"}
    status = study.status()
    assert (status["unknown"], status["to_launch"]) == (2, 0)
    assert "submitted" not in study.launch().stdout
    assert "submitted" in study.launch("assume_dead=true").stdout
    study.wait_until_idle()
    assert study.check().rows == 2


def test_hosts_that_see_each_others_files_late(own_root: Path, tmp_path: Path, can_mount: None) -> None:
    """The login side and the nodes see one folder through mounts of their own, each some seconds behind the other."""
    with (
        late_hosts(own_root, delay=4.0, jitter=2.0, seed=7) as hosts,
        Cluster(
            root=own_root / "hosts",
            nodes=2,
            partitions=PARTITION,
            node_mounts=hosts.node_mounts("n0", "n1"),
            settings={"MinJobAge": "3"},
        ) as cluster,
    ):
        study = Study(cluster=cluster, root=tmp_path, arguments=SLOW, results=hosts.shared / "results")
        study.launch()
        again = study.launch().stdout  # at once: the other host's files are not seen yet, the jobs are in the queue
        assert "submitted" not in again
        study.wait_for_rows(8)
        record = next(heard.record for heard in read_records(study.folder) if heard.record.trial_id is not None)
        os.kill(record.pid, signal.SIGKILL)
        study.wait_until_idle(600)
        time.sleep(7)
        study.launch()
        study.wait_until_idle(600)
        time.sleep(7)
        report = study.check()
        assert report.rows == 32
        assert len(report.repeated) <= 2, "at most what was in flight when the worker was killed"


def test_nodes_whose_clocks_are_two_hours_ahead(engine: Cluster, tmp_path: Path) -> None:
    """Ages are measured by the file system's clock: locks and records of such a node are neither stale nor from the future."""
    library = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
    if library is None:
        pytest.fail("libfaketime is not installed: .ci/install_slurm.sh installs it")
    setup = f"cluster.setup=['export LD_PRELOAD={library} FAKETIME=+2h DONT_FAKE_MONOTONIC=1']"
    study = Study(cluster=engine, root=tmp_path, arguments=(*SLOW, setup))
    study.launch()
    study.wait_for_rows(4)
    records = [heard for heard in read_records(study.folder) if heard.record.ended is None]
    assert records
    assert all(heard.age < 60 for heard in records)
    os.kill(records[0].record.pid, signal.SIGKILL)
    # libfaketime lets some of Python's sleeps fail (EINVAL): a collector that meets that comes back later, and may still wait here.
    study.wait_until_only_collectors(600)
    study.launch()
    study.wait_until_only_collectors(600)
    assert study.check().rows == 32


def test_killed_and_resumed_twenty_times_gives_the_same_table(engine: Cluster, tmp_path: Path) -> None:
    """The soak: whole sweeps torn down at random moments, twenty times; then the same values as one that was left alone."""
    arguments, trials = (*SLOW, "bit_width=3,4,6,8"), 64
    calm = Study(cluster=engine, root=tmp_path, arguments=arguments, name="calm")
    calm.launch()
    torn = Study(cluster=engine, root=tmp_path, arguments=arguments, name="torn")
    calm.wait_until_idle(600)
    dice = random.Random(20)
    for _ in range(20):
        torn.launch()
        assert torn.status()["done"] < trials - 3, "torn down so often that it cannot have come to its end"
        torn.wait_for_rows(dice.randint(0, 3) + (ledger.read(torn.record).ended.total() if torn.record.exists() else 0))
        victims = [heard.record.pid for heard in read_records(torn.folder) if heard.is_alive]
        for pid in victims if dice.random() < 0.5 else []:
            os.kill(pid, signal.SIGKILL)
        engine.cancel_all()
    torn.launch()
    torn.wait_until_idle(600)
    assert torn.check().rows == trials
    pd.testing.assert_frame_equal(_values(calm), _values(torn))


def _values(study: Study) -> pd.DataFrame:
    keys = ["trial_id", "task_key", "metric"]
    columns = [*keys, "value", "stderr", "num_samples", "bits_per_weight", "total_model_bits", "requests_hash"]
    frame = quantsweep.load_results(study.folder.path)[columns]
    return frame.sort_values(keys).reset_index(drop=True)
