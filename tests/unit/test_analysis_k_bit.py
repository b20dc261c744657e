"""The k-bit inference study on tables whose answer is known beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import quantsweep
from analysis import k_bit_claims
from analysis.__main__ import main
from analysis.claims import CONTRADICTED, OPEN, SUPPORTED, Finding
from analysis.correlation import correlation
from analysis.curves import contenders, curves, interpolate, mean_lead, plain_curves
from analysis.effects import Setting, paired
from analysis.equal_bits import best_bit_width, shares
from analysis.k_bit_claims import CLAIMS, claims
from analysis.k_bit_figures import curves_at_equal_bits, effects_of_type_and_block
from analysis.k_bit_inference import block_size_effects, data_type_effects
from analysis.k_bit_report import correlation_in_words
from analysis.scores import scores
from analysis.selection import block_order, refuse_other_requests, select, variants
from analysis.tables import against_baseline
from analysis.uncertainty import Scoreboard, proportion_interval
from quantsweep.errors import ConfigurationError, ResultsError
from quantsweep.evaluation.statistics import standard_error

pytestmark = pytest.mark.usefixtures("closed_figures")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial of a table that is made up."""

    model: str = "m1"
    family: str = "f"
    parameters: float = 2.0**20
    bits: int = 4
    data_type: str = "int"
    block: int = 64
    method: str = "round_to_nearest"
    fraction: float = 0.02
    log2_bits: float | None = None

    @property
    def bits_per_weight(self) -> float:
        return self.bits + 16 / self.block if self.bits < 16 else 16.0

    def row(self, task: str, metric: str, value: float, stderr: float, **more: Any) -> dict[str, Any]:
        baseline = self.bits == 16
        total = self.parameters * self.bits_per_weight if self.log2_bits is None else 2.0**self.log2_bits
        return {
            "trial_id": f"{self.model} {self.bits} {self.data_type} {self.block} {self.method} {self.fraction}",
            "model": self.model,
            "family": self.family,
            "method": "none" if baseline else self.method,
            "data_type": None if baseline else self.data_type,
            "bit_width": None if baseline else self.bits,
            "granularity": None if baseline else "block",
            "block_size": None if baseline else self.block,
            "data_type_options": "{}",
            "method_options": json.dumps({"fraction": self.fraction} if self.method == PROXY else {}),
            **dict.fromkeys(("symmetric", "scale_dtype", "block_axis", "calibration", "seed", "dtype")),
            "task": task,
            "task_key": f"{task}@1.0",
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "num_samples": 100,
            "num_nonfinite": 0,
            "num_tokens": 100,
            "is_primary": True,
            "num_parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "total_model_bits": total,
            "total_model_bits_without_embeddings": total / 2,
            **more,
        }

    def measured(
        self, accuracies: Mapping[str, tuple[float, float]] | None = None, text: tuple[float, float] | None = None
    ) -> list[dict[str, Any]]:
        """Rows of metrics: values and standard errors by task, and of bits per byte."""
        rows = [self.row(task, "acc", *measured) for task, measured in (accuracies or {}).items()]
        return rows + ([self.row("text", "bits_per_byte", *text)] if text else [])

    def observed(
        self, correct: Mapping[str, Sequence[float]] | None = None, text: tuple[Sequence[float], Sequence[int]] | None = None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of metrics and of samples, from outcomes by example."""
        rows, samples = [], []
        for task, outcomes in (correct or {}).items():
            value, stderr = float(np.mean(outcomes)), standard_error("mean", outcomes, 0.0)
            rows.append(self.row(task, "acc", value, stderr, num_samples=len(outcomes)))
            samples.append(rows[-1] | {"requests_hash": task, "correct": list(outcomes), "loglikelihood": [0.0], "num_bytes": None})
        if text:
            value = -sum(text[0]) / sum(text[1]) / math.log(2)
            rows.append(self.row("text", "bits_per_byte", value, standard_error("bits_per_byte", list(zip(*text, strict=True)), value)))
            samples.append(
                rows[-1] | {"requests_hash": "text", "correct": None, "loglikelihood": list(text[0]), "num_bytes": list(text[1])}
            )
        return rows, [sample | {"correct_norm": None} for sample in samples]


def frames(*observed: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.DataFrame([row for rows, _ in observed for row in rows]), pd.DataFrame([row for _, rows in observed for row in rows])


def board_of(rows: list[dict[str, Any]], score: str = "accuracy") -> Scoreboard:
    return Scoreboard(scores(pd.DataFrame(rows)), score)


# --- one row a trial ----------------------------------------------------------------------------------------------------


def test_the_score_is_the_mean_of_the_tasks_and_its_error_that_of_independent_tasks() -> None:
    table = scores(pd.DataFrame(Trial().measured({"a": (0.5, 0.03), "b": (0.7, 0.04)}, text=(1.5, 0.1))))
    (row,) = table.to_dict("records")
    assert (row["accuracy"], row["accuracy_stderr"]) == pytest.approx((0.6, 0.025))
    assert (row["bits_per_byte"], row["bits_per_byte_stderr"]) == (1.5, 0.1)
    assert (row["cross_entropy"], row["cross_entropy_stderr"]) == pytest.approx((1.5 * math.log(2), 0.1 * math.log(2)))
    assert (row["bits"], row["block"], row["label"], row["model"], row["family"]) == (4, "64", "int", "m1", "f")
    assert (row["total_model_bits"], row["total_model_bits_without_embeddings"]) == (2**20 * 4.25, 2**19 * 4.25)
    assert table.attrs["cross_entropy_per"] == "byte"


def test_a_trial_that_lacks_a_task_or_has_a_broken_one_has_no_mean() -> None:
    whole = Trial(model="m1").measured({"a": (0.5, 0.03), "b": (0.7, 0.04)})
    lacking = Trial(model="m2").measured({"a": (0.5, 0.03)})
    broken = Trial(model="m3").measured({"a": (0.5, 0.03), "b": (0.7, 0.04)})
    broken[1]["num_nonfinite"] = 1
    table = scores(pd.DataFrame([*whole, *lacking, *broken])).set_index("model")
    assert table["accuracy"].isna().to_dict() == {"m1": False, "m2": True, "m3": True}
    assert table["accuracy_stderr"].isna().to_dict() == {"m1": False, "m2": True, "m3": True}
    assert table["bits_per_byte"].isna().all()


def test_only_headline_accuracies_count_and_a_table_without_any_has_none() -> None:
    rows = [*Trial().measured({"a": (0.5, 0.03)}), Trial().row("a", "acc_norm", 0.9, 0.03, is_primary=False)]
    assert scores(pd.DataFrame(rows))["accuracy"].to_list() == [0.5]
    assert scores(pd.DataFrame(Trial().measured(text=(1.5, 0.1))))["accuracy"].isna().all()


def test_cross_entropy_is_a_tokens_where_samples_tell_bytes_and_stops_at_perplexity_100() -> None:
    results, samples = frames(
        Trial(model="good").observed(text=([-200.0, -100.0], [200, 100])),  # 3 nats a token of 100
        Trial(model="bad").observed(text=([-300.0, -200.0], [200, 100])),  # 5 nats
    )
    table = scores(results, samples).set_index("model")
    assert table["cross_entropy"].to_dict() == pytest.approx({"good": 3.0, "bad": math.log(100)})
    assert table["cross_entropy_stderr"]["bad"] == 0
    assert table.attrs["cross_entropy_per"] == "token"
    infinite = scores(pd.DataFrame(Trial().measured(text=(math.inf, math.nan))))
    assert infinite["cross_entropy"].to_list() == pytest.approx([math.log(100)])
    assert infinite["bits_per_byte"].to_list() == [math.inf]


def test_what_cannot_be_one_row_a_trial_is_refused() -> None:
    rows = pd.DataFrame(Trial().measured({"a": (0.5, 0.03)}, text=(1.5, 0.1)))
    with pytest.raises(ConfigurationError, match=r"several rows for task 'a@1.0' \(sweeps one, two\)"):
        scores(pd.concat([rows.assign(sweep="one"), rows.assign(sweep="two")]))
    with pytest.raises(ConfigurationError, match=r"evaluated in several ways: a@1\.0, a@1\.0\+limit30"):
        scores(pd.concat([rows, rows[rows.task == "a"].assign(task_key="a@1.0+limit30")]))
    with pytest.raises(ConfigurationError, match="several tasks have bits_per_byte: other, text"):
        scores(pd.concat([rows, rows[rows.task == "text"].assign(task="other", task_key="other@1.0")]))


PROXY, CENTERED = "outlier_dependent", "centering"


def test_options_of_the_method_are_told_apart_and_its_defaults_are_not_shown() -> None:
    kinds: list[dict[str, Any]] = [{"method": PROXY}, {"method": PROXY, "fraction": 0.1}, {"method": CENTERED}, {}]
    trials = [Trial(**kind, model=model) for model in ("m1", "m2") for kind in kinds]
    table = scores(pd.DataFrame([row for trial in trials for row in trial.measured({"a": (0.5, 0.03)})]))
    assert set(zip(table["label"], table["outlier_fraction"], table["centered"], strict=True)) == {
        ("int outlier_dependent", 0.02, False),
        ("int outlier_dependent fraction=0.1", 0.1, False),
        ("int centering", 0.0, True),
        ("int", 0.0, False),
    }


def test_a_planted_model_is_another_model_of_another_family() -> None:
    rows = pd.DataFrame([row for model in ("m1", "m2") for row in Trial(model=model).measured({"a": (0.5, 0.03)})])
    plain = rows.assign(plant_channels=math.nan, plant_scale=math.nan, plant_seed=math.nan)
    planted = rows.assign(plant_channels=2, plant_scale=16.0, plant_seed=0, trial_id=rows["trial_id"] + "p")
    table = scores(pd.concat([plain, planted]))
    assert set(zip(table["model"], table["family"], table["label"], strict=True)) == {
        *((model, "f", "int") for model in ("m1", "m2")),
        *((f"{model} planted 2×16", "f planted 2×16", "int") for model in ("m1", "m2")),
    }


# --- standard errors ----------------------------------------------------------------------------------------------------


def test_with_samples_a_single_trial_has_the_standard_errors_of_the_table() -> None:
    rng = np.random.default_rng(0)
    correct = {"a": rng.integers(0, 2, 50).astype(float), "b": rng.integers(0, 2, 30).astype(float)}
    results, samples = frames(Trial().observed(correct, text=(-rng.uniform(5, 50, 20), rng.integers(10, 40, 20))))
    table = scores(results, samples)
    (trial,) = table.index
    for score in ("accuracy", "bits_per_byte"):
        assert Scoreboard(table, score, samples).stderr({trial: 1.0}) == pytest.approx(table[f"{score}_stderr"].iloc[0], rel=1e-12)
        assert Scoreboard(table, score, samples).stderr({trial: -2.0}) == pytest.approx(2 * table[f"{score}_stderr"].iloc[0], rel=1e-12)


def test_a_difference_is_paired_by_example() -> None:
    a, b = Trial(block=64), Trial(block=1024)
    results, samples = frames(a.observed({"t": [1, 1, 0, 0]}), b.observed({"t": [1, 0, 0, 0]}))
    table = scores(results, samples)
    difference = dict(zip(table.index, (1.0, -1.0), strict=True))
    assert Scoreboard(table, "accuracy", samples).value(difference) == 0.25
    assert Scoreboard(table, "accuracy", samples).stderr(difference) == pytest.approx(0.25)  # 0 1 0 0: s = 1/2, n = 4
    assert Scoreboard(table, "accuracy").stderr(difference) == pytest.approx(math.sqrt(1 / 12 + 1 / 16))


def test_a_difference_of_bits_per_byte_is_paired_too() -> None:
    x, y, length = np.array([-10.0, -30.0, -20.0]), np.array([-11.0, -32.0, -27.0]), [20, 20, 20]
    results, samples = frames(Trial(block=64).observed(text=(x, length)), Trial(block=1024).observed(text=(y, length)))
    table = scores(results, samples)
    board = Scoreboard(table, "bits_per_byte", samples)
    difference = dict(zip(table.index, (1.0, -1.0), strict=True))
    assert board.value(difference) == pytest.approx(-(1 + 2 + 7) / 60 / math.log(2))
    assert board.stderr(difference) == pytest.approx(np.std([1, 2, 7], ddof=1) / math.sqrt(3) / 20 / math.log(2))


def test_what_cannot_be_paired_is_refused() -> None:
    results, samples = frames(Trial(block=64).observed({"t": [1, 0]}), Trial(block=1024).observed({"t": [1, 0]}))
    table = scores(results)
    with pytest.raises(ResultsError, match=r"different examples of task 't@1\.0'"):
        Scoreboard(table, "accuracy", samples.assign(requests_hash=["one", "two"]))
    with pytest.raises(ResultsError, match="no samples of trial"):
        Scoreboard(table, "accuracy", samples[:1]).stderr(dict.fromkeys(table.index, 1.0))


# --- curves -------------------------------------------------------------------------------------------------------------


def line(bits: int, start: float, end: float, *, stderr: float = 0.01, **axes: Any) -> list[dict[str, Any]]:
    """Two models of 20 and 24 log2 bits, with accuracies (and bits per byte 1 − accuracy)."""
    ends = ((20.0, "small", start), (24.0, "large", end))
    trials = [(Trial(**{"bits": bits, "model": model, "log2_bits": x, **axes}), y) for x, model, y in ends]
    return [row for trial, y in trials for row in trial.measured({"t": (y, stderr)}, text=(1 - y, stderr))]


def test_interpolation_is_linear_within_the_curve_and_nothing_outside() -> None:
    board = board_of(line(4, 0.2, 0.6))
    (curve,) = curves(board)
    assert (curve.family, curve.bits, curve.label, curve.block, curve.models) == ("f", 4, "int", "64", ("small", "large"))
    values, stderrs = interpolate(curve, [19.9, 20, 21, 22, 24, 24.1], board)
    assert values == pytest.approx([math.nan, 0.2, 0.3, 0.4, 0.6, math.nan], nan_ok=True)
    half, quarter = 0.01 * math.sqrt(0.5), 0.01 * math.sqrt(0.75**2 + 0.25**2)
    assert stderrs == pytest.approx([math.nan, 0.01, quarter, half, 0.01, math.nan], nan_ok=True)
    (without,) = curves(board, size="total_model_bits_without_embeddings")
    assert without.x == (19, 23)


def test_a_curve_does_not_pass_over_a_model_without_number() -> None:
    rows = line(4, 0.2, 0.6)
    rows += Trial(model="middle", log2_bits=22).measured({"t": (math.nan, math.nan)}, text=(math.inf, math.nan))
    for score in ("accuracy", "bits_per_byte"):
        board = board_of(rows, score)
        values, stderrs = interpolate(curves(board)[0], [20, 21, 22, 23, 24], board)
        assert np.isnan(values).tolist() == np.isnan(stderrs).tolist() == [False, True, True, True, False]


def test_two_models_of_one_size_make_no_curve() -> None:
    rows = line(4, 0.2, 0.6) + Trial(model="twin", log2_bits=24).measured({"t": (0.5, 0.01)})
    with pytest.raises(ConfigurationError, match="models large and twin of family 'f' have the same size"):
        curves(board_of(rows))


@pytest.mark.parametrize("score", ["accuracy", "bits_per_byte"])
def test_the_planted_winner_wins_its_share_with_a_known_lead(score: str) -> None:
    """3 bit from 0.3 to 0.5, 4 bit from 0.2 to 0.6: they cross at 22 of 20 to 24."""
    board = board_of(line(3, 0.3, 0.5, stderr=0.006) + line(4, 0.2, 0.6, stderr=0.008), score)
    best = best_bit_width(curves(board), board)
    at = best.set_index("x")
    assert (at.index.min(), at.index.max(), len(at)) == (20, 24, 101)
    assert at.loc[20.0, ["bits", "second_bits"]].to_list() == [3, 4]
    assert at.loc[24.0, ["bits", "second_bits"]].to_list() == [4, 3]
    assert at.loc[24.0, ["lead", "lead_stderr"]].to_list() == pytest.approx([0.1, 0.01])
    assert at.loc[21.0, ["lead", "lead_stderr"]].to_list() == pytest.approx([0.05, 0.01 * math.sqrt(0.75**2 + 0.25**2)])
    won = shares(best).set_index("bits")
    assert won["share"].to_dict() == pytest.approx({3: 0.5, 4: 0.5}, abs=0.01)
    # beyond |x − 22| = d the lead d/20 is more than 1.96 standard errors of 0.0071 to 0.01: from about 0.3 on
    assert won["distinguishable"].to_dict() == pytest.approx({3: 0.43, 4: 0.43}, abs=0.02)
    assert (won.loc[3, "high"], won.loc[4, "low"]) == pytest.approx((22, 22), abs=0.05)


def test_a_lead_within_noise_is_not_distinguishable() -> None:
    board = board_of(line(3, 0.30, 0.50, stderr=0.02) + line(4, 0.31, 0.51, stderr=0.02))
    won = shares(best_bit_width(curves(board), board))
    assert won[["bits", "share", "distinguishable"]].to_numpy().tolist() == [[4, 1.0, 0.0]]
    assert won["mean_lead"].to_list() == pytest.approx([0.01])


def test_the_best_data_type_is_taken_or_the_one_that_was_asked_for() -> None:
    rows = line(3, 0.3, 0.5) + line(4, 0.2, 0.4) + line(4, 0.35, 0.55, data_type="fp") + line(4, 0.9, 0.9, data_type="fp", block=128)
    board = board_of(rows)
    best = best_bit_width(curves(board), board)
    assert set(zip(best["bits"], best["label"], best["block"], strict=True)) == {(4, "fp", "64")}
    assert set(best_bit_width(curves(board), board, label="int")["bits"]) == {3}
    assert set(best_bit_width(curves(board), board, block=None)["block"]) == {"128"}


def test_a_data_type_of_one_model_is_no_contender_however_good() -> None:
    rows = line(4, 0.2, 0.4) + Trial(model="small", log2_bits=20, data_type="fp").measured({"t": (0.9, 0.01)})
    assert contenders(curves(board_of(rows)), 1.0, family="f")[4].label == "int"


def test_gaps_have_no_winner_and_curves_that_share_no_size_no_rows() -> None:
    rows = line(3, 0.3, 0.5) + line(4, 0.2, 0.6)
    gap = [*rows, *Trial(bits=3, model="middle", log2_bits=22).measured({"t": (math.nan, math.nan)})]
    board = board_of(gap)
    best = best_bit_width(curves(board), board)
    assert best.dropna(subset="bits")["x"].to_list() == [20, 24]
    assert shares(best)["share"].sum() == pytest.approx(2 / 101)
    far = board_of([*line(3, 0.3, 0.5), *[row | {"total_model_bits": row["total_model_bits"] * 2**9} for row in line(4, 0.2, 0.6)]])
    assert best_bit_width(curves(far), far).empty
    assert shares(best_bit_width(curves(far), far)).empty


# --- effects ------------------------------------------------------------------------------------------------------------


def test_effects_are_means_over_models_paired_by_example() -> None:
    outcomes = {
        ("m1", "int", 64): [1, 1, 1, 0],
        ("m1", "int", 1024): [1, 0, 1, 0],
        ("m1", "fp", 64): [1, 1, 1, 1],
        ("m2", "int", 64): [1, 1, 0, 0],
        ("m2", "int", 1024): [0, 1, 0, 0],
        ("m2", "fp", 64): [1, 1, 0, 0],
        ("m3", "int", 64): [1, 1, 1, 1],  # without counterparts
    }
    trials = [(Trial(model=model, data_type=kind, block=block), right) for (model, kind, block), right in outcomes.items()]
    results, samples = frames(*(trial.observed({"t": right}) for trial, right in trials))
    board = Scoreboard(scores(results, samples), "accuracy", samples)
    (block,) = block_size_effects(board).dropna(subset="difference").to_dict("records")
    assert (block["label"], block["block"], block["against"], block["models"]) == ("int", "64", "1024", 2)
    # mean over the two models of the differences by example: ½ (0 1 0 0) + ½ (1 0 0 0)
    expected = np.array([0.5, 0.5, 0, 0])
    assert (block["difference"], block["stderr"]) == pytest.approx((expected.mean(), expected.std(ddof=1) / 2))
    assert block["extra_bits"] == pytest.approx(16 / 64 - 16 / 1024)
    (kind,) = data_type_effects(board).dropna(subset="difference").to_dict("records")
    assert (kind["block"], kind["label"], kind["against"], kind["models"], kind["extra_bits"]) == ("64", "fp", "int", 2, 0)
    assert (kind["difference"], kind["stderr"]) == pytest.approx((0.125, np.std([0, 0, 0, 0.5], ddof=1) / 2))


def test_a_setting_against_itself_is_zero_without_error(reference: pd.DataFrame) -> None:
    board = Scoreboard(scores(reference), "accuracy")
    same = paired(board, Setting(bits=4, label="int", block="64"), Setting(bits=4, label="int", block="64"))
    assert (board.value(same), board.stderr(same)) == (0, 0)


def test_pearsons_r_and_where_it_has_no_interval() -> None:
    models = ["a", "a", "b", "c", "d"]
    table = pd.DataFrame({"model": models, "cross_entropy": [1.0, 2.0, 3.0, 4.0, math.nan], "accuracy": [4.0, 2.0, 3.0, 1.0, 9.0]})
    found = correlation(table)
    assert (found.r, found.n) == (pytest.approx(-0.8), 4)
    assert math.isnan(found.low), "three models with both"
    four = correlation(table.assign(model=["a", "b", "c", "d", "d"]))
    assert -1 - 1e-9 <= four.low <= four.r <= four.high <= 1 + 1e-9
    assert correlation(table.assign(model=["a", "b", "c", "d", "d"])) == four, "the seed is fixed"
    assert math.isnan(correlation(table.assign(accuracy=0.5)).r)
    assert correlation_in_words(correlation(table.assign(accuracy=0.5))).startswith("no r of cross entropy and accuracy, ")


# --- coverage -----------------------------------------------------------------------------------------------------------


def test_intervals_of_leads_cover_the_truth_95_times_in_100() -> None:
    """Two models at two bit widths answer the same examples, whose difficulty they share by three quarters."""
    rng = np.random.default_rng(7)
    truth = {("small", 3): 0.50, ("large", 3): 0.60, ("small", 4): 0.55, ("large", 4): 0.75}
    trials = {key: Trial(model=key[0], bits=key[1], log2_bits=20.0 if key[0] == "small" else 22.0) for key in truth}
    covered, as_if_independent, repetitions, n = 0, 0, 300, 200
    for _ in range(repetitions):
        difficulty, shared = rng.uniform(size=n), rng.uniform(size=n) < 0.75
        answers = {key: (np.where(shared, difficulty, rng.uniform(size=n)) < p).astype(float) for key, p in truth.items()}
        results, samples = frames(*(trials[key].observed({"t": answers[key]}) for key in truth))
        table = scores(results, samples)
        three, four = curves(Scoreboard(table, "accuracy"))
        lead = mean_lead(four, three, 11)  # the mean over x of two straight lines: that of their ends
        board = Scoreboard(table, "accuracy", samples)
        error = abs(board.value(lead) - 0.10)
        covered += error < board.margin(lead)
        as_if_independent += error < Scoreboard(table, "accuracy").margin(lead)
    assert abs(covered / repetitions - 0.95) < 3 * math.sqrt(0.95 * 0.05 / repetitions)
    assert as_if_independent / repetitions > covered / repetitions + 0.01


@pytest.mark.parametrize("number", [4, 8, 20])
@pytest.mark.parametrize("rho", [-0.5, -0.95])
def test_the_interval_of_r_covers_where_trials_are_versions_of_models(number: int, rho: float) -> None:
    """Models of ten trials each, which differ by much less than the models do; the truth is that of many models."""
    rng = np.random.default_rng(3)
    repetitions, as_if_independent, covered = 400, 0, 0
    models = np.repeat(np.arange(number), 10)
    for _ in range(repetitions):
        x, e = rng.standard_normal((2, number))
        x, y = x[models], (rho * x + math.sqrt(1 - rho**2) * e)[models]
        jitter = rng.standard_normal((2, len(models))) * 1e-3
        found = correlation(pd.DataFrame({"model": models, "cross_entropy": x + jitter[0], "accuracy": y + jitter[1]}))
        covered += found.low < rho < found.high
        as_if_independent += abs(math.atanh(found.r) - math.atanh(rho)) < 1.96 / math.sqrt(found.n - 3)
    assert covered / repetitions > 0.93
    assert as_if_independent / repetitions < 0.6


def test_intervals_of_few_examples_cover_the_truth() -> None:
    """A rare right answer among 20 (± 1.96 standard errors covers .33), and pairs of which few differ."""
    rng = np.random.default_rng(11)
    right = rng.binomial(20, 0.02, size=1_000)
    intervals = {k: proportion_interval(int(k), 20) for k in set(right)}
    assert np.mean([intervals[k][0] <= 0.02 <= intervals[k][1] for k in right]) > 0.95
    first, second = Trial(model="m1"), Trial(model="m2")
    covered, with_difference = 0, 0
    for _ in range(100):
        kind = rng.choice(3, p=[0.02, 0.005, 0.975], size=200)  # the second alone right, the first alone, the same
        shared = rng.uniform(size=200) < 0.5
        answers = [np.where(kind == 2, shared, kind == alone).astype(float) for alone in (1, 0)]
        results, samples = frames(first.observed({"t": answers[0]}), second.observed({"t": answers[1]}))
        board = Scoreboard(scores(results, samples), "accuracy", samples)
        ids = dict(zip(board.table["model"], board.table.index, strict=True))
        low, high = board.interval({ids["m2"]: 1.0, ids["m1"]: -1.0})
        with_difference += not math.isnan(low)
        covered += low <= 0.015 <= high
    assert with_difference > 95
    assert covered / with_difference > 0.92


def test_the_interval_of_one_accuracy_is_exact_and_that_of_means_is_t() -> None:
    results, samples = frames(Trial().observed({"t": [0.0] * 20}))
    (trial,) = results["trial_id"].unique()
    for outcomes in (samples, None):
        board = Scoreboard(scores(results, outcomes), "accuracy", outcomes)
        assert board.interval({trial: 1.0}) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    results, samples = frames(Trial().observed({"t": [0.0, 1.0] * 5, "u": [1.0, 1.0, 0.0, 1.0]}))
    assert Scoreboard(scores(results), "accuracy").degrees({trial: 1.0}) == 3
    board = Scoreboard(scores(results, samples), "accuracy", samples)
    assert 3 < board.degrees({trial: 1.0}) < 13
    low, high = board.interval({trial: 1.0})
    assert (low + high) / 2 == pytest.approx(0.625)
    assert (high - low) / 2 > 1.96 * board.stderr({trial: 1.0})


def test_what_quantizing_costs_is_known_document_by_document() -> None:
    rng = np.random.default_rng(5)
    difficulty = rng.normal(2.0, 1.0, size=(2, 60))
    loss = {16: np.zeros((2, 60)), 4: rng.normal(0.1, 0.02, size=(2, 60)), 3: rng.normal(0.5, 0.1, size=(2, 60))}
    observed = [
        Trial(model=f"m{place}", bits=bits).observed(text=(list(-100 * (difficulty[place] + lost[place])), [100] * 60))
        for bits, lost in loss.items()
        for place in range(2)
    ]
    results, samples = frames(*observed)
    difference, margin = against_baseline(results, samples)
    assert difference["int"].to_list() == pytest.approx([loss[bits].mean() / math.log(2) for bits in (3, 4)])
    by_document = loss[4].mean(axis=0)  # both models answer the same documents: their losses are added, document by document
    stderr = float(np.std(by_document, ddof=1)) / math.sqrt(60) / math.log(2)
    assert margin.loc[(4, "64"), "int"] == pytest.approx(stderr * stats.t.ppf(0.975, 59), rel=0.05)
    alone = against_baseline(results)[1].loc[(4, "64"), "int"]
    assert alone > 20 * margin.loc[(4, "64"), "int"]
    without = results[~((results["model"] == "m1") & (results["method"] == "none"))]
    assert against_baseline(without, samples)[0].isna().all().all()
    with pytest.raises(ConfigurationError, match="word_perplexity have no standard error"):
        against_baseline(results, samples, metric="word_perplexity")


# --- what has no common mean --------------------------------------------------------------------------------------------


def test_planted_and_plain_models_are_not_averaged_from_python_either() -> None:
    rows = pd.DataFrame([row for bits in (3, 4) for row in Trial(bits=bits).measured({"a": (0.5, 0.03)})])
    planted = rows.assign(plant_channels=2, plant_scale=16.0, plant_seed=0, trial_id=rows["trial_id"] + "p")
    both = pd.concat([rows.assign(plant_channels=math.nan, plant_scale=math.nan, plant_seed=math.nan), planted])
    table = scores(both)
    board = Scoreboard(table, "accuracy")
    for average in (lambda: claims(both), lambda: block_size_effects(board), lambda: data_type_effects(board), lambda: correlation(table)):
        with pytest.raises(ConfigurationError, match=r"plain, planted 2×16.*variants"):
            average()
    assert {name: len(of) for name, of in variants(both)} == {"plain models": 2, "planted 2×16": 2}
    for _, of in variants(both):
        claims(of)


def test_one_name_with_several_requests_is_refused() -> None:
    rows = pd.DataFrame([row for bits in (3, 4) for row in Trial(bits=bits).measured({"a": (0.5, 0.03)})])
    mixed = rows.assign(requests_hash=["first", "second"])
    with pytest.raises(ConfigurationError, match=r"different requests under the name 'a@1\.0': requests_hash first \(1 trial\), second"):
        scores(mixed)
    with pytest.raises(ConfigurationError, match="different requests"):
        select(mixed, metric="acc")
    scores(rows.assign(requests_hash=["first", None]))
    refuse_other_requests(mixed.assign(protocol="joined_paragraphs", model=["m", "n"]))  # windows are those of each model's tokenizer
    with pytest.raises(ConfigurationError, match="different requests"):
        refuse_other_requests(mixed.assign(protocol="joined_paragraphs", model="m"))


# --- claims -------------------------------------------------------------------------------------------------------------

PAPER = ("lambada_openai", "piqa", "winogrande", "hellaswag")
MODELS = {"opt": ("opt", (1e9, 4e9, 16e9, 64e9)), "pythia": ("pyt", (0.5e9, 2e9, 8e9, 20e9))}
LOSS = {3: 0.02, 4: 0.005, 5: 0.004, 6: 0.003, 7: 0.002, 8: 0.001, 16: 0.0}
HELPS_AT_4 = {("fp", 64): 0.0015, ("quantile", 64): 0.003, ("fp", 1024): 0.0, ("quantile", 1024): 0.0}


def as_in_the_paper(trial: Trial) -> float:
    """Accuracy where everything that the paper claims is true."""
    accuracy = 0.5 + 0.03 * math.log2(trial.parameters / 1e9) - LOSS[trial.bits]
    if trial.bits == 3 and trial.parameters > 1e10:
        return 0.60 if trial.method == PROXY else 0.36
    if trial.bits == 4:
        accuracy += HELPS_AT_4.get((trial.data_type, trial.block), 0.0) + (0.001 if trial.block == 64 else 0.0)
    return accuracy


def study(
    accuracy: Callable[[Trial], float] = as_in_the_paper,
    *,
    stderr: float = 1e-5,
    tasks: Sequence[str] = PAPER,
    keep: Callable[[Trial], bool] = lambda _: True,
) -> pd.DataFrame:
    """The paper's grid on eight models of two families."""
    rows: list[dict[str, Any]] = []
    for family, (name, sizes) in MODELS.items():
        for size in sizes:
            axes: dict[str, Any] = {"family": family, "model": f"{name}-{size / 1e9:g}b", "parameters": size}
            quantized = [
                Trial(**axes, bits=bits, data_type=data_type, block=block)
                for bits in range(3, 9)
                for data_type in ("int", "fp", "quantile", "dynamic")
                for block in (64, 1024)
            ]
            proxies = [Trial(**axes, bits=bits, method=PROXY) for bits in (3, 4)]
            for trial in filter(keep, [Trial(**axes, bits=16), *quantized, *proxies]):
                value = accuracy(trial)
                text = (2.0 - 2 * value, stderr)  # perfectly correlated with accuracy
                rows += trial.measured(dict.fromkeys(tasks, (value, stderr)), text=text)
    return pd.DataFrame(rows)


def found(frame: pd.DataFrame, claim: str) -> Finding:
    (finding,) = [finding for finding in claims(frame) if finding.claim.id == claim]
    return finding


@pytest.fixture
def per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if samples had told how many bytes a token has."""

    def told(*arguments: Any) -> pd.DataFrame:
        table = scores(*arguments)
        table.attrs["cross_entropy_per"] = "token"
        return table

    monkeypatch.setattr(k_bit_claims, "scores", told)


def test_without_samples_perplexity_is_not_a_tokens() -> None:
    finding = found(study(), "f")
    assert (finding.verdict, finding.missing) == (OPEN, ("the samples: perplexity is a token's, and the tables alone have bits per byte",))


def test_the_claims_are_data() -> None:
    assert [claim.id for claim in CLAIMS] == list("abcdef")
    assert {claim.source for claim in CLAIMS} == {"arXiv:2212.09720"}


@pytest.mark.usefixtures("per_token")
@pytest.mark.parametrize("claim", "abcdef")
def test_where_the_paper_is_right_each_claim_is_supported_and_where_errors_are_large_none_is(claim: str) -> None:
    finding = found(study(), claim)
    assert (finding.verdict, finding.missing) == (SUPPORTED, ())
    assert finding.num_models > 0
    assert "opt" in finding.scope
    assert finding.low <= finding.effect <= finding.high
    if claim != "f":  # its interval is over models
        assert found(study(stderr=0.3), claim).verdict == OPEN


def changed(where: Callable[[Trial], bool], by: float) -> Callable[[Trial], float]:
    return lambda trial: as_in_the_paper(trial) + (by if where(trial) else 0.0)


@pytest.mark.parametrize(
    ("claim", "accuracy"),
    [
        ("a", changed(lambda t: t.bits == 5, 0.05)),
        ("a", changed(lambda t: t.bits == 8 and t.family == "opt", 0.2)),
        ("b", changed(lambda t: t.bits == 3 and t.model == "opt-64b", 0.2)),
        ("c", changed(lambda t: t.bits == 4 and t.data_type == "quantile" and t.block == 64, -0.01)),
        ("c", changed(lambda t: t.bits == 4 and t.block == 64, -0.01)),
        ("c", changed(lambda t: t.bits == 5, 0.05)),
        ("d", changed(lambda t: t.bits == 6 and t.block == 64, 0.01)),
        ("d", changed(lambda t: t.bits == 7 and t.data_type == "fp", 0.01)),
        ("e", changed(lambda t: t.bits == 3 and t.method == PROXY and t.parameters > 1e10, -0.13)),
        ("e", changed(lambda t: t.bits == 3 and t.method == PROXY, 0.3)),
        ("e", changed(lambda t: t.bits == 4 and t.method == PROXY, 0.02)),
    ],
)
def test_a_planted_exception_contradicts_its_claim(claim: str, accuracy: Callable[[Trial], float]) -> None:
    finding = found(study(accuracy), claim)
    assert finding.verdict == CONTRADICTED
    assert finding.high < 0


@pytest.mark.parametrize(
    ("claim", "keep", "missing"),
    [
        ("a", lambda t: t.bits != 5, "opt at 5 bit"),
        ("a", lambda t: t.family == "opt", "1 more families"),
        ("b", lambda t: t.parameters < 1e10, "opt models above 10 billion parameters"),
        ("b", lambda t: t.family == "opt", "pythia models above 10 billion parameters"),
        ("c", lambda t: t.bits != 5, "5-bit trials at block 1024"),
        ("c", lambda t: t.data_type != "quantile", "4-bit trials of quantile and int"),
        ("d", lambda t: t.bits != 7, "7-bit trials of block 64 over 1024"),
        ("e", lambda t: t.method != PROXY, "outlier_dependent"),
        ("e", lambda t: t.parameters < 1e10, "models that are unstable at 3 bit"),
        ("f", lambda t: t.model == "opt-1b" and t.bits == 16, "4 or more"),
    ],
)
def test_what_is_not_in_the_table_is_named_and_nothing_is_concluded(claim: str, keep: Callable[[Trial], bool], missing: str) -> None:
    finding = found(study(keep=keep), claim)
    assert finding.verdict == OPEN
    assert any(missing in lack for lack in finding.missing), finding.missing


def test_a_missing_part_does_not_hide_a_contradiction() -> None:
    assert found(study(changed(lambda t: t.bits == 5, 0.05), keep=lambda t: t.bits != 7), "a").verdict == CONTRADICTED


def test_answers_that_never_differ_are_no_evidence_of_no_effect() -> None:
    rng = np.random.default_rng(2)
    answers = rng.integers(0, 2, 12)
    grid = [
        Trial(bits=bits, data_type=kind, block=block)
        for bits in (6, 7, 8)
        for kind in ("int", "fp", "quantile", "dynamic")
        for block in (64, 1024)
    ]
    results, samples = frames(*(trial.observed({"piqa": answers}) for trial in grid))
    (finding,) = [finding for finding in claims(results, samples) if finding.claim.id == "d"]
    assert (finding.verdict, finding.statements) == (OPEN, ())
    assert finding.missing[0] == "more examples (no answer differs): 6 bit: 0.005 less the gain of block 64 over 1024"


def test_the_random_level_must_be_known_and_the_baseline_above_it() -> None:
    unknown = found(study(tasks=("piqa", "riddles")), "b")
    assert (unknown.verdict, unknown.missing[0]) == (OPEN, "the random level of riddles")
    blind = found(study(lambda _: 0.2), "b")
    assert blind.verdict == OPEN
    assert "a baseline of opt-64b that is above the random level 0.35" in blind.missing
    (statement, _) = found(study(), "b").statements
    assert statement.estimate == pytest.approx(0.5 * (0.68 - 0.35) - (0.36 - 0.35))


@pytest.mark.usefixtures("per_token")
def test_a_weak_correlation_counts_against_the_claim_only_beyond_the_errors_of_accuracies() -> None:
    rng = np.random.default_rng(5)
    frame = study()
    shaken = frame["trial_id"].map({trial: rng.normal(0, 0.08) for trial in frame["trial_id"].unique()})
    weak = frame.assign(value=frame["value"] + shaken.where(frame["metric"] == "acc", 0.0))
    assert found(weak, "f").verdict == CONTRADICTED
    uncertain = weak.assign(stderr=0.2)
    assert found(uncertain, "f").verdict == OPEN
    assert found(uncertain, "f").effect == found(weak, "f").effect


def test_examples_that_shake_all_trials_alike_are_no_noise_between_them() -> None:
    rng = np.random.default_rng(6)
    shared, alone, variance = [], [], []
    for _ in range(25):
        # 20 trials of one ability: whatever their accuracies differ by is noise.
        item, own = rng.standard_normal(60), rng.standard_normal((20, 60))
        observed = [Trial(model=f"m{i}").observed({"t": (item + 0.3 * e > 0).astype(float)}) for i, e in enumerate(own)]
        table = scores(pd.DataFrame([row for rows, _ in observed for row in rows]))
        samples = pd.DataFrame([row for _, rows in observed for row in rows])
        shared.append(Scoreboard(table, "accuracy", samples).noise(list(table.index)))
        alone.append(Scoreboard(table, "accuracy").noise(list(table.index)))
        variance.append(table["accuracy"].var())
    assert np.mean(shared) == pytest.approx(np.mean(variance), rel=0.2)
    assert np.mean(alone) > 2 * np.mean(variance)


def test_gains_of_blocks_and_of_a_bit_are_compared_where_both_are_known() -> None:
    def accuracy(trial: Trial) -> float:
        block, bit = {"int": (0.10, 0.10)}.get(trial.data_type, (0.01, 0.05))
        return 0.5 + (block if trial.block == 64 else 0.0) + (bit if trial.bits > 4 else 0.0)

    lacks = study(accuracy, keep=lambda trial: trial.data_type == "int" or trial.bits != 5)
    assert found(lacks, "c").statements[-1].estimate == pytest.approx(0.10 - 0.8 * 0.10)
    lacks = study(accuracy, keep=lambda trial: trial.data_type == "dynamic" or trial.bits != 5)
    assert found(lacks, "c").statements[-1].estimate == pytest.approx(0.01 - 0.8 * 0.05)


def test_claims_on_bits_per_byte_are_those_that_it_can_tell() -> None:
    findings = {finding.claim.id: finding.verdict for finding in claims(study(), score="bits_per_byte")}
    assert findings == {"a": SUPPORTED, "c": SUPPORTED, "d": SUPPORTED}


# --- the committed table ------------------------------------------------------------------------------------------------


def test_the_reference_table(reference: pd.DataFrame) -> None:
    table = scores(reference)
    assert len(table) == 175
    headline = reference[reference.is_primary & reference.metric.isin(("acc", "acc_norm"))]
    assert table["accuracy"].to_dict() == pytest.approx(headline.groupby("trial_id").value.mean().to_dict())
    board = Scoreboard(table, "bits_per_byte")
    int4 = block_size_effects(board).set_index(["bits", "label"]).loc[(4, "int")]
    rows = reference[(reference.metric == "bits_per_byte") & (reference.data_type == "int") & (reference.bit_width == 4)]
    means = rows.groupby("block_size").value.mean()
    assert int4["difference"] == pytest.approx(means[64] - means[1024])
    assert (int4["extra_bits"], int4["models"]) == (pytest.approx(15 / 64), 7)
    won = shares(best_bit_width(curves(board), board)).set_index(["family", "bits"])
    assert won.loc[("mini-neox", 4), "share"] == 1
    assert (won["distinguishable"] == 0).all()  # 30 documents, not paired: nothing can be told


def test_the_reference_table_supports_no_claim_of_models_it_does_not_have(reference: pd.DataFrame) -> None:
    findings = {finding.claim.id: finding for finding in claims(reference)}
    assert {finding.verdict for finding in findings.values()} == {OPEN}
    assert all(any(f"at {bits} bit" in lack for lack in findings["a"].missing) for bits in (5, 6, 7))
    assert all(finding.missing for finding in findings.values())


# --- figures and the command --------------------------------------------------------------------------------------------


def test_figures_show_the_best_curves_and_paired_effects() -> None:
    board = board_of(study().to_dict("records"))
    figure = curves_at_equal_bits(board)
    assert [axis.get_title().splitlines()[0] for axis in figure.axes] == ["opt", "pythia"]
    assert "4: quantile" in figure.axes[0].get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*(f"{bits}-bit" for bits in range(3, 9)), "16-bit baseline"]
    (four,) = [line for line in figure.axes[0].lines if line.get_color() == "C2"]
    assert np.asarray(four.get_xdata())[0] == pytest.approx(math.log2(1e9 * 4.25))
    assert np.asarray(four.get_ydata())[0] == pytest.approx(0.5 - 0.005 + 0.004)
    effects = effects_of_type_and_block(board)
    lines = {c.get_label(): np.asarray(c.lines[0].get_ydata()) for c in effects.axes[1].containers}
    assert [label.get_text() for label in effects.axes[1].get_xticklabels()] == ["1024", "64"]
    assert lines["int"] == pytest.approx([0, 0.001])
    assert lines["quantile"] == pytest.approx([0, 0.004])
    with pytest.raises(ConfigurationError, match=r"block size 32. There are: 64, 1024$"):
        curves_at_equal_bits(board, block="32")


def test_the_command_prints_tables_and_claims_and_draws_the_same_bytes_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    trials = [
        Trial(model=f"m{size}", parameters=2.0**size, bits=bits, data_type=kind, block=block)
        for size in (20, 22)
        for bits in (3, 4)
        for kind in ("int", "fp")
        for block in (64, 1024)
    ]
    results, samples = frames(*(t.observed({"mini_cloze": rng.integers(0, 2, 40)}, (-rng.uniform(20, 40, 9), [40] * 9)) for t in trials))
    monkeypatch.setattr(quantsweep, "load_results", lambda folders: results if folders == [tmp_path, tmp_path] else None)
    monkeypatch.setattr(quantsweep, "load_samples", lambda _: samples)
    assert main(["k_bit_inference", str(tmp_path), str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "mean zero-shot accuracy: best bit width at equal total model bits" in out
    assert "bits per byte: best bit width at equal total model bits without embeddings" in out
    assert out.count("NOT ENOUGH EVIDENCE") == 6 + 3
    names = {
        f"k_bit_{what}_{score}.{suffix}"
        for what in ("curves", "effects")
        for score in ("accuracy", "bits_per_byte")
        for suffix in ("png", "svg")
    }
    names |= {f"k_bit_{what}_{score}.csv" for what in ("block_size", "data_type") for score in ("accuracy", "bits_per_byte")}
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == names
    table = pd.read_csv(tmp_path / "k_bit_block_size_bits_per_byte.csv")
    assert set(zip(table["bits"], table["label"], table["block"], table["against"], strict=True)) == {
        (bits, kind, 64, 1024) for bits in (3, 4) for kind in ("int", "fp")
    }
    assert main(["k_bit_inference", str(tmp_path), str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert not any(b"<dc:date>" in content for content in first.values())


def test_the_command_says_what_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k_bit_inference", str(tmp_path)]) == 1
    assert "is not the folder of a sweep" in capsys.readouterr().err


def test_winners_and_figures_are_of_plain_rounding() -> None:
    """A proxy trial that is best at its bits is no candidate for the best data type of its width."""
    kinds: list[dict[str, Any]] = [{}, {"method": PROXY}]
    trials = [Trial(model=f"m{n}", parameters=2.0**n, bits=bits, **kind) for n in (20, 22) for bits in (3, 4) for kind in kinds]
    board = board_of([row for t in trials for row in t.measured({"a": (0.6 if t.method == PROXY else 0.5, 0.01)})])
    assert {curve.label for curve in curves(board)} == {"int", "int outlier_dependent"}
    assert {curve.label for curve in plain_curves(curves(board))} == {"int"}
    assert "outlier_dependent" not in curves_at_equal_bits(board).axes[0].get_title()


def test_block_sizes_are_in_order() -> None:
    rows = [row for block in (64, 128, 1024) for row in line(4, 0.2, 0.4, block=block)]
    effects = block_size_effects(board_of(rows))
    assert list(zip(effects["block"], effects["against"], strict=True)) == [("64", "1024"), ("128", "1024")]
    assert sorted(["tensor", "1024", "64"], key=block_order) == ["64", "1024", "tensor"]
