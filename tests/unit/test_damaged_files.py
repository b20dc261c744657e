"""What does not belong in a table's folder is one message, by name; nobody hangs, nothing of it is read or folded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from test_records import row

import quantsweep
from quantsweep.errors import ResultsError
from quantsweep.storage.files import write_table
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.tables.compaction import compact
from quantsweep.tables.table_files import FINAL

MAKE: dict[str, Callable[[Path], object]] = {
    "foreign": lambda path: write_table(path, pa.table({"a": [1]})),
    "columns of ours": lambda path: write_table(path, pa.table({"value": [1.0]})),
    "types of theirs": lambda path: write_table(path, pa.table({"trial_id": [1.5], "value": ["x"]})),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "empty": Path.touch,
    "truncated": lambda path: path.write_bytes(b"PAR1" + bytes(100)),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    monkeypatch.setattr(records, "DAMAGED_SECONDS", 0.1)
    made = SweepFolder(tmp_path / "sweep")
    made.create()
    records.write_rows(made, "metrics", [row("metrics")], "one")
    records.write_rows(made, "metrics", [row("metrics", trial_id="other")], "two")
    return made


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("act", [lambda folder: quantsweep.load_results(folder.path), compact], ids=["load_results", "compact"])
def test_what_does_not_belong_here_is_said_by_name(folder: SweepFolder, kind: str, act: Callable[[SweepFolder], object]) -> None:
    path = folder.table("metrics") / f"bad{FINAL}"
    MAKE[kind](path)
    with pytest.raises(ResultsError, match=r"bad\.final\.parquet.*Move it away"):
        act(folder)


def test_a_message_that_ends_in_a_full_stop_gets_no_second_one() -> None:
    said = records.damaged_text(Path("bad"), "metrics", ValueError("not a Parquet file."))
    assert said.startswith("bad cannot be read: not a Parquet file. Move it away; ")


@pytest.mark.parametrize(("table", "words"), [("metrics", "run again with the next launch"), ("samples", "nothing runs again by itself")])
def test_the_remedy_says_what_is_lost(folder: SweepFolder, table: str, words: str) -> None:
    (folder.table(table) / f"bad{FINAL}").touch()
    with pytest.raises(ResultsError, match=words):
        records.read_table(folder.path, table)
