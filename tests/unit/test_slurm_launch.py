"""Arrays: how shards become them, how many fit, and the script that Slurm gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import submitit

from quantsweep.launching import cluster as slurm_cluster
from quantsweep.launching.cluster import array_size, group_shards, room
from quantsweep.slurm import Limits
from quantsweep.specs import ClusterSpec, Resources

SMALL, LARGE = Resources(), Resources(gpus=1)


def limits(**changes: int | None) -> Limits:
    return Limits(**{"max_array_size": 1001, "max_job_count": 10_000, "max_submit_jobs": None, "notes": (), **changes})  # type: ignore[arg-type]


def test_one_array_a_resource_class_split_at_the_limit() -> None:
    shards = [(n, LARGE if n % 3 == 0 else SMALL) for n in range(10)]
    groups = group_shards(shards, 4)
    assert groups == [(LARGE, (0, 3, 6, 9)), (SMALL, (1, 2, 4, 5)), (SMALL, (7, 8))]


@pytest.mark.parametrize(
    ("known", "queued", "expected"),
    [
        (limits(), 0, 5_000),
        (limits(), 4_000, 1_000),
        (limits(max_submit_jobs=50), 0, 45),
        (limits(max_submit_jobs=50), 60, 0),
        (limits(max_submit_jobs=1), 0, 1),
    ],
)
def test_room_leaves_some_for_others(known: Limits, queued: int, expected: int) -> None:
    assert room(known, queued) == expected


def test_the_users_array_size_can_only_be_smaller() -> None:
    assert array_size(ClusterSpec(kind="slurm", max_array_size=10), limits()) == 10
    assert array_size(ClusterSpec(kind="slurm", max_array_size=5_000), limits()) == 1001


def test_the_script_that_slurm_gets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The golden sbatch text: every option of the cluster's yaml in its place."""

    spec = ClusterSpec(
        kind="slurm",
        partition="gpu",
        account="lab",
        qos="long",
        constraint="a100",
        exclude="bad01",
        setup=("module load cuda",),
        max_parallel=20,
        additional_parameters=(("mail_type", "END"),),
    )
    parameters = slurm_cluster.sbatch_parameters(spec, Resources(gpus=2, cpus=8, memory_gb=64, minutes=90), "qs-sweep-0", num_tasks=3)
    executor = submitit.SlurmExecutor(folder="/results/logs/slurm/qs-sweep-0", python="/env/bin/python")
    executor.update_parameters(**parameters)
    text = executor._make_submission_file_text("COMMAND", "UID").replace(str(slurm_cluster.product_root()), "/checkout")
    golden = Path(__file__).parents[1] / "golden" / "array.sbatch"
    if os.environ.get("QUANTSWEEP_REWRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
