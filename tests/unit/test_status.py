"""The facts of `quantsweep status`, and `quantsweep cancel`: every trial is counted once, whatever happened to it."""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantsweep.cli import cancel, status
from quantsweep.cli.main import main
from quantsweep.cli.status import sweep_status
from quantsweep.errors import ConfigurationError, ResultsError
from quantsweep.failures import classes
from quantsweep.failures.holds import cancelled, holding, read_holds
from quantsweep.launching.advance import advance
from quantsweep.launching.settle import settle
from quantsweep.launching.submissions import read_submissions
from quantsweep.launching.tasks import to_leave_alone
from quantsweep.operations.messages import status_text
from quantsweep.planning.plan_files import plan_files, read_header, read_shard_trials
from quantsweep.storage.lock import launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import ClusterSpec
from tests.unit import engine_cases
from tests.unit.engine_cases import TASKS, Site, fail, finish, submit, trial, worker, write

STATES = ("done", "running", "queued", "waiting", "unknown", "held", "failed", "to_launch")


def facts(folder: SweepFolder) -> dict[str, Any]:
    found = sweep_status(folder)
    assert sum(found[state] for state in STATES) == found["trials"], found
    assert found["failed"] == sum(failure["count"] for failure in found["failures"])
    assert found["evaluations_done"] <= found["evaluations"]
    json.dumps(found)
    assert status_text(found)
    return found


def counts(folder: SweepFolder) -> dict[str, int]:
    found = facts(folder)
    return {name: found[name] for name in STATES if found[name]}


def test_a_sweep_that_was_never_launched_is_said_so(sweep: SweepFolder) -> None:
    with pytest.raises(ResultsError, match="nothing was launched"):
        sweep_status(sweep)


def test_each_state_in_turn(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(bits) for bits in (2, 3, 4)]
    site.max_job_count = 6  # room for two
    plan = write(sweep, planned)
    assert counts(sweep) == {"to_launch": 3}
    submit(sweep)
    assert counts(sweep) == {"queued": 2, "waiting": 1}
    site.set("RUNNING", only=(101, 0))
    assert counts(sweep) == {"running": 1, "queued": 1, "waiting": 1}
    finish(sweep, planned[0], plan=plan.name)
    assert counts(sweep) == {"done": 1, "queued": 1, "waiting": 1}
    finish(sweep, planned[1], TASKS[:1])
    del site.jobs[101, 1]
    assert counts(sweep) == {"done": 1, "unknown": 1, "waiting": 1}
    cancelled(["bit_width=4"], sweep).save(sweep)
    assert counts(sweep) == {"done": 1, "unknown": 1, "held": 1}
    worker(sweep, job="101_1", ended="finished")
    assert counts(sweep) == {"done": 1, "held": 1, "to_launch": 1}
    fail(sweep, planned[1], classes.BUG, plan=plan.name)
    assert counts(sweep) == {"done": 1, "held": 1, "failed": 1}
    assert facts(sweep)["evaluations_done"] == 3


def test_trials_of_a_running_job_are_not_all_said_to_be_run_at_this_moment(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(bits) for bits in (2, 3, 4)]
    write(sweep, planned, shard_minutes=60)
    submit(sweep)
    site.set("RUNNING")
    assert facts(sweep)["at_hand"] == 0, "it has not begun"
    worker(sweep, job="101_0", trial_id=planned[1].trial.trial_id)
    worker(sweep, job="90_0", trial_id=planned[0].trial.trial_id, ended="finished")
    worker(sweep, job="91_0", trial_id=planned[2].trial.trial_id, age=10_000)
    found = facts(sweep)
    assert (found["running"], found["at_hand"]) == (3, 1)
    assert "in running jobs 3" in status_text(found)
    assert "1   being run at this moment" in status_text(found)


def test_a_failed_trial_that_runs_again_is_running(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(2)])
    fail(sweep, trial(2), classes.TIME_LIMIT, plan=plan.name)
    assert counts(sweep) == {"failed": 1}
    submit(sweep)
    assert counts(sweep) == {"queued": 1}
    assert facts(sweep)["retried"] == {classes.TIME_LIMIT: 1}


