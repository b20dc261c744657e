"""One step of a running sweep: what is tried again, with what, and what is left to a person."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest

from quantsweep.errors import LockedError
from quantsweep.failures import classes
from quantsweep.failures.holds import cancelled, read_holds
from quantsweep.launching import advance as module
from quantsweep.launching import budget
from quantsweep.launching.advance import StepSummary, advance, advance_now_and_then
from quantsweep.launching.submissions import read_submissions, spent_by_job
from quantsweep.planning.plan_files import plan_files, read_header, read_owned_tasks, read_shard_trials
from quantsweep.storage.lock import launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables.forgetting import Kind, Tombstone, write_fence
from quantsweep.trial.specs import ClusterSpec, PlannedTrial, Resources
from tests.unit.engine_cases import TASKS, Site, age_submissions, fail, failed_rows, finish, submit, trial, worker, write


def newest(folder: SweepFolder) -> str:
    return plan_files(folder.plan)[-1].name


def retried(folder: SweepFolder, plan: str | None = None) -> list[PlannedTrial]:
    """The trials of the newest plan, or none if `plan` is that."""
    path = plan_files(folder.plan)[-1]
    return [] if path.name == plan else read_shard_trials(path, range(100))


def lose(folder: SweepFolder, site: Site, state: str, planned: PlannedTrial) -> None:
    """The newest job was at this trial when Slurm ended it."""
    (job, index), _ = [
        (key, value) for key, value in site.jobs.items() if value[1] in ("PENDING", "RUNNING") and "collector" not in value[0]
    ][-1]
    [((plan, shard_id), _)] = [owner for trial_id, owner in read_owned_tasks(folder.plan).items() if trial_id == planned.trial.trial_id]
    worker(folder, job=f"{job}_{index}", plan=plan, shard_id=shard_id, trial_id=planned.trial.trial_id, node="n0")
    site.set(state, only=(job, index))


def end(folder: SweepFolder, site: Site, state: str = "COMPLETED") -> StepSummary:
    """All jobs end so; then the collector's step."""
    site.set(state)
    return advance(folder)


# --- what is tried again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "more"),
    [
        ("TIMEOUT", {"minutes": 480}),
        ("OUT_OF_MEMORY", {"memory_gb": 8}),
        ("FAILED", {"memory_gb": 8}),
        ("NODE_FAIL", {}),
        ("PREEMPTED", {}),
    ],
)
def test_a_lost_trial_runs_again_with_more_of_what_it_lacked(sweep: SweepFolder, site: Site, state: str, more: dict[str, int]) -> None:
    planned = trial(2)
    first = write(sweep, [planned])
    submit(sweep)
    lose(sweep, site, state, planned)
    step = advance(sweep)
    assert (step.retried, step.submitted.shards, step.given_up) == (1, 1, {})
    [again] = retried(sweep)
    assert again.trial.trial_id == planned.trial.trial_id, "resources are no part of a trial"
    assert again.trial.model.resources == dataclasses.replace(Resources(), raised=bool(more), **more)
    asked = site.submitted[-1].resources
    assert all(getattr(asked, key) == value for key, value in more.items())
    assert read_header(plan_files(sweep.plan)[-1]).root == first.name
    assert advance(sweep).retried == 0, "it is in flight"


def test_memory_is_doubled_until_its_limit_then_a_person_is_asked(sweep: SweepFolder, site: Site) -> None:
    planned = trial(2)
    write(sweep, [planned], cluster=ClusterSpec(kind="slurm", max_memory_gb=10))
    submit(sweep)
    asked = []
    for _ in range(4):
        asked.append(site.submitted[-1].resources.memory_gb)
        lose(sweep, site, "OUT_OF_MEMORY", planned)
        step = advance(sweep)
        if step.given_up:
            break
    assert asked == [4, 8, 10]
    [reason] = step.given_up
    assert "cluster.max_memory_gb" in reason
    plans = len(plan_files(sweep.plan))
    assert advance(sweep).given_up == step.given_up
    assert len(plan_files(sweep.plan)) == plans


