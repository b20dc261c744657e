"""Which row counts: by what was asked and whose life it is, never by a clock; the same in every table."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

import quantsweep
from quantsweep.cli.main import main
from quantsweep.cli.status import sweep_status
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.tables.compaction import compact
from quantsweep.trial.specs import ClusterSpec, PlannedTrial
from tests.unit.engine_cases import TASKS, trial, write
from tests.unit.test_records import row

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HERE = ClusterSpec()
_numbers = itertools.count()


def attempt(
    folder: SweepFolder,
    planned: PlannedTrial,
    value: float,
    *,
    plan: str,
    launch: int | None,
    life: int = 0,
    minutes: float = 0,
    **more: Any,
) -> None:
    """All rows of one attempt at all its tasks; minutes: how far its machine's clock is off.  failure: that it failed in the end."""
    failed, tasks = more.get("failed", False), more.get("tasks", planned.tasks)
    name = f"{more.get('name', 'a')}{next(_numbers):04d}"
    common = {
        **records.identity_columns(planned.trial),
        "attempt": name,
        "plan": plan,
        "launch": launch,
        "life": life,
        "finished_at": NOW + timedelta(minutes=minutes),
    }
    for task in tasks:
        named = {**common, **records.task_columns(task)}
        records.write_rows(folder, "samples", [row("samples", **named, loglikelihood=[value])], f"{name}-{task.name}")
        records.write_rows(folder, "metrics", [row("metrics", **named, metric=m, value=value) for m in "xy"], f"{name}-{task.name}")
    records.write_rows(folder, "layers", [row("layers", **common, layer=layer, bits=value) for layer in "kl"], name)
    end = {"status": "failed", "failure_class": "hung"} if failed else {"status": "done", "failure_class": None}
    records.write_rows(folder, "trials", [row("trials", **common, **end, config=records.config_json(planned), load_seconds=value)], name)


def shown(folder: SweepFolder) -> dict[str, set[float]]:
    """Table → the values that its reader shows."""
    return {
        "metrics": set(quantsweep.load_results(folder.path).value),
        "samples": {float(value[0]) for value in quantsweep.load_samples(folder.path).loglikelihood},
        "layers": set(quantsweep.load_layers(folder.path).bits),
        "trials": set(quantsweep.load_trials(folder.path).load_seconds),
    }


def everywhere(value: float) -> dict[str, set[float]]:
    """What `shown` gives where all tables agree."""
    return {table: {value} for table in ("metrics", "samples", "layers", "trials")}


def alike(folder: SweepFolder, value: float) -> None:
    """Every table shows this value, each row once, before compaction and after it, and by the rule for plain pandas."""
    for _ in range(2):
        assert shown(folder) == everywhere(value)
        counts = [len(load(folder.path)) for load in (quantsweep.load_results, quantsweep.load_samples, quantsweep.load_layers)]
        assert counts == [4, 2, 2]
        [status] = quantsweep.load_trials(folder.path).status
        assert (status, sweep_status(folder)["done"]) == ("done", 1)
        plain = pd.read_parquet(folder.table("metrics")).sort_values(["launch", "plan", "life", "attempt"], na_position="first")
        last = plain[plain.attempt == plain.groupby(["trial_id", "task_key"]).attempt.transform("last")]
        assert set(last.value) == {value}
        compact(folder)


@pytest.mark.parametrize("minutes", [-10, 10], ids=["the old one's clock behind", "ahead"])
@pytest.mark.parametrize("name", ["a", "z"])
@pytest.mark.parametrize("by", ["launch", "retry", "life"])
def test_the_later_asked_counts_whatever_the_clocks_say(sweep: SweepFolder, by: str, minutes: float, name: str) -> None:
    planned = trial()
    first = write(sweep, [planned], cluster=HERE)
    second = write(sweep, [planned], cluster=HERE, root=first.name if by == "retry" else None)
    new: dict[str, Any] = {
        "launch": {"plan": second.name, "launch": 2},
        "retry": {"plan": second.name, "launch": 1},
        "life": {"plan": first.name, "launch": 1, "life": 1},
    }[by]
    attempt(sweep, planned, 2.0, **new)
    attempt(sweep, planned, 1.0, plan=first.name, launch=1, minutes=minutes, name=name)
    alike(sweep, 2.0)


def test_a_retry_of_an_older_launch_does_not_count_before_a_later_launch(sweep: SweepFolder) -> None:
    planned = trial()
    first, second = (write(sweep, [planned], cluster=HERE) for _ in range(2))
    retry = write(sweep, [planned], cluster=HERE, root=first.name)
    attempt(sweep, planned, 2.0, plan=second.name, launch=2)
    attempt(sweep, planned, 1.0, plan=retry.name, launch=1, minutes=10)
    alike(sweep, 2.0)


