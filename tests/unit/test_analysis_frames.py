"""Tables of anybody: what is read, what is refused, and answers that are known beforehand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.__main__ import main
from analysis.boards import board, mean_over_seeds, mean_over_tasks, one_score, side_by_side
from analysis.claims import CONTRADICTED, OPEN
from analysis.correlation import correlation
from analysis.curves import curves, interpolate
from analysis.degradation import block_errors, degradation, mean_degradation, recovery
from analysis.effects import factor_effects
from analysis.equal_bits import best_bit_width, leads, pareto, shares
from analysis.frames import checked, from_results, read_table
from analysis.k_bit_claims import four_bit_wins
from analysis.scores import scores
from analysis.tables import against_baseline
from analysis.uncertainty import Scoreboard
from quantsweep.errors import ConfigurationError

SIZES = {"s": 1e6, "m": 4e6, "l": 16e6}
LOST = {16.0: 0.0, 4.0: 0.01, 3.0: 0.03, 1.58: 0.2}


def accuracy(parameters: float, bits: float) -> float:
    return 0.4 + 0.05 * math.log2(parameters / 1e6) - LOST[bits]


def table(**more: Any) -> pd.DataFrame:
    """A family of three sizes at four precisions, one of them no whole number."""
    rows = [
        {"model": model, "family": "f", "parameters": size, "bits": bits, "metric": "acc", "value": accuracy(size, bits)}
        for model, size in SIZES.items()
        for bits in LOST
    ]
    return pd.DataFrame(rows).assign(**more)


# --- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_of_others_is_read_under_our_names(tmp_path: Path, suffix: str) -> None:
    theirs = table(task="lambada", num_samples=500).rename(columns={"bits": "bit_width", "parameters": "size"})
    path = tmp_path / f"table{suffix}"
    theirs.to_csv(path, index=False) if suffix == ".csv" else theirs.to_parquet(path)
    found = read_table(path, rename={"bit_width": "bits", "size": "parameters"})
    pd.testing.assert_frame_equal(found, checked(table(task="lambada", num_samples=500)), check_dtype=False, check_like=True)
    assert found["is_baseline"].sum() == 3
    with pytest.raises(ConfigurationError, match=r"--rename size=parameters\n.*--rename bit_width=bits"):
        read_table(path)
    with pytest.raises(ConfigurationError, match=r"column 'bit_widht'.*Did you mean 'bit_width'"):
        read_table(path, rename={"bit_widht": "bits"})


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"must end in \.csv or \.parquet"):
        read_table(tmp_path / "table.xlsx")
    with pytest.raises(ConfigurationError, match="there is no file"):
        read_table(tmp_path / "table.csv")
    for name in ("empty.csv", "broken.parquet"):
        (tmp_path / name).write_text("")
        with pytest.raises(ConfigurationError, match="cannot be read as"):
            read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": 76.3}, "acc such as 76.3: a share of 1 is expected; if these are per cent, divide by 100"),
        ({"parameters": 7.0}, "'parameters' has 7: it counts parameters"),
        ({"tokens": 300.0}, "'tokens' has 300: it counts tokens"),
        ({"bits": 0.0}, "'bits' has 0 to 0"),
        ({"total_bits": 2e6}, "not bytes"),
        ({"stderr": -1.0}, "'stderr' has numbers below 0"),
        ({"num_samples": 0}, "'num_samples' has numbers below 1"),
        ({"metric": "perplexity"}, "a perplexity is 1 or more; if these are nats, call the metric loss"),
        ({"metric": "goodness"}, "whether more of goodness is better: add a column higher_is_better"),
        ({"family": None}, "column 'family' is empty in 12 rows"),
        ({"bits": "W4A16"}, "column 'bits' holds 'W4A16' where a number is expected"),
        ({"family": range(12)}, "model 'l' is of several families"),
    ],
)
def test_units_and_holes_are_told_in_words(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        checked(table(**change))


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigurationError) as refused:
        checked(table(value=76.3, parameters=7.0, stderr=-1.0))
    assert str(refused.value).count("\n  - ") == 3


def test_rows_that_stand_twice_are_refused_with_what_sets_them_apart() -> None:
    twice = pd.concat([table(imatrix="no"), table(imatrix="yes")[lambda d: d.bits < 16]])
    with pytest.raises(ConfigurationError, match=r"'s' has 2 rows of one configuration at 4 bit with acc: .*; differing in imatrix"):
        checked(twice)
    assert len(checked(twice.rename(columns={"imatrix": "calibration"}))) == 21
    noise = table().query("bits == 16").assign(value=lambda d: d.value + 0.015)
    with pytest.raises(ConfigurationError, match=r"'s' has 2 baselines with acc: 0\.4, 0\.415"):
        checked(pd.concat([table(), noise]))


def test_scores_that_do_not_belong_together_are_never_mixed() -> None:
    both = checked(pd.concat([table(), table(metric="perplexity", value=9.0)]))
    with pytest.raises(ConfigurationError, match=r"never mixed: acc, perplexity\. Choose one: --metric acc"):
        board(both)
    with pytest.raises(ConfigurationError, match="metric"):
        board(both, metric="acc_normal")
    tasks = checked(pd.concat([table(task="a"), table(task="b")]))
    with pytest.raises(ConfigurationError, match="several tasks have acc: a, b"):
        board(tasks)
    versions = checked(table(lm_eval_version=["0.4.2"] * 6 + ["0.4.9"] * 6))
    with pytest.raises(ConfigurationError, match=r"several kinds of 'lm_eval_version' \(0\.4\.2, 0\.4\.9\)"):
        board(versions)
    seeds = checked(pd.concat([table(seed=seed)[lambda d: d.bits < 16] for seed in (0, 1)] + [table().query("bits == 16")]))
    with pytest.raises(ConfigurationError, match="2 seeds in one configuration"):
        board(seeds)
    assert len(board(mean_over_seeds(seeds)).table) == 12


def test_means_over_tasks_and_seeds_have_their_errors() -> None:
    tasks = pd.concat([table(task="a", stderr=0.03), table(task="b", stderr=0.04, value=0.5)])
    mean = mean_over_tasks(checked(tasks)).set_index(["model", "bits"])
    assert mean.loc[("s", 3.0), "value"] == pytest.approx((accuracy(1e6, 3.0) + 0.5) / 2)
    assert mean["stderr"].to_list() == pytest.approx([0.025] * 12)
    lacking = mean_over_tasks(checked(tasks.iloc[:-1])).set_index(["model", "bits"])["value"]
    assert lacking.isna().sum() == 1
    assert math.isnan(lacking["l", 1.58])
    seeds = pd.concat([table(seed=seed, value=value)[lambda d: d.bits == 4] for seed, value in enumerate((0.1, 0.2, 0.6))])
    spread = mean_over_seeds(checked(seeds))
    assert spread["value"].to_list() == pytest.approx([0.3] * 3)
    assert spread["stderr"].to_list() == pytest.approx([np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)] * 3)
    assert spread["num_seeds"].to_list() == [3] * 3


# --- answers ------------------------------------------------------------------------------------------------------------


def test_degradation_is_against_the_same_models_baseline_with_intervals_over_examples_and_models() -> None:
    found = degradation(board(checked(table(num_samples=1_000))))
    four = found[found["bits"] == 4]
    assert four["degradation"].to_list() == pytest.approx([0.01] * 3)
    p, q = accuracy(1e6, 4.0), accuracy(1e6, 16.0)
    half = math.sqrt((p * (1 - p) + q * (1 - q)) / 999) * stats.t.ppf(0.975, 999)
    assert four.loc[four["model"] == "s", "high"].item() == pytest.approx(0.01 + half)
    shifted = table(value=lambda d: d.value - (d.bits == 4) * np.log2(d.parameters / 1e6) * 0.01)
    mean = mean_degradation(degradation(board(checked(shifted)))).set_index("bits").loc[4.0]
    lost = np.array([0.01, 0.03, 0.05])
    half = lost.std(ddof=1) / math.sqrt(3) * stats.t.ppf(0.975, 2)
    assert mean[["mean", "low", "high", "median"]].to_list() == pytest.approx([0.03, 0.03 - half, 0.03 + half, 0.03])
    assert (mean["models"], mean["of_models"]) == (3, 3)
    assert found["low"].notna().all()
    assert degradation(board(checked(shifted)))["low"].isna().all(), "nothing tells how sure a value is"


def test_models_without_a_baseline_are_named_and_a_table_without_any_is_refused() -> None:
    lacking = table()[lambda d: (d.model != "m") | (d.bits < 16)]
    found = degradation(board(checked(lacking)))
    assert found.attrs["without_baseline"] == ("m",)
    assert found.loc[found["model"] == "m", "degradation"].isna().all()
    with pytest.raises(ConfigurationError, match=r"no model with a baseline .*Models: l, m, s"):
        degradation(board(checked(table()[lambda d: d.bits < 16])))
    with pytest.raises(ConfigurationError, match="no quantized row"):
        degradation(board(checked(table()[lambda d: d.bits == 16])))


def test_an_exploded_perplexity_is_counted_and_does_not_carry_the_mean_in_nats_away() -> None:
    perplexity = table(metric="perplexity", value=lambda d: 10.0 * np.exp([LOST[b] for b in d.bits]))
    perplexity.loc[(perplexity.bits == 3) & (perplexity.model == "l"), "value"] = 4e5
    perplexity.loc[(perplexity.bits == 1.58) & (perplexity.model == "l"), "value"] = math.inf
    found = degradation(board(checked(perplexity)))
    means, nats = mean_degradation(found).set_index("bits"), mean_degradation(found, column="nats").set_index("bits")
    assert means["exploded"].to_dict() == {1.58: 1, 3.0: 1, 4.0: 0}
    assert means.loc[3.0, "mean"] > 1e5
    assert nats.loc[3.0, "median"] == pytest.approx(0.03)
    assert nats.loc[4.0, "mean"] == pytest.approx(0.01)
    assert (nats.loc[1.58, "models"], nats.loc[1.58, "of_models"]) == (2, 3)
    with pytest.raises(ConfigurationError, match="recovery is a share"):
        recovery(board(checked(perplexity)))


def test_recovery_has_the_interval_of_a_ratio() -> None:
    found = recovery(board(checked(table(num_samples=400)))).set_index(["model", "bits"]).loc[("s", 1.58)]
    q, b = 0.2, 0.4
    assert found["recovery"] == pytest.approx(50)
    rng = np.random.default_rng(0)  # the ratio of two independent shares, drawn
    drawn = rng.binomial(400, q, 20_000) / rng.binomial(400, b, 20_000)
    assert found["high"] - found["low"] == pytest.approx(100 * np.diff(np.quantile(drawn, [0.025, 0.975]))[0], rel=0.06)


def test_curves_are_straight_in_log2_of_total_bits_and_the_winner_is_known() -> None:
    """3 bit loses 0.03, which is what a model of 1.5 times the bits gains: less than the 4/3 that 4 bit costs."""
    scoreboard = board(checked(table(num_samples=100_000_000)))
    found = {curve.bits: curve for curve in curves(scoreboard)}
    assert set(found) == {1.58, 3, 4, 16}
    x = math.log2(2e6 * 1.58)
    value, stderr = interpolate(found[1.58], [x], scoreboard)
    assert value[0] == pytest.approx(accuracy(2e6, 1.58))
    ends = [math.sqrt(p * (1 - p) / (1e8 - 1)) for p in (accuracy(1e6, 1.58), accuracy(4e6, 1.58))]
    assert stderr[0] == pytest.approx(0.5 * math.hypot(*ends))
    won = shares(best_bit_width(curves(scoreboard), scoreboard, block=None)).set_index("bits")
    assert won["share"].to_dict() == {3: 1.0}
    lead = 0.05 * math.log2(4 / 3) + LOST[4.0] - LOST[3.0]
    assert won.loc[3, "mean_lead"] == pytest.approx(lead)
    assert won.loc[3, "distinguishable"] == 1
    found = leads(curves(scoreboard), scoreboard).set_index(["bits", "over"])
    assert len(found) == 6, "also of 16 over 1.58 bit, which share few sizes"
    assert found.loc[(3, 4), "lead"] == pytest.approx(lead)
    assert found.loc[(3, 4), "low"] < lead < found.loc[(3, 4), "high"]
    assert found.loc[(4, 16), "models"] == 3


def test_the_frontier_is_what_nobody_beats_at_as_few_bits() -> None:
    scoreboard = board(checked(table(stderr=0.001)))
    found = pareto(scoreboard)
    order = [(row["total_bits"], row["value"]) for _, row in found.iterrows()]
    for place, (_, row) in enumerate(found.iterrows()):
        better = [value for bits, value in order if bits <= row["total_bits"] and value > row["value"]]
        assert row["on_frontier"] == (not better), order[place]
        if better:
            assert row["behind"] == pytest.approx(max(better) - row["value"])
            assert row["high"] - row["behind"] == pytest.approx(0.001 * math.sqrt(2) * stats.norm.ppf(0.975))
            assert scoreboard.value({row["beaten_by"]: 1.0}) == max(better)
    assert found["on_frontier"].sum() not in (0, len(found))
    broken = table()
    broken.loc[0, "value"] = math.nan
    assert pareto(board(checked(broken))).attrs == {"trials": 12, "left_out": 1}


def crossed(**levels: tuple[Any, ...]) -> pd.DataFrame:
    """4-bit trials of three models over the product of some factors, and baselines; each factor's place in its levels costs."""
    rows = table()[lambda d: d.bits.isin([4, 16])]
    for name, kinds in levels.items():
        four = rows[rows.bits == 4]
        parts = [four.assign(**{name: kind}, value=four.value - 0.01 * place) for place, kind in enumerate(kinds)]
        rows = pd.concat([rows[rows.bits == 16], *parts])
    return rows


