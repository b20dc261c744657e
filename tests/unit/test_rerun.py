"""`rerun`: what is forgotten is exactly what was asked, at once, for good, and later attempts count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_records import row

import quantsweep
from quantsweep.cli.main import main
from quantsweep.cli.rerun import select
from quantsweep.errors import ConfigurationError, ResultsError
from quantsweep.storage import workers
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import WorkerRecord, write_record
from quantsweep.tables import records
from quantsweep.tables.filters import parse
from quantsweep.tables.forgetting import SCHEMA, Kind, Tombstone, read_forgotten, write_fence
from quantsweep.words import count
from tests.unit.engine_cases import trial


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    """Two models; of model a one attempt that failed after its first task, then one that did the second."""
    made = SweepFolder(tmp_path / "results" / "sweep")
    made.create()
    attempt(made, "a", "a1", ["t@1"], code_commit="old", status="failed", failure_class="bug", failure_fingerprint="f00d")
    attempt(made, "a", "a2", ["u@1"], code_commit="new")
    attempt(made, "b", "b1", ["t@1", "u@1"], code_commit="old")
    return made


def attempt(folder: SweepFolder, model: str, name: str, tasks: list[str], status: str = "done", **values: Any) -> None:
    common = {"model": model, "trial_id": f"trial-{model}", "attempt": name} | {
        key: values.pop(key) for key in ("code_commit", "launch") if key in values
    }
    for task in tasks:
        where = {"task": task.split("@")[0], "task_key": task}
        records.write_rows(folder, "samples", [row("samples", **common, **where)], f"{name}-{task}")
        records.write_rows(folder, "metrics", [row("metrics", **common, **where, metric=m) for m in ("x", "y")], f"{name}-{task}")
    records.write_rows(folder, "layers", [row("layers", **common)], name)
    failure = {f"failure_{key}": None for key in ("class", "message", "fingerprint", "traceback")}
    common["config"] = records.config_json(trial())
    records.write_rows(folder, "trials", [row("trials", **{**common, "status": status, **failure, **values})], name)


def standing(folder: SweepFolder) -> tuple[set[tuple[str, str]], set[str]]:
    """(evaluations that have a row, attempts that have a row in trials), as (attempt, task_key)."""
    metrics = records.read_table(folder.path, "metrics", ["attempt", "task_key"]).to_pylist()
    return {(r["attempt"], r["task_key"]) for r in metrics}, set(records.read_table(folder.path, "trials").column("attempt").to_pylist())


EVERYTHING = {("a1", "t@1"), ("a2", "u@1"), ("b1", "t@1"), ("b1", "u@1")}


@pytest.mark.parametrize(
    ("texts", "evaluations", "attempts", "counts"),
    [
        (["model=a"], {("b1", "t@1"), ("b1", "u@1")}, {"b1"}, (1, 2, 1)),
        (["code_commit=old"], {("a2", "u@1")}, {"a2"}, (2, 3, 1)),
        (["task=t"], {("a2", "u@1"), ("b1", "u@1")}, {"a1", "a2", "b1"}, (2, 2, 0)),
        (["task=t", "model=b"], EVERYTHING - {("b1", "t@1")}, {"a1", "a2", "b1"}, (1, 1, 0)),
        (["status=failed"], EVERYTHING, {"a2", "b1"}, (1, 0, 1)),
        (["failure_class=bug", "failure_fingerprint=f0"], EVERYTHING, {"a2", "b1"}, (1, 0, 1)),
        (["status=done", "model=b"], {("a1", "t@1"), ("a2", "u@1")}, {"a1", "a2"}, (1, 2, 0)),
        (["--all"], set(), set(), (2, 4, 1)),
    ],
)
def test_what_matches_is_forgotten_and_nothing_else(
    folder: SweepFolder,
    capsys: pytest.CaptureFixture[str],
    texts: list[str],
    evaluations: set[tuple[str, str]],
    attempts: set[str],
    counts: tuple[int, int, int],
) -> None:
    trials, gone, failures = counts
    assert main(["rerun", str(folder.path), *texts, "--yes"]) == 0
    printed = capsys.readouterr().out
    words = f"{count(gone, 'evaluation')} and {count(failures, 'failed attempt')} of {count(trials, 'trial')}"
    assert f"{words} to forget" in printed
    assert "the launch command resumes" in printed
    assert standing(folder) == (evaluations, attempts)
    pairs = {(f"trial-{name[0]}", task) for name, task in evaluations}
    assert records.read_done(folder.path) == pairs
    for load in (quantsweep.load_results, quantsweep.load_samples):
        assert set(load(folder.path)[["trial_id", "task_key"]].itertuples(index=False, name=None)) == pairs
    # Compaction has run: plain pandas does not see them either.
    for table, left in (("metrics", 2 * len(evaluations)), ("samples", len(evaluations)), ("trials", len(attempts))):
        assert sum(len(pd.read_parquet(path)) for path in folder.table(table).glob("*.parquet")) == left


def test_forgotten_at_once_also_before_compaction_and_later_attempts_count(folder: SweepFolder) -> None:
    write_fence(folder, select(folder, parse(["model=b"])).lines)
    assert len(pd.read_parquet(folder.table("metrics"))) == 8
    assert {trial for trial, _ in records.read_done(folder.path)} == {"trial-a"}
    assert "b1" not in set(quantsweep.load_layers(folder.path).attempt)
    assert "b1" not in set(quantsweep.load_trials(folder.path, attempts=True).attempt)
    attempt(folder, "b", "b2", ["t@1"], launch=2)
    assert ("trial-b", "t@1") in records.read_done(folder.path)
    assert set(
        quantsweep.load_results(
            folder.path,
        )
        .query("model == 'b'")
        .attempt
    ) == {"b2"}


@pytest.mark.parametrize("name", ["b1", "b9"], ids=["the same attempt", "another one"])
@pytest.mark.parametrize("texts", ["model=b", "code_commit=old", "status=done"])
def test_whatever_was_asked_for_before_never_comes_back_whoever_writes_it(folder: SweepFolder, name: str, texts: str) -> None:
    write_fence(folder, select(folder, parse([texts])).lines)
    attempt(folder, "b", name, ["t@1", "v@1"], code_commit="newest")
    assert {trial for trial, _ in records.read_done(folder.path)} == {"trial-a"}
    for load in (quantsweep.load_results, quantsweep.load_samples, quantsweep.load_trials, quantsweep.load_layers):
        assert set(load(folder.path).trial_id) == {"trial-a"}
    assert main(["compact", str(folder.path)]) == 0
    assert set(pd.read_parquet(folder.table("metrics")).trial_id) == {"trial-a"}
    attempt(folder, "b", "b3", ["t@1"], launch=2)
    assert ("trial-b", "t@1") in records.read_done(folder.path)


def test_of_one_trial_what_other_code_wrote_before_stays_and_what_it_writes_later_does_not(folder: SweepFolder) -> None:
    write_fence(folder, select(folder, parse(["code_commit=old"])).lines)
    assert standing(folder) == ({("a2", "u@1")}, {"a2"})
    attempt(folder, "a", "a3", ["t@1"], code_commit="old")
    assert standing(folder) == ({("a2", "u@1")}, {"a2"})


def test_tombstones_of_older_versions_are_heeded(folder: SweepFolder) -> None:
    """As commit 8d87509 wrote them: exact attempts, no number; its rows have no launch of their own."""
    lines = [
        {"attempt": "b1", "trial_id": "trial-b", "task_key": None, "kind": "attempt"},
        {"attempt": "a2", "trial_id": "trial-a", "task_key": "u@1", "kind": "evaluation"},
        {"attempt": "a1", "trial_id": "trial-a", "task_key": None, "kind": "failure"},
    ]
    pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), folder.plan / "forgotten-0018f2b4c6d8e0a1-1a2b3c4d.parquet")
    for path in folder.path.glob("*/*.parquet"):
        if path.parent.name != "plan":
            pq.write_table(pq.read_table(path).drop_columns(["launch", "life"]), path)
    assert standing(folder) == ({("a1", "t@1")}, {"a2"})
    attempt(folder, "b", "b2", ["t@1"])
    assert ("b2", "t@1") in standing(folder)[0]


def test_the_same_attempt_name_in_another_trial_is_not_meant(folder: SweepFolder) -> None:
    write_fence(folder, [Tombstone("b1", "trial-other", None, Kind.ATTEMPT), Tombstone("b1", "trial-b", "t@1", Kind.EVALUATION)])
    assert standing(folder)[0] == EVERYTHING - {("b1", "t@1")}
    assert standing(folder)[1] == {"a1", "a2", "b1"}


def test_columns_that_were_not_asked_for_do_not_appear(folder: SweepFolder) -> None:
    write_fence(folder, select(folder, parse(["model=b"])).lines)
    assert records.read_table(folder.path, "metrics", ["value"]).column_names == ["value"]
    assert records.read_table(folder.path, "metrics", ["value"]).num_rows == 4


def test_without_a_filter_it_refuses(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rerun", str(folder.path), "--yes"]) == 1
    assert "--all" in capsys.readouterr().err
    assert main(["rerun", str(folder.path), "model=a", "--all", "--yes"]) == 1
    assert standing(folder)[0] == EVERYTHING


def test_without_yes_and_without_a_keyboard_nothing_is_forgotten(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rerun", str(folder.path), "model=a"]) == 1
    assert "add --yes" in capsys.readouterr().out
    assert standing(folder)[0] == EVERYTHING


@pytest.mark.parametrize("text", ["model=mini-nexo", "model=a,mini-nexo", "task=t,tt", "bit_width=4,99"])
def test_a_value_that_matches_nothing_is_told_with_the_nearest(folder: SweepFolder, text: str) -> None:
    attempt(folder, "mini-neox", "c1", ["t@1"])
    with pytest.raises(ConfigurationError, match=f"unknown {text.partition('=')[0]} '(mini-nexo'. Did you mean 'mini-neox'|tt'|99')"):
        select(folder, parse([text]))


def test_values_that_exist_apart_but_not_together_match_nothing(folder: SweepFolder) -> None:
    with pytest.raises(ResultsError, match="nothing in sweep matches model=b status=failed"):
        select(folder, parse(["model=b", "status=failed"]))


def test_an_outcome_and_a_task_are_not_asked_together(folder: SweepFolder) -> None:
    with pytest.raises(ConfigurationError, match="give one of them"):
        select(folder, parse(["task=t", "status=failed"]))


def test_live_workers_are_told_and_keep_their_files(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    writer = records.Writer(folder, "w-1")
    write_record(folder, WorkerRecord(worker="w-1", host=workers.platform.node(), pid=os.getpid(), plan="p"))
    writer.add("metrics", [row("metrics", model="c", trial_id="trial-c", attempt="c1")])
    assert main(["rerun", str(folder.path), "model=c", "--yes"]) == 0
    printed = capsys.readouterr().out
    assert "1 worker is at work" in printed
    assert "1 forgotten row stands in files that workers may still write" in printed
    assert "trial-c" not in {trial for trial, _ in records.read_done(folder.path)}
    assert "trial-c" in set(pd.read_parquet(folder.table("metrics")).trial_id)


def test_a_damaged_tombstone_is_said_since_its_rows_would_come_back(folder: SweepFolder) -> None:
    (folder.plan / "fence-00001-20260101T000000-1a2b3c4d.parquet").write_bytes(b"nothing")
    with pytest.raises(ResultsError, match=r"fence-00001-20260101T000000-1a2b3c4d\.parquet"):
        read_forgotten(folder.path)


@pytest.mark.parametrize("options", [["--task", "t", "--task", "u"], ["--task", "t,u"]])
def test_several_tasks(folder: SweepFolder, options: list[str]) -> None:
    assert main(["rerun", str(folder.path), "--yes", *options, "model=b"]) == 0
    assert standing(folder)[0] == EVERYTHING - {("b1", "t@1"), ("b1", "u@1")}


def test_filters_may_follow_options(folder: SweepFolder) -> None:
    assert main(["rerun", str(folder.path), "--yes", "model=a", "--task", "t"]) == 0
    assert standing(folder)[0] == EVERYTHING - {("a1", "t@1")}


def test_what_ends_while_the_question_stands_is_not_forgotten_with_the_rest(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def yes() -> bool:
        attempt(folder, "b", "b2", ["t@1", "u@1"], code_commit="new")
        return True

    monkeypatch.setattr("quantsweep.cli.rerun._agreed", yes)
    assert main(["rerun", str(folder.path), "code_commit=old"]) == 0
    assert {("b2", "t@1"), ("b2", "u@1")} <= standing(folder)[0], "new code made it"
    assert "b1" not in standing(folder)[1]
    assert "3 evaluations" in capsys.readouterr().out
