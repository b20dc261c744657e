"""Nothing typed is lost: the words of a launch in its plan, `list`, `show`, `resume`; and how a launch ended, told from its tables."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from quantsweep.cli import resume
from quantsweep.cli.main import main
from quantsweep.errors import ConfigurationError, ResultsError
from quantsweep.exit_status import ExitStatus
from quantsweep.failures import classes
from quantsweep.failures.holds import cancelled
from quantsweep.operations.launches import KEEP_DROPPED, ending, read_launches, without_dropped
from quantsweep.planning.plan import Expansion, build_plan
from quantsweep.planning.plan_files import plan_files, read_header, read_plan_tasks, write_plan
from quantsweep.planning.typed import Typed, looks_secret
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import ClusterSpec, PlannedTrial, RunSettings
from tests.unit.engine_cases import fail, finish, trial, write

HERE = ClusterSpec()


def launched(folder: SweepFolder, trials: list[PlannedTrial], *words: str, directory: str | None = None) -> Path:
    """A plan of these trials, launched with these words (from the folder that holds `results`)."""
    plan = build_plan(
        Expansion(trials=tuple(trials), duplicates=0, skipped={}, candidates=len(trials)),
        sweep=folder.name, done=frozenset(), in_flight=frozenset(), settings=RunSettings(), workers=1,
    )  # fmt: skip
    return write_plan(folder.plan, plan, typed=Typed(words, directory or str(folder.path.parents[1])))


def command(folder: SweepFolder, *words: str) -> int:
    return main([*words, "--results-dir", str(folder.path.parent)])


def test_the_words_come_back_as_they_were_typed(sweep: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-m", "model=/my models/a (old)", "bit_width=3,4", "'quoted'", "tag=ü")
    path = launched(sweep, [trial(2)], *words, directory="/some where")
    typed = read_header(path).typed
    assert typed == Typed(words, "/some where")
    assert command(sweep, "show", sweep.name) == 0
    shown = capsys.readouterr().out
    assert "python launch.py -m 'model=/my models/a (old)' bit_width=3,4" in shown
    assert "/some where" in shown
    assert command(sweep, "show", sweep.name, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["launches"][0]["trials"], facts["launches"][0]["done"], facts["values"]["bit_width"]) == (1, 0, [2])


def test_list_says_how_far_each_sweep_is_and_what_cannot_be_read(sweep: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    plan = launched(sweep, [trial(2), trial(3)], "-m", "bit_width=2,3")
    finish(sweep, trial(2), plan=plan.name)
    foreign = sweep.path.parent / "foreign" / "plan"
    foreign.mkdir(parents=True)
    (foreign / plan.name).write_text("no Parquet")
    assert command(sweep, "list") == 0
    said = capsys.readouterr().out
    assert re.search(r"^sweep +1/2 +\d{4}-\d\d-\d\d \d\d:\d\d +python launch.py -m bit_width=2,3$", said, re.MULTILINE)
    assert re.search(r"^foreign +unreadable", said, re.MULTILINE)
    assert command(sweep, "list", "--json") == 0
    assert [(facts["sweep"], facts["done"]) for facts in json.loads(capsys.readouterr().out)] == [("foreign", 0), ("sweep", 1)]


def test_an_empty_results_folder_has_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--results-dir", str(tmp_path / "none")]) == 0
    assert "no sweep" in capsys.readouterr().out


def test_resume_types_what_has_something_left_oldest_first(sweep: SweepFolder) -> None:
    plan = launched(sweep, [trial(2)], "-m", "bit_width=2")
    launched(sweep, [trial(3)], "-m", "bit_width=3")
    launched(sweep, [trial(4)], "-m", "bit_width=4")
    launched(sweep, [trial(3)], "-m", "bit_width=3")
    finish(sweep, trial(2), plan=plan.name)
    assert [typed.words[-1] for typed in resume.to_type(sweep)] == ["bit_width=3", "bit_width=4"]
    cancelled(["bit_width=4"], sweep, drop=True).save(sweep)
    assert [typed.words[-1] for typed in resume.to_type(sweep)] == ["bit_width=3"], "what was dropped is nobody's wish"
    finish(sweep, trial(3), plan=plan.name)
    assert [typed.words[-1] for typed in resume.to_type(sweep)] == ["bit_width=3"], "all done: the last says so and prints its table"


def test_resume_acts_on_the_folder_that_was_named(sweep: SweepFolder, tmp_path: Path) -> None:
    launched(sweep, [trial(3)], "-m", "sweep=sweep", "bit_width=3")
    launched(sweep, [trial(4)], "-m", "bit_width=4", "results_dir=results")
    assert [typed.words[1:] for typed in resume.to_type(sweep)] == [("sweep=sweep", "bit_width=3"), ("bit_width=4", "results_dir=results")]
    copy = SweepFolder(sweep.path.with_name("copy"))
    shutil.copytree(sweep.path, copy.path)
    words = [typed.words[1:] for typed in resume.to_type(copy)]
    assert words == [("bit_width=3", "sweep=copy"), ("bit_width=4", "results_dir=results", "sweep=copy")]
    moved = SweepFolder(tmp_path / "backup" / "sweep")
    shutil.copytree(sweep.path, moved.path)
    place = f"results_dir={moved.path.parent}"
    assert [typed.words[1:] for typed in resume.to_type(moved)] == [("sweep=sweep", "bit_width=3", place), ("bit_width=4", place)]


def test_what_was_dropped_stays_so_in_a_launch_that_resume_types(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(sweep, [trial(3), trial(4)], "-m", "bit_width=3,4")
    cancelled(["bit_width=4"], sweep, drop=True).save(sweep)
    asked = (trial(3), trial(4), trial(5))
    assert without_dropped(sweep, asked) == asked, "who types a launch wants what it names"
    monkeypatch.setenv(KEEP_DROPPED, "1")
    assert without_dropped(sweep, asked) == (trial(3), trial(5))


def test_retries_have_no_words_of_their_own(sweep: SweepFolder) -> None:
    plan = launched(sweep, [trial(2)], "-m", "bit_width=2")
    write(sweep, [trial(2)], root=plan.name)
    assert [launch.header.name for launch in read_launches(sweep)] == [plan.name]


def test_a_plan_of_the_version_before_says_that_its_words_were_not_kept(sweep: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(sweep, [trial(2)], cluster=HERE)
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"quantsweep"])
    del metadata["typed"]
    pq.write_table(table.replace_schema_metadata({"quantsweep": json.dumps(metadata)}), path)
    assert command(sweep, "show", sweep.name) == 0
    assert "words not kept" in capsys.readouterr().out
    with pytest.raises(ResultsError, match="were not kept"):
        resume.to_type(sweep)
    assert command(sweep, "resume", sweep.name) == ExitStatus.REFUSED


def test_resume_passes_on_the_first_failure_and_stops_at_a_refusal(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for bits in (2, 3, 4):
        launched(sweep, [trial(bits)], "-m", f"bit_width={bits}")
    ends = {"bit_width=2": 0, "bit_width=3": 3, "bit_width=4": 0}
    monkeypatch.setattr(resume, "launch_again", lambda typed, output: ends.pop(typed.words[-1]))
    assert command(sweep, "resume", sweep.name) == ExitStatus.FAILED
    assert ends == {}
    ends |= {"bit_width=2": 130, "bit_width=3": 0}
    assert command(sweep, "resume", sweep.name) == ExitStatus.STOPPED
    assert ends == {"bit_width=3": 0}
    assert command(sweep, "resume", sweep.name, "--dry-run") == 0
    assert capsys.readouterr().out.endswith("python launch.py -m bit_width=4\n")


def test_a_folder_that_is_gone_is_said(sweep: SweepFolder) -> None:
    with pytest.raises(ResultsError, match="the folder in which this was typed is gone: /no/such"):
        resume.launch_again(Typed(("-m",), "/no/such"), sys.stdout)


@pytest.mark.parametrize(
    "word",
    [
        "tracking.api_key=0123456789abcdef",
        "+wandb.token=abc",
        "model.options.password=x",
        "cluster.additional_parameters={comment: hf_abcdefghijklmnopqrstuvwxyz}",
        "cluster.setup=[export HF_TOKEN=abcdef]",
        "model.path=https://user:secret@host/repo",
    ],
)
def test_a_word_that_looks_like_a_secret_is_refused(word: str) -> None:
    with pytest.raises(ConfigurationError, match="looks like a secret") as refused:
        Typed(("-m", word), "/")
    assert word.partition("=")[2] not in str(refused.value), "a refusal must not print it either"


@pytest.mark.parametrize(
    "word",
    [
        "model.tokenizer=abc",
        "num_tokens=5",
        "model.revision=0123456789abcdef0123456789abcdef01234567",
        "+sweeps=quickstart",
        "tracking.token=null",
        "data_type.options.key=${oc.env:HF_TOKEN}",
        "cluster.setup=[export HF_TOKEN=$HF_TOKEN]",
        "task=secret_santa",
        "hydra.searchpath=[file:///my/conf]",
    ],
)
def test_what_is_no_secret_is_taken(word: str) -> None:
    assert not looks_secret(word)


def test_how_a_launch_ended_is_told_from_its_tables(sweep: SweepFolder) -> None:
    plan = write(sweep, [trial(bits) for bits in (2, 3, 4)], cluster=HERE)
    asked = read_plan_tasks(plan)
    assert ending(sweep, asked, has_budget=False) is ExitStatus.FAILED, "nothing ran"
    assert ending(sweep, asked, has_budget=True) is ExitStatus.BUDGET_SPENT
    finish(sweep, trial(2), plan=plan.name)
    fail(sweep, trial(3), classes.BUG, plan=plan.name)
    cancelled(["bit_width=4"], sweep).save(sweep)
    assert ending(sweep, asked, has_budget=False) is ExitStatus.FAILED
    finish(sweep, trial(3), plan=plan.name)
    assert ending(sweep, asked, has_budget=False) is ExitStatus.HELD
    finish(sweep, trial(4), plan=plan.name)
    assert ending(sweep, asked, has_budget=True) is ExitStatus.DONE
    assert len(plan_files(sweep.plan)) == 1


@pytest.mark.parametrize("word", ["model=/data/disk-fast-storage-volume-01/m", "sweep=task-of-a-long-name-and-more", "limit=5"])
def test_a_word_that_only_holds_the_letters_of_a_token_is_none(word: str) -> None:
    Typed((word,), "/")
