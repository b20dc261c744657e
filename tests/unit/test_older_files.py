"""Files that older versions wrote: every reader, plain pandas too, sees every column of every file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_records import row

import quantsweep
from quantsweep.storage.files import write_table
from quantsweep.storage.paths import TABLES, SweepFolder
from quantsweep.tables import records
from quantsweep.tables.compaction import compact
from quantsweep.tables.filters import parse
from quantsweep.tables.table_files import FINAL

OLD = Path(__file__).resolve().parents[1] / "golden" / "sweep_8d87509"
"""`launch.py -m model=mini-neox-0.3m bit_width=3,4 data_type=fp block_size=64 task=mini_ppl limit=2`, run by commit 8d87509."""
PLANTED = ("plant_channels", "plant_scale", "plant_seed")


@pytest.fixture
def old(tmp_path: Path) -> SweepFolder:
    shutil.copytree(OLD, tmp_path / "old")
    folder = SweepFolder(tmp_path / "old")
    folder.create()
    return folder


def test_a_folder_of_an_older_version_is_read_as_it_is(old: SweepFolder) -> None:
    frame = quantsweep.load_results(old.path)
    plain = pd.read_parquet(OLD / "metrics")
    assert sorted(frame.value) == sorted(plain.value)
    assert list(frame.bit_width.unique()) == [3, 4]
    assert len(quantsweep.load_trials(old.path)) == 2
    assert len(quantsweep.load_samples(old.path)) == 2
    assert len(quantsweep.load_layers(old.path)) == len(pq.read_table(OLD / "layers"))
    assert len(records.read_done(old.path)) == 2
    assert frame.tag.isna().all(), "neither its plans nor its rows have one"


def test_rows_from_before_there_were_factors_have_them_at_none(old: SweepFolder) -> None:
    """Read as they are, beside rows of this version, and folded; a filter means the same by them."""
    records.Writer(old, "zz-new").add("metrics", [row("metrics", trial_id="new", rounding="gptq", activation="per_token")])
    (rounding,) = set(pd.read_parquet(OLD / "metrics").method)
    for _ in range(2):
        frame = quantsweep.load_results(old.path)
        before = frame[frame.trial_id != "new"]
        assert {name: set(before[name]) for name in ("rounding", "activation", "clipping", "scope", "step_options")} == {
            **{"rounding": {rounding}, "activation": {"none"}, "clipping": {"absmax"}, "scope": {"none"}, "step_options": {"{}"}},
        }
        assert list(frame[frame.trial_id == "new"].activation) == ["per_token"]
        rows = records.read_encoded(old.path, "metrics", ["trial_id", "rounding", "activation"])
        assert parse(["activation=none", f"rounding={rounding}"]).mask(rows).sum() == len(before)
        compact(old)


@pytest.mark.parametrize("table", TABLES)
def test_the_first_row_of_this_version_completes_the_older_files(old: SweepFolder, table: str) -> None:
    names = records.arrow_schema(table).names
    [path] = old.table(table).glob("*.parquet")
    before = pq.read_table(path)
    assert not set(names) <= set(before.column_names), "nothing was added since: this test says nothing"
    records.Writer(old, "zz-new").add(table, [row(table)])
    after = pq.read_table(path)
    assert after.column_names[: len(names)] == names
    assert after.select(before.column_names).equals(before), "its rows are what they were"
    plain = pd.read_parquet(old.table(table))
    assert set(names) <= set(plain.columns)
    assert len(plain) == before.num_rows + 1


def test_columns_stay_whatever_file_sorts_first(tmp_path: Path) -> None:
    """An older file whose worker may still write it is left alone; planted rows stay apart from plain ones in plain pandas."""
    folder = SweepFolder(tmp_path / "sweep")
    folder.create()
    records.Writer(folder, "w").add("metrics", [row("metrics", plant_channels=4, plant_scale=16.0, plant_seed=0)])
    older = pa.Table.from_pylist([row("metrics", trial_id="plain")], schema=records.arrow_schema("metrics")).drop_columns([*PLANTED])
    for name in ("0-host-000.parquet", f"compacted-0{FINAL}"):
        write_table(folder.table("metrics") / name, older)
    frame = pd.read_parquet(folder.table("metrics"))
    assert list(frame.plant_scale.dropna()) == [16.0]
    assert len(frame) == 3


def test_compaction_completes_what_it_may(old: SweepFolder) -> None:
    before = quantsweep.load_results(old.path)
    compact(old)
    for path in old.table("metrics").glob("*.parquet"):
        assert pq.read_schema(path).names == records.arrow_schema("metrics").names
    pd.testing.assert_frame_equal(before, quantsweep.load_results(old.path))


def test_what_is_not_ours_is_not_rewritten(old: SweepFolder) -> None:
    path = old.table("metrics") / f"theirs{FINAL}"
    write_table(path, pa.table({"a": [1]}))
    content = path.read_bytes()
    records.Writer(old, "zz-new").add("metrics", [row("metrics")])
    assert path.read_bytes() == content