def test_only_the_last_attempt_counts_and_failures_are_grouped(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(bits) for bits in (2, 3, 4)], cluster=ClusterSpec())
    for bits in (2, 3):
        fail(sweep, trial(bits), classes.CRASHED, plan=plan.name, fingerprint="old")
        fail(sweep, trial(bits), classes.BUG, plan=plan.name, fingerprint="new")
    fail(sweep, trial(4), classes.HUNG, plan=plan.name, fingerprint="hung")
    finish(sweep, trial(4))
    found = facts(sweep)
    assert [(failure["count"], failure["fingerprint"], failure["class"]) for failure in found["failures"]] == [(2, "new", classes.BUG)]
    assert "quantsweep logs" in status_text(found)


def test_tasks_that_were_added_make_a_trial_unfinished(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2, tasks=TASKS[:1])], cluster=ClusterSpec())
    finish(sweep, trial(2, tasks=TASKS[:1]))
    assert counts(sweep) == {"done": 1}
    write(sweep, [trial(2)], cluster=ClusterSpec())
    assert counts(sweep) == {"to_launch": 1}
    assert facts(sweep)["evaluations_done"] == 1


def test_where_slurm_is_silent_nothing_is_concluded(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2), trial(3)])
    submit(sweep)
    finish(sweep, trial(2))
    site.down = {"squeue"}
    found = facts(sweep)
    assert "no answer" in found["slurm"]
    assert found["done"] == 1
    assert "no answer" in status_text(found)


def test_hours_budget_nodes_and_who_is_at_work(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(2), trial(3)], gpu_hours=7.5)
    write(sweep, [trial(2)], root=plan.name, gpu_hours=7.5)
    worker(sweep, gpus=2, seconds=1800.0, ended="finished")
    worker(sweep, gpus=0, seconds=3600.0, ended="finished")
    for _ in range(2):
        fail(sweep, trial(2), classes.BAD_NODE, plan=plan.name, host="n9")
    with launch_lock(sweep.plan / "launch.lock"):
        found = facts(sweep)
    assert (found["gpu_hours"], found["worker_hours"], found["budget_gpu_hours"], found["excluded_nodes"]) == (1.0, 1.5, 7.5, ["n9"])
    assert "process" in found["launch"]


def test_a_cancel_that_names_nothing_that_is_left_leaves_no_hold(sweep: SweepFolder, site: Site) -> None:
    """It would catch what a later `rerun` brings back."""
    plan = write(sweep, [trial(2), trial(3)])
    finish(sweep, trial(3), plan=plan.name)
    arguments = {"sweep": sweep.name, "results_dir": str(sweep.path.parent), "drop": False, "json": False}
    assert cancel.run(argparse.Namespace(filters=["bit_width=3"], **arguments)) == 0
    assert list(read_holds(sweep)) == []
    assert cancel.run(argparse.Namespace(filters=["bit_width=2"], **arguments)) == 0
    assert len(list(read_holds(sweep))) == 1


def test_what_a_newer_launch_has_taken_over_is_not_held(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2), trial(3)], cluster=ClusterSpec())
    cancelled(["bit_width=2"], sweep).save(sweep)
    assert counts(sweep) == {"held": 1, "to_launch": 1}
    assert [hold["words"] for hold in facts(sweep)["holds"]] == ["bit_width=2"]
    write(sweep, [trial(2)], cluster=ClusterSpec())
    assert counts(sweep) == {"to_launch": 2}
    assert facts(sweep)["holds"] == [], "a hold that holds nothing is not spoken of"