def test_effects_are_of_one_factor_with_all_others_equal() -> None:
    frame = checked(crossed(data_type=("int", "fp"), block_size=(64, 128, None), transform=("none", "smooth")))
    found = factor_effects(board(frame), "transform", against="none")
    assert len(found) == 6
    assert found["difference"].to_list() == pytest.approx([-0.01] * 6)
    assert set(found["models"]) == {3}
    blocks = factor_effects(board(frame), "block_size", against="128").set_index("block_size")["difference"]
    assert blocks["64"].to_list() == pytest.approx([0.01] * 4)
    assert blocks["none"].to_list() == pytest.approx([-0.01] * 4)
    with pytest.raises(ConfigurationError, match="level of 'transform'"):
        factor_effects(board(frame), "transform", against="smoth")
    with pytest.raises(ConfigurationError, match="factor of this table"):
        factor_effects(board(frame), "compensation")
    with pytest.raises(ConfigurationError, match="has one level only"):
        factor_effects(board(checked(crossed(data_type=("int",)))), "data_type")


def test_factors_that_move_together_are_refused_by_name() -> None:
    frame = crossed(data_type=("int", "fp"), block_size=(64, 128))
    together = frame[(frame.bits == 16) | ((frame.data_type == "int") == (frame.block_size == 64))]
    words = r"data_type \(fp against int\) and block_size \(128 against 64\) move together in all 3 pairs.*differ in one of them only"
    with pytest.raises(ConfigurationError, match=words):
        factor_effects(board(checked(together)), "data_type", against="int")
    three = pd.concat([together, frame[frame.bits == 4].query("block_size == 64").assign(data_type="nf")])
    three = three.drop_duplicates(["model", "bits", "data_type", "block_size"])
    found = factor_effects(board(checked(three)), "data_type", against="int")
    assert set(found["data_type"]) == {"nf"}
    assert found.attrs["reasons"][0].startswith("data_type (fp against int) and block_size (128 against 64) move together")


