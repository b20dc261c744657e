"""What became of tasks that ended: once, with the right cause, whatever interrupted the one who wrote it down."""

from __future__ import annotations

import dataclasses
import platform

import pytest

from quantsweep.errors import ResultsError
from quantsweep.failures import classes
from quantsweep.launching.settle import settle, slurm_log
from quantsweep.launching.submissions import read_submissions
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import read_records
from quantsweep.tables import records
from tests.unit.engine_cases import TASKS, Site, age_submissions, fail, failed_rows, finish, submit, trial, worker, write
from tests.unit.test_records import row

PLANNED = trial(4)
TRIAL = PLANNED.trial.trial_id


@pytest.fixture
def job(sweep: SweepFolder, site: Site) -> str:
    """One running task, its worker at its one trial; the job id."""
    plan = write(sweep, [PLANNED])
    submit(sweep)
    site.set("RUNNING")
    name = f"{site.next_id - 1}_0"
    worker(sweep, worker="w", job=name, plan=plan.name, shard_id=0, trial_id=TRIAL, trial_started=1.7e9, node="n3", log_start=7)
    return name


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", classes.TIME_LIMIT),
        ("DEADLINE", classes.TIME_LIMIT),
        ("OUT_OF_MEMORY", classes.OUT_OF_HOST_MEMORY),
        ("NODE_FAIL", classes.NODE_FAILURE),
        ("BOOT_FAIL", classes.NODE_FAILURE),
        ("PREEMPTED", classes.PREEMPTED),
        ("FAILED", classes.KILLED),
        ("COMPLETED", classes.LOST),
    ],
)
def test_the_trial_at_hand_gets_the_cause_that_slurm_knows(sweep: SweepFolder, site: Site, job: str, state: str, cause: str) -> None:
    site.set(state)
    settle(sweep)
    [one] = failed_rows(sweep)
    assert (one["trial_id"], one["failure_class"], one["slurm_job"], one["host"], one["log_start"]) == (TRIAL, cause, job, "n3", 7)
    assert one["plan"].startswith("plan-00001")
    assert PLANNED.trial.label in one["failure_message"]
    [heard] = read_records(sweep)
    assert heard.record.ended == f"lost: {state}"
    assert all(submission.closed for submission in read_submissions(sweep))


def test_what_somebody_cancelled_has_not_failed(sweep: SweepFolder, site: Site, job: str) -> None:
    site.set("CANCELLED")
    settle(sweep)
    assert failed_rows(sweep) == []
    [heard] = read_records(sweep)
    assert heard.record.ended is not None


def test_a_worker_between_two_trials_lost_none(sweep: SweepFolder, site: Site, job: str) -> None:
    worker(sweep, worker="w", job=job, plan="plan", shard_id=0)
    site.set("NODE_FAIL")
    settle(sweep)
    assert failed_rows(sweep) == []


def test_a_worker_that_had_ended_lost_nothing(sweep: SweepFolder, site: Site, job: str) -> None:
    worker(sweep, worker="w", job=job, plan="plan", shard_id=0, trial_id=TRIAL, ended="finished")
    site.set("FAILED")
    settle(sweep)
    assert failed_rows(sweep) == []


def test_a_trial_whose_tasks_all_have_rows_is_no_loss(sweep: SweepFolder, site: Site, job: str) -> None:
    finish(sweep, PLANNED)
    site.set("TIMEOUT")
    settle(sweep)
    assert failed_rows(sweep) == []


def test_a_trial_with_one_task_left_is_lost(sweep: SweepFolder, site: Site, job: str) -> None:
    finish(sweep, PLANNED, TASKS[:1])
    site.set("TIMEOUT")
    settle(sweep)
    assert len(failed_rows(sweep)) == 1