def test_a_node_that_was_excluded_long_ago_is_not_any_more(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write(sweep, [trial(2)], cluster=ClusterSpec())
    for _ in range(2):
        fail(sweep, trial(2), classes.BAD_NODE, plan=plan.name, host="n9")
    assert facts(sweep)["excluded_nodes"] == ["n9"]
    monkeypatch.setattr("quantsweep.failures.nodes.STRIKE_HOURS", 0.0)
    assert facts(sweep)["excluded_nodes"] == []


def test_one_squeue_and_at_most_one_sacct(sweep: SweepFolder, site: Site) -> None:
    for bits in (2, 3, 4):
        write(sweep, [trial(bits)])
        submit(sweep)
    site.jobs.clear()
    site.asked.clear()
    facts(sweep)
    assert sorted(argv[0] for argv in site.asked) == ["sacct", "squeue"]


EVENTS = ("run", "end", "fail", "timeout", "cancel", "forget", "finish", "hold", "launch", "advance", "silence")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(events=st.lists(st.sampled_from(EVENTS), max_size=10), seed=st.integers(0, 99))
def test_whatever_happens_every_trial_is_counted_once_and_none_is_twice_in_flight(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, events: list[str], seed: int
) -> None:
    folder = SweepFolder(tmp_path_factory.mktemp("s") / "sweep")
    folder.create()
    site = engine_cases.install(monkeypatch, folder, max_job_count=14)  # room for six
    chance = random.Random(seed)
    planned = [trial(bits, model=model) for bits in (2, 3, 4, 5) for model in (0, 1)]
    write(folder, planned, breaker_trials=3)
    submit(folder)
    for event in events:
        _happens(event, folder, site, chance, planned)
        facts(folder)
        _check_flights(folder, site)


def _happens(event: str, folder: SweepFolder, site: Site, chance: random.Random, planned: list[Any]) -> None:
    live = [key for key, (name, state, _) in site.jobs.items() if state in ("PENDING", "RUNNING") and not name.endswith("collector")]
    job = chance.choice(live) if live else None
    one = chance.choice(planned)
    plan = plan_files(folder.plan)[-1].name
    if event in ("run", "end", "timeout", "cancel") and job is not None:
        site.set({"run": "RUNNING", "end": "COMPLETED", "timeout": "TIMEOUT", "cancel": "CANCELLED"}[event], only=job)
    elif event == "forget" and job is not None:
        del site.jobs[job]
    elif event == "finish":
        finish(folder, one, plan=plan)
    elif event == "fail":
        fail(folder, one, chance.choice(sorted(classes.CLASSES)), plan=plan)
    elif event == "hold":
        cancelled([f"bit_width={chance.randint(2, 5)}"], folder).save(folder)
    elif event == "launch":
        with launch_lock(folder.plan / "launch.lock"):
            write(folder, planned, in_flight=to_leave_alone(folder, settle(folder)))
        submit(folder)
    elif event == "advance":
        advance(folder)
    elif event == "silence":
        site.accounts = None


def _check_flights(folder: SweepFolder, site: Site) -> None:
    """Of the jobs that live no two will run the same trial: what a hold makes one of them skip it does not run."""
    flying: list[str] = []
    holds = read_holds(folder)
    for submission in read_submissions(folder):
        for array in submission.arrays:
            for index, shard_ids in enumerate(array.tasks):
                state = site.jobs.get((array.array_job_id or 0, index), ("", "GONE", ""))[1]
                if state in ("PENDING", "RUNNING"):
                    root = read_header(folder.plan / array.plan).root
                    trials = read_shard_trials(folder.plan / array.plan, shard_ids)
                    flying += [p.trial.trial_id for p in trials if holding(holds, p, root) is None]
    assert len(flying) == len(set(flying))


# --- cancel -------------------------------------------------------------------------------------------------------------


def run(command: Any, folder: SweepFolder, **values: Any) -> int:
    arguments = {"sweep": folder.name, "results_dir": str(folder.path.parent), "filters": [], "json": False, "drop": False, **values}
    return int(command.run(argparse.Namespace(**arguments)))


def test_cancel_takes_everything_out_and_nothing_comes_back_by_itself(
    sweep: SweepFolder, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.max_job_count = 6
    write(sweep, [trial(bits) for bits in (2, 3, 4)])
    submit(sweep)
    site.set("RUNNING", only=(101, 0))
    assert run(cancel, sweep) == 0
    assert "3 trials held (every trial), 2 jobs taken out of the queue" in capsys.readouterr().out
    step = advance(sweep)
    assert (step.retried, step.submitted.shards) == (0, 0)
    assert counts(sweep) == {"held": 3}
    assert run(status, sweep, json=True) == 0
    assert json.loads(capsys.readouterr().out)["holds"][0]["by"] == "cancel"


def test_cancel_by_filter_leaves_jobs_with_other_trials_alone(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2), trial(3)], shard_minutes=60)
    write(sweep, [trial(4), trial(5)])
    submit(sweep)
    site.set("RUNNING")
    run(cancel, sweep, filters=["bit_width=2,4"])
    assert [argv[1:] for argv in site.asked if argv[0] == "scancel"] == [["102_0"]]
    finish(sweep, trial(3))
    run(cancel, sweep, filters=["bit_width=2"])
    assert [argv[1:] for argv in site.asked if argv[0] == "scancel"] == [["102_0"], ["101_0"]], "only what is left counts"


