"""The ledger records what ran, its faults strike whom they should, and a process dies where it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import quantsweep
from quantsweep.exit_status import ExitStatus
from quantsweep.failures import classes
from quantsweep.tables import records
from tests.conftest import ROOT, Launch
from tests.slurm import ledger
from tests.slurm.cluster import Cluster
from tests.slurm.ledger import Fault, FaultPlan, KillPoint

SWEEP = ("-m", "model=mini-neox-0.3m", "bit_width=3,4,8", "task=mini_ppl", "limit=2", "sweep=recorded")


def python(code: str, variables: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as somebody who knows nothing of the ledger, with the checkout importable."""
    path = os.pathsep.join([variables["PYTHONPATH"], str(ROOT)])
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **variables, "PYTHONPATH": path}, cwd=folder, capture_output=True, text=True, check=False
    )


# -- kill points --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "call", "left"), [("before", 1, []), ("after", 1, ["0"]), ("before", 3, ["0", "1"]), ("after", 3, ["0", "1", "2"])]
)
def test_a_process_dies_at_the_call_that_is_named_and_once(tmp_path: Path, moment: str, call: int, left: list[str]) -> None:
    point = KillPoint(module="quantsweep.storage.files", function="write_text", moment=moment, call=call)
    room = tmp_path / "room"
    room.mkdir()
    variables = ledger.environment(kill=[point], state=tmp_path)
    code = "from quantsweep.storage.files import write_text; from pathlib import Path\nfor n in range(4): write_text(Path(str(n)), 'x')"
    killed = python(code, variables, room)
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, "")
    assert sorted(path.name for path in room.iterdir()) == left
    assert ledger.fired(point, tmp_path)
    again = python(code, variables, room)
    assert (again.returncode, again.stderr) == (0, "")
    assert len(list(room.iterdir())) == 4


def test_methods_of_every_kind_are_reached(tmp_path: Path) -> None:
    (tmp_path / "thing.py").write_text(
        "class Thing:\n"
        "    def plain(self): return 1\n"
        "    @classmethod\n    def of_class(cls): return cls()\n"
        "    @staticmethod\n    def static(): return 2\n"
    )
    for number, (function, call) in enumerate(
        {"plain": "Thing().plain()", "of_class": "Thing.of_class()", "static": "Thing.static()"}.items()
    ):
        state = tmp_path / str(number)
        state.mkdir()
        point = KillPoint(module="thing", function=f"Thing.{function}", moment="after", call=2)
        code = f"from thing import Thing; {call}; print('once', flush=True); {call}; print('twice', flush=True)"
        done = python(code, ledger.environment(kill=[point], state=state), tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "once\n", "")


@pytest.mark.parametrize(
    ("place", "job", "dies"), [("login", None, True), ("login", "7", False), ("job", "7", True), ("job", None, False), ("any", "7", True)]
)
def test_jobs_inherit_the_environment_and_not_the_launchers_death(tmp_path: Path, place: str, job: str | None, dies: bool) -> None:
    point = KillPoint(module="quantsweep.storage.files", function="write_text", moment="before", place=place)
    variables = ledger.environment(kill=[point], state=tmp_path) | ({"SLURM_JOB_ID": job} if job else {})
    done = python(
        "from quantsweep.storage.files import write_text; from pathlib import Path; write_text(Path('x'), 'x')", variables, tmp_path
    )
    assert done.returncode == (-signal.SIGKILL if dies else 0)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("QS_TEST_KILL", "quantsweep.storage.files:write_text:during:1", "before|after"),
        ("QS_TEST_KILL", "quantsweep.storage.files:write_text", "expected module:function"),
        ("QS_TEST_KILL", "quantsweep.storage.files:no_such_function:after:1", "no_such_function"),
        ("QS_TEST_FAULTS", "/nowhere", "/nowhere"),
    ],
)
def test_a_setting_that_means_nothing_ends_the_process(tmp_path: Path, setting: str, value: str, says: str) -> None:
    variables = ledger.environment() | {"QS_TEST_KILL_STATE": str(tmp_path), setting: value}
    done = python("import quantsweep.storage.files; print('went on')", variables, tmp_path)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert (done.stdout, says in done.stderr) == ("", True)


# -- reading and comparing ----------------------------------------------------------------------------


def lines(*events: tuple[str, float, int, str]) -> str:
    """A record of one task; an event is (what, and of a fault its kind; when; pid; trial)."""
    parted = [(what.split(), when, pid, trial) for what, when, pid, trial in events]
    return "".join(" ".join([what[0], str(when), str(pid), "-", trial, "ppl@1", *what[1:]]) + "\n" for what, when, pid, trial in parted)