def test_settled_twice_is_settled_once(sweep: SweepFolder, site: Site, job: str) -> None:
    """A collector that dies between its rows and its receipts, and compaction or other losses in between."""
    record = read_records(sweep)[0].record
    before = [(one.path, one.path.read_text()) for one in read_submissions(sweep)]
    site.set("TIMEOUT")
    settle(sweep)
    [first] = failed_rows(sweep)
    for path, text in before:
        path.write_text(text)
    worker(sweep, **dataclasses.asdict(record))
    for path in sweep.table("trials").glob("settled-*"):
        path.rename(path.with_name("compacted-1.final.parquet"))
    settle(sweep)
    assert failed_rows(sweep) == [first]


def test_a_trial_that_had_failed_already_fails_once(sweep: SweepFolder, site: Site, job: str) -> None:
    """Its worker wrote its row, and was lost before it began another trial: its record still names this one."""
    record = read_records(sweep)[0].record
    worker(sweep, **{**dataclasses.asdict(record), "log": "/logs/w.log", "log_start": 7})
    made = row("trials", trial_id=TRIAL, status="failed", failure_class="bug", attempt="its own", log="w.log", log_start=7)
    records.Writer(sweep, "w").add("trials", [made])
    site.set("TIMEOUT")
    settle(sweep)
    assert [one["failure_class"] for one in failed_rows(sweep)] == ["bug"]


def test_two_losses_of_one_trial_are_two(sweep: SweepFolder, site: Site, job: str) -> None:
    record = dataclasses.asdict(read_records(sweep)[0].record)
    worker(sweep, **{**record, "worker": "w2", "log": "/logs/w2.log"})
    site.set("TIMEOUT")
    settle(sweep)
    assert len({row["attempt"] for row in failed_rows(sweep)}) == 2


def test_a_job_that_failed_before_its_worker_began(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(bits) for bits in (2, 3, 4)]
    write(sweep, planned, shard_minutes=60)
    submit(sweep)
    finish(sweep, planned[0])
    name = next(iter(site.jobs.values()))[0]
    log = slurm_log(sweep, name, f"{site.next_id - 1}_0")
    log.parent.mkdir(parents=True)
    log.write_text("module: command not found\nModuleNotFoundError: No module named 'torch'\n")
    site.set("FAILED")
    settle(sweep)
    rows = failed_rows(sweep)
    assert {one["trial_id"] for one in rows} == {p.trial.trial_id for p in planned[1:]}, "what is done is not accused"
    for one in rows:
        assert one["failure_class"] == classes.NOT_STARTED
        assert "No module named 'torch'" in one["failure_message"]
        assert "module: command not found" in one["failure_traceback"]
    settle(sweep)
    assert len(failed_rows(sweep)) == 2


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", classes.NOT_STARTED),
        ("COMPLETED", classes.NOT_STARTED),
        ("DEADLINE", classes.NOT_STARTED),
        ("NODE_FAIL", classes.NODE_FAILURE),
        ("BOOT_FAIL", classes.NODE_FAILURE),
        ("OUT_OF_MEMORY", classes.OUT_OF_HOST_MEMORY),
        ("PREEMPTED", classes.PREEMPTED),
        ("CANCELLED", None),
    ],
)
def test_every_end_without_a_worker_counts_unless_it_was_wanted(sweep: SweepFolder, site: Site, state: str, cause: str | None) -> None:
    write(sweep, [PLANNED])
    submit(sweep)
    site.set(state)
    settle(sweep)
    assert [row["failure_class"] for row in failed_rows(sweep)] == ([cause] if cause else [])
    assert all(state in row["failure_message"] for row in failed_rows(sweep))
    assert read_submissions(sweep)[0].closed


