"""The committed results of the miniature k-bit study are whole, and what is written about them is what they say."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from analysis.curves import curves, plain_curves
from analysis.equal_bits import best_bit_width, shares
from analysis.scores import scores
from analysis.selection import BASELINE, labelled, planted_apart
from analysis.uncertainty import Scoreboard
from tests.conftest import ROOT

FOLDER = ROOT / "results" / "reference"
TYPES = ("int", "fp", "quantile", "dynamic")


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    return pd.read_parquet(FOLDER / "k_bit_inference_mini.parquet")


def test_every_trial_of_the_study_is_there_with_all_its_tasks(results: pd.DataFrame) -> None:
    headlines = results[results["is_primary"]]
    assert headlines["trial_id"].nunique() == 2_730
    assert set(headlines.groupby("trial_id").size()) == {3}
    assert np.isfinite(results["value"]).all()


def test_planting_leaves_the_baselines_as_they_are(results: pd.DataFrame) -> None:
    baselines = results[(results["method"] == BASELINE) & (results["metric"] == "bits_per_byte")]
    plain, planted = (rows.set_index("model")["value"] for _, rows in baselines.groupby(baselines["plant_channels"].notna()))
    assert len(plain) == len(planted) == 7
    # float32: the products are the same to the bit (a scale of 16), the sums of a norm are not.
    assert np.allclose(plain, planted.loc[plain.index], rtol=1e-6, atol=0)


def test_the_tables_in_the_text_are_those_of_the_results(results: pd.DataFrame) -> None:
    rows = results[results["metric"] == "bits_per_byte"]
    rows = labelled(planted_apart(rows))
    text = (FOLDER / "README.md").read_text()
    tables = [dict(_rows(part)) for part in text.split("| bit width | int | fp | quantile | dynamic |")[1:]]
    assert len(tables) == 2
    for is_planted, table in zip((False, True), tables, strict=True):
        here = rows[(rows["planted"] != "") == is_planted]
        means = here.groupby(["bits", "label", "block"])["value"].mean()
        for bits in range(3, 9):
            assert table[bits] == [f"{means[bits, kind, '64']:.4f} / {means[bits, kind, '1024']:.4f}" for kind in TYPES]
        assert f"baseline {means[16, BASELINE, BASELINE]:.4f}" in text


def _rows(part: str) -> list[tuple[int, list[str]]]:
    found = re.findall(r"^\| (\d) \|(.*)\|$", part, flags=re.MULTILINE)
    return [(int(bits), [cell.strip() for cell in cells.split("|")]) for bits, cells in found]


def test_five_bit_wins_on_bits_per_byte(results: pd.DataFrame) -> None:
    """As the text says of claim (a), without the samples: the order needs no standard errors."""
    board = Scoreboard(scores(results), "bits_per_byte")
    won = shares(best_bit_width(plain_curves(curves(board)), board)).set_index(["family", "bits"])["share"]
    assert set(won.index.get_level_values("bits")) == {5, 6}
    assert (won.xs(5, level="bits") > 0.8).all()
    assert len(won.xs(5, level="bits")) == 4