def test_causes_are_counted_since_the_last_launch_by_hand(sweep: SweepFolder, site: Site) -> None:
    planned = trial(2)
    for launch in range(2):
        write(sweep, [planned])
        submit(sweep)
        for _ in range(2):
            lose(sweep, site, "TIMEOUT", planned)
            assert advance(sweep).retried == 1, launch
        lose(sweep, site, "TIMEOUT", planned)
        assert advance(sweep).retried == 1
        lose(sweep, site, "TIMEOUT", planned)
        assert advance(sweep).retried == 0, "three retries, then a person"


@pytest.mark.parametrize(("max_retries", "allowed"), [(0, 0), (1, 1), (2, 2), (9, 3), (None, 3)])
def test_max_retries(sweep: SweepFolder, site: Site, max_retries: int | None, allowed: int) -> None:
    planned = trial(2)
    write(sweep, [planned], max_retries=max_retries)
    submit(sweep)
    count = 0
    for _ in range(6):
        lose(sweep, site, "OUT_OF_MEMORY", planned)
        if not advance(sweep).retried:
            break
        count += 1
    assert count == allowed


def test_a_trial_that_makes_way_for_others_is_never_given_up(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ASSIGNMENTS", 3)
    planned = trial(2)
    write(sweep, [planned], max_retries=0)
    submit(sweep)
    for _ in range(6):
        lose(sweep, site, "PREEMPTED", planned)
        assert advance(sweep).retried == 1


def test_a_trial_that_leaves_no_trace_is_given_up_in_the_end(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ASSIGNMENTS", 3)
    write(sweep, [trial(2)])
    submit(sweep)
    steps = [_between_trials(sweep, site) for _ in range(3)]
    assert [step.retried for step in steps] == [1, 1, 0]
    assert steps[-1].given_up == {"submitted 3 times without an end": 1}
    write(sweep, [trial(2)])
    submit(sweep)
    assert _between_trials(sweep, site).retried == 1, "whoever types the command again means it"


def _between_trials(sweep: SweepFolder, site: Site) -> StepSummary:
    """The newest job had begun trials, and was lost when it was at none."""
    [*_, (number, _)] = [key for key, (name, _, _) in site.jobs.items() if not name.endswith("collector")]
    worker(sweep, job=f"{number}_0", plan=newest(sweep), shard_id=0)
    return end(sweep, site, "NODE_FAIL")


@pytest.mark.parametrize("accounts", [{}, None], ids=["accounts", "no accounts"])
@pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "FAILED", "COMPLETED", "UNKNOWN"])
def test_a_job_that_ends_before_its_worker_writes_counts_against_retries(
    sweep: SweepFolder, site: Site, state: str, accounts: dict[tuple[int, int | None], str] | None
) -> None:
    """A setup line that hangs: it was submitted at every step, for ever."""
    site.accounts = accounts
    write(sweep, [trial(2, gpus=1)], max_retries=0, gpu_hours=1.0)
    submit(sweep)
    for _ in range(5):
        if state == "UNKNOWN":
            site.forget()
            age_submissions(sweep, 5_000)
        else:
            site.set(state)
        advance(sweep)
    assert len(site.submitted) == 1
    [row] = failed_rows(sweep)
    assert state in row["failure_message"]


@pytest.mark.parametrize(
    ("state", "accounted", "hours"),
    [("TIMEOUT", "TIMEOUT", 3 / 3600), ("TIMEOUT", None, 4.0), ("FAILED", None, 0.0), ("CANCELLED", None, 0.0), ("UNKNOWN", None, 1.5)],
)
def test_a_job_that_ends_before_its_worker_writes_counts_against_the_budget(
    sweep: SweepFolder, site: Site, state: str, accounted: str | None, hours: float
) -> None:
    """What sacct says has elapsed (three seconds on paper), else the submission's own times; limits are four hours."""
    site.accounts = None if accounted is None else {(site.next_id + 1, 0): accounted}
    write(sweep, [trial(2, gpus=2)], gpu_hours=1.0)
    submit(sweep)
    if state == "UNKNOWN":
        site.forget()
        age_submissions(sweep, 5_400)
    else:
        site.set(state, node="")
        if state == "TIMEOUT":
            site.set(state)
    step = advance(sweep)
    used = budget.used([], spent_by_job(read_submissions(sweep))) / 3600
    assert used == pytest.approx(2 * hours, abs=1e-2)
    assert step.submitted.budget_spent == (hours >= 1)


