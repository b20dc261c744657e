"""Tracking is a courtesy: whatever breaks in it, the trial and the shard go on; each evaluation stands in one table."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantsweep.planning.plan_files import read_header
from quantsweep.running import tracking
from quantsweep.running.tracking import NoTracker, WandbTracker, make_tracker, what_lacks
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import RunSettings, options_tuple
from tests.unit import engine_cases
from tests.unit.engine_cases import TASKS, finish, trial, write
from tests.unit.test_records import row

PATCHING = threading.Lock()
CONFIG = {"kind": "wandb", "project": "p", "entity": None, "mode": "offline"}


class Service:
    """Stands for wandb: keeps the tables of runs that finished; breaks where it is told, or does not answer."""

    def __init__(self, *, breaks: str = "", hangs: float = 0.0) -> None:
        self.breaks, self.hangs = breaks, hangs
        self.inits = 0
        self.tables: list[list[list[Any]]] = []
        self.Settings = self.Table = SimpleNamespace

    def init(self, **options: Any) -> Run:
        with PATCHING:
            self.inits += 1
            number = self.inits
        time.sleep(self.hangs)
        if self.breaks == "init":
            raise SystemExit("the library gives up")
        return Run(self, f"run{number}")

    def evaluations(self) -> Counter[tuple[str, str]]:
        """How often each (trial, task) stands in a table."""
        task = tracking.TABLE_COLUMNS.index("task")
        return Counter((line[0], line[task]) for table in self.tables for line in table)


class Run:
    """One run: several may be open at once."""

    def __init__(self, service: Service, name: str) -> None:
        self.service, self.id = service, name
        self.pending: Any = None

    def log(self, data: dict[str, Any]) -> None:
        if self.service.breaks == "log":
            raise ConnectionError("no network")
        self.pending = data.get("evaluations")

    def finish(self) -> None:
        if self.service.breaks == "finish":
            raise ConnectionError("no network")
        if self.pending is not None:
            self.service.tables.append(self.pending.data)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service()
    monkeypatch.setitem(__import__("sys").modules, "wandb", made)
    return made


@pytest.fixture
def plan(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tracked plan of four shards, one trial each."""
    monkeypatch.setattr(engine_cases, "RunSettings", lambda **options: RunSettings(tracking=options_tuple(CONFIG), **options))
    return write(sweep, [trial(bits) for bits in (2, 3, 4, 5)])


def run(sweep: SweepFolder, plan: Path, shards: dict[int, int]) -> WandbTracker:
    """Track shards, each with the trial of so many bits that it has."""
    tracker = make_tracker(sweep, read_header(plan))
    assert isinstance(tracker, WandbTracker)
    for shard_id, bits in shards.items():
        tracker.begin(shard_id)
        evaluate(sweep, plan, shard_id, bits)
        tracker.log_evaluation(row("metrics"))
        tracker.end()
    tracker.close()
    return tracker


def evaluate(sweep: SweepFolder, plan: Path, shard_id: int, bits: int, attempt: str = "") -> None:
    genuine = engine_cases.row
    values = {"shard_id": shard_id, "attempt": attempt or f"a{bits}"}
    with PATCHING, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_cases, "row", lambda table, **given: genuine(table, **{**given, **values}))
        finish(sweep, trial(bits), plan=plan.name)


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_a_failure_at_any_point_is_swallowed(sweep: SweepFolder, plan: Path, service: Service, breaks: str) -> None:
    service.breaks = breaks
    run(sweep, plan, {0: 2, 1: 3})
    assert service.tables == []
    service.breaks = ""
    run(sweep, write(sweep, [trial(7)]), {0: 7})
    assert service.evaluations() == Counter({(trial(bits).trial.trial_id, task.name): 1 for bits in (2, 3, 7) for task in TASKS})


def test_a_service_that_does_not_answer_keeps_nobody_waiting_and_is_tried_once_a_launch(
    sweep: SweepFolder, plan: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CONNECT_SECONDS", 0.2)
    service.breaks, service.hangs = "init", 1.0
    began = time.monotonic()
    run(sweep, plan, {0: 2, 1: 3})
    assert time.monotonic() - began < 0.9
    time.sleep(1.2)
    run(sweep, plan, {2: 4})
    run(sweep, plan, {3: 5})
    assert service.inits == 1
    run(sweep, write(sweep, [trial(7)]), {0: 7})
    assert service.inits == 2, "the next launch tries again"


def test_each_evaluation_stands_in_one_table_after_a_kill_and_a_resume(sweep: SweepFolder, plan: Path, service: Service) -> None:
    run(sweep, plan, {0: 2})
    evaluate(sweep, plan, 1, 3)  # its worker is killed in the middle of its shard, and has no table
    engine_cases.worker(sweep, host=platform.node(), pid=2**22 - 1, plan=plan.name, shard_id=1)
    run(sweep, write(sweep, [trial(4), trial(5)]), {0: 4, 1: 5})
    assert service.evaluations() == Counter({(trial(bits).trial.trial_id, task.name): 1 for bits in (2, 3, 4, 5) for task in TASKS})


def test_rows_of_a_worker_that_lives_are_left_to_its_own_table(sweep: SweepFolder, plan: Path, service: Service) -> None:
    evaluate(sweep, plan, 1, 3)
    engine_cases.worker(sweep, host="elsewhere", plan=plan.name, shard_id=1)
    run(sweep, plan, {0: 2})
    assert {trial_id for trial_id, _ in service.evaluations()} == {trial(2).trial.trial_id}
    tracker = make_tracker(sweep, read_header(plan))
    tracker.begin(1)
    tracker.end()
    tracker.close()
    assert set(service.evaluations().values()) == {1}
    assert len(service.evaluations()) == 4


def test_two_that_end_at_once_take_up_what_is_left_once(sweep: SweepFolder, plan: Path, service: Service) -> None:
    evaluate(sweep, plan, 3, 5)
    threads = [threading.Thread(target=run, args=(sweep, plan, {shard: bits})) for shard, bits in ((0, 2), (1, 3), (2, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.evaluations()[trial(5).trial.trial_id, "t"] == 1


def test_rows_of_launches_that_were_not_tracked_are_not_taken_up(
    sweep: SweepFolder, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(sweep, write(sweep, [trial(2)]), 0, 2)
    monkeypatch.setattr(engine_cases, "RunSettings", lambda **options: RunSettings(tracking=options_tuple(CONFIG), **options))
    run(sweep, write(sweep, [trial(3)]), {0: 3})
    assert {trial_id for trial_id, _ in service.evaluations()} == {trial(3).trial.trial_id}


def test_which_rows_a_table_had_is_kept(sweep: SweepFolder, plan: Path, service: Service) -> None:
    run(sweep, plan, {0: 2})
    [kept] = (sweep.logs / "tracked").glob("*.json")
    assert json.loads(kept.read_text()) == sorted(["a2", task.task_key] for task in TASKS)


def test_none_is_the_default(sweep: SweepFolder) -> None:
    assert isinstance(make_tracker(sweep, read_header(write(sweep, [trial(2)]))), NoTracker)
    assert options_tuple(CONFIG)[0] == ("entity", None)


def test_without_a_key_it_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "wandb login" in str(what_lacks("online"))
    assert what_lacks("offline") is None
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert what_lacks("online") is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert "wandb login" in str(what_lacks("online"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert what_lacks("online") is None