def test_rows_of_an_older_version_tell_their_launch_by_their_plan(sweep: SweepFolder) -> None:
    planned = trial()
    first, second = (write(sweep, [planned], cluster=HERE) for _ in range(2))
    retry = write(sweep, [planned], cluster=HERE, root=first.name)
    attempt(sweep, planned, 1.0, plan=retry.name, launch=None, minutes=10)
    attempt(sweep, planned, 2.0, plan=second.name, launch=None)
    for path in sweep.path.glob("*/*.final.parquet"):  # as commit 8d87509 wrote them
        pq.write_table(pq.read_table(path).drop_columns(["launch", "life"]), path)
    assert shown(sweep) == everywhere(2.0)
    assert set(records.read_table(sweep.path, "metrics", ["launch"]).column("launch").to_pylist()) == {1, 2}


@pytest.mark.parametrize("launch", [1, 2])
def test_a_failure_of_what_is_done_does_not_count_whenever_it_is_written(sweep: SweepFolder, launch: int) -> None:
    """A zombie calls a trial hung that is done; and a second attempt fails where the first one, thought dead, has ended well."""
    planned = trial()
    plans = [write(sweep, [planned], cluster=HERE) for _ in range(2)]
    attempt(sweep, planned, 2.0, plan=plans[0].name, launch=1)
    attempt(sweep, planned, 1.0, plan=plans[launch - 1].name, launch=launch, minutes=10, failed=True, tasks=())
    assert shown(sweep)["trials"] == {2.0}
    [status] = quantsweep.load_trials(sweep.path).status
    assert (status, sweep_status(sweep)["done"], sweep_status(sweep)["failed"]) == ("done", 1, 0)
    assert sorted(quantsweep.load_trials(sweep.path, attempts=True).status) == ["done", "failed"]


def test_a_failure_after_the_last_task_leaves_the_trial_done_everywhere(sweep: SweepFolder) -> None:
    planned = trial()
    plan = write(sweep, [planned], cluster=HERE)
    attempt(sweep, planned, 2.0, plan=plan.name, launch=1, failed=True)
    alike(sweep, 2.0)


def test_a_task_that_was_added_and_failed_is_a_failure(sweep: SweepFolder) -> None:
    first, second = trial(tasks=TASKS[:1]), trial(tasks=TASKS[1:])
    plans = [write(sweep, [planned], cluster=HERE) for planned in (first, second)]
    attempt(sweep, first, 2.0, plan=plans[0].name, launch=1)
    attempt(sweep, second, 1.0, plan=plans[1].name, launch=2, failed=True, tasks=())
    assert list(quantsweep.load_trials(sweep.path).status) == ["failed"]
    assert sweep_status(sweep)["failed"] == 1


def test_a_trial_of_which_a_task_was_forgotten_is_done_for_nobody_until_it_ran_again(sweep: SweepFolder) -> None:
    planned = trial()
    plan = write(sweep, [planned], cluster=HERE)
    attempt(sweep, planned, 1.0, plan=plan.name, launch=1)
    assert main(["rerun", str(sweep.path), "--yes", "--task", "t"]) == 0
    assert list(quantsweep.load_trials(sweep.path).status) == ["forgotten"]
    status = sweep_status(sweep)
    assert (status["done"], status["to_launch"]) == (0, 1)
    again = write(sweep, [planned], cluster=HERE)
    attempt(sweep, trial(tasks=TASKS[:1]), 2.0, plan=again.name, launch=3)
    assert list(quantsweep.load_trials(sweep.path).status) == ["done"]
    assert sweep_status(sweep)["done"] == 1


def test_an_evaluation_shows_the_rows_of_one_attempt_and_samples_follow(sweep: SweepFolder, tmp_path: Path) -> None:
    """The later attempt has one metric and samples of a task whose metrics it never wrote: nothing is mixed."""
    planned = trial()
    plans = [write(sweep, [planned], cluster=HERE) for _ in range(2)]
    attempt(sweep, planned, 1.0, plan=plans[0].name, launch=1)
    late = {**records.identity_columns(planned.trial), "attempt": "late", "plan": plans[1].name, "launch": 2, "life": 0}
    t, u = planned.tasks
    rows = [row("samples", **late, **records.task_columns(task), loglikelihood=[2.0]) for task in (t, u)]
    records.write_rows(sweep, "samples", rows, "late")
    records.write_rows(sweep, "metrics", [row("metrics", **late, **records.task_columns(t), metric="x", value=2.0)], "late")
    frame = quantsweep.load_results(sweep.path)
    assert sorted(zip(frame.task, frame.metric, frame.value, strict=True)) == [("t", "x", 2.0), ("u", "x", 1.0), ("u", "y", 1.0)]
    samples = quantsweep.load_samples(sweep.path)
    assert {task: value[0] for task, value in zip(samples.task, samples.loglikelihood, strict=True)} == {"t": 2.0, "u": 1.0}
