"""Time left and the live bar: a recorded quickstart is played again, and what would have been said is held against what came."""

from __future__ import annotations

import dataclasses
import heapq
import io
import re
import time

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from quantsweep.cli.status import sweep_status
from quantsweep.crew.display import Tally, display
from quantsweep.evaluation.share import Share
from quantsweep.operations.messages import status_text
from quantsweep.operations.time_left import Ended, Running, expected_seconds, seconds_left
from quantsweep.planning.plan_files import read_minutes
from quantsweep.planning.shards import cut, predicted_minutes
from quantsweep.running.worker import Worker
from quantsweep.storage.lock import RUN, launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import WorkerRecord
from quantsweep.trial.specs import ClusterSpec, PlannedTrial
from tests.unit.engine_cases import TASKS, Site, finish, trial, worker, write
from tests.unit.test_worker_stop import LOADED, QUANTIZED, WELL, Script

REST_SECONDS = 0.05
LOAD_SECONDS = 1.0
START_SECONDS = 12.0
THREE = tuple(dataclasses.replace(TASKS[0], name=name, lm_eval_task=name, limit=30) for name in ("a", "b", "c"))


@pytest.fixture
def recorded(reference: pd.DataFrame) -> dict[PlannedTrial, float]:
    """The trials of the committed quickstart, as they were planned, and the seconds that each took on one of two cores."""
    rows = reference.drop_duplicates(["trial_id", "task_key"]).groupby("trial_id")
    taken: dict[PlannedTrial, float] = {}
    for number, (_, row) in enumerate(rows.agg(n=("num_parameters", "first"), seconds=("evaluate_seconds", "sum")).iterrows()):
        planned = trial(4, model=int(row.n), tasks=THREE, block=number + 2)
        model = dataclasses.replace(planned.trial.model, parameters=int(row.n))
        taken[dataclasses.replace(planned, trial=dataclasses.replace(planned.trial, model=model))] = row.seconds + REST_SECONDS
    assert len(taken) == 175
    return taken


@pytest.mark.parametrize("slower", [1.0, 4.0], ids=["this machine", "one four times as slow"])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_time_left_is_right_within_thirty_percent_from_a_tenth_of_the_work_on(
    recorded: dict[PlannedTrial, float], workers: int, slower: float, seed: int
) -> None:
    """Half of the trials are 17 % of the work: counting them would be wrong by factors."""
    noise = np.random.default_rng(seed).lognormal(0, 0.1, len(recorded))
    taken = {p: seconds * slower * n for (p, seconds), n in zip(recorded.items(), noise, strict=True)}
    shards = cut(recorded, max_minutes=30, workers=workers)
    tally = Tally({p.trial.trial_id: (s.shard_id, predicted_minutes(p)) for s in shards for p in s.trials}, workers)
    total, now, spent = sum(taken.values()), 0.0, 0.0
    free = [(START_SECONDS, index) for index in range(workers)]
    events: list[tuple[float, PlannedTrial]] = []
    for shard in shards:
        at, index = heapq.heappop(free)
        at += LOAD_SECONDS
        for planned in shard.trials:
            at += taken[planned]
            events.append((at, planned))
        heapq.heappush(free, (at, index))
    end = max(at for at, _ in events)
    errors: dict[float, float] = {}
    for now, planned in sorted(events, key=lambda event: event[0]):
        tally.end(planned.trial.trial_id, failed=False, seconds=taken[planned])
        spent += taken[planned]
        for share in (0.1, 0.25, 0.5):
            if spent >= share * total and share not in errors:
                left = tally.look([], 0.0)[1]
                assert left is not None
                errors[share] = left / (end - now) - 1
    assert max(map(abs, errors.values())) < 0.3, errors


def test_nothing_is_said_while_nothing_is_known() -> None:
    assert seconds_left([1.0] * 10, [], [Ended(1.0, 2.0)] * 2, 2) is None
    assert seconds_left([1.0] * 10, [], [Ended(1.0, 2.0)] * 3, 2) == pytest.approx(10.0)


def test_a_long_first_trial_tells_by_its_own_pace() -> None:
    assert seconds_left([60.0], [Running(60.0, 1800.0, share=0.5)], [], 1) == pytest.approx(1800 + 3600)
    assert seconds_left([60.0], [Running(60.0, 1800.0, share=0.05)], [], 1) is None


def test_what_is_longer_than_all_that_ended_follows_the_slope_of_those() -> None:
    ended = [Ended(length, 1.0 + length) for length in (1.0, 2.0) for _ in range(12)]
    assert expected_seconds([10.0], ended).tolist() == pytest.approx([11.0])
    assert expected_seconds([10.0], ended[:12]).tolist() == pytest.approx([20.0]), "no slope is known"
    flat = [Ended(length, 3.0) for length in (1.0, 2.0) for _ in range(12)]
    assert expected_seconds([10.0], flat).tolist() == pytest.approx([7.5]), "half of the proportion at least"


