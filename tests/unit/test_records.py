"""The tables: what is written is what is read, once, whatever happens in between."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantsweep
from quantsweep.errors import ResultsError
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.tables.results import WHOLE_OR_NULL
from quantsweep.tables.table_files import Listing
from quantsweep.trial.specs import CalibrationSpec, ModelSpec, QuantizationSpec, StepSpec, TrialSpec

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
EXAMPLES: dict[pa.DataType, Any] = {
    pa.string(): "x",
    pa.int32(): 1,
    pa.int64(): 2,
    pa.float64(): 0.5,
    pa.bool_(): True,
    pa.timestamp("us", tz="UTC"): NOW,
    pa.list_(pa.bool_()): [True],
    pa.list_(pa.float32()): [0.5],
    pa.list_(pa.int32()): [3],
}


def row(table: str, **values: Any) -> dict[str, Any]:
    base = {c.name: EXAMPLES[c.type] for c in records.COLUMNS[table]}
    return base | {"data_type_options": '{"exponent_bits":2}', "method_options": "{}", "step_options": "{}"} | values


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    made = SweepFolder(tmp_path / "sweep")
    made.create()
    return made


@pytest.mark.parametrize("table", records.COLUMNS)
def test_what_is_written_is_what_is_read(folder: SweepFolder, table: str) -> None:
    written = row(table)
    records.Writer(folder, "w").add(table, [written])
    assert records.read_table(folder.path, table).to_pylist() == [written]
    assert len(pd.read_parquet(folder.table(table))) == 1


def test_a_row_with_other_columns_is_refused(folder: SweepFolder) -> None:
    with pytest.raises(ResultsError, match=r"missing \['value'\], unknown \['valeu'\]"):
        records.Writer(folder, "w").add("metrics", [{k: v for k, v in row("metrics").items() if k != "value"} | {"valeu": 1}])


def test_every_row_is_durable_when_add_returns_and_files_are_few(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(records.MAX_ROWS, "samples", 100)
    writer = records.Writer(folder, "w")
    for n in range(205):
        writer.add("samples", [row("samples", trial_id=str(n))])
        if n % 50 == 0:
            assert pq.read_table(folder.table("samples")).num_rows == n + 1
    assert len(list(folder.table("samples").glob("w*"))) == 3
    assert len(set(records.read_table(folder.path, "samples").column("trial_id").to_pylist())) == n + 1


def test_long_outcomes_begin_another_file_by_size(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_BYTES", 100_000)
    writer = records.Writer(folder, "w")
    for n in range(6):
        writer.add("samples", [row("samples", trial_id=str(n), loglikelihood=[0.5] * 10_000)])
    assert len(list(folder.table("samples").glob("w*"))) == 3
    assert records.read_table(folder.path, "samples").num_rows == 6


def test_a_full_disk_leaves_what_was_there(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = records.Writer(folder, "w")
    writer.add("metrics", [row("metrics")])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            writer.add("metrics", [row("metrics", trial_id="lost")])
    assert records.read_table(folder.path, "metrics").num_rows == 1
    writer.add("metrics", [row("metrics", trial_id="later")])
    assert set(records.read_table(folder.path, "metrics").column("trial_id").to_pylist()) == {"x", "later"}


def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a file system of 256 kB, if this process may mount one."""
    import subprocess

    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root; the same error is injected in test_a_full_disk_leaves_what_was_there")
    try:
        small = SweepFolder(mount / "sweep")
        small.create()
        writer, written = records.Writer(small, "w"), 0
        with pytest.raises(OSError, match="No space"):  # noqa: PT012 - the loop is what fills the disk
            while True:
                writer.add("metrics", [row("metrics", trial_id=os.urandom(500).hex())])
                written += 1
        assert records.read_table(small.path, "metrics").num_rows == written > 0
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)  # a traceback may still hold a file


