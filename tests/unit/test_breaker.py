"""The breaker holds those that share the cause, and only those."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantsweep.failures import breaker, classes
from quantsweep.failures.breaker import COUNTED, SHARED_COLUMNS, find_holds
from quantsweep.failures.holds import read_holds
from quantsweep.storage.paths import SweepFolder
from tests.unit.engine_cases import fail, finish, trial, write
from tests.unit.test_records import row

ROOT = "plan-00012-20260101T000000-1a2b3c4d.parquet"
AXES = {"method": "gptq", "family": "f", "model": "m", "data_type": "int", "bit_width": 4, "granularity": "block", "block_size": 64}


def made(number: int, cause: str | None = classes.BUG, fingerprint: str = "aa", **axes: Any) -> dict[str, Any]:
    values = {"failure_class": cause, "failure_fingerprint": fingerprint, "failure_message": "KeyError: 'x'"}
    return row("trials", **{**AXES, **axes}, **values, trial_id=f"t{number}")


def filters(holds: list[breaker.Hold]) -> list[set[str]]:
    return [set(hold.filters) for hold in holds]


def test_the_threshold_counts_trials_of_one_fingerprint() -> None:
    rows = [made(n, bit_width=n) for n in range(2, 6)]
    assert find_holds(rows, [], 5, ROOT) == []
    assert find_holds([*rows, made(2, bit_width=2), made(2, bit_width=2)], [], 5, ROOT) == [], "one trial, three attempts"
    assert find_holds([*rows, made(6, fingerprint="bb", bit_width=6)], [], 5, ROOT) == []
    [hold] = find_holds([*rows, made(6, bit_width=6)], [], 5, ROOT)
    assert (hold.name, hold.count, hold.up_to) == ("breaker-00012-aa", 5, 12)
    assert "KeyError" in hold.because


@pytest.mark.parametrize("cause", sorted(set(classes.CLASSES) - COUNTED))
def test_what_says_nothing_of_the_next_trial_is_not_counted(cause: str) -> None:
    assert find_holds([made(n, cause, bit_width=n) for n in range(9)], [], 2, ROOT) == []


def test_what_all_have_in_common_is_held_and_widens() -> None:
    one_family = [made(n, bit_width=n) for n in range(3)]
    [narrow] = find_holds(one_family, [], 3, ROOT)
    assert set(narrow.filters) == {f"{key}={value}" for key, value in AXES.items() if key != "bit_width"}
    [wide] = find_holds([*one_family, made(9, family="g", model="g1", bit_width=9)], [], 3, ROOT)
    assert set(wide.filters) == {"method=gptq", "data_type=int", "granularity=block", "block_size=64"}


def test_null_is_a_value_too() -> None:
    baselines = [made(n, data_type=None, bit_width=None, block_size=None, granularity=None, model=f"m{n}") for n in range(3)]
    [hold] = find_holds(baselines, [], 3, ROOT)
    assert {"data_type=null", "bit_width=null", "block_size=null"} <= set(hold.filters)


def test_a_success_with_the_same_in_common_acquits() -> None:
    rows = [made(n, bit_width=n) for n in range(3)]
    assert find_holds(rows, [made(8, None, bit_width=8)], 3, ROOT) == []
    assert len(find_holds(rows, [made(8, None, bit_width=8, method="rtn")], 3, ROOT)) == 1


def test_nothing_in_common_holds_everything_unless_anything_works() -> None:
    rows = [made(n, **{key: f"{value}{n}" for key, value in AXES.items()}) for n in range(3)]
    [hold] = find_holds(rows, [], 3, ROOT)
    assert hold.filters == ()
    assert find_holds(rows, [made(9, None)], 3, ROOT) == []


small = st.fixed_dictionaries({key: st.sampled_from([0, 1]) for key in SHARED_COLUMNS})


@given(st.lists(small, max_size=8), st.lists(small, max_size=4), st.integers(2, 4))
def test_every_failed_trial_would_be_held_and_no_success(failed: list[dict[str, int]], good: list[dict[str, int]], threshold: int) -> None:
    rows = [made(n, **axes) for n, axes in enumerate(failed)]
    holds = find_holds(rows, [made(100 + n, None, **axes) for n, axes in enumerate(good)], threshold, ROOT)
    assert len(holds) <= 1
    for hold in holds:
        asked = dict(text.split("=") for text in hold.filters)
        assert all(str(axes[key]) == value for axes in failed for key, value in asked.items())
        assert not any(all(str(axes[key]) == value for key, value in asked.items()) for axes in good)


def test_attempts_of_this_launch_only_and_not_in_force_for_the_next(sweep: SweepFolder) -> None:
    planned = [trial(bits, model=0) for bits in range(2, 6)]
    others = [trial(bits, model=1) for bits in range(2, 4)]
    first = write(sweep, [*planned, *others])
    for one in planned[:2]:
        fail(sweep, one, classes.BUG, plan=first.name)
    breaker.check(sweep, first.name, None)
    breaker.check(sweep, first.name, 3)
    assert read_holds(sweep) == []
    retry = write(sweep, planned, root=first.name)
    fail(sweep, planned[2], classes.BUG, plan=retry.name)
    breaker.check(sweep, first.name, 3)
    [hold] = read_holds(sweep)
    assert [hold.holds(one, first.name) for one in (*planned, *others)] == [True] * 4 + [False] * 2
    second = write(sweep, planned)
    breaker.check(sweep, second.name, 3)
    assert read_holds(sweep) == [hold]
    assert not any(hold.holds(one, second.name) for one in planned)
    finish(sweep, planned[3], plan=second.name)
    for one in planned[:3]:
        fail(sweep, one, classes.BUG, plan=second.name)
    breaker.check(sweep, second.name, 3)
    assert read_holds(sweep) == [hold], "a trial that has the same in common works"


def test_the_same_failure_in_the_next_launch_is_a_hold_of_its_own(sweep: SweepFolder) -> None:
    planned = [trial(bits) for bits in (2, 3, 4)]
    for _ in range(2):
        plan = write(sweep, planned)
        for one in planned[:2]:
            fail(sweep, one, classes.BUG, plan=plan.name)
        breaker.check(sweep, plan.name, 2)
    assert [hold.up_to for hold in read_holds(sweep)] == [1, 2]
    assert sum(hold.holds(planned[2], plan.name) for hold in read_holds(sweep)) == 1
