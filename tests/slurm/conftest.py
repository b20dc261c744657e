"""One real cluster for the whole session, and a clean queue in it for each test.

Where Slurm is not installed the tests are skipped, so that a laptop can run the rest of the suite;
with QUANTSWEEP_REQUIRE_SLURM set (as in CI) they fail instead, so that nobody mistakes a skip for
a pass.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import late_fs
from tests.slurm.cluster import TEMPORARY_PREFIX, Cluster, missing_programs, reap_orphans
from tests.slurm.studies import PAIR

# Not tmp_path, whose names are too long for Unix sockets; mkdtemp makes a folder that only its owner can read.
TEMPORARY = Path("/tmp")


def _why_not() -> str | None:
    """Say why no cluster can be started here, None if one can."""
    if missing := missing_programs():
        return f"Slurm is not installed here (missing: {', '.join(missing)}); .ci/install_slurm.sh installs it"
    if os.geteuid() != 0:
        return "starting a Slurm cluster needs root"
    return None


def _skip_or_fail(reason: str | None) -> None:
    if reason is None:
        return
    if os.environ.get("QUANTSWEEP_REQUIRE_SLURM"):
        pytest.fail(f"QUANTSWEEP_REQUIRE_SLURM is set, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def can_mount() -> None:
    """For tests with file systems of their own (tests/slurm/late_fs.py, scenarios.py): skipped, or failed, without them."""
    _skip_or_fail(late_fs.why_not())


@pytest.fixture(scope="session")
def cluster_root() -> Iterator[Path]:
    """A folder for a cluster; also decides whether these tests run, are skipped, or fail."""
    _skip_or_fail(_why_not())
    reap_orphans(TEMPORARY)
    root = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=TEMPORARY))
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def own_root(cluster_root: Path) -> Path:
    """A new folder for a test's own cluster and file systems."""
    return Path(tempfile.mkdtemp(prefix="t", dir=cluster_root))


@pytest.fixture(scope="session")
def cluster(cluster_root: Path) -> Iterator[Cluster]:
    """The session's cluster: 4 nodes, arrays of up to 101, QOS `tight`, partitions main, low, high and limited."""
    with Cluster(
        root=cluster_root / "main",
        max_array_size=101,
        qos={"tight": {"MaxSubmitJobsPerUser": "50"}},
        partitions={"limited": "QOS=tight PreemptMode=OFF"},
        preemption=True,
    ) as started:
        yield started


@pytest.fixture
def in_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    """The session's cluster as this process's own: SLURM_CONF set, work in a new folder, queue empty afterwards."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    # sbatch writes slurm-<id>.out where it is called.
    monkeypatch.chdir(tmp_path)
    yield cluster
    cluster.cancel_all()


@pytest.fixture(scope="session")
def engine_cluster(cluster_root: Path) -> Iterator[Cluster]:
    """A cluster with tight limits for the sweep engine: 2 nodes, arrays of up to 101, 200 jobs in all, QOS `tight` of 50."""
    with Cluster(
        root=cluster_root / "engine",
        nodes=2,
        max_array_size=101,
        max_job_count=200,
        qos={"tight": {"MaxSubmitJobsPerUser": "50"}},
        partitions={PAIR: "MaxCPUsPerNode=1 PreemptMode=OFF", "cancel": "PriorityTier=1 PreemptMode=CANCEL GraceTime=0"},
        preemption=True,
    ) as started:
        yield started


@pytest.fixture
def engine(engine_cluster: Cluster) -> Iterator[Cluster]:
    """That cluster with an empty queue and all its nodes, before and after a test."""
    yield engine_cluster
    engine_cluster.cancel_all()