def test_unfinished_files_are_not_read(folder: SweepFolder) -> None:
    records.Writer(folder, "w").add("metrics", [row("metrics")])
    (folder.table("metrics") / ".half.parquet.tmp").write_bytes(b"PAR1")
    (folder.table("metrics") / ".half.parquet").write_bytes(b"PAR1")
    assert records.read_table(folder.path, "metrics").num_rows == 1
    assert len(pd.read_parquet(folder.table("metrics"))) == 1


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "flipped"])
def test_a_damaged_file_is_said_by_name(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(records, "DAMAGED_SECONDS", 0.1)
    records.Writer(folder, "w").add("metrics", [row("metrics", trial_id=str(n)) for n in range(100)])
    whole = (folder.table("metrics") / "w-000.parquet").read_bytes()
    flipped = bytes(byte ^ 0xFF for byte in whole[4 : len(whole) // 2])
    content = {
        "text": b"PAR1 and then nothing",
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:4] + flipped + whole[len(whole) // 2 :],
    }[damage]
    (folder.table("metrics") / "damaged.parquet").write_bytes(content)
    with pytest.raises(ResultsError, match=r"damaged\.parquet"):
        records.read_done(folder.path)


attempts = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["t@1", "u@1"]), st.integers(0, 5), st.floats(-1, 1)), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(attempts)
def test_load_results_has_each_evaluation_once_and_the_latest(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, int, float]]
) -> None:
    folder = SweepFolder(tmp_path_factory.mktemp("s") / "sweep")
    folder.create()
    latest: dict[tuple[str, str], tuple[int, float]] = {}
    for number, (trial, task, launch, value) in enumerate(rows):
        if any(known == launch for pair, (known, _) in latest.items() if pair == (trial, task)):
            continue  # two attempts of one launch: other things than the launch decide
        when = NOW - timedelta(seconds=number)
        values = {"launch": launch, "attempt": str(number), "value": value, "finished_at": when}
        records.Writer(folder, "w").add("metrics", [row("metrics", trial_id=trial, task_key=task, **values)])
        latest[trial, task] = max(latest.get((trial, task), (-1, 0.0)), (launch, value))
    frame = quantsweep.load_results(folder.path)
    assert {(r.trial_id, r.task_key): r.value for r in frame.itertuples()} == {key: value for key, (_, value) in latest.items()}
    assert len(frame) == len(latest)
    assert records.read_done(folder.path) == frozenset(latest)


def test_a_file_that_is_gone_when_it_is_read_is_looked_for_again(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client shows names that are gone for a while: every reading lists anew until that is over."""
    records.Writer(folder, "w").add("metrics", [row("metrics")])
    real, listings = records.list_files, []

    def listing(room: Path) -> Listing:
        listings.append(room)
        seen = real(room)
        return replace(seen, files=(*seen.files, room / "ghost.parquet")) if len(listings) < 5 else seen

    monkeypatch.setattr(records, "list_files", listing)
    assert records.read_table(folder.path, "metrics").num_rows == 1
    assert len(listings) == 5


def test_a_file_that_stays_gone_is_said_by_name(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "GONE_SECONDS", 0.1)
    monkeypatch.setattr(records, "list_files", lambda room: Listing((room / "ghost.parquet",), {}))
    with pytest.raises(ResultsError, match=r"ghost\.parquet.*look at the file system"):
        records.read_table(folder.path, "metrics")


def test_reading_needs_no_right_to_write(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colleague's sweep: the fresh view of the folder cannot be had, the rows can."""
    records.Writer(folder, "w").add("metrics", [row("metrics")])

    def refuse(room: Path) -> float:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(records, "filesystem_now", refuse)
    assert len(records.read_done(folder.path)) == 1


def test_a_worker_writes_files_of_its_name_and_overwrites_none(folder: SweepFolder) -> None:
    records.Writer(folder, "w-1").add("metrics", [row("metrics")])
    records.Writer(folder, "w-1").add("metrics", [row("metrics", trial_id="again")])
    assert sorted(path.name for path in folder.table("metrics").glob("w-*")) == ["w-1-000.parquet", "w-1-001.parquet"]


def test_whole_numbers_stay_whole_beside_a_baseline_that_has_none(folder: SweepFolder) -> None:
    writer = records.Writer(folder, "w")
    writer.add("metrics", [row("metrics", bit_width=4, block_size=64)])
    nothing = dict.fromkeys((*WHOLE_OR_NULL, "data_type"), None)
    writer.add("metrics", [row("metrics", **{**nothing, "trial_id": "baseline", "data_type_options": "{}"})])
    frame = quantsweep.load_results(folder.path).set_index("trial_id")
    assert {str(frame[name].dtype) for name in (*WHOLE_OR_NULL, "data_type_exponent_bits")} == {"Int64"}
    assert frame.loc["baseline", [*WHOLE_OR_NULL]].isna().all()
    [quantized] = frame.index.drop("baseline")
    assert [str(value) for value in frame.loc[quantized, ["bit_width", "block_size", "data_type_exponent_bits"]]] == ["4", "64", "2"]
    assert list(frame[frame.bit_width == 4].index) == [quantized], "a null equals no number"
    assert list(frame.columns)[: len(records.COLUMNS["metrics"]) - 1] == [
        c.name for c in records.COLUMNS["metrics"] if c.name != "trial_id"
    ]


def test_the_axes_that_may_be_null_are_those_whose_meaning_says_so() -> None:
    axes = (*records.IDENTITY, *records.TASK)
    assert {c.name for c in axes if pa.types.is_integer(c.type) and "null" in c.meaning} == set(WHOLE_OR_NULL)


def test_options_become_columns_and_sweeps_can_be_joined(folder: SweepFolder, tmp_path: Path) -> None:
    other = SweepFolder(tmp_path / "other")
    other.create()
    for place in (folder, other):
        records.Writer(place, "w").add("metrics", [row("metrics")])
    frame = quantsweep.load_results([folder.path, other.path])
    assert list(frame.sweep) == ["sweep", "other"]
    assert list(frame.data_type_exponent_bits) == [2, 2]


@pytest.mark.parametrize("room", ["plan", "logs", "logs/slurm"])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_rooms_that_others_may_write_are_refused(folder: SweepFolder, room: str, mode: int) -> None:
    (folder.path / room).chmod(mode)
    with pytest.raises(ResultsError, match="chmod -R go-w"):
        folder.check()


def test_rooms_are_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = SweepFolder(tmp_path / "open" / "sweep")
        made.create()
    finally:
        os.umask(before)
    assert made.plan.stat().st_mode & 0o022 == 0


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="not the folder of a sweep"):
        quantsweep.load_results(tmp_path)


