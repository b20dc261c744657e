"""Submitting: intents before, receipts after; nothing lost and nothing twice, wherever it breaks off; never above a limit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantsweep import slurm
from quantsweep.crew import slurm_job
from quantsweep.errors import LockedError, SlurmError
from quantsweep.failures import classes
from quantsweep.failures.holds import cancelled
from quantsweep.launching.cluster import NoRoomError, RefusedError
from quantsweep.launching.refill import array_size, room, submit_waiting
from quantsweep.launching.settle import settle
from quantsweep.launching.submissions import SubmittedArray, read_submissions
from quantsweep.launching.tasks import observe
from quantsweep.planning.plan_files import read_owners, shard_trials
from quantsweep.slurm import Limits
from quantsweep.storage.files import write_text
from quantsweep.storage.lock import launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import ClusterSpec, PlannedTrial
from tests.unit.engine_cases import SLURM, Site, age_submissions, fail, finish, submit, trial, worker, write


def limits(**changes: int | None) -> Limits:
    return Limits(**{"max_array_size": 1001, "max_job_count": 10_000, "max_submit_jobs": None, "notes": (), **changes})  # type: ignore[arg-type]


# --- what waits ---------------------------------------------------------------------------------------------------------


def trials_submitted(folder: SweepFolder, site: Site) -> list[str]:
    """Trial ids in everything that was accepted, as often as they stand there."""
    return [trial_id for plan, shard_id in site.shards() for trial_id in shard_trials(folder.plan / plan, [shard_id])]


def ids(*planned: PlannedTrial) -> list[str]:
    return sorted(p.trial.trial_id for p in planned)


def test_everything_that_is_planned_is_submitted_once(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(bits, model=model) for bits in (2, 3, 4) for model in (0, 1)]
    write(sweep, planned)
    summary = submit(sweep)
    assert (summary.shards, summary.waiting, summary.refusal) == (6, 0, None)
    assert sorted(trials_submitted(sweep, site)) == ids(*planned)
    assert submit(sweep).shards == 0
    site.set("COMPLETED")
    assert submit(sweep).shards == 0, "a shard is submitted once, whatever came of it; the rest is for retries and launches"


def test_shards_that_waited_in_older_plans_are_submitted_unless_a_newer_plan_has_their_trials(sweep: SweepFolder, site: Site) -> None:
    old = write(sweep, [trial(2), trial(3), trial(4)])
    new = write(sweep, [trial(3), trial(5)])
    submit(sweep)
    owners = read_owners(sweep.plan)
    assert sorted(site.shards()) == sorted(owners.values())
    assert sorted(plan for plan, _ in site.shards()) == [old.name, old.name, new.name, new.name]


def test_done_trials_need_no_shard(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2), trial(3)])
    finish(sweep, trial(2))
    finish(sweep, trial(3), trial(3).tasks[:1])
    submit(sweep)
    assert trials_submitted(sweep, site) == ids(trial(3))


def test_tasks_that_are_added_later_run_alone(sweep: SweepFolder, site: Site) -> None:
    first, both = trial(2).tasks[:1], trial(2).tasks
    write(sweep, [trial(2, tasks=first)])
    submit(sweep)
    finish(sweep, trial(2, tasks=first))
    site.set("COMPLETED")
    plan = write(sweep, [trial(2, tasks=both)])
    submit(sweep)
    assert [plan_name for plan_name, _ in site.shards()][1:] == [plan.name]


def test_shards_of_local_plans_are_not_slurms(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)], cluster=ClusterSpec())
    assert submit(sweep).waiting == 0
    assert site.asked == []


def test_held_shards_stay_where_they_are(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2), trial(3)])
    cancelled(["bit_width=2"], sweep).save(sweep)
    submit(sweep)
    assert trials_submitted(sweep, site) == ids(trial(3))
    cancelled([], sweep).save(sweep)
    assert submit(sweep).waiting == 0


def test_broken_nodes_are_excluded(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(2), trial(3)])
    for cause in ("bad_node", "node_failure"):
        fail(sweep, trial(9), cause, plan=plan.name, host="n7")
    fail(sweep, trial(9), "bad_node", plan=plan.name, host="n8")
    assert submit(sweep).excluded == site.excluded == ("n7",)


def test_where_every_node_is_broken_none_is_excluded(sweep: SweepFolder, site: Site) -> None:
    """Slurm would refuse a job that may run nowhere; and nothing could show that a node has been mended."""
    plan = write(sweep, [trial(2), trial(3)])
    for host in ("n7", "n8"):  # the partition has two nodes
        for _ in range(2):
            fail(sweep, trial(9), "bad_node", plan=plan.name, host=host)
    assert submit(sweep).excluded == site.excluded == ()


def test_what_waits_already_is_kept_off_broken_nodes_and_off_those_of_the_yaml(sweep: SweepFolder, site: Site) -> None:
    """Slurm replaces a job's list of excluded nodes."""
    plan = write(sweep, [trial(2), trial(3)], cluster=ClusterSpec(kind="slurm", exclude="n[1-2]"))
    submit(sweep)
    site.set("RUNNING", only=(101, 0))
    for _ in range(2):
        fail(sweep, trial(9), "bad_node", plan=plan.name, host="n7")
    write(sweep, [trial(4)])
    submit(sweep)
    assert [argv for argv in site.asked if any("ExcNodeList" in word for word in argv)] == [
        ["scontrol", "update", "JobId=101", "ExcNodeList=n7,n[1-2]"]
    ]


