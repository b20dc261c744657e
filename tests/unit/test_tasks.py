"""How tasks stand: Slurm's word crossed with the workers' records.  Nobody knows is not dead."""

from __future__ import annotations

import dataclasses
import json
import os
import platform

import pytest

from quantsweep import slurm
from quantsweep.errors import ResultsError, SlurmError
from quantsweep.failures.holds import cancelled
from quantsweep.launching import tasks
from quantsweep.launching.advance import step
from quantsweep.launching.settle import settle
from quantsweep.launching.submissions import job_prefix, read_submissions
from quantsweep.launching.tasks import Task, in_flight_trials, observe, to_leave_alone
from quantsweep.storage.lock import launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import STALE_SECONDS, read_records, this_machine
from tests.unit.engine_cases import Site, age_submissions, submit, trial, worker, write

LONG = STALE_SECONDS + 60


def one_task(folder: SweepFolder, site: Site) -> str:
    """Submit a sweep of one trial; returns its job id."""
    write(folder, [trial()])
    submit(folder)
    return f"{site.next_id - 1}_0"  # the collector came after it


def look(folder: SweepFolder, *, assume_dead: bool = False) -> Task:
    [task] = observe(folder, assume_dead=assume_dead).tasks
    return task


def test_nothing_of_the_sweep_in_the_queue_asks_slurm_nothing(sweep: SweepFolder, site: Site) -> None:
    assert observe(sweep).tasks == ()
    write(sweep, [trial()])
    assert observe(sweep).tasks == ()
    assert site.asked == []


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED", "SPECIAL_EXIT"])
def test_what_may_still_run_is_in_flight(sweep: SweepFolder, site: Site, state: str) -> None:
    one_task(sweep, site)
    site.set(state)
    age_submissions(sweep, 10 * LONG)
    seen = observe(sweep, assume_dead=True)
    assert [task.state.word for task in seen.in_flight] == [state], "assume_dead is for what nobody knows"
    assert in_flight_trials(sweep, seen.in_flight) == {trial().trial.trial_id}
    assert [argv[0] for argv in site.asked].count("sacct") == 0


@pytest.mark.parametrize(
    "state", ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"]
)
def test_what_has_ended_is_ended_with_slurms_word(sweep: SweepFolder, site: Site, state: str) -> None:
    one_task(sweep, site)
    site.set(state)
    assert look(sweep).ended == state


@pytest.mark.parametrize("state", ["FORWARDED", "REVOKED", "UPDATE_DB"])
def test_a_word_that_nobody_has_heard_of_is_neither_running_nor_dead(sweep: SweepFolder, site: Site, state: str) -> None:
    one_task(sweep, site)
    site.set(state)
    assert look(sweep).ended is None
    assert in_flight_trials(sweep, observe(sweep).in_flight)


@pytest.mark.parametrize(("said", "ended"), [("COMPLETED", "COMPLETED"), ("TIMEOUT", "TIMEOUT"), ("CANCELLED by 0", "CANCELLED")])
def test_accounts_know_what_the_queue_has_forgotten(sweep: SweepFolder, site: Site, said: str, ended: str) -> None:
    job = one_task(sweep, site)
    site.forget(account=said)
    worker(sweep, job=job, trial_id="x")
    assert look(sweep).ended == ended


def test_accounts_that_still_say_running_prove_nothing(sweep: SweepFolder, site: Site) -> None:
    """The controller lost the job, or the database lags: held until the worker has been silent for long."""
    job = one_task(sweep, site)
    site.forget(account="RUNNING")
    assert look(sweep).state is slurm.State.UNKNOWN
    record = worker(sweep, job=job)
    assert (look(sweep).state, look(sweep).ended) == (slurm.State.RUNNING, None)
    worker(sweep, worker=record.worker, job=job, age=LONG)
    age_submissions(sweep, LONG)
    assert look(sweep).ended == "UNKNOWN"


@pytest.mark.parametrize("accounts", [None, {}], ids=["no accounting", "not in the accounts"])
@pytest.mark.parametrize(
    ("age", "record", "ended"),
    [
        (0, None, None),
        (LONG, None, "UNKNOWN"),
        (LONG, {"age": 0}, None),
        (LONG, {"age": STALE_SECONDS - 60}, None),
        (LONG, {"age": LONG}, "UNKNOWN"),
        (0, {"age": 0, "ended": "finished"}, "COMPLETED"),
        (LONG, {"age": LONG, "ended": "error: KeyError"}, "COMPLETED"),
    ],
)
def test_jobs_that_nobody_knows(
    sweep: SweepFolder,
    site: Site,
    accounts: dict[tuple[int, int | None], str] | None,
    age: float,
    record: dict[str, object] | None,
    ended: str | None,
) -> None:
    job = one_task(sweep, site)
    site.accounts = accounts
    site.forget()
    age_submissions(sweep, age)
    if record is not None:
        worker(sweep, job=job, **record)
    task = look(sweep)
    assert task.ended == ended
    assert (ended is not None) or task.state in (slurm.State.UNKNOWN, slurm.State.RUNNING)
    assert look(sweep, assume_dead=True).ended is not None, "somebody has looked"