def test_a_folder_of_tables_is_said_how_to_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.parquet").touch()
    with pytest.raises(ResultsError, match=r"no metrics/\).*pandas\.read_parquet"):
        quantsweep.load_results(tmp_path)


@pytest.mark.parametrize("load", [quantsweep.load_results, quantsweep.load_trials, quantsweep.load_samples, quantsweep.load_layers])
@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([], "no sweep to load: give the folder"),
        (["sweep", "other/../sweep"], "given twice"),
        (["sweep", "other/sweep"], "two sweeps of one name, sweep.*Rename"),
    ],
)
def test_sweeps_that_would_be_mixed_up_are_refused(
    folder: SweepFolder, load: Callable[[list[Path]], object], places: list[str], message: str
) -> None:
    SweepFolder(folder.path.parent / "other" / "sweep").create()
    with pytest.raises(ResultsError, match=message):
        load([folder.path.parent / place for place in places])


def test_an_empty_sweep_is_an_empty_frame(folder: SweepFolder) -> None:
    assert quantsweep.load_results(folder.path).empty
    assert quantsweep.load_samples(str(folder.path)).empty


def dictionary() -> str:
    """The tables of results/README.md, from the schema."""
    parts = []
    for table, columns in records.COLUMNS.items():
        lines = [f"## {table}", "", "| column | type | unit | meaning |", "|---|---|---|---|"]
        lines += [f"| `{c.name}` | {c.type} | {c.unit} | {c.meaning} |" for c in columns]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def test_the_data_dictionary_is_the_schema() -> None:
    path = ROOT / "results" / "README.md"
    text = path.read_text()
    start = text.index("## metrics")
    if os.environ.get("QUANTSWEEP_REWRITE_GOLDEN"):
        path.write_text(text[:start] + dictionary())
    assert text[start:] == dictionary(), "rewrite with QUANTSWEEP_REWRITE_GOLDEN=1"


def test_whatever_tells_calibrations_apart_is_a_column() -> None:
    model = ModelSpec(name="m", family="f", path="/m", content="sha256:m")
    rounded = QuantizationSpec(rounding=StepSpec("none", 1))
    text = CalibrationSpec(name="local", path="/a.txt", content="sha256:a", num_samples=8, sequence_length=64)
    others = {
        "content": "sha256:b",
        "column": "body",
        "rule": "concatenated",
        "version": 2,
        "num_samples": 9,
        "sequence_length": 32,
        "seed": 1,
    }
    specs = [text, *(replace(text, **{key: value}) for key, value in others.items())]
    columns = [records.identity_columns(TrialSpec(model=model, quantization=rounded, calibration=one)) for one in specs]
    first, *rest = ({**one, "trial_id": None} for one in columns)
    assert all(other != first for other in rest)