@pytest.mark.parametrize("ended", [None, "ended by Slurm", "error: ResultsError: no such file"])
def test_a_worker_that_never_came_to_a_trial_is_as_none(sweep: SweepFolder, site: Site, ended: str | None) -> None:
    plan = write(sweep, [trial(3), trial(4)], shard_minutes=60)
    submit(sweep)
    worker(sweep, job=f"{site.next_id - 1}_0", plan=plan.name, shard_ids=(0,), ended=ended)
    site.set("FAILED")
    settle(sweep)
    assert [row["failure_class"] for row in failed_rows(sweep)] == [classes.NOT_STARTED] * 2
    assert all(ended is None or ended in row["failure_message"] for row in failed_rows(sweep))


def test_a_trial_whose_worker_wrote_why_it_failed_is_not_accused_again(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(3), trial(4)], shard_minutes=60)
    submit(sweep)
    fail(sweep, trial(3), classes.BUG, plan=plan.name)
    site.set("FAILED")
    settle(sweep)
    assert sorted(row["failure_class"] for row in failed_rows(sweep)) == [classes.BUG, classes.NOT_STARTED]


def test_what_runs_keeps_its_submission_open_and_what_is_closed_is_never_asked_about(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(3), trial(4)])
    submit(sweep)
    [first, second] = list(site.jobs)[:2]
    site.set("COMPLETED", only=first)
    seen = settle(sweep)
    assert [task.index for task in seen.in_flight] == [1]
    [submission] = read_submissions(sweep)
    assert (submission.closed, submission.arrays[0].ended) == (False, {0: "COMPLETED"})
    site.set("COMPLETED", only=second)
    settle(sweep)
    site.asked.clear()
    assert settle(sweep).tasks == ()
    assert site.asked == []


def test_a_lost_receipt_is_written_late(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [PLANNED])
    submit(sweep)
    [submission] = read_submissions(sweep)
    number = submission.arrays[0].array_job_id
    dataclasses.replace(submission, arrays=(dataclasses.replace(submission.arrays[0], array_job_id=None),)).save()
    assert len(settle(sweep).in_flight) == 1
    assert read_submissions(sweep)[0].arrays[0].array_job_id == number


@pytest.mark.parametrize("state", ["PENDING", "COMPLETED"])
def test_a_receipt_is_found_whatever_the_job_does_by_now(sweep: SweepFolder, site: Site, state: str) -> None:
    write(sweep, [PLANNED])
    submit(sweep)
    [submission] = read_submissions(sweep)
    dataclasses.replace(submission, arrays=(dataclasses.replace(submission.arrays[0], array_job_id=None),)).save()
    site.set(state)
    settle(sweep)
    assert not read_submissions(sweep)[0].arrays[0].abandoned


def test_a_receipt_is_found_in_the_records_of_workers_that_the_queue_has_forgotten(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [PLANNED])
    submit(sweep)
    [submission] = read_submissions(sweep)
    [array] = submission.arrays
    dataclasses.replace(submission, arrays=(dataclasses.replace(array, array_job_id=None),)).save()
    site.forget(account="OUT_OF_MEMORY")
    job = f"{array.array_job_id}_0"
    worker(sweep, job=job, job_name=array.job_name, plan=plan.name, shard_id=0, trial_id=TRIAL)
    settle(sweep)
    assert [row["failure_class"] for row in failed_rows(sweep)] == [classes.OUT_OF_HOST_MEMORY]
    assert read_submissions(sweep)[0].arrays[0].ended == {0: "OUT_OF_MEMORY"}


def test_an_intent_that_came_to_nothing_is_abandoned_and_said_so_at_once(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [PLANNED])
    submit(sweep)
    [submission] = read_submissions(sweep)
    dataclasses.replace(submission, arrays=(dataclasses.replace(submission.arrays[0], array_job_id=None),)).save()
    site.forget()
    seen = settle(sweep)
    assert seen.tasks == ()
    assert [array.abandoned for array in seen.submissions[0].arrays] == [True], "who goes on from here must know"
    assert read_submissions(sweep)[0].closed