@pytest.mark.parametrize("cause", [classes.BUG, classes.MODEL_OR_DATA, classes.CONFIGURATION, classes.QUANTIZATION, classes.DISK_FULL])
def test_what_the_same_input_repeats_is_not_tried_again(sweep: SweepFolder, site: Site, cause: str) -> None:
    planned = [trial(2), trial(3)]
    plan = write(sweep, planned, shard_minutes=60)
    submit(sweep)
    fail(sweep, planned[0], cause, plan=plan.name)
    finish(sweep, planned[1], plan=plan.name)
    step = end(sweep, site)
    assert step.retried == 0
    assert sum(step.given_up.values()) == 1


def test_crashed_and_hung_run_once_more(sweep: SweepFolder, site: Site) -> None:
    planned = trial(2)
    plan = write(sweep, [planned])
    submit(sweep)
    fail(sweep, planned, classes.CRASHED, plan=plan.name)
    assert end(sweep, site).retried == 1
    fail(sweep, planned, classes.HUNG, plan=newest(sweep))
    assert end(sweep, site).retried == 1, "another cause has a count of its own"
    fail(sweep, planned, classes.CRASHED, plan=newest(sweep))
    assert end(sweep, site).retried == 0


def test_only_the_tasks_that_are_missing_run_again(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(2), trial(3), trial(4)]
    plan = write(sweep, planned, shard_minutes=60)
    submit(sweep)
    finish(sweep, planned[0])
    finish(sweep, planned[1], TASKS[:1])
    assert end(sweep, site).retried == 2
    assert {p.trial.trial_id: len(p.tasks) for p in retried(sweep, plan.name)} == {
        planned[1].trial.trial_id: 1,
        planned[2].trial.trial_id: 2,
    }


def test_a_finished_sweep_is_left_alone(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(2)])
    submit(sweep)
    finish(sweep, trial(2))
    assert end(sweep, site) == StepSummary()
    assert newest(sweep) == plan.name
    calls = len(site.asked)
    assert advance(sweep) == StepSummary()
    assert len(site.asked) == calls, "Slurm is not asked about a sweep that is over"


# --- what is not --------------------------------------------------------------------------------------------------------


def test_what_was_cancelled_waits_for_the_launch_command(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(2), trial(3)])
    submit(sweep)
    lose(sweep, site, "CANCELLED", trial(3))
    site.set("CANCELLED", only=(101, 0))
    assert advance(sweep) == StepSummary()
    assert (newest(sweep), failed_rows(sweep)) == (plan.name, [])
    write(sweep, [trial(2), trial(3)])
    assert submit(sweep).shards == 2


def test_after_a_full_disk_nothing_goes_on_by_itself_from_the_very_same_step_on(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(2)])
    submit(sweep)
    worker(sweep, job="101_0", plan=plan.name, ended="DISK_FULL")
    assert end(sweep, site, "FAILED").retried == 0
    assert advance(sweep).retried == 0


def test_an_intent_that_came_to_nothing_waits_again_in_the_very_same_step(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)])
    site.refuse[0] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        submit(sweep)
    assert advance(sweep).submitted.shards == 1


def test_a_trial_that_is_in_flight_elsewhere_is_not_planned_again(sweep: SweepFolder, site: Site) -> None:
    """Somebody said assume_dead=true of a job that lived: it still works on the older plan while the newer one's job has ended."""
    write(sweep, [trial(2)])
    submit(sweep)
    site.set("RUNNING")
    write(sweep, [trial(2), trial(3)])
    submit(sweep)
    site.set("COMPLETED", only=(103, 0))
    site.set("COMPLETED", only=(103, 1))
    assert advance(sweep).retried == 1
    assert [p.trial.quantization.bit_width for p in retried(sweep)] == [3]


def test_held_trials_are_not_tried_again_until_the_command_is_typed_again(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(2), trial(3)])
    submit(sweep)
    cancelled(["bit_width=2"], sweep).save(sweep)
    lose(sweep, site, "NODE_FAIL", trial(3))
    step = end(sweep, site, "NODE_FAIL")
    assert {p.trial.quantization.bit_width for p in retried(sweep, plan.name)} == {3}
    assert any("cancelled by hand" in reason for reason in step.given_up)
    write(sweep, [trial(2), trial(3)])
    submit(sweep)
    assert end(sweep, site, "COMPLETED").retried == 2, "whoever types the command again wants it after all"