# --- limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "queued", "cluster", "expected"),
    [
        (limits(), 0, SLURM, 4_999),
        (limits(), 4_000, SLURM, 999),
        (limits(), 9_000, SLURM, 0),
        (limits(max_submit_jobs=50), 0, SLURM, 44),
        (limits(max_submit_jobs=50), 60, SLURM, 0),
        (limits(max_submit_jobs=1), 0, SLURM, 1),
        (limits(max_submit_jobs=50), 0, ClusterSpec(kind="slurm", max_submitted=10), 10),
        (limits(max_submit_jobs=50), 7, ClusterSpec(kind="slurm", max_submitted=10), 3),
        (limits(max_submit_jobs=50), 0, ClusterSpec(kind="slurm", max_submitted=500), 44),
        (limits(max_job_count=200), 0, SLURM, 99),
    ],
)
def test_room_leaves_some_for_others(known: Limits, queued: int, cluster: ClusterSpec, expected: int) -> None:
    assert room(known, queued, cluster) == expected


@given(st.integers(1, 10_000), st.integers(2, 100_000), st.none() | st.integers(1, 500), st.integers(0, 20_000))
def test_room_and_the_collector_stay_within_every_limit(submit_jobs: int, count: int, own: int | None, queued: int) -> None:
    places = room(limits(max_submit_jobs=submit_jobs, max_job_count=count), queued, ClusterSpec(kind="slurm", max_submitted=own))
    assert places >= 0
    assert places == 0 or (queued + places <= submit_jobs and queued + places < count)
    assert own is None or places <= max(0, own - queued)


def test_the_users_array_size_can_only_be_smaller() -> None:
    assert array_size(ClusterSpec(kind="slurm", max_array_size=10), limits()) == 10
    assert array_size(ClusterSpec(kind="slurm", max_array_size=5_000), limits()) == 1001
    assert array_size(SLURM, limits()) == 1001, "its largest index is then MaxArraySize − 1"


def test_arrays_are_split_and_what_does_not_fit_waits(sweep: SweepFolder, site: Site) -> None:
    site.max_array_size, site.max_job_count = 4, 24  # half of it, one for the collector: 11
    planned = [trial(2, block=block) for block in range(8, 8 + 15)]
    write(sweep, planned)
    site.jobs[1, None] = ("somebody's other work", "RUNNING", "n0")
    summary = submit(sweep)
    assert [len(array.tasks) for array in site.submitted] == [4, 4, 2]
    assert (summary.shards, summary.waiting) == (10, 5)
    assert submit(sweep).shards == 0, "no room"
    site.set("COMPLETED", only=(101, 0))
    assert submit(sweep).shards == 0, "the collector has that place"
    site.set("COMPLETED", only=(101, 1))
    site.set("COMPLETED", only=(101, 2))
    assert submit(sweep).shards == 2
    site.set("COMPLETED")
    assert (submit(sweep).shards, submit(sweep).waiting) == (3, 0)
    assert sorted(trials_submitted(sweep, site)) == ids(*planned)


