"""Verdicts on failed trials."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantsweep.failures import classes
from quantsweep.failures.retries import TREATMENTS, UNLIMITED, decide
from quantsweep.trial.specs import ClusterSpec, Resources

CLUSTER = ClusterSpec(kind="slurm", max_gpus=4, max_memory_gb=100, max_minutes=1_000)
NEEDS = Resources(gpus=1, cpus=2, memory_gb=30, minutes=300)


def test_every_class_has_a_treatment() -> None:
    assert set(TREATMENTS) == set(classes.CLASSES)


@given(st.lists(st.sampled_from(sorted(TREATMENTS)), max_size=12), st.none() | st.integers(0, 4))
def test_no_cause_is_retried_more_often_than_allowed_and_nothing_shrinks(causes: list[str], most: int | None) -> None:
    verdict = decide(causes, causes[-1:], NEEDS, CLUSTER, most)
    too_often = False
    for cause, count in Counter(causes).items():
        allowed = TREATMENTS[cause].retries
        too_often |= count > (allowed if most is None or allowed == UNLIMITED else min(most, allowed))
    if too_often:
        assert verdict.resources is None
    if verdict.resources is None:
        assert verdict.reason
        return
    for key in ("gpus", "memory_gb", "minutes"):
        assert getattr(NEEDS, key) <= getattr(verdict.resources, key) <= getattr(CLUSTER, f"max_{key}")
    assert verdict.resources.cpus == NEEDS.cpus


def test_doubling_stops_at_the_clusters_maximum() -> None:
    needs, seen = NEEDS, []
    for n in range(1, 5):
        verdict = decide([classes.TIME_LIMIT] * min(n, 3), [classes.TIME_LIMIT], needs, CLUSTER)
        if verdict.resources is None:
            break
        needs = verdict.resources
        seen.append(needs.minutes)
    assert seen == [600, 1_000]
    assert "cluster.max_minutes" in verdict.reason


def test_several_causes_under_one_plan_are_all_treated() -> None:
    both = [classes.TIME_LIMIT, classes.OUT_OF_GPU_MEMORY, classes.OUT_OF_HOST_MEMORY]
    assert decide(both, both, NEEDS, CLUSTER).resources == Resources(gpus=2, cpus=2, memory_gb=60, minutes=600, raised=True)


def test_what_was_treated_under_an_older_plan_is_not_treated_again() -> None:
    assert decide([classes.TIME_LIMIT, classes.NODE_FAILURE], [classes.NODE_FAILURE], NEEDS, CLUSTER).resources == NEEDS


def test_a_model_without_gpus_cannot_be_helped_with_more_of_them() -> None:
    assert decide([classes.OUT_OF_GPU_MEMORY], [classes.OUT_OF_GPU_MEMORY], Resources(), CLUSTER).resources is None


@pytest.mark.parametrize(("cluster_gb", "model_gb"), [(8, 64), (64, 8), (None, 64)])
def test_more_of_one_thing_changes_nothing_else_of_what_the_job_gets(cluster_gb: int | None, model_gb: int) -> None:
    """The cluster's yaml overrides the model's numbers; a retry starts from what the job really had."""
    cluster = ClusterSpec(kind="slurm", memory_gb=cluster_gb, minutes=100, cpus=3)
    model = Resources(memory_gb=model_gb, minutes=500, cpus=9)
    before = cluster.resources(model)
    verdict = decide([classes.TIME_LIMIT], [classes.TIME_LIMIT], model, cluster)
    assert verdict.resources is not None
    after = cluster.resources(verdict.resources)
    assert (after.minutes, after.memory_gb, after.cpus) == (2 * before.minutes, before.memory_gb, before.cpus)


def test_no_cause_is_no_reason_against() -> None:
    assert decide([], [], NEEDS, CLUSTER, 0).resources == NEEDS


def test_memory_that_the_site_states_itself_is_not_doubled_in_vain() -> None:
    cluster = dataclasses.replace(CLUSTER, additional_parameters=(("mem_per_cpu", "2G"),))
    assert decide([classes.OUT_OF_HOST_MEMORY], [classes.OUT_OF_HOST_MEMORY], NEEDS, cluster).resources is None