def test_two_scores_of_a_configuration_stand_side_by_side() -> None:
    text = table(metric="loss", task="text", value=lambda d: 3.0 - 2 * d.value)
    both = checked(pd.concat([table(task="cloze"), text]))
    found = side_by_side(both, ("loss", "text"), ("acc", "cloze"))
    assert len(found) == 12
    assert correlation(found, "x", "y").r == pytest.approx(-1)


def test_block_errors_are_of_decoder_blocks() -> None:
    names = ["model.layers.0.fc1", "model.layers.0.fc2", "model.layers.11.fc1"]
    layers = pd.DataFrame({"model": "s", "trial_id": "t", "layer": names, "relative_error": [0.1, 0.3, 0.5]})
    found = block_errors(layers)
    assert found.drop(columns=["model", "trial_id"]).to_numpy().tolist() == [[0, pytest.approx(0.2), 0.1, 0.3, 2], [11, 0.5, 0.5, 0.5, 1]]
    with pytest.raises(ConfigurationError, match="relative_error"):
        block_errors(layers, error="output_error")
    with pytest.raises(ConfigurationError, match="1 layer such as 'head' are in no numbered decoder block"):
        block_errors(pd.concat([layers, layers.head(1).assign(layer="head")]))


# --- our own tables -----------------------------------------------------------------------------------------------------