def test_a_full_disk_is_the_workers_own_word(sweep: SweepFolder, site: Site, job: str) -> None:
    record = dataclasses.asdict(read_records(sweep)[0].record)
    worker(sweep, **{**record, "ended": "DISK_FULL", "trial_id": None})
    site.set("FAILED")
    assert [task.ended for task in settle(sweep).ended] == ["DISK_FULL"]
    assert read_submissions(sweep)[0].arrays[0].ended == {0: "DISK_FULL"}
    assert failed_rows(sweep) == []


def test_unknown_for_long_is_written_down_with_its_cause(sweep: SweepFolder, site: Site, job: str) -> None:
    site.accounts = None
    site.forget()
    record = dataclasses.asdict(read_records(sweep)[0].record)
    worker(sweep, **record, age=10)
    age_submissions(sweep, 5_000)
    settle(sweep)
    assert failed_rows(sweep) == []
    settle(sweep, assume_dead=True)
    [one] = failed_rows(sweep)
    assert "knows nothing of it" in one["failure_message"]


def test_killed_workers_of_this_machine_are_nobodys_fault(sweep: SweepFolder, site: Site) -> None:

    plan = write(sweep, [PLANNED])
    worker(sweep, host=platform.node(), pid=2**22 - 1, plan=plan.name, shard_id=0, trial_id=TRIAL)
    worker(sweep, host="elsewhere", plan=plan.name, shard_id=0, trial_id=TRIAL)
    settle(sweep)
    assert sorted(str(heard.record.ended) for heard in read_records(sweep)) == ["None", "lost"]
    assert records.read_table(sweep.path, "trials").num_rows == 0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "5", '{"arrays": 3}', '{"user": "u", "declared": "soon", "arrays": [], "collector": null, "closed": false}',
     '{"user": "u", "declared": 1.0, "arrays": [{"tasks": [[0]], "resources": {}, "gpu_seconds": [], "ended": []}], "closed": false}',
     '{"user": "u", "declared": 1.0, "arrays": ["x"], "collector": null, "closed": false}', "\\xff"],
)  # fmt: skip
def test_a_damaged_submission_is_one_message_with_the_remedy(sweep: SweepFolder, site: Site, text: str) -> None:
    write(sweep, [PLANNED])
    submit(sweep)
    [submission] = read_submissions(sweep)
    submission.path.write_bytes(text.encode("latin-1") if text else b"\xff\xfe")
    with pytest.raises(ResultsError, match=r"cannot be read .*move the file away"):
        settle(sweep)


def complete(sweep: SweepFolder, plan: str) -> None:
    """Every evaluation of the trial has its row, and the trial itself has none."""
    for task in TASKS:
        finish(sweep, PLANNED, [task], plan=plan)
    assert records.read_table(sweep.path, "trials").num_rows == 0


@pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "CANCELLED", "COMPLETED"])
def test_a_trial_whose_worker_was_lost_before_it_wrote_the_trials_row_gets_it(sweep: SweepFolder, site: Site, job: str, state: str) -> None:
    complete(sweep, read_records(sweep)[0].record.plan)
    site.set(state)
    settle(sweep)
    [one] = records.read_table(sweep.path, "trials").to_pylist()
    assert (one["trial_id"], one["status"], one["failure_class"], one["log_start"]) == (TRIAL, "done", None, 7)
    assert one["attempt"] in {r["attempt"] for r in records.read_table(sweep.path, "metrics").to_pylist()}
    assert one["total_model_bits"] is not None
    settle(sweep)
    assert records.read_table(sweep.path, "trials").num_rows == 1


def test_also_one_of_a_worker_of_this_machine_that_was_killed(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [PLANNED])
    complete(sweep, plan.name)
    worker(sweep, host=platform.node(), pid=2**22 - 1, plan=plan.name, shard_id=0, trial_id=TRIAL)
    settle(sweep)
    settle(sweep)
    [one] = records.read_table(sweep.path, "trials").to_pylist()
    assert (one["trial_id"], one["status"]) == (TRIAL, "done")