@pytest.mark.parametrize("accounts", [None, "CANCELLED by 0"], ids=["no accounting", "accounts"])
@pytest.mark.parametrize("queue_forgets", [False, True])
def test_an_array_that_was_cancelled_before_it_began_is_one_line_for_all_its_tasks(
    sweep: SweepFolder, site: Site, accounts: str | None, queue_forgets: bool
) -> None:
    write(sweep, [trial(3), trial(4), trial(5)], shard_minutes=1e-9)
    submit(sweep)
    site.cancel_pending()
    if accounts is None:
        site.accounts = None
    if queue_forgets:
        site.forget(account=accounts)
    is_known = not (queue_forgets and accounts is None)
    assert [task.ended for task in observe(sweep).tasks] == (["CANCELLED"] * 3 if is_known else [None] * 3)


def test_the_queue_goes_before_accounts_that_lag(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(3), trial(4)])
    submit(sweep)
    site.accounts = dict.fromkeys(site.jobs, "PENDING")
    site.cancel_pending()
    age_submissions(sweep, LONG)
    assert [task.ended for task in observe(sweep).tasks] == ["CANCELLED"] * 2


@pytest.mark.parametrize("account", [None, "PENDING"], ids=["absent", "the accounts lag"])
@pytest.mark.parametrize("age", [0, LONG])
def test_tasks_cancelled_alone_leave_no_trace(sweep: SweepFolder, site: Site, account: str | None, age: float) -> None:
    """Slurm takes them out of the array that waits, and makes no record of them."""
    write(sweep, [trial(3), trial(4), trial(5)])
    submit(sweep)
    job = next(job for job, _ in site.jobs)
    site.set("RUNNING", only=(job, 0))
    site.accounts = {(job, 0): "RUNNING"} | ({} if account is None else {(job, 2): account})
    del site.jobs[job, 2]
    age_submissions(sweep, age)
    assert {task.index: task.ended for task in observe(sweep).tasks} == {0: None, 1: None, 2: "CANCELLED"}
    site.accounts = None  # it cannot be told from one that died before it could say a word
    assert next(task for task in observe(sweep).tasks if task.index == 2).ended == ("UNKNOWN" if age else None)


def test_another_job_that_has_the_number_now_is_not_ours(sweep: SweepFolder, site: Site) -> None:
    job = one_task(sweep, site)
    number = int(job.partition("_")[0])
    site.jobs[number, 0] = ("somebody-elses", "RUNNING", "n3")
    site.jobs = {key: value for key, value in site.jobs.items() if key == (number, 0)}
    assert look(sweep).state is slurm.State.UNKNOWN


def test_a_worker_that_only_its_record_speaks_for_is_looked_at_again(sweep: SweepFolder, site: Site) -> None:
    """It may have died a moment ago: a collector that went home now would leave nobody behind."""
    job = one_task(sweep, site)
    site.accounts = None
    site.forget()
    worker(sweep, job=job)
    with launch_lock(sweep.plan / "launch.lock", purpose="test"):
        summary = step(sweep)
    assert (summary.in_flight, summary.is_stuck) == (0, True)


def test_the_line_of_what_never_began_says_nothing_of_tasks_that_did(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(3), trial(4), trial(5), trial(6)])
    submit(sweep)
    job = next(job for job, _ in site.jobs)
    for index, state in ((0, "RUNNING"), (1, "RUNNING"), (2, "COMPLETED")):
        site.set(state, only=(job, index))
    site.cancel_pending()
    site.accounts = None
    worker(sweep, job=f"{job}_1", ended="finished")
    del site.jobs[job, 1]  # it ended a while ago, and is forgotten
    assert {task.index: task.ended for task in observe(sweep).tasks} == {0: None, 1: "COMPLETED", 2: "COMPLETED", 3: "CANCELLED"}


def test_patience_counts_from_the_intent_however_often_the_file_is_written(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(3), trial(4)])
    submit(sweep)
    age_submissions(sweep, LONG)
    [first, second] = [key for key, (name, _, _) in site.jobs.items() if not name.endswith("collector")]
    site.set("COMPLETED", only=first)
    settle(sweep)
    del site.jobs[second]
    assert [task.ended for task in observe(sweep).tasks] == ["UNKNOWN"], "settling the first is no sign of life of the second"