def test_our_own_table_gives_the_answers_that_it_gave(reference: pd.DataFrame) -> None:
    frame = from_results(reference)
    scoreboard = board(frame, metric="bits_per_byte")
    whole = Scoreboard(scores(reference), "bits_per_byte")
    assert set(scoreboard.table.index) == set(whole.table.index)
    ours = best_bit_width(curves(scoreboard), scoreboard, block="64")
    theirs = best_bit_width(curves(whole), whole)
    columns = ["family", "x", "bits", "value", "second_bits", "lead"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns])
    means = mean_degradation(degradation(scoreboard)).set_index(["bits", "block", "label"])["mean"]
    before, _ = against_baseline(reference)
    assert means.to_dict() == pytest.approx({key: float(value) for key, value in before.stack().items()})
    blocks = factor_effects(scoreboard, "block_size")
    assert set(blocks["block_size"]) == {"64"}
    assert set(blocks["models"]) == {7}
    assert one_score(frame, "bits_per_byte")["task"].nunique() == 1


# --- the claim and the commands -----------------------------------------------------------------------------------------


def test_claim_a_is_judged_on_any_table_against_all_its_precisions() -> None:
    """What 3 bit saves is worth more here than what it loses; a second family is missing, which hides no contradiction."""
    finding = four_bit_wins(board(checked(table(num_samples=100_000_000))))
    assert (finding.verdict, finding.num_models) == (CONTRADICTED, 3)
    assert finding.decides == "f: mean lead of 4 bit over 3 bit at equal bits"
    assert finding.effect == pytest.approx(-(0.05 * math.log2(4 / 3) + LOST[4.0] - LOST[3.0]))
    assert any("1.58 bit" in statement.text for statement in finding.statements)
    assert any("f at 5 bit (any block" in lack for lack in finding.missing)
    assert four_bit_wins(board(checked(table(num_samples=50)))).verdict == OPEN
    assert four_bit_wins(board(checked(table()))).statements == (), "no number is behind a value: nothing is concluded"