def test_one_array_a_resource_class_and_plan(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2), trial(3), trial(2, model=1, gpus=1), trial(3, model=1, gpus=1)])
    write(sweep, [trial(5)])
    submit(sweep)
    assert [(len(array.tasks), array.resources.gpus) for array in site.submitted] == [(2, 0), (2, 1), (1, 0)]


def test_a_whole_node_runs_several_shards_a_task(sweep: SweepFolder, site: Site) -> None:
    cluster = ClusterSpec(kind="slurm", allocation="node", node_gpus=4, node_cpus=8)
    write(sweep, [trial(bits, gpus=2, cpus=4) for bits in range(2, 7)] + [trial(2, model=2, gpus=0, cpus=2)], cluster=cluster)
    submit(sweep)
    by_gpus = {array.resources.gpus: array for array in site.submitted}
    assert by_gpus[2].workers == 2
    assert [len(task) for task in by_gpus[2].tasks] == [2, 2, 1]
    assert (by_gpus[0].workers, [len(task) for task in by_gpus[0].tasks]) == (4, [1])


def test_the_time_limit_stays_below_the_partitions(sweep: SweepFolder, site: Site) -> None:
    site.max_minutes = "01:30:00"
    write(sweep, [trial(2, minutes=600), trial(2, model=1, minutes=10)])
    submit(sweep)
    assert sorted(array.resources.minutes for array in site.submitted) == [10, 90]


def test_the_running_sweep_believes_limits_that_were_read_just_now(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "alpha")  # every job has it
    write(sweep, [trial(2)])
    submit(sweep)
    write(sweep, [trial(3)])
    site.asked.clear()
    submit(sweep)
    assert ["scontrol", "show", "config"] not in site.asked
    with launch_lock(sweep.plan / "launch.lock"):
        write(sweep, [trial(4)])
        submit_waiting(sweep, settle(sweep), fresh_limits=True)
    assert ["scontrol", "show", "config"] in site.asked


def test_a_damaged_note_of_limits_is_read_anew(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)])
    write_text(sweep.plan / "limits.json", '{"max_array_size": 1')
    assert submit(sweep).shards == 1


# --- crashes and refusals -----------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands for kill -9 in the middle of submitting: nothing that the process would still have done is done."""


def three_arrays(sweep: SweepFolder, site: Site) -> list[PlannedTrial]:
    planned = [trial(bits, model=model, gpus=model) for model in (0, 1, 2) for bits in (2, 3)]
    write(sweep, planned)
    return planned