def test_sacct_is_asked_from_the_intent_on(sweep: SweepFolder, site: Site) -> None:
    """It shows only what ended after its start time; a later one would hide a job that ended hours ago."""
    one_task(sweep, site)
    age_submissions(sweep, 5 * 3600)
    settle(sweep)
    site.forget()
    observe(sweep)
    [argv] = [argv for argv in site.asked if argv[0] == "sacct"]
    start = argv[argv.index("--starttime") + 1]
    from datetime import datetime, timedelta

    assert datetime.now() - datetime.fromisoformat(start) > timedelta(hours=5)


def test_a_process_that_is_gone_from_this_machine_is_not_alive(sweep: SweepFolder, site: Site) -> None:
    job = one_task(sweep, site)
    site.forget()
    worker(sweep, job=job, host=platform.node(), pid=os.getpid())
    assert look(sweep).state is slurm.State.RUNNING
    worker(sweep, job=job, host=platform.node(), pid=2**22 - 1, ended="finished")
    assert look(sweep).state is slurm.State.RUNNING, "one of several workers of a whole node still works"


def test_a_process_of_a_container_with_this_machines_name_is_not_seen_from_here(sweep: SweepFolder) -> None:
    gone = {"host": platform.node(), "pid": 2**22 - 1}
    worker(sweep, **gone, machine=this_machine())
    worker(sweep, **gone, machine="this start of the kernel, other numbers of processes")
    assert sorted(heard.is_alive for heard in read_records(sweep)) == [False, True]


def test_a_job_whose_workers_have_not_all_ended_has_not_ended(sweep: SweepFolder, site: Site) -> None:
    job = one_task(sweep, site)
    site.forget()
    worker(sweep, worker="b", job=job, age=40)
    worker(sweep, worker="a", job=job, ended="finished", age=1)
    worker(sweep, worker="c", job=job, ended="finished", age=1)
    assert (look(sweep).state, look(sweep).ended) == (slurm.State.RUNNING, None)
    worker(sweep, worker="b", job=job, ended="finished")
    assert look(sweep).ended == "COMPLETED"


def test_no_answer_is_not_an_empty_answer(sweep: SweepFolder, site: Site) -> None:
    one_task(sweep, site)
    site.down = {"squeue"}
    with pytest.raises(SlurmError, match="unknown"):
        observe(sweep)


def test_jobs_of_another_user_are_not_judged(sweep: SweepFolder, site: Site) -> None:
    one_task(sweep, site)
    [submission] = read_submissions(sweep)
    dataclasses.replace(submission, user="somebody-else").save()
    with pytest.raises(SlurmError, match="somebody-else"):
        observe(sweep)


def test_a_damaged_submission_is_said_by_name(sweep: SweepFolder, site: Site) -> None:
    one_task(sweep, site)
    [submission] = read_submissions(sweep)
    content = json.loads(submission.path.read_text())
    del content["arrays"][0]["plan"]
    submission.path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=submission.path.name):
        observe(sweep)


