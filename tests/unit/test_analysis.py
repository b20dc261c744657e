"""Tables and figures of grids that are not whole: nothing is averaged that does not belong together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

import quantsweep
from analysis.__main__ import main
from analysis.figures import MARKERS, bits_against_size
from analysis.tables import by_bit_width
from quantsweep.errors import ConfigurationError
from quantsweep.storage.paths import product_root

pytestmark = pytest.mark.usefixtures("closed_figures")


def where(frame: pd.DataFrame, **values: Any) -> pd.Series:
    chosen = pd.Series(True, index=frame.index)
    for column, value in values.items():
        chosen &= frame[column] == value
    return chosen


def with_copies(frame: pd.DataFrame, of: dict[str, Any], **changes: Any) -> pd.DataFrame:
    """The frame and copies of some of its rows with other axes."""
    copies = frame[where(frame, **of)].assign(**changes)
    copies["trial_id"] = "copy" + copies["trial_id"]
    return pd.concat([frame, copies], ignore_index=True)


CELL = {"metric": "bits_per_byte", "model": "mini-opt-0.4m", "bit_width": 4, "data_type": "fp", "block_size": 64}


def others(table: pd.DataFrame, row: tuple[int, str], column: str) -> pd.DataFrame:
    """The table without one cell."""
    table = table.copy()
    table.loc[row, column] = 0.0
    return table


# --- the table ----------------------------------------------------------------------------------------------------------


def test_a_cell_is_the_plain_mean_over_the_models(reference: pd.DataFrame) -> None:
    table = by_bit_width(reference)
    rows = reference[where(reference, metric="bits_per_byte", bit_width=3, data_type="int", block_size=1024)]
    assert len(rows) == 7
    assert table.loc[(3, "1024"), "int"] == pytest.approx(rows.value.mean(), rel=1e-12)
    baseline = reference[where(reference, metric="bits_per_byte", method="none")].value.mean()
    assert table.loc[(16, "none")].to_list() == pytest.approx([baseline] * 4)
    assert table.index.to_list() == [*((bits, block) for bits in (3, 4, 8) for block in ("64", "1024")), (16, "none")]
    assert table.columns.to_list() == ["dynamic", "fp", "int", "quantile"]
    assert table.attrs["documents"] == "30 documents"


@pytest.mark.parametrize("planted", [math.nan, math.inf, None])
def test_nan_inf_and_a_missing_row_show_in_their_cell_and_nowhere_else(reference: pd.DataFrame, planted: float | None) -> None:
    whole, hit = by_bit_width(reference), where(reference, **CELL)
    assert hit.sum() == 1
    broken = reference[~hit] if planted is None else reference.assign(value=reference.value.mask(hit, planted))
    table = by_bit_width(broken)
    assert table.attrs["num_models"] == 7
    assert table.loc[(4, "64"), "fp"] == math.inf if planted == math.inf else math.isnan(table.loc[(4, "64"), "fp"])
    pd.testing.assert_frame_equal(others(table, (4, "64"), "fp"), others(whole, (4, "64"), "fp"))


def test_a_model_without_baseline_makes_the_baseline_nan_and_a_sweep_without_any_has_no_such_row(reference: pd.DataFrame) -> None:
    table = by_bit_width(reference[~where(reference, model="mini-opt-0.4m", method="none")])
    assert table.loc[(16, "none")].isna().all()
    assert table.drop(16).notna().all().all()
    assert 16 not in by_bit_width(reference[reference.method != "none"]).index.get_level_values(0)
    assert by_bit_width(reference[reference.method == "none"]).shape == (1, 1)


def test_accuracies_with_nonfinite_loglikelihoods_are_nan_and_perplexities_are_not(reference: pd.DataFrame) -> None:
    hit = where(reference, model="mini-opt-0.4m", bit_width=4, data_type="fp", block_size=64)
    reference["num_nonfinite"] = reference.num_nonfinite.mask(hit, 2)
    assert math.isnan(by_bit_width(reference, metric="acc_norm").loc[(4, "64"), "fp"])
    assert by_bit_width(reference).notna().all().all()
    older = reference.drop(columns="num_nonfinite")
    assert by_bit_width(older, metric="acc_norm").notna().all().all()


def test_a_metric_of_two_tasks_needs_the_task(reference: pd.DataFrame) -> None:
    for function in (by_bit_width, bits_against_size):
        with pytest.raises(ConfigurationError, match=r"mini_cloze, mini_continuation.*--task"):
            function(reference, metric="acc")
    table = by_bit_width(reference, metric="acc", task="mini_cloze")
    rows = reference[where(reference, metric="acc", task="mini_cloze", bit_width=8, data_type="int", block_size=64)]
    assert table.loc[(8, "64"), "int"] == pytest.approx(rows.value.mean())
    with pytest.raises(ConfigurationError, match="Did you mean 'mini_cloze'"):
        by_bit_width(reference, metric="acc", task="mini_close")


def test_a_task_evaluated_in_two_ways_needs_the_key(reference: pd.DataFrame) -> None:
    both = with_copies(reference, {"task": "mini_ppl"}, task_key="mini_ppl@1.0")
    with pytest.raises(ConfigurationError, match=r"mini_ppl@1\.0, mini_ppl@1\.0\+limit30"):
        by_bit_width(both)
    pd.testing.assert_frame_equal(by_bit_width(both, task="mini_ppl@1.0"), by_bit_width(reference))


def test_options_that_are_not_the_default_are_columns_of_their_own(reference: pd.DataFrame) -> None:
    other = '{"exponent_bits":3,"subnormal":"appendix"}'
    both = with_copies(reference, {"data_type": "fp", "bit_width": 4}, data_type_options=other, value=9.0)
    table = by_bit_width(both)
    assert table.columns.to_list() == ["dynamic", "fp", "fp exponent_bits=3", "int", "quantile"]
    assert table["fp exponent_bits=3"].dropna().to_dict() == {
        (4, "64"): 9.0,
        (4, "1024"): 9.0,
        (16, "none"): table.loc[(16, "none"), "int"],
    }
    pd.testing.assert_frame_equal(table.drop(columns="fp exponent_bits=3"), by_bit_width(reference))


def planted(reference: pd.DataFrame, **changes: Any) -> pd.DataFrame:
    """The reference, and the same of models with planted outliers, as load_results gives them: null for plain models."""
    plain = reference.assign(plant_channels=math.nan, plant_scale=math.nan, plant_seed=math.nan)
    copies = plain.assign(plant_channels=4.0, plant_scale=16.0, plant_seed=0.0, **changes)
    copies["trial_id"] = "copy" + copies["trial_id"]
    return pd.concat([plain, copies], ignore_index=True)


def test_planted_and_plain_models_have_columns_and_baselines_of_their_own(reference: pd.DataFrame) -> None:
    both = planted(reference, value=9.0)
    table = by_bit_width(both)
    mark = " planted 4×16"
    assert table.columns.to_list() == [c + m for c in ("dynamic", "fp", "int", "quantile") for m in ("", mark)]
    plain = [column for column in table if not column.endswith(mark)]
    pd.testing.assert_frame_equal(table[plain], by_bit_width(reference))
    assert (table.drop(columns=plain) == 9.0).all().all()
    alone = by_bit_width(both[both.plant_channels.notna()])
    assert alone.columns.to_list() == [f"{column}{mark}" for column in plain]
    assert (alone == 9.0).all().all()


def test_planted_models_without_baselines_do_not_get_those_of_the_plain_ones(reference: pd.DataFrame) -> None:
    both = planted(reference)
    table = by_bit_width(both[both.plant_channels.isna() | (both.method != "none")])
    assert table["int"].notna().all()
    assert math.isnan(table.loc[(16, "none"), "int planted 4×16"])


def test_planted_models_are_a_family_of_their_own(reference: pd.DataFrame) -> None:
    both = planted(reference, value=9.0)
    pd.testing.assert_frame_equal(by_bit_width(both, family="mini-opt"), by_bit_width(reference, family="mini-opt"))
    assert (by_bit_width(both, family="mini-opt planted 4×16") == 9.0).all().all()
    panels = [axis.get_title() for axis in bits_against_size(both).axes]
    assert panels == ["mini-neox", "mini-neox planted 4×16", "mini-opt", "mini-opt planted 4×16"]


@pytest.mark.parametrize(
    ("change", "column"), [({"method": "gptq"}, "int gptq"), ({"symmetric": False}, "int symmetric=False"), ({"seed": 7.0}, "int seed=7.0")]
)
def test_another_method_or_axis_is_told_apart(reference: pd.DataFrame, change: dict[str, Any], column: str) -> None:
    table = by_bit_width(with_copies(reference, {"data_type": "int"}, **change, value=9.0))
    assert (table[column].drop(16) == 9.0).all()


def test_rows_that_cannot_be_told_apart_are_refused(reference: pd.DataFrame) -> None:
    with pytest.raises(ConfigurationError, match=r"2 rows of model .* differ in trial_id"):
        by_bit_width(with_copies(reference, CELL))


def test_codebooks_are_labelled_with_their_names_and_others_levels_with_theirs(reference: pd.DataFrame) -> None:
    """The levels of a yaml are usual, and so are those of a data type whose yaml lies elsewhere."""
    usual = yaml.safe_load((product_root() / "conf" / "data_type" / "af4.yaml").read_text())["options"]["levels"]
    for name, levels in (("af4", usual), ("mine", [-1.0, 0.0, 1.0]), ("af4", [-1.0, 0.0, 1.0])):
        reference = with_copies(reference, CELL, data_type=name, data_type_options=json.dumps({"levels": levels}))
    assert {"af4", "mine", "af4 levels=[-1.0, 0.0, 1.0]"} <= set(by_bit_width(reference).columns)


def test_tensor_rows_of_one_type_and_bits_of_one_type_leave_the_rest_as_it_is(reference: pd.DataFrame) -> None:
    for granularity in ("tensor", "channel"):
        of = {"data_type": "int", "bit_width": 4, "block_size": 64}
        reference = with_copies(reference, of, granularity=granularity, block_size=np.nan, block_axis="input")
    table = by_bit_width(with_copies(reference, {"data_type": "int", "bit_width": 4, "granularity": "block"}, bit_width=5.0))
    assert table.loc[4].index.to_list() == ["64", "1024", "channel", "tensor"]
    assert table.loc[(4, "tensor")].notna().to_dict() == {"dynamic": False, "fp": False, "int": True, "quantile": False}
    assert table.loc[5, "int"].notna().all()
    assert table.loc[5].drop(columns="int").isna().all().all()
    assert table.attrs["num_models"] == 7


# --- the figure ---------------------------------------------------------------------------------------------------------


def drawn(figure: Figure, panel: int, color: str, marker: str) -> np.ndarray:
    """The values of the curve of one colour and marker, NaN where there is a gap."""
    (line,) = [line for line in figure.axes[panel].lines if (line.get_color(), line.get_marker()) == (color, marker)]
    return np.asarray(line.get_ydata(), float)


def words(figure: Figure) -> str:
    return " ".join((figure.get_suptitle() + " " + figure.get_supxlabel()).split())


FOUR_BIT, FIVE_BIT = "C2", "C3"
DYNAMIC, FP, INT, QUANTILE = MARKERS[:4]


def test_the_figure_says_what_it_shows_with_a_curve_for_each_data_type(reference: pd.DataFrame) -> None:
    figure = bits_against_size(reference)
    said = ("bits per byte of mini_ppl", "block size 64", "30 documents", "the same for all curves")
    assert all(part in words(figure) for part in said)
    assert "left out" not in words(figure)
    (legend,) = figure.legends
    names = ["3-bit", "4-bit", "8-bit", "16-bit baseline", "dynamic", "fp", "int", "quantile"]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert [len(axis.lines) for axis in figure.axes] == [13, 13]
    for label, marker in zip(names[4:], MARKERS, strict=False):
        rows = reference[where(reference, metric="bits_per_byte", bit_width=4, block_size=64, family="mini-opt", data_type=label)]
        assert drawn(figure, 1, FOUR_BIT, marker) == pytest.approx(rows.sort_values("num_parameters").value.to_numpy())


@pytest.mark.parametrize("planted", [math.nan, math.inf, None])
def test_a_trial_that_is_missing_or_not_finite_is_a_gap_and_is_counted(reference: pd.DataFrame, planted: float | None) -> None:
    hit = where(reference, **CELL)
    figure = bits_against_size(reference[~hit] if planted is None else reference.assign(value=reference.value.mask(hit, planted)))
    figure.canvas.draw()
    assert np.isnan(drawn(figure, 1, FOUR_BIT, FP)).tolist() == [True, False, False]
    assert not np.isnan(drawn(figure, 1, FOUR_BIT, INT)).any()
    assert not np.isnan(drawn(figure, 0, FOUR_BIT, FP)).any()
    assert "1 point left out (not finite or missing)" in words(figure)


def test_bits_of_one_data_type_in_one_family_keep_colours(reference: pd.DataFrame) -> None:
    of = {"data_type": "int", "bit_width": 4, "family": "mini-opt"}
    figure = bits_against_size(with_copies(reference, of, bit_width=5.0))
    whole = bits_against_size(reference)
    for panel in (0, 1):
        assert drawn(figure, panel, FOUR_BIT, INT) == pytest.approx(drawn(whole, panel, FOUR_BIT, INT))
    assert len(drawn(figure, 1, FIVE_BIT, INT)) == 3
    assert [len(axis.lines) for axis in figure.axes] == [13, 14]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:5] == ["3-bit", "4-bit", "5-bit", "8-bit", "16-bit baseline"]


def test_a_family_without_baselines_has_gaps_for_them(reference: pd.DataFrame) -> None:
    figure = bits_against_size(reference[~where(reference, family="mini-opt", method="none")])
    figure.canvas.draw()
    assert "3 points left out" in words(figure)


def test_block_sizes_of_the_figure(reference: pd.DataFrame) -> None:
    of = {"data_type": "int", "block_size": 64}
    reference = with_copies(reference, of, granularity="tensor", block_size=np.nan)
    figure = bits_against_size(reference, block_size="tensor")
    assert "block size tensor" in words(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["3-bit", "4-bit", "8-bit", "16-bit baseline", "int"]
    with pytest.raises(ConfigurationError, match=r"There are: 64, 1024, tensor\. Choose one: --block-size"):
        bits_against_size(reference, block_size=128)


def test_titles_and_legends_of_many_panels_do_not_overlap(reference: pd.DataFrame) -> None:
    """As drawn: no text of the figure lies over another."""
    long = reference.assign(family=reference.family + " of a laboratory with a name of many words")
    other = [{"data_type": "int"}] * 9
    for number, of in enumerate(other):
        long = with_copies(long, {**of, "method": "round_to_nearest"}, method=f"a_method_with_a_long_name_{number}")
    figure = bits_against_size(planted(long))
    figure.canvas.draw()
    texts = [figure._suptitle, figure._supxlabel, *(axis.title for axis in figure.axes), *figure.legends[0].get_texts()]  # type: ignore[attr-defined]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 20
    assert not any(one.overlaps(two) for place, one in enumerate(boxes) for two in boxes[:place])
    assert all(box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1 for box in boxes)


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_draws(
    reference: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantsweep, "load_results", lambda _: reference)
    monkeypatch.setattr(quantsweep, "load_samples", lambda _: None)
    (tmp_path / "results" / "mine" / "plan").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["mine", "--metric", "acc", "--task", "mini_cloze", "--block-size", "1024"]) == 0
    out = capsys.readouterr().out
    assert "acc of mini_cloze, mean over 7 models, 30 documents" in out
    assert "difference to the 16-bit baseline ± half its 95 % interval" in out
    assert {path.name for path in (tmp_path / "results" / "mine").iterdir()} == {"plan", "acc.png", "acc.svg"}


def test_one_word_is_a_sweep_also_where_its_study_has_that_name(
    reference: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantsweep, "load_results", lambda _: reference)
    monkeypatch.setattr(quantsweep, "load_samples", lambda _: None)
    (tmp_path / "results" / "k_bit_inference" / "plan").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["k_bit_inference"]) == 0
    assert "bits per byte of mini_ppl, mean over 7 models" in capsys.readouterr().out


SAMPLES = ["trial_id", "task_key", "requests_hash", "num_bytes", "correct", "correct_norm", "loglikelihood"]


def test_several_sweeps_by_name_are_one_table_with_what_they_share_once(
    reference: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / "results" / name / "plan").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    is_baseline = reference.method == "none"
    parts = [reference[is_baseline | (reference.bit_width == bits)] for bits in (4, 8)]
    asked = []
    monkeypatch.setattr(quantsweep, "load_results", lambda folders: asked.append(folders) or pd.concat(parts, ignore_index=True))
    monkeypatch.setattr(quantsweep, "load_samples", lambda _: pd.DataFrame(columns=SAMPLES))
    assert main(["one", "two"]) == 0
    out = capsys.readouterr().out
    assert asked == [[Path("results/one"), Path("results/two")]]
    assert "7 trials in several of these sweeps: the first sweep's values are shown (0 values of another sweep differ)" in out
    assert str(by_bit_width(reference[is_baseline | reference.bit_width.isin([4, 8])]).round(4).loc[(8, "64"), "int"]) in out
    assert (tmp_path / "results" / "one" / "bits_per_byte.png").is_file()
    assert main(["one", "three", "--metric", "ac"]) == 1
    assert "Did you mean 'acc'" in capsys.readouterr().err


def test_a_table_of_any_blocks_is_shown_and_only_the_figure_asks_for_one(
    reference: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = reference.block_size == 64, reference.block_size == 1024
    whole = reference.assign(
        granularity=reference.granularity.mask(small, "channel").mask(large, "tensor"), block_size=reference.block_size.mask(small | large)
    )
    monkeypatch.setattr(quantsweep, "load_results", lambda _: whole)
    monkeypatch.setattr(quantsweep, "load_samples", lambda _: None)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "channel" in out.partition("difference")[0]
    assert "no figure: it is of one block size, and there are channel, tensor. Choose one: --block-size channel" in out
    assert not any(tmp_path.iterdir())
    assert main([str(tmp_path), "--block-size", "tensor"]) == 0
    assert "figure (block size tensor): " in capsys.readouterr().out
    monkeypatch.setattr(quantsweep, "load_results", lambda _: whole[whole.granularity != "tensor"])
    assert main([str(tmp_path)]) == 0
    assert "figure (block size channel): " in capsys.readouterr().out


def test_a_sweep_of_which_nothing_is_done_says_how_many_trials_failed(
    reference: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results" / "e1" / "plan").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantsweep, "load_results", lambda _: reference.head(0))
    monkeypatch.setattr(quantsweep, "load_trials", lambda _: pd.DataFrame({"status": ["failed", "failed"]}))
    for words in (["e1"], ["table", "e1"], ["law", "e1"], ["k_bit_inference", "e1"]):
        assert main(words) == 1
        assert capsys.readouterr().err == "no results in e1: 2 trials failed. Why: quantsweep status e1\n"


SMOOTH = {"transform": "smooth", "method": "round_to_nearest+transform=smooth"}
ACTIVATION = {
    "activation.data_type": "int",
    "activation.symmetric": True,
    "activation.convention": "absmax_full",
    "activation.sites": "linear",
}


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (
            {**SMOOTH, "step_options": {"transform.smooth.alpha": 0.5, "transform.smooth.search": 0}},
            "int round_to_nearest+transform=smooth",
        ),
        ({**SMOOTH, "step_options": {"transform.smooth.alpha": 0.8}}, "int round_to_nearest+transform=smooth smooth.alpha=0.8"),
        ({"clipping": "mse", "step_options": {"clipping.grid": 50, "clipping.least": 0.2}}, "int clipping.grid=50"),
        ({"clipping": "percentile"}, "int clipping=percentile"),
        ({"compensation": "lorc", "step_options": {"compensation.rank": 4}}, "int compensation.rank=4"),
        (
            {"activation": "per_token", "activation_bit_width": 6, "step_options": ACTIVATION, "method": "w8a8"},
            "int w8a8 activation.bit_width=6",
        ),
        (
            {"method": "gptq_as_published", "rounding": "gptq", "method_options": {"damping": 0.1, "stream": "weights"}},
            "int gptq_as_published damping=0.1",
        ),
    ],
)
def test_labels_say_what_steps_have_otherwise_than_their_yaml(reference: pd.DataFrame, change: dict[str, Any], column: str) -> None:
    none = dict.fromkeys(("transform", "correction", "tuning", "compensation", "activation", "kv_cache", "scope"), "none")
    rows = reference.assign(**none, clipping="absmax", rounding=reference.method, step_options="{}", activation_bit_width=math.nan)
    written = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in change.items()}
    columns = set(by_bit_width(with_copies(rows, {"data_type": "int"}, **written)).columns)
    assert columns - set(by_bit_width(reference).columns) == {column}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metric", "acc"], "--task"),
        (["--metric", "ac"], "Did you mean 'acc'"),
        (["--task", "piqa"], "unknown task"),
        (["--block-size", "7"], "There are: 64, 1024"),
    ],
)
def test_what_the_command_cannot_show_is_said_without_a_traceback(
    reference: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(quantsweep, "load_results", lambda _: reference)
    assert main([str(tmp_path), *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_no_sweep_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "is not the folder of a sweep" in capsys.readouterr().err


def test_a_misspelt_study_is_told_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k_bit_inferense", str(tmp_path)]) == 1
    assert "unknown study 'k_bit_inferense'. Did you mean 'k_bit_inference'?" in capsys.readouterr().err