def write_rows(folder: Path, rows: list[tuple[str, str, float]]) -> None:
    """Rows of the table of metrics; a row is (trial, metric, when it was finished).  A trial has one attempt."""
    (folder / "metrics").mkdir(parents=True)
    schema = records.arrow_schema("metrics")
    empty = {**dict.fromkeys(schema.names), "task_key": "ppl@1", "data_type_options": "{}", "method_options": "{}"}
    frame = [
        {**empty, "trial_id": trial, "metric": metric, "finished_at": datetime.fromtimestamp(when, UTC), "attempt": trial}
        for trial, metric, when in rows
    ]
    pq.write_table(pa.Table.from_pylist(frame, schema=schema), folder / "metrics" / "test-000.parquet")


def test_each_broken_promise_has_its_name(tmp_path: Path) -> None:
    record = tmp_path / "ledger"
    record.write_text(
        lines(
            ("begin", 1, 10, "good"), ("end", 2, 10, "good"),
            ("begin", 3, 10, "lost"), ("end", 4, 10, "lost"),
            ("begin", 5, 10, "cut"),
            ("begin", 6, 11, "cut"), ("end", 7, 11, "cut"),
            ("begin", 8, 11, "failed"), ("fault bug", 8, 11, "failed"), ("error", 8, 11, "failed"),
            ("begin", 9, 11, "again"), ("end", 10, 11, "again"), ("begin", 12, 12, "again"), ("end", 13, 12, "again"),
            ("begin", 14, 12, "uneven"), ("end", 15, 12, "uneven"),
            ("begin", 16, 12, "stranger"), ("end", 17, 12, "stranger"),
            ("begin", 18, 12, "running"),
        )
    )  # fmt: skip
    folder = tmp_path / "sweep"
    whole = {"good": 2, "cut": 7, "again": 11, "invented": 1, "stranger": 17}
    both = [(trial, metric, when) for trial, when in whole.items() for metric in ("a", "b")]
    write_rows(folder, [*both, ("uneven", "a", 15)])
    asked = [(trial, "ppl@1") for trial in ("good", "lost", "cut", "failed", "again", "uneven", "invented", "running")]
    report = ledger.check(ledger.read(record), folder, asked=asked)
    kinds = ("missing", "uneven", "strangers", "invented", "lost", "repeated")
    named = {kind: [trial for trial, _ in getattr(report, kind)] for kind in kinds}
    assert named == {
        "missing": ["failed", "lost", "running"], "uneven": ["uneven"], "strangers": ["stranger"], "invented": ["invented"],
        "lost": ["lost"], "repeated": ["again"],
    }  # fmt: skip
    assert [(event.trial, event.pid) for event in report.needless] == [("again", 12)]
    assert [(event.trial, event.pid) for event in report.cut] == [("cut", 10), ("running", 12)]
    assert (report.asked, report.rows, ledger.read(record).faults) == (8, 6, {"bug": 1})
    assert [problem.split()[1].rstrip(",") for problem in report.problems()] == [
        "missing",
        "uneven",
        "strangers",
        "invented",
        "lost",
        "needless",
    ]


@pytest.mark.parametrize(
    "text", ["begin 1 2 - trial", "begin 1 2 - trial task", "begin 1 2 - unknown task\n", "nonsense 1 2 - trial task\n"]
)
def test_a_record_that_is_not_whole_proves_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger").write_text(text)
    with pytest.raises(ledger.LedgerError):
        ledger.read(tmp_path / "ledger")


def test_a_rate_strikes_about_that_share_and_always_the_same(tmp_path: Path) -> None:
    trials = [f"{number:016x}" for number in range(20_000)]
    fault = Fault(kind="bug", rate=0.01)
    struck = [trial for trial in trials if fault.chooses(trial, "1 0")]
    assert 150 < len(struck) < 250
    assert (
        struck == [trial for trial in trials if fault.chooses(trial, "1 0")] != [trial for trial in trials if fault.chooses(trial, "2 0")]
    )


def test_a_fault_strikes_as_often_as_it_says_over_all_processes(tmp_path: Path) -> None:
    plan = FaultPlan(
        faults=(Fault(kind="bug", trials=("ab",), times=2), Fault(kind="kill", trials=("cd",), times=None)), state=tmp_path / "state"
    )
    plan.write(tmp_path / "plan")
    read = [FaultPlan.read(tmp_path / "plan") for _ in range(2)]
    assert [bool(one.due("ab12", "begin")) for one in (*read, *read)] == [True, True, False, False]
    assert all(one.due("cdef", "begin") for one in (*read, *read))
    assert read[0].due("ab34", "end") is None