def test_the_command_answers_a_table_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.csv"
    theirs = pd.concat([table(task=task, num_samples=500) for task in ("a", "b")]).rename(columns={"bits": "wbits"})
    theirs["data_type"] = np.where(theirs["wbits"] == 16, None, "int")
    both = pd.concat([theirs, theirs[theirs.wbits == 4].assign(data_type="fp", value=lambda d: d.value + 0.002)])
    both.to_csv(path, index=False)
    assert main(["table", str(path), "--rename", "wbits=bits", "--task", "mean"]) == 0
    said = capsys.readouterr().out
    assert "acc of mean of 2 tasks: 15 trials of 3 models" in said
    for title in (
        "degradation",
        "recovery",
        "best precision at equal bits",
        "each two precisions",
        "Pareto frontier",
        "effect of data_type",
    ):
        assert f"\n{title}" in said
    assert main(["table", str(path)]) == 1
    assert "--rename wbits=bits" in capsys.readouterr().err
    for words in ("wbits", "wbits=", "=bits"):
        assert main(["table", str(path), "--rename", words]) == 1
        assert "write --rename THEIRS=OURS" in capsys.readouterr().err
    assert main(["table", str(path), "--rename", "wbits=bits"]) == 1
    assert "Choose one: --task a, or take their mean: --task mean" in capsys.readouterr().err
    assert main([]) == 0
    assert "python -m analysis law" in capsys.readouterr().out


def test_the_command_fits_a_law_and_says_what_it_hangs_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = np.geomspace(1e6, 1e9, 5)
    rows = [
        {"model": f"m{n:.0e}", "family": "f", "parameters": n, "bits": bits, "metric": "loss", "value": 2 + 30 * n**-0.3 + added}
        for n in sizes
        for bits, added in ((16, 0.0), *((p, 5 * n**-0.1 * math.exp(-p / 0.8)) for p in (3, 4)))
    ]
    path = tmp_path / "losses.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    assert main(["law", str(path)]) == 0
    said = capsys.readouterr().out
    assert "delta = C N^−gamma_N exp(−P/gamma)\n10 points of 5 models; 8 of 8 starts ended here" in said
    assert "fitted without m1e+09, the law foretells its 2 points with an error of +0.00% (median error of the other 8: 0.00%)" in said
    assert "gamma: 0.8; 0.8 without the 5 points that move it most" in said
    assert main(["law", str(path), "--law", "offsets", "--tokens"]) == 1
    assert "no term of tokens" in capsys.readouterr().err


