"""GPU-hours: used, reserved, left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantsweep.launching.budget import FACTOR, START_SECONDS, allotment, remaining, used
from quantsweep.running.stopping import Allotment
from quantsweep.storage.workers import WorkerRecord


def record(job: str | None, gpus: int, seconds: float) -> WorkerRecord:
    return WorkerRecord(worker="w", host="h", pid=1, plan="p", job=job, gpus=gpus, seconds=seconds)


def test_workers_without_a_gpu_use_nothing() -> None:
    assert used([record(None, 0, 1e9), record("1_0", 2, 30.0), record("1_1", 1, 5.0)]) == 65.0


def test_what_a_job_in_flight_may_still_use_is_not_left() -> None:
    workers = [record("1_0", 1, 100.0), record("1_0", 1, 50.0), record("2_0", 4, 10.0)]
    assert remaining(1.0, workers, {}) == 3600 - 190
    assert remaining(1.0, workers, {"1_0": 400.0, "9_9": 60.0}) == 3600 - 190 - 250 - 60
    assert remaining(1.0, workers, {"1_0": 100.0}) == 3600 - 190, "one that used more than it was given reserves nothing, and owes it"


jobs = st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1e4))
usage = st.lists(st.builds(record, st.sampled_from("abcdx"), st.integers(0, 8), st.floats(0, 1e4)), max_size=8)


@given(usage, jobs)
def test_working_off_an_allotment_changes_nothing_that_is_left(workers: list[WorkerRecord], reserved: dict[str, float]) -> None:
    left = remaining(1e6, workers, reserved)
    assert left <= 1e6 * 3600 - used(workers) + 1e-6
    spent = {job: sum(r.gpus * r.seconds for r in workers if r.job == job) for job in reserved}
    more = [record(job, 1, max(0.0, granted - spent[job])) for job, granted in reserved.items()]
    assert remaining(1e6, [*workers, *more], reserved) == pytest.approx(left)


def test_an_allotment_forgives_a_wrong_prediction() -> None:
    assert allotment(100.0) == FACTOR * 100 + START_SECONDS


def test_an_allotment_is_spent_by_all_workers_of_a_job_together() -> None:
    granted = Allotment(10.0)
    granted.use(6.0)
    assert not granted.is_spent()
    granted.use(4.0)
    assert granted.is_spent()
    free = Allotment()
    free.use(1e9)
    assert not free.is_spent()
    assert Allotment(0.0).is_spent()