# -- on the product -----------------------------------------------------------------------------------


def test_a_sweep_is_recorded(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ledger.environment(record=tmp_path / "ledger").items():
        monkeypatch.setenv(name, value)
    launch(*SWEEP)
    record = ledger.read(tmp_path / "ledger")
    report = ledger.check(record, tmp_path / "results" / "recorded")
    assert (report.problems(), report.asked, report.rows, report.repeated, report.cut) == ([], 3, 3, {}, [])
    assert record.begun == record.ended == dict.fromkeys(record.ended, 1)


FAULTS = {
    "out_of_gpu_memory": classes.OUT_OF_GPU_MEMORY,
    "device_assert": classes.BUG,
    "bug": classes.BUG,
    "segfault": classes.CRASHED,
    "kill": classes.KILLED,
    "host_memory": classes.OUT_OF_HOST_MEMORY,
}


@pytest.mark.slurm  # of its slowness only: `make test-slurm` runs what is long
@pytest.mark.long
def test_faults_strike_in_the_child_and_a_retry_succeeds(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trial a fault, all found by its beginning; the row says what happened, and the second time all goes well."""
    sweep = ("-m", "model=mini-neox-0.3m", "bit_width=range(3,9)", "task=mini_ppl", "limit=2", "sweep=faulty")
    launch(*sweep[:-1], "sweep=ids")
    ids = sorted(quantsweep.load_trials(tmp_path / "results" / "ids").trial_id)
    faults = tuple(Fault(kind=kind, trials=(trial,), megabytes=64, seconds=0) for kind, trial in zip(FAULTS, ids, strict=True))
    FaultPlan(faults=faults, state=tmp_path / "state").write(tmp_path / "faults")
    for name, value in ledger.environment(record=tmp_path / "ledger", faults=tmp_path / "faults").items():
        monkeypatch.setenv(name, value)
    launch(*sweep, expect=ExitStatus.FAILED)
    record = ledger.read(tmp_path / "ledger")
    assert record.faults == dict.fromkeys(FAULTS, 1)
    trials = quantsweep.load_trials(tmp_path / "results" / "faulty", attempts=True).set_index("trial_id")
    assert {kind: trials.failure_class[trial] for kind, trial in zip(FAULTS, ids, strict=True)} == FAULTS
    launch(*sweep)
    record = ledger.read(tmp_path / "ledger")
    report = ledger.check(record, tmp_path / "results" / "faulty")
    assert (report.problems(), report.repeated, len(report.cut)) == ([], {}, 2)
    assert record.begun == dict.fromkeys(record.begun, 2)


# -- on the cluster -----------------------------------------------------------------------------------


@pytest.mark.slurm
def test_jobs_are_recorded_with_their_slurm_id(in_cluster: Cluster, tmp_path: Path) -> None:
    """A product of a few lines stands in for the real one: the record must work from a snapshot in any folder."""
    package = tmp_path / "code" / "quantsweep"
    for folder in (package, *(package / room for room in ("trial", "running", "evaluation"))):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (package / "trial" / "specs.py").write_text(
        "import types\n"
        "class PlannedTrial:\n"
        "    @classmethod\n"
        "    def from_json(cls, text): return types.SimpleNamespace(trial=types.SimpleNamespace(trial_id=text))\n"
    )
    (package / "evaluation" / "evaluator.py").write_text("class Evaluator:\n    def evaluate(self, spec): pass\n")
    (package / "running" / "child.py").write_text(
        "import os, types\n"
        "from quantsweep.trial.specs import PlannedTrial\n"
        "PlannedTrial.from_json('trial' + os.environ['SLURM_ARRAY_TASK_ID'])\n"
        "from quantsweep.evaluation.evaluator import Evaluator\n"
        "Evaluator().evaluate(types.SimpleNamespace(task_key='ppl@1'))\n"
    )
    setup = ledger.setup_lines(ledger.environment(record=tmp_path / "ledger"))
    script = "; ".join([f"cd {tmp_path / 'code'}", *setup, f"exec {sys.executable} -m quantsweep.running.child"])
    job = in_cluster.submit("--array=0-3", "--export=NONE", script=script)
    in_cluster.wait_until(lambda: not in_cluster.run(["squeue", "-h"]).stdout, "an empty queue")
    record = ledger.read(tmp_path / "ledger")
    assert sorted((event.event, event.trial, event.job) for event in record.events) == [
        (event, f"trial{task}", f"{job}_{task}") for event in ("begin", "end") for task in range(4)
    ]  # fmt: skip
    assert all(abs(event.time - time.time()) < 300 for event in record.events)