def test_failures_on_nodes_that_slurm_lost_leave_the_node_out(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(2), trial(3)]
    write(sweep, planned)
    submit(sweep)
    for one in reversed(planned):
        lose(sweep, site, "NODE_FAIL", one)
    assert advance(sweep).submitted.excluded == site.excluded == ("n0",)


def test_the_breaker_trips_in_the_step_too(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(bits, model=model) for model in (0, 1) for bits in (2, 3, 4)]
    plan = write(sweep, planned, breaker_trials=2)
    submit(sweep)
    for one in planned[:2]:
        fail(sweep, one, classes.CRASHED, plan=plan.name)
    for one in planned[3:]:
        finish(sweep, one, plan=plan.name)
    step = end(sweep, site)
    [hold] = read_holds(sweep)
    assert hold.holds(planned[2], plan.name)
    assert not hold.holds(planned[4], plan.name)
    assert step.retried == 0


def test_a_step_that_was_killed_after_its_plan_is_gone_on_with(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    write(sweep, [trial(2)])
    submit(sweep)
    lose(sweep, site, "NODE_FAIL", trial(2))
    with monkeypatch.context() as patch:
        patch.setattr(module, "submit_waiting", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            advance(sweep)
    step = advance(sweep)
    assert (step.retried, step.submitted.shards) == (0, 1)
    assert len(plan_files(sweep.plan)) == 2


def test_what_was_forgotten_since_comes_back_with_the_next_launch_only(sweep: SweepFolder, site: Site) -> None:
    """`quantsweep rerun` after a bug was mended: the running sweep, with the old code, must not bring the rows back."""
    planned = [trial(2), trial(3)]
    plan = write(sweep, planned, shard_minutes=60)
    submit(sweep)
    for one in planned:
        finish(sweep, one, plan=plan.name)
    write_fence(sweep, [Tombstone(None, planned[0].trial.trial_id, None, Kind.TRIAL)])
    step = end(sweep, site)
    assert (step.retried, step.submitted.shards, newest(sweep)) == (0, 0, plan.name)
    write(sweep, planned)
    submit(sweep)
    assert end(sweep, site, "NODE_FAIL").retried == 1, "it is the new launch's"


def test_a_job_that_could_not_be_launched_anywhere_is_cancelled_and_goes_elsewhere(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)])
    submit(sweep)
    site.reasons[101, 0] = "launch failed requeued held"
    step = advance(sweep)
    assert (step.retried, step.submitted.shards) == (1, 1)
    assert site.jobs[101, 0][1] == "CANCELLED"


def test_retries_are_gathered_while_the_queue_is_full(sweep: SweepFolder, site: Site) -> None:
    """Each retry plan makes shards of its own, and each of them loads its model anew."""
    plan = write(sweep, [trial(bits) for bits in range(2, 9)])
    submit(sweep)
    for index in (0, 1):
        site.set("RUNNING", only=(101, index))
    site.set("NODE_FAIL", only=(101, 2))
    assert advance(sweep).retried == 0, "two run, four wait"
    old = time.time() - module.GATHER_SECONDS - 1
    os.utime(sweep.plan / newest(sweep), (old, old))
    assert advance(sweep).retried == 1
    assert newest(sweep) != plan.name


def test_a_node_that_is_kept_off_already_does_not_end_the_gathering(sweep: SweepFolder, site: Site) -> None:
    """It is broken for a day: each failure would have made a plan and a load of its own until then."""
    site.partitions = "PartitionName=main Default=YES TotalNodes=9 State=UP\n"
    plan = write(sweep, [trial(bits) for bits in range(2, 9)])
    submit(sweep)
    for index in (0, 1):
        site.set("RUNNING", only=(101, index))
    for number in range(2):
        fail(sweep, trial(2, model=1), classes.BAD_NODE, plan=plan.name, host="n9")
        site.set("NODE_FAIL", only=(101, 2 + number), node=f"m{number}")
    step = advance(sweep)
    assert (step.retried, step.submitted.excluded) == (2, ("n9",)), "at once: what waits must be kept off it"
    assert any("ExcNodeList=n9" in word for argv in site.asked for word in argv)
    site.set("NODE_FAIL", only=(101, 4), node="m4")
    assert advance(sweep).retried == 0, "two run, the others wait, and none of them can come to it"