def test_a_machine_that_gets_slower_is_noticed_and_the_longest_trial_is_waited_for() -> None:
    ended = [Ended(1.0, 1.0)] * 50 + [Ended(1.0, 3.0)] * 12
    assert expected_seconds([1.0], ended).tolist() == pytest.approx([3.0])
    assert seconds_left([100.0], [], [Ended(100.0, 100.0)] * 3, 8) == pytest.approx(100.0), "one trial cannot be shared"


def shown(width: int, *, label: str, total: int) -> str:
    """The last line of the bar on a terminal of this width."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, height=10, color_system=None)
    minutes = {str(n): (0, 1.0) for n in range(total)}
    tally = Tally(minutes, 2)
    with display(tally, console) as made:
        for n in range(5):
            tally.end(str(n), failed=n == 0, seconds=60.0)
        made._next = 0.0
        made.tick([WorkerRecord(worker="w", host="h", pid=1, plan="p", trial_id="9", label=label, trial_started=time.time())])
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue()).replace("\r", "\n").rstrip().splitlines()[-1]


@pytest.mark.parametrize("width", [66, 80, 120])
def test_the_bar_fits_the_terminal_and_only_the_name_is_cut(width: int) -> None:
    line = shown(width, label="mini-neox-6.0m [red]outlier_dependent fraction=0.05 quantile 4-bit block 64 " * 2, total=35_000)
    assert len(line) <= width
    for number in ("5/35,000", "1 failed", "0:00", "about 12 days left"):
        assert number in line
    assert "mini-ne" in line or width < 80


def test_without_a_terminal_it_is_a_line_of_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally({str(n): (0, 1.0) for n in range(10)}, 1)
    with display(tally, Console(file=io.StringIO(), force_terminal=False)) as made:
        for n in range(4):
            tally.end(str(n), failed=False, seconds=30.0)
        made._next = 0.0
        made.tick([])
    assert capsys.readouterr().err == "4/10   0 failed   0:00   about 3 min left   40% of the work\n"


def test_trials_that_a_shard_leaves_out_are_not_waited_for() -> None:
    tally = Tally({"a": (0, 1.0), "b": (0, 1.0), "c": (1, 2.0)}, 1)
    tally.end("a", failed=False, seconds=None)
    assert tally.look([], 0.0)[0] == pytest.approx(0.25)
    tally.end_shard(0)
    assert tally.look([], 0.0)[0] == pytest.approx(0.5)


def test_the_share_of_a_trial_at_hand_counts() -> None:
    tally = Tally({"a": (0, 3.0), "b": (0, 1.0)}, 1)
    record = WorkerRecord(worker="w", host="h", pid=1, plan="p", trial_id="a", trial_started=100.0, share=0.5)
    assert tally.look([record], 160.0) == (pytest.approx(0.375), pytest.approx(60 + 40))


def test_the_share_of_a_trial_weighs_its_tasks_by_what_they_took_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("quantsweep.evaluation.share.time.monotonic", lambda: clock[0])
    share = Share()
    said = []
    for _ in range(2):
        share.begin(["short", "long"])
        said.append(share.read(0.5))
        for task, seconds in (("short", 1.0), ("long", 9.0)):
            share.begin_task(task)
            said.append(round(share.read(0.5), 3))
            clock[0] += seconds
        share.end_task()
        said.append(share.read(0.5))
    assert said == [0, 0.25, 0.75, 1, 0, 0.05, 0.55, 1]


def test_what_the_child_says_of_a_trial_reaches_its_workers_record(sweep: SweepFolder) -> None:
    plan = write(sweep, [trial(2)], cluster=ClusterSpec())
    seen: list[float] = []
    made = Worker(plan)
    Script(made, {2: (LOADED, QUANTIZED, {"event": "progress", "share": 0.4}, lambda stop: seen.append(made.beat.record.share), *WELL[2:])})
    made.run(0)
    made.close()
    assert seen == [0.4]


def test_status_says_it_of_a_sweep_on_this_machine_too(sweep: SweepFolder, site: Site) -> None:
    planned = [trial(bits) for bits in (2, 3, 4, 5, 6)]
    plan = write(sweep, planned, cluster=ClusterSpec())
    assert set(read_minutes(plan)) == {p.trial.trial_id for p in planned}
    for one in planned[:3]:
        finish(sweep, one, plan=plan.name)
    worker(sweep, trial_id=planned[3].trial.trial_id, trial_started=time.time())
    assert sweep_status(sweep)["minutes_left"] is None, "nobody is at work on it"
    with launch_lock(sweep.plan / "launch.lock", purpose=RUN):
        facts = sweep_status(sweep)
        assert facts["minutes_left"] is not None
        assert (facts["waiting"], facts["to_launch"], facts["at_hand"]) == (2, 0, 1), "nobody has to launch what is being run"
        assert "if 1 worker goes on" in status_text(facts)