def test_live_jobs_that_no_submission_speaks_of_are_waited_for_then_refused(
    sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host's intent that is not seen here yet: submitting now would submit twice."""
    one_task(sweep, site)
    site.jobs[999, 0] = (f"{job_prefix(sweep)}cafe-0", "RUNNING", "n0")
    monkeypatch.setattr(tasks, "VISIBLE_SECONDS", 0.0)
    with pytest.raises(SlurmError, match=r"cafe-0.*scancel"):
        observe(sweep)
    site.set("COMPLETED", only=(999, 0))
    assert look(sweep).ended is None, "what has ended does not matter"


def test_the_missing_submission_turns_up(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one_task(sweep, site)
    [submission] = read_submissions(sweep)
    late = dataclasses.replace(submission, path=submission.path.with_name("submission-20990101T000000-cafe.json"))
    late = dataclasses.replace(late, arrays=(dataclasses.replace(late.arrays[0], job_name=f"{job_prefix(sweep)}cafe-0", array_job_id=999),))
    site.jobs[999, 0] = (f"{job_prefix(sweep)}cafe-0", "RUNNING", "n0")
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds: late.save())
    assert {task.job_id for task in observe(sweep).tasks} == {f"{site.next_id - 1}_0", "999_0"}


def test_what_runs_on_another_cluster_is_not_judged_here(sweep: SweepFolder, site: Site) -> None:
    """Two clusters of one site often see one file system, and this one's queue knows nothing of the other's jobs."""
    site.cluster = "alpha"
    one_task(sweep, site)
    assert look(sweep).ended is None
    site.cluster = "beta"
    age_submissions(sweep, LONG)
    with pytest.raises(SlurmError, match="jobs on cluster alpha"):
        observe(sweep)


def test_jobs_of_other_sweeps_are_not_ours_but_count_in_the_queue(sweep: SweepFolder, site: Site) -> None:
    one_task(sweep, site)
    site.jobs[999, None] = ("qs-sweep-elsewhere-0", "RUNNING", "n0")
    site.jobs[998, None] = ("other", "COMPLETED", "n0")
    seen = observe(sweep)
    assert len(seen.tasks) == 1
    assert sum(task.state.is_active for task in seen.queued) == 3, "the array, its collector, and the stranger"
    assert [task.job_id for task in seen.collectors] == [f"{site.next_id}_0"]


# --- held by Slurm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "reason"),
    [("PENDING", "launch failed requeued held"), ("PENDING", "launch_failed_requeued_held"), ("REQUEUE_HOLD", "JobHoldMaxRequeue")],
)
def test_a_task_that_waits_for_an_administrator_is_lost_with_its_node(sweep: SweepFolder, site: Site, state: str, reason: str) -> None:
    one_task(sweep, site)
    site.set(state)
    site.reasons[101, 0] = reason
    task = look(sweep)
    assert (task.ended, task.to_cancel) == ("NODE_FAIL", True)
    settle(sweep)
    assert ["scancel", "101_0"] in site.asked
    assert read_submissions(sweep)[0].arrays[0].ended == {0: "NODE_FAIL"}


@pytest.mark.parametrize("reason", ["Priority", "Resources", "JobHeldUser", "JobHeldAdmin", "BeginTime", "Dependency"])
def test_a_task_that_waits_for_anything_else_waits(sweep: SweepFolder, site: Site, reason: str) -> None:
    one_task(sweep, site)
    site.reasons[101, 0] = reason
    assert (look(sweep).ended, look(sweep).to_cancel) == (None, False)
    settle(sweep)
    assert "scancel" not in {argv[0] for argv in site.asked}


def test_a_reason_of_a_task_that_runs_again_is_an_old_one(sweep: SweepFolder, site: Site) -> None:
    one_task(sweep, site)
    site.reasons[101, 0] = "launch failed requeued held"
    site.set("RUNNING")
    assert look(sweep).ended is None


# --- what a launch leaves alone -----------------------------------------------------------------------------------------


def test_a_launch_takes_over_what_a_hold_makes_queued_jobs_skip(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(bits) for bits in (2, 3, 4)]
    plan = write(sweep, planned, shard_minutes=60)
    submit(sweep)
    ids = {p.trial.quantization.bit_width: p.trial.trial_id for p in planned}
    assert to_leave_alone(sweep, observe(sweep)) == set(ids.values())
    cancelled(["bit_width=2,3"], sweep).save(sweep)
    assert to_leave_alone(sweep, observe(sweep)) == {ids[4]}
    worker(sweep, job="101_0", plan=plan.name, shard_id=0, trial_id=ids[3])
    assert to_leave_alone(sweep, observe(sweep)) == {ids[3], ids[4]}, "a worker that is at it ends it"
    write(sweep, planned, in_flight=to_leave_alone(sweep, observe(sweep)))
    submit(sweep)
    flying = in_flight_trials(sweep, [task for task in observe(sweep).in_flight if task.plan != plan.name])
    assert flying == {ids[2]}
    assert to_leave_alone(sweep, observe(sweep)) == set(ids.values()), "the hold is not in force for the job of the later launch"


# --- one name, two jobs -------------------------------------------------------------------------------------------------


def test_without_a_receipt_the_job_that_works_is_the_one(sweep: SweepFolder, site: Site) -> None:
    """Slurm heard the same sbatch twice, and the launcher was killed before it wrote down either."""
    job = one_task(sweep, site)
    [submission] = read_submissions(sweep)
    [array] = submission.arrays
    dataclasses.replace(submission, arrays=(dataclasses.replace(array, array_job_id=None),)).save()
    site.jobs[999, 0] = (array.job_name, "PENDING", "")
    worker(sweep, job=job, job_name=array.job_name)
    settle(sweep)
    assert read_submissions(sweep)[0].arrays[0].array_job_id == array.array_job_id


def test_with_a_receipt_its_job_alone_is_looked_at(sweep: SweepFolder, site: Site) -> None:
    job = one_task(sweep, site)
    [array] = read_submissions(sweep)[0].arrays
    site.jobs[999, 0] = (array.job_name, "RUNNING", "n0")
    assert [task.job_id for task in observe(sweep).tasks] == [job]