@pytest.mark.parametrize("running", [0, 1])
def test_retries_do_not_wait_for_a_queue_that_may_not_move(sweep: SweepFolder, site: Site, running: int) -> None:
    """Nobody else runs, so nobody would come back before all that is queued has ended."""
    write(sweep, [trial(bits) for bits in range(2, 9)])
    submit(sweep)
    for index in range(running):
        site.set("RUNNING", only=(101, index))
    site.set("NODE_FAIL", only=(101, 2))
    assert advance(sweep).retried == 1


def test_retries_come_when_places_would_soon_be_empty(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(bits) for bits in range(2, 7)])
    submit(sweep)
    for index in (0, 1):
        site.set("RUNNING", only=(101, index))
    site.set("NODE_FAIL", only=(101, 2))
    assert advance(sweep).retried == 1, "as many run as wait"


def test_a_trial_that_a_newer_plan_took_over_is_retried_once(sweep: SweepFolder, site: Site) -> None:
    """Its old shard is looked at too, for a trial in it that was given up."""
    lost, hopeless = trial(2), trial(3)
    plan = write(sweep, [lost, hopeless], shard_minutes=10_000)
    submit(sweep)
    assert site.submitted[-1].tasks == ((0,),), "one shard"
    fail(sweep, hopeless, classes.BUG, plan=plan.name)
    for _ in range(2):
        assert end(sweep, site, "NODE_FAIL").retried == 1
        assert [planned.trial.trial_id for planned in retried(sweep)] == [lost.trial.trial_id]


def test_a_node_on_which_nothing_can_begin_is_left_out(sweep: SweepFolder, site: Site) -> None:
    """Its file system is missing: it would swallow the whole queue, job after job."""
    planned = [trial(bits) for bits in (2, 3, 4)]
    plan = write(sweep, planned)
    submit(sweep)
    finish(sweep, planned[0], plan=plan.name, host="n1")
    site.set("COMPLETED", node="n1", only=(101, 0))
    site.set("FAILED", node="n7", only=(101, 1))
    assert advance(sweep).submitted.excluded == (), "once is no habit"
    site.set("FAILED", node="n7", only=(101, 2))
    step = advance(sweep)
    assert (step.retried, step.submitted.excluded) == (1, ("n7",))


# --- who takes it, and when ---------------------------------------------------------------------------------------------


def test_workers_that_end_together_take_the_step_once(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)])
    assert "submitted 1 shard," in advance_now_and_then(sweep)
    assert "just now" in advance_now_and_then(sweep)
    stamp = sweep.plan / ".advanced"
    os.utime(stamp, (time.time() - 60,) * 2)
    with launch_lock(sweep.plan / "launch.lock", purpose="run"):
        assert "somebody else" in advance_now_and_then(sweep)


def test_where_no_collector_comes_after_them_workers_wait_their_turn(
    sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last worker to end would leave what waits to nobody."""
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    site.max_job_count = 4  # room for one
    write(sweep, [trial(2), trial(3)], cluster=ClusterSpec(kind="slurm", submit_from_nodes=False))
    assert "submitted 1 shard, 1 waits" in advance_now_and_then(sweep)
    finish(sweep, trial(2))
    site.set("COMPLETED")
    assert "submitted 1 shard, 0 wait" in advance_now_and_then(sweep)
    assert [0 < pause <= module.PAUSE_SECONDS for pause in pauses] == [True]


def test_a_step_that_fails_fails_no_worker(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)])
    submit(sweep)
    site.down = {"squeue"}
    assert "could not be looked after" in advance_now_and_then(sweep)


def test_the_step_needs_the_lock(sweep: SweepFolder, site: Site) -> None:
    with launch_lock(sweep.plan / "launch.lock", purpose="run"), pytest.raises(LockedError):
        advance(sweep)