def test_filters_of_cancel_may_follow_options(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2), trial(3)])
    assert main(["cancel", sweep.name, "task=t", "--results-dir", str(sweep.path.parent), "bit_width=2"]) == 0
    assert [hold.filters for hold in read_holds(sweep)] == [("task=t", "bit_width=2")]


def test_what_was_cancelled_before_it_ran_is_known_also_when_slurm_has_forgotten_it(sweep: SweepFolder, site: Site) -> None:
    write(sweep, [trial(2), trial(3)])
    submit(sweep)
    site.set("RUNNING", only=(101, 0))
    run(cancel, sweep)
    assert read_submissions(sweep)[0].arrays[0].ended == {1: "CANCELLED"}, "what ran has its trial settled by who looks next"
    site.accounts = None
    site.forget()
    assert counts(sweep) == {"unknown": 1, "held": 1}


def test_cancel_does_not_need_the_lock(sweep: SweepFolder, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A launch with wait=true holds it all the time; a second process would ask in vain."""
    write(sweep, [trial(2), trial(3)])
    submit(sweep)
    with launch_lock(sweep.plan / "launch.lock", purpose="run"):
        assert run(cancel, sweep) == 0
    assert "2 trials held (every trial), 2 jobs taken out of the queue" in capsys.readouterr().out
    assert advance(sweep).retried == 0
    assert counts(sweep) == {"held": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bit_widht=2", "unknown filter column 'bit_widht'"),
        ("bit_width=2,99", "unknown bit_width '99'"),
        ("plant_scale=null,16", "unknown plant_scale '16'. Available: null"),
    ],
)
def test_a_filter_that_names_what_is_not_there_holds_nothing(sweep: SweepFolder, site: Site, text: str, message: str) -> None:
    write(sweep, [trial(2)])
    with pytest.raises(ConfigurationError, match=message):
        run(cancel, sweep, filters=[text])
    assert not read_holds(sweep)
    assert counts(sweep) == {"to_launch": 1}


def test_what_is_dropped_is_not_counted_any_more_until_a_launch_asks_for_it_again(
    sweep: SweepFolder, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial that fails for good, and a combination that nobody wants: neither stands in the way of the end for ever."""
    planned = [trial(bits) for bits in (2, 3, 4)]
    plan = write(sweep, planned, cluster=ClusterSpec())
    finish(sweep, planned[0], plan=plan.name)
    fail(sweep, planned[1], classes.BUG, plan=plan.name)
    cancelled(["bit_width=3,4"], sweep).save(sweep)
    assert counts(sweep) == {"done": 1, "failed": 1, "held": 1}
    assert main(["cancel", sweep.name, "bit_width=3,4", "--drop", "--results-dir", str(sweep.path.parent)]) == 0
    assert "2 trials dropped" in capsys.readouterr().out
    found = facts(sweep)
    assert (found["trials"], found["done"], found["dropped"], found["evaluations"]) == (1, 1, 2, 2)
    assert "dropped             2" in status_text(found)
    assert "resume" not in status_text(found), "nothing is left to run"
    write(sweep, [planned[2]], cluster=ClusterSpec())
    assert counts(sweep) == {"done": 1, "to_launch": 1}, "who asks again wants it again"
