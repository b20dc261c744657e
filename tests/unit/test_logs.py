"""`quantsweep logs TRIAL`: one trial of one sweep, or why that is not what was asked for."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from quantsweep.cli.main import main
from quantsweep.launching.settle import slurm_log
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from tests.unit.test_records import row


def ran(results: Path, sweep: str, *trial_ids: str) -> None:
    """A sweep in which these trials ran; each one's log says its sweep and its id."""
    folder = SweepFolder(results / sweep)
    folder.create()
    (folder.logs / "w.log").touch()
    for trial_id in trial_ids:
        text = f"log of {trial_id} in {sweep}\n"
        start = (folder.logs / "w.log").stat().st_size
        with (folder.logs / "w.log").open("a") as log:
            log.write(text)
        place = {"log": "w.log", "log_start": start, "log_end": start + len(text), "finished_at": datetime.now(UTC)}
        records.Writer(folder, f"w-{trial_id}").add("trials", [row("trials", trial_id=trial_id, attempt=f"a-{trial_id}", **place)])


def logs(results: Path, *arguments: str) -> int:
    return main(["logs", *arguments, "--results-dir", str(results)])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    ran(tmp_path, "first", "aa11", "ab22")
    ran(tmp_path, "second", "aa11", "cd33")
    return tmp_path


def test_a_trial_of_one_sweep_is_found_by_the_beginning_of_its_id(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(results, "cd") == 0
    assert capsys.readouterr().out == "log of cd33 in second\n"


def test_a_trial_of_several_sweeps_is_not_guessed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(results, "aa11") == 1
    assert "trial aa11 is in 2 sweeps: first, second. Choose one: --sweep first" in capsys.readouterr().err
    for sweep in ("first", "second"):
        assert logs(results, "aa11", "--sweep", sweep) == 0
        assert capsys.readouterr().out == f"log of aa11 in {sweep}\n"


def test_a_beginning_of_several_ids_is_not_guessed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(results, "a", "--sweep", "first") == 1
    assert "2 trials begin with 'a': aa11, ab22. Give more of the id" in capsys.readouterr().err


def never_started(results: Path, text: str | None) -> None:
    folder = SweepFolder(results / "third")
    folder.create()
    why = {"status": "failed", "failure_class": "not_started", "failure_message": "a setup line failed"}
    place = {"log": "", "log_start": 0, "log_end": 0, "slurm_job": "7_3", "finished_at": datetime.now(UTC)}
    records.Writer(folder, "settled").add("trials", [row("trials", trial_id="ee44", **place, **why)])
    if text is not None:
        log = slurm_log(folder, "qs-third-abc-0", "7_3")
        log.parent.mkdir(parents=True)
        log.write_text(text)


def test_of_a_job_that_never_started_its_own_output_is_shown(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`status` recommends this very command."""
    never_started(results, "module: command not found\n")
    assert logs(results, "ee") == 0
    assert capsys.readouterr().out == "module: command not found\n"


def test_of_a_job_that_left_no_log_the_cause_is_said(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    never_started(results, None)
    assert logs(results, "ee") == 1
    assert "not_started: a setup line failed" in (said := capsys.readouterr().err)
    assert "7_3 left no log" in said


def test_a_log_that_was_deleted_is_said(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "second" / "logs" / "w.log").unlink()
    assert logs(results, "cd") == 1
    assert "w.log cannot be read: No such file or directory" in capsys.readouterr().err


def test_an_unknown_trial_is_said_so(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(results, "ff") == 1
    assert "no trial that has ended begins with 'ff'" in capsys.readouterr().err
