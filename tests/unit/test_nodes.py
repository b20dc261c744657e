"""Bad nodes: strikes by attempt, or by job where nothing could even begin; a success forgives, and so does a day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from quantsweep.failures import classes
from quantsweep.failures.nodes import CAUSES, ELSEWHERE, STRIKE_HOURS, find_broken

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def row(cause: str | None, *, host: str = "n1", attempt: str = "a", job: str | None = "1_0", hours: float = 1.0) -> dict[str, Any]:
    status = "done" if cause is None else "failed"
    when = NOW - timedelta(hours=hours)
    return {"host": host, "status": status, "failure_class": cause, "finished_at": when, "attempt": attempt, "slurm_job": job}


def strikes(cause: str, number: int = 2, **values: Any) -> list[dict[str, Any]]:
    return [row(cause, attempt=f"{cause}{n}", job=f"1_{n}", **values) for n in range(number)]


@pytest.mark.parametrize("cause", sorted(CAUSES))
def test_two_strikes_and_it_is_out(cause: str) -> None:
    assert find_broken(strikes(cause, 1), NOW) == {}
    assert find_broken(strikes(cause), NOW) == {"n1": 2}
    assert find_broken(strikes(cause, 1) * 2, NOW) == {}, "one attempt that was written twice is one"
    assert find_broken([*strikes(cause, 1), *strikes(cause, 1, host="n2")], NOW) == {}


@pytest.mark.parametrize("cause", sorted(set(classes.CLASSES) - CAUSES - ELSEWHERE))
def test_other_causes_are_not_the_machines(cause: str) -> None:
    assert find_broken([*strikes(cause, 5), row(None, host="n2")], NOW) == {}


def test_a_success_since_forgives() -> None:
    two = strikes(classes.BAD_NODE, hours=5)
    assert find_broken([row(None, hours=4), *two], NOW) == {}
    assert find_broken([row(None, hours=6), *two], NOW) == {"n1": 2}
    assert find_broken([row(None, hours=4, host="n2"), *two], NOW) == {"n1": 2}


def test_a_day_forgives() -> None:
    [old, new] = strikes(classes.NODE_FAILURE)
    old["finished_at"] = NOW - timedelta(hours=STRIKE_HOURS + 1)
    assert find_broken([old, new], NOW) == {}


@pytest.mark.parametrize("cause", sorted(ELSEWHERE))
def test_a_node_on_which_nothing_begins_or_answers_is_out_only_if_another_works(cause: str) -> None:
    """Else it is the setup lines that are wrong, or a file server, and every node would be out."""
    two = strikes(cause)
    assert find_broken(two, NOW) == {}
    assert find_broken([*two, row(None, host="n1", hours=3)], NOW) == {}, "nowhere else"
    assert find_broken([*two, row(None, host="n2", hours=9)], NOW) == {"n1": 2}


def test_one_job_that_could_not_begin_is_one_strike_however_many_trials_it_had() -> None:
    of_one_job = [row(classes.NOT_STARTED, attempt=f"a{n}", job="7_0") for n in range(50)]
    works = row(None, host="n2")
    assert find_broken([*of_one_job, works], NOW) == {}
    assert find_broken([*of_one_job, row(classes.NOT_STARTED, job="7_1"), works], NOW) == {"n1": 2}


def test_of_a_machine_without_a_name_nothing_is_known() -> None:
    assert find_broken([*strikes(classes.NODE_FAILURE, host=""), *strikes(classes.NOT_STARTED, host=""), row(None)], NOW) == {}


def test_a_node_that_was_lost_before_any_worker_began_is_one_strike_a_job() -> None:
    of_one_job = [row(classes.NODE_FAILURE, attempt=f"a{n}", job="7_0") | {"log": ""} for n in range(50)]
    assert find_broken(of_one_job, NOW) == {}
    assert find_broken([*of_one_job, row(classes.NODE_FAILURE, job="7_1") | {"log": ""}], NOW) == {"n1": 2}