@pytest.mark.parametrize("accepted", [False, True], ids=["sbatch was not called", "the job is in the queue"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_launcher_that_is_killed_loses_and_doubles_nothing(sweep: SweepFolder, site: Site, at: int, *, accepted: bool) -> None:
    planned = three_arrays(sweep, site)
    genuine = site.submit_array

    def dying(folder: SweepFolder, submission: Path, index: int, *rest: object, **more: object) -> int:
        if index == at:
            if accepted:
                genuine(folder, submission, index, *rest, **more)  # type: ignore[arg-type]
            raise KilledError
        return genuine(folder, submission, index, *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantsweep.launching.cluster.submit_array", dying)
        with pytest.raises(KilledError):
            submit(sweep)
    assert len(observe(sweep).in_flight) == 2 * (at + accepted)
    summary = submit(sweep)
    assert summary.waiting == 0
    assert sorted(trials_submitted(sweep, site)) == ids(*planned)
    site.asked.clear()
    site.set("COMPLETED")
    settle(sweep)
    assert all(submission.closed for submission in read_submissions(sweep))
    settle(sweep)
    assert [argv[0] for argv in site.asked] == ["squeue"], "closed submissions are never asked about again"


def test_an_orphan_that_arrives_after_it_was_given_up_runs_nothing(
    sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sbatch outlived its launcher: its job comes when its shards are submitted under another name already."""
    write(sweep, [trial(2)])
    site.refuse[0] = KilledError()  # type: ignore[assignment]
    with pytest.raises(KilledError):
        submit(sweep)
    assert submit(sweep).shards == 1
    [old, new] = sorted(read_submissions(sweep), key=lambda one: not one.arrays[0].abandoned)
    site.jobs[555, 0] = (old.arrays[0].job_name, "RUNNING", "n1")
    monkeypatch.setattr("quantsweep.crew.slurm_job.Worker", lambda *a, **k: pytest.fail("a worker was made"))
    assert slurm_job.main(["task", str(old.path), "0"]) == 0
    assert "given up" in capsys.readouterr().out
    assert {task.job_id.split("_")[0] for task in observe(sweep).in_flight} == {str(new.arrays[0].array_job_id)}


def test_no_room_in_the_middle_gives_up_the_rest_for_now(sweep: SweepFolder, site: Site) -> None:
    planned = three_arrays(sweep, site)
    site.refuse[1] = NoRoomError("full")
    summary = submit(sweep)
    assert (summary.shards, summary.waiting, summary.refusal) == (2, 4, "full")
    assert submit(sweep).shards == 4
    assert sorted(trials_submitted(sweep, site)) == ids(*planned)


def test_no_room_for_the_first_is_no_error(sweep: SweepFolder, site: Site) -> None:
    planned = three_arrays(sweep, site)
    site.refuse.update(dict.fromkeys(range(2), NoRoomError("full")))  # both tasks of the first array, then one
    summary = submit(sweep)
    assert (summary.shards, summary.waiting, summary.refusal) == (0, 6, "full")
    assert site.collectors == []
    assert submit(sweep).shards == 6
    assert sorted(trials_submitted(sweep, site)) == ids(*planned)


@pytest.mark.parametrize(("fits", "sizes"), [(8, [8]), (5, [4, 4]), (3, [2, 2, 4]), (1, [1, 1, 2, 4])])
def test_where_the_first_array_does_not_fit_half_of_it_may(sweep: SweepFolder, site: Site, fits: int, sizes: list[int]) -> None:
    """A limit that was read is filled by others meanwhile; the rest of the array is an array of its own."""
    planned = [trial(2, block=block) for block in range(8, 16)]
    write(sweep, planned)
    genuine = site.submit_array

    def narrow(folder: SweepFolder, submission: Path, index: int, array: SubmittedArray, *rest: object, **more: object) -> int:
        if len(array.tasks) > fits and not site.submitted:
            raise NoRoomError("full")
        return genuine(folder, submission, index, array, *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantsweep.launching.cluster.submit_array", narrow)
        assert submit(sweep).shards == 8
    assert [len(array.tasks) for array in site.submitted] == sizes
    assert len({array.job_name for array in site.submitted}) == len(sizes), "each has a name of its own"
    assert sorted(trials_submitted(sweep, site)) == ids(*planned)


def test_half_an_array_has_half_the_budget(sweep: SweepFolder, site: Site) -> None:
    write(sweep, gpu_trials(3), gpu_hours=100.0)
    site.refuse[0] = NoRoomError("full")
    submit(sweep)
    assert [(len(array.tasks), len(array.gpu_seconds)) for array in site.submitted] == [(2, 2), (1, 1)]


def test_refused_for_good_is_an_error_if_it_is_everything(sweep: SweepFolder, site: Site) -> None:
    three_arrays(sweep, site)
    site.refuse.update(dict.fromkeys(range(3), RefusedError("Invalid account")))
    with pytest.raises(RefusedError):
        submit(sweep)
    assert site.calls == 3, "a refusal is not tried again"
    site.refuse.clear()
    assert submit(sweep).shards == 6


def test_one_array_that_is_refused_for_good_does_not_hold_the_others(sweep: SweepFolder, site: Site) -> None:
    three_arrays(sweep, site)
    site.refuse[0] = RefusedError("no node has so much memory")
    summary = submit(sweep)
    assert (summary.shards, summary.waiting, summary.refusal, summary.refused) == (4, 2, None, ("no node has so much memory",))


def test_an_unclear_answer_is_asked_about_before_it_is_tried_again(sweep: SweepFolder, site: Site) -> None:
    """sbatch timed out: the first time the job is there all the same, the second time it is not."""
    three_arrays(sweep, site)
    genuine = site.submit_array
    calls: list[int] = []

    def slow(folder: SweepFolder, submission: Path, index: int, *rest: object, **more: object) -> int:
        calls.append(index)
        if len(calls) == 1:
            genuine(folder, submission, index, *rest, **more)  # type: ignore[arg-type]
            raise SlurmError("timed out; it may have been accepted all the same")
        if len(calls) == 2:
            raise SlurmError("timed out")
        return genuine(folder, submission, index, *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantsweep.launching.cluster.submit_array", slow)
        assert submit(sweep).shards == 6
    assert calls == [0, 1, 1, 2]
    assert len({array.job_name for array in site.submitted}) == len(site.submitted) == 3


@pytest.mark.parametrize("index", [0, 1])
def test_where_slurm_falls_silent_the_intent_stays_until_somebody_can_ask(sweep: SweepFolder, site: Site, index: int) -> None:
    """Given up at once, its tasks (running by then) would run a second time elsewhere."""
    planned = three_arrays(sweep, site)
    genuine = site.submit_array

    def silent(folder: SweepFolder, submission: Path, number: int, *rest: object, **more: object) -> int:
        genuine(folder, submission, number, *rest, **more)  # type: ignore[arg-type]
        if number == index:
            site.down.add("squeue")
            raise SlurmError("timed out; it may have been accepted all the same")
        return site.next_id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantsweep.launching.cluster.submit_array", silent)
        if index == 0:
            with pytest.raises(SlurmError, match="no answer"):
                submit(sweep)
        else:
            assert "no answer" in str(submit(sweep).refusal)
    assert not any(array.abandoned for submission in read_submissions(sweep) for array in submission.arrays)
    site.down.clear()
    assert submit(sweep).shards == 6 - 2 * (index + 1)
    assert sorted(trials_submitted(sweep, site)) == ids(*planned)


def test_who_lost_the_lock_submits_no_more(sweep: SweepFolder, site: Site) -> None:
    """Stopped for long (a suspended laptop) between two arrays; another launch has taken over."""
    planned = three_arrays(sweep, site)
    lock = sweep.plan / "launch.lock.2"
    genuine = site.submit_array

    def slept(*arguments: object, **more: object) -> int:
        number = genuine(*arguments, **more)  # type: ignore[arg-type]
        lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "theirs", "purpose": "launch", "machine": "another"}))
        return number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantsweep.launching.cluster.submit_array", slept)
        with pytest.raises(LockedError, match="elsewhere"):
            submit(sweep)
    assert site.calls == 1
    assert lock.exists(), "it is theirs"
    [submission] = read_submissions(sweep)
    assert submission.arrays[0].array_job_id is None, "the other launch may have given this intent up: its word stands"
    lock.unlink()
    assert submit(sweep).shards == 4
    assert sorted(trials_submitted(sweep, site)) == ids(*planned)


def test_a_lock_that_is_nobodys_does_not_submit(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)])
    with pytest.raises(LockedError):
        submit_waiting(sweep, settle(sweep))
    assert site.submitted == []


# --- the collector ------------------------------------------------------------------------------------------------------


def test_one_collector_waits_for_everything(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)])
    submit(sweep)
    write(sweep, [trial(3)])
    summary = submit(sweep)
    assert summary.collector is None
    assert site.collectors == [(101,)]
    [update] = [argv for argv in site.asked if argv[:2] == ["scontrol", "update"]]
    assert update[2:] == ["JobId=102", "Dependency=afterany:101:103", "StartTime=now"]


def test_without_sbatch_on_the_nodes_there_is_no_collector(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2)], cluster=ClusterSpec(kind="slurm", submit_from_nodes=False))
    assert "submit_from_nodes" in str(submit(sweep).collector)
    assert site.collectors == []


def test_a_collector_that_is_refused_is_said_and_costs_nothing(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> int:
        raise NoRoomError("no place for it")

    monkeypatch.setattr("quantsweep.launching.cluster.submit_collector", refused)
    write(sweep, [trial(2)])
    summary = submit(sweep)
    assert (summary.shards, summary.collector) == (1, "no place for it")


# --- the budget ---------------------------------------------------------------------------------------------------------


def gpu_trials(number: int) -> list[PlannedTrial]:
    return [trial(2, gpus=2, block=8 + n) for n in range(number)]


def test_the_budget_bounds_what_is_handed_out(sweep: SweepFolder, site: Site) -> None:
    write(sweep, gpu_trials(5), gpu_hours=700 / 3600)
    summary = submit(sweep)
    [array] = site.submitted
    assert summary.budget_spent
    assert summary.waiting == 5 - len(array.tasks)
    assert len(array.gpu_seconds) == len(array.tasks) == 3
    assert sum(array.gpu_seconds) == pytest.approx(700)
    assert submit(sweep).shards == 0, "all of it is reserved"


def test_what_a_job_did_not_use_is_handed_out_again(sweep: SweepFolder, site: Site) -> None:
    write(sweep, gpu_trials(5), gpu_hours=700 / 3600)
    submit(sweep)
    for (job, index), _ in list(site.jobs.items())[:3]:
        worker(sweep, job=f"{job}_{index}", gpus=2, seconds=10.0, ended="finished")
    site.set("COMPLETED")
    assert submit(sweep).shards == 2
    assert sum(site.submitted[1].gpu_seconds) <= 700 - 60
    for job in (key for key in site.jobs if key[0] == site.next_id - 1 or site.jobs[key][1] == "PENDING"):
        worker(sweep, job=f"{job[0]}_{job[1]}", gpus=2, seconds=400.0, ended="budget")
    site.set("COMPLETED")
    write(sweep, gpu_trials(6), gpu_hours=700 / 3600)
    assert submit(sweep).budget_spent


def test_models_without_a_gpu_use_no_budget(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [*gpu_trials(2), trial(3, model=2)], gpu_hours=1 / 3600)
    worker(sweep, gpus=1, seconds=1e6, ended="finished")
    summary = submit(sweep)
    [array] = site.submitted
    assert (array.resources.gpus, array.gpu_seconds, summary.shards, summary.budget_spent) == (0, (), 1, True)


def test_submissions_survive_a_round_trip(sweep: SweepFolder, site: Site) -> None:
    write(sweep, gpu_trials(2), gpu_hours=100.0)
    submit(sweep)
    age_submissions(sweep, 0)
    [submission] = read_submissions(sweep)
    assert submission.arrays[0] == dataclasses.replace(site.submitted[0], array_job_id=101)
    assert abs(submission.declared - time.time()) < 60


def test_a_node_without_scontrol_submits_by_what_the_launch_read(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "main")
    write(sweep, [trial(2)])
    submit(sweep)
    write(sweep, [trial(3)])
    path = sweep.plan / "limits.json"
    os.utime(path, (1.0, 1.0))
    genuine = site.run

    def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if argv[0] == "scontrol":
            raise slurm.CommandMissing("'scontrol' is not on PATH")
        return genuine(argv)

    monkeypatch.setattr(slurm, "_run", run)
    assert submit(sweep).shards == 1


def test_a_broken_node_stops_no_submission_where_several_partitions_are_named(sweep: SweepFolder, site: Site) -> None:
    cluster = ClusterSpec(kind="slurm", partition="main,other")
    plan = write(sweep, [trial(2)], cluster=cluster)
    for _ in range(2):
        fail(sweep, trial(2), classes.BAD_NODE, plan=plan.name, host="n9")
    site.partitions = "PartitionName=main Nodes=n[1-9] State=UP\nPartitionName=other Nodes=n[9-12] State=UP\n"
    assert submit(sweep).shards == 1
    assert site.excluded == ("n9",)
