"""What the documentation says: links lead somewhere, commands and numbers are real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis.figures import bits_against_size
from analysis.tables import by_bit_width

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "node_modules"} & set(path.relative_to(ROOT).parts) and "site-packages" not in path.parts
)


@pytest.fixture(scope="module")
def reference() -> pd.DataFrame:
    """The committed table of a whole quickstart sweep."""
    return pd.read_parquet(ROOT / "results" / "reference" / "quickstart.parquet")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def bpb(reference: pd.DataFrame) -> pd.DataFrame:
    return reference[reference.metric == "bits_per_byte"]


def test_the_reference_is_a_whole_quickstart(reference: pd.DataFrame) -> None:
    assert reference.trial_id.nunique() == 175
    assert not reference.duplicated(["trial_id", "task_key", "metric"]).any()
    assert reference.groupby("trial_id").task.nunique().eq(3).all()


def test_eight_bit_is_within_noise_of_the_baseline_and_error_grows_as_bits_fall(reference: pd.DataFrame) -> None:
    rows = bpb(reference)
    baseline = rows[rows.method == "none"].set_index("model")
    quantized = rows[rows.method != "none"]
    eight = quantized[quantized.bit_width == 8]
    assert ((eight.value.to_numpy() - baseline.value.loc[eight.model].to_numpy()) < eight.stderr.to_numpy()).all()
    by_bits = quantized.pivot_table(index=["model", "data_type", "block_size"], columns="bit_width", values="value")
    assert (by_bits[3] > by_bits[4]).all()
    assert (by_bits[4] > by_bits[8]).all()


def test_small_blocks_beat_large_ones_at_three_and_four_bit(reference: pd.DataFrame) -> None:
    quantized = bpb(reference)
    quantized = quantized[(quantized.method != "none") & (quantized.bit_width < 8)]
    by_block = quantized.pivot_table(index=["model", "data_type", "bit_width"], columns="block_size", values="value")
    assert (by_block[64] < by_block[1024]).all()


def test_bits_per_byte_fall_with_size(reference: pd.DataFrame) -> None:
    baseline = bpb(reference)[lambda rows: rows.method == "none"]
    for _, family in baseline.groupby("family"):
        assert family.sort_values("num_parameters").value.is_monotonic_decreasing


def test_the_table_averages_the_same_models_in_each_cell(reference: pd.DataFrame) -> None:
    whole = by_bit_width(reference)
    assert whole.attrs["num_models"] == 7
    assert not whole.isna().any().any()
    partial = by_bit_width(reference[~((reference.model == "mini-opt-0.4m") & (reference.bit_width == 3))])
    assert partial.attrs["num_models"] == 7
    assert partial.loc[3].isna().all().all()
    pd.testing.assert_frame_equal(partial.drop(3), whole.drop(3))


def test_the_figure_has_a_panel_a_family_and_curves_of_bit_widths_and_data_types(reference: pd.DataFrame) -> None:
    figure = bits_against_size(reference)
    assert [axis.get_title() for axis in figure.axes] == ["mini-neox", "mini-opt"]
    assert all(len(axis.lines) == 3 * 4 + 1 for axis in figure.axes)


def commands() -> list[str]:
    """The `quantsweep` and single-line Python commands of the README."""
    text = (ROOT / "README.md").read_text()
    lines = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python launch.py", "quantsweep plan")) and "mycluster" not in line]


def test_the_readme_shows_commands() -> None:
    assert len(commands()) >= 4


@pytest.mark.parametrize("command", commands())
def test_the_readmes_commands_run(command: str, tmp_path: Path) -> None:
    words = command.split()
    program = [sys.executable, "-m", "quantsweep.cli.main"] if words[0] == "quantsweep" else [sys.executable, str(ROOT / "launch.py")]
    arguments = words[1:] if words[0] == "quantsweep" else words[2:]
    small = [f"results_dir={tmp_path}", "limit=4"] if words[0] == "python" else []
    arguments = [a for a in arguments if not a.startswith("limit=")]
    done = subprocess.run([*program, *arguments, *small], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_study_table_counts_what_the_studies_plan(tmp_path: Path) -> None:
    import json

    text = (ROOT / "sweeps" / "README.md").read_text()
    for path in (ROOT / "sweeps").glob("*.yaml"):
        probe = [sys.executable, "-m", "quantsweep.cli.main", "plan", f"+sweeps={path.stem}", "--json"]
        counts = json.loads(subprocess.run(probe, capture_output=True, text=True, cwd=tmp_path, check=True).stdout)
        total = counts["trials"]
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`{path.stem}`" in line)
        numbers = {int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", row)}
        assert total in numbers, f"{path.stem}: {counts}"
        assert counts["evaluations"] in numbers