def losses_of_tokens(*, together: bool) -> pd.DataFrame:
    """What quantizing adds is 2e-4 N^-0.3 D^0.5 exp(-P/0.8).  together: 20 tokens a parameter."""
    trained = [(n, (20 * n,) if together else (1e9, 1e10, 1e11)) for n in (1e7, 1e8, 1e9)]
    rows = [
        {"model": f"m{n:.0e} {d:.0e}", "family": "f", "parameters": n, "tokens": d, "bits": bits, "metric": "loss", "value": value}
        for n, tokens in trained
        for d in tokens
        for bits, value in ((16, 3.0), *((p, 3.0 + 2e-4 * n**-0.3 * d**0.5 * math.exp(-p / 0.8)) for p in (3, 4)))
    ]
    return pd.DataFrame(rows)


def test_a_law_of_a_table_whose_tokens_vary_takes_them_in_or_says_that_they_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "losses.csv"
    losses_of_tokens(together=False).to_csv(path, index=False)
    assert main(["law", str(path)]) == 0
    said = capsys.readouterr().out
    assert "D^gamma_D" in said
    assert "gamma_D: 0.5;" in said
    assert "training tokens vary (1e+09 to 1e+11) and are in the law; --no-tokens leaves them out" in said
    assert main(["law", str(path), "--no-tokens"]) == 0
    said = capsys.readouterr().out
    assert "gamma_D" not in said
    assert "are left out, as --no-tokens says; --tokens takes them in" in said
    losses_of_tokens(together=True).to_csv(path, index=False)
    assert main(["law", str(path)]) == 0
    said = capsys.readouterr().out
    assert "D^gamma_D exp" not in said.partition("points")[0]
    assert "LEFT OUT: delta = " in said
    assert "do not tell" in said
    assert main(["law", str(path), "--tokens"]) == 1
    assert "do not tell" in capsys.readouterr().err


def test_our_table_tells_steps_by_what_their_yaml_does_not_say(reference: pd.DataFrame) -> None:
    """Each factor has its own column, with the options that are others than the step's own."""
    rows = with_steps(reference)
    turned = {"transform.smooth.alpha": 0.8, "transform.smooth.search": 0, "clipping.grid": 50, "clipping.exponent": 2.4}
    turned |= {
        "activation.data_type": "int",
        "activation.symmetric": True,
        "activation.convention": "absmax_full",
        "activation.sites": "linear",
    }
    plain = where(rows, bit_width=4, data_type="int", block_size=64)
    other = rows[plain].assign(
        method="round_to_nearest+transform=smooth+clipping=mse+activation=per_token",
        transform="smooth",
        clipping="mse",
        activation="per_token",
        activation_bit_width=6,
        step_options=json.dumps(turned),
        calibration="mini",
        calibration_samples=64,
        calibration_length=256,
        calibration_seed=0,
        trial_id="other" + rows["trial_id"],
    )
    frame = from_results(pd.concat([rows, other], ignore_index=True))
    of_other = frame[frame["trial_id"].str.startswith("other")]
    assert {name: set(of_other[name]) for name in ("rounding", "transform", "clipping", "activation", "calibration")} == {
        "rounding": {"round_to_nearest"},
        "transform": {"smooth alpha=0.8"},
        "clipping": {"mse grid=50"},
        "activation": {"per_token bit_width=6"},
        "calibration": {"mini num_samples=64"},
    }
    table = board(frame, metric="bits_per_byte").table
    assert "int smooth alpha=0.8 mse grid=50 per_token bit_width=6 mini num_samples=64" in {
        " ".join(label.split()) for label in table["label"]
    }


def with_steps(reference: pd.DataFrame) -> pd.DataFrame:
    """The reference with the columns that `load_results` gives today."""
    none = dict.fromkeys(("transform", "correction", "tuning", "compensation", "activation", "kv_cache", "scope"), "none")
    cut = dict.fromkeys(("activation_bit_width", "calibration_samples", "calibration_length", "calibration_seed"), math.nan)
    return reference.assign(**none, **cut, rounding=reference["method"], clipping="absmax", step_options="{}")


def where(frame: pd.DataFrame, **values: object) -> pd.Series[bool]:
    return (frame[list(values)] == pd.Series(values)).all(axis=1)
