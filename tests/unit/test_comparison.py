"""Two arms on the same examples: statistics against independent references, coverage and power by simulation, refusals in words."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

import analysis
from analysis.comparison import noise, paired, partners, text
from analysis.comparison.arms import BETTER, EQUAL, UNDECIDED, WORSE
from analysis.comparison.outcomes import clusters_of, with_tokens
from analysis.comparison.paired import Paired, estimate, score_interval, sign_flip, standard_error, studentized
from analysis.comparison.power import detectable, examples_needed
from analysis.uncertainty import Scoreboard
from quantsweep.errors import ConfigurationError
from quantsweep.evaluation.statistics import standard_error as table_error
from quantsweep.exit_status import ExitStatus, of_verdicts
from tests.unit.test_records import row


def answers(difference_E: Any, codes_E: Any = None) -> Paired:
    """One pair of trials whose right answers differ so; codes: the cluster of each example."""
    d = np.asarray(difference_E, dtype=float)
    if codes_E is not None:
        sums, sizes = np.bincount(codes_E, weights=d), np.bincount(codes_E).astype(float)
        return Paired(x_UK=sums[None], w_UK=sizes[None], share_U=np.ones(1), is_count=True, is_single=False)
    return Paired(x_UK=d[None], w_UK=np.ones((1, len(d))), share_U=np.ones(1), is_count=True, is_single=True)


def losses(x_UK: Any, w_K: Any) -> Paired:
    x = np.atleast_2d(np.asarray(x_UK, dtype=float))
    weights = np.broadcast_to(np.asarray(w_K, dtype=float), x.shape)
    return Paired(x_UK=x, w_UK=weights, share_U=np.full(len(x), 1 / len(x)), is_count=False, is_single=True, num_pairs=len(x))


def table(gained: int, lost: int, number: int) -> Paired:
    return answers([1] * gained + [-1] * lost + [0] * (number - gained - lost))


# --- tests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (8, 0), (5, 5), (30, 12), (400, 350)])
def test_single_answers_are_mcnemars_exact_test(gained: int, lost: int) -> None:
    expected = 1.0 if gained + lost == 0 else stats.binomtest(gained, gained + lost).pvalue
    assert sign_flip(np.array([1] * gained + [-1] * lost + [0] * 7)) == pytest.approx(expected, rel=1e-10)


def test_whole_clusters_are_tossed_exactly() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        counts = random.integers(-5, 6, size=9)
        tossed = [abs(sum(sign * size for sign, size in zip(signs, counts, strict=True))) for signs in itertools.product((1, -1), repeat=9)]
        assert sign_flip(counts) == pytest.approx(np.mean(np.array(tossed) >= abs(counts.sum())), rel=1e-12)


def score(delta: float, gained: int, lost: int, number: int) -> float:
    """Tango's score statistic, the nuisance share found by maximizing the likelihood numerically."""

    def surprise(share: float) -> float:
        cells = (share + delta, share, 1 - 2 * share - delta)
        counts = (gained, lost, number - gained - lost)
        return -sum(k * math.log(max(p, 1e-300)) for k, p in zip(counts, cells, strict=True) if k)

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    share = optimize.minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return float((gained - lost - number * delta) / math.sqrt(number * (2 * share + delta - delta**2)))


@pytest.mark.parametrize(("gained", "lost", "number"), [(3, 1, 20), (0, 4, 20), (30, 12, 220), (7, 7, 50)])
def test_tangos_interval_is_what_the_score_test_does_not_reject(gained: int, lost: int, number: int) -> None:
    low, high = score_interval(gained, lost, number)
    assert score(low, gained, lost, number) == pytest.approx(stats.norm.ppf(0.975), abs=1e-3)
    assert score(high, gained, lost, number) == pytest.approx(-stats.norm.ppf(0.975), abs=1e-3)
    assert score_interval(lost, gained, number) == pytest.approx((-high, -low))


def test_where_no_answer_differs_the_interval_is_not_nothing() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    assert score_interval(0, 0, 20) == pytest.approx((-z2 / (20 + z2), z2 / (20 + z2)))
    assert score_interval(20, 0, 20)[1] == 1.0
    whole = estimate(answers([0] * 20, np.repeat(np.arange(5), 4)))
    assert (whole.low, whole.high) == score_interval(0, 0, 5)  # four questions on each of five texts are five examples


def test_lm_evals_users_case() -> None:
    """EleutherAI/lm-evaluation-harness#3868: n = 220, unpaired z-test p = .080, McNemar .008; the table itself is not published.

    Every table of 220 answers with these two figures is one that pairing decides, and its p is the exact test's.
    """
    number, fitting = 220, 0
    for gained, lost in itertools.combinations(range(60), 2):
        if round(float(2 * stats.binom.cdf(gained, gained + lost, 0.5)), 3) != 0.008:
            continue
        both = np.arange(number - gained - lost + 1)
        first, second = (both + gained) / number, (both + lost) / number
        variance = (first * (1 - first) + second * (1 - second)) / (number - 1)
        unpaired = 2 * stats.norm.sf((second - first) / np.sqrt(variance))
        if not (tables := int((np.round(unpaired, 3) == 0.080).sum())):
            continue
        fitting += tables
        found = estimate(table(gained, lost, number))
        assert round(found.p, 3) == 0.008
        assert found.high < 0
    assert fitting >= 5


# --- errors and intervals ----------------------------------------------------------------------------------------------------


def test_the_error_of_a_difference_is_the_tables_formula_on_differences() -> None:
    random = np.random.default_rng(1)
    x, w = random.normal(size=40), random.integers(100, 900, 40).astype(float)
    expected = table_error("bits_per_byte", np.stack([-math.log(2) * x, w], axis=1), math.nan)
    assert standard_error(losses(x, w))[0] == pytest.approx(expected, rel=1e-12)


def test_the_error_over_clusters_is_that_of_their_sums() -> None:
    random = np.random.default_rng(2)
    codes = np.repeat(np.arange(12), random.integers(1, 6, 12))
    d = random.integers(-1, 2, len(codes)).astype(float)
    r, total, squares = d.mean(), len(d), 0.0
    for k in range(12):
        squares += float((d[codes == k] - r).sum()) ** 2
    assert standard_error(answers(d, codes))[0] == pytest.approx(math.sqrt(12 / 11 * squares) / total, rel=1e-12)


def test_a_bootstrap_of_models_and_documents_agrees_with_the_error_over_both() -> None:
    """Its variance counts the interaction three times (Owen 2007), which is small here: many models, many documents."""
    random = np.random.default_rng(3)
    x = random.normal(size=(40, 1)) * 0.5 + random.normal(size=(1, 60)) + 0.3 * random.normal(size=(40, 60))
    found = [x[np.ix_(random.integers(40, size=40), random.integers(60, size=60))].mean() for _ in range(3000)]
    assert standard_error(losses(x, np.ones(60)))[0] == pytest.approx(np.std(found), rel=0.06)


def test_an_interval_over_models_covers_other_models_and_the_one_over_documents_does_not() -> None:
    random = np.random.default_rng(4)
    covered = np.zeros(2)
    for _ in range(400):
        x = random.normal(size=(6, 1)) + random.normal(size=(1, 40)) + random.normal(size=(6, 40))
        found = estimate(losses(x, np.ones(40)))
        covered += [found.low <= 0 <= found.high, found.low_these <= 0 <= found.high_these]
    assert 0.925 <= covered[0] / 400 <= 0.985  # four standard deviations of 400 tosses about 95.5 %
    assert covered[1] / 400 < 0.7


@pytest.mark.parametrize(("number", "gained", "lost"), [(20, 0.02, 0.0), (20, 0.02, 0.02), (20, 0.3, 0.1), (100, 0.05, 0.02)])
def test_intervals_of_few_answers_cover(number: int, gained: float, lost: float) -> None:
    """Exactly, over all tables: a score interval is off by a little where nothing is rare, and too wide where everything is."""
    covered = 0.0
    law = stats.multinomial(number, [gained, lost, 1 - gained - lost])
    for a, b in itertools.product(range(number + 1), repeat=2):
        if a + b <= number and (p := law.pmf([a, b, number - a - b])) > 1e-6:
            low, high = score_interval(a, b, number)
            covered += p * (low - 1e-9 <= gained - lost <= high + 1e-9)
    assert covered >= 0.93


def test_intervals_of_skew_losses_cover_where_students_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty documents with log-normal differences, the worst of them: 91 % of 2,000 intervals cover, of Student's 87 %."""
    monkeypatch.setattr(paired, "NUM_RESAMPLES", 999)
    random, truth = np.random.default_rng(5), math.exp(0.5)
    covered = np.zeros(2)
    for _ in range(300):
        w = random.integers(500, 1500, 20).astype(float)
        x = random.lognormal(size=20) * w
        found = estimate(losses(x, w))
        half = found.stderr * stats.t.ppf(0.975, 19)
        covered += [found.low <= truth <= found.high, abs(found.difference - truth) <= half]
    assert covered[0] / 300 >= 0.88
    assert covered[0] >= covered[1] + 5


def test_the_bootstrap_is_students_t_where_differences_are_normal() -> None:
    random = np.random.default_rng(6)
    x = random.normal(size=200)
    drawn = studentized(x, np.ones(200))
    assert np.quantile(drawn, [0.025, 0.5, 0.975]) == pytest.approx([-1.97, 0.0, 1.97], abs=0.12)
    shares: list[float] = []
    assert (studentized(x, np.ones(200), on_progress=shares.append) == drawn).all()  # the same every time
    assert shares[-1] == 1.0


# --- clusters ----------------------------------------------------------------------------------------------------------------


def planted(random: np.random.Generator, num: int, size: int, correlation: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Answers that differ, none of the arms better: each is its text's own draw or, with √correlation, its text's common one."""
    law = {"a": [-1.0, 0.0, 1.0], "p": [0.25, 0.5, 0.25]}
    common, own = random.choice(size=(num, 1), **law), random.choice(size=(num, size), **law)
    return np.where(random.random((num, size)) < math.sqrt(correlation), common, own)


def test_questions_about_one_text_fool_the_naive_test_and_not_the_clustered_one() -> None:
    random = np.random.default_rng(7)
    codes = np.repeat(np.arange(30), 8)
    together = planted(random, 4000, 2, 0.7)
    assert np.corrcoef(together.T)[0, 1] == pytest.approx(0.7, abs=0.04)
    wrong = np.zeros(4)
    for _ in range(400):
        d = planted(random, 30, 8, 0.7).ravel()
        naive, clustered = estimate(answers(d)), estimate(answers(d, codes))
        wrong += [naive.p <= 0.05, clustered.p <= 0.05, not naive.low <= 0 <= naive.high, not clustered.low <= 0 <= clustered.high]
    assert wrong[0] / 400 > 0.3
    assert wrong[2] / 400 > 0.3
    assert wrong[1] / 400 < 0.09  # 5 % and four standard deviations
    assert wrong[3] / 400 < 0.09


def test_windows_of_one_page_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "NUM_RESAMPLES", 499)
    random = np.random.default_rng(8)
    wrong = np.zeros(2)
    for _ in range(150):
        d = math.sqrt(0.7) * random.normal(size=(20, 1)) + math.sqrt(0.3) * random.normal(size=(20, 6))
        windows, pages = estimate(losses(d.ravel(), np.ones(120))), estimate(losses(d.sum(axis=1), np.full(20, 6.0)))
        wrong += [windows.p <= 0.05, pages.p <= 0.05]
    assert wrong[0] / 150 > 0.25
    assert wrong[1] / 150 < 0.125


# --- power -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "share"), [(400, 0.2), (1000, 0.1)])
def test_what_is_called_detectable_is_detected_four_times_in_five(number: int, share: float) -> None:
    seen = table(round(share * number / 2), round(share * number / 2), number)
    size = detectable(seen, estimate(seen))
    random = np.random.default_rng(9)
    drawn = random.multinomial(number, [(share + size) / 2, (share - size) / 2, 1 - share], size=4000)
    tables, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    found = sum(int(k) for (a, b), k in zip(tables, counts, strict=True) if stats.binomtest(a, a + b).pvalue <= 0.05)
    assert 0.74 <= found / 4000 <= 0.84  # the exact test is a little weaker than its normal approximation


def test_as_many_examples_as_are_said_to_decide_do_so() -> None:
    random = np.random.default_rng(10)
    few = table(12, 6, 100)
    needed = int(examples_needed(few, estimate(few), 100, None))
    drawn = random.multinomial(needed, [0.12, 0.06, 0.82], size=4000)
    tables, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    found = sum(int(k) for (a, b), k in zip(tables, counts, strict=True) if stats.binomtest(a, a + b).pvalue <= 0.05)
    assert 0.75 <= found / 4000 <= 0.84
    d = random.normal(0.1, 1, 100)
    seen = losses(d, np.ones(100))
    needed = int(examples_needed(seen, estimate(seen), 100, None))
    z = abs(d.mean()) / (d.std(ddof=1) / math.sqrt(needed))
    assert stats.norm.sf(stats.norm.ppf(0.975) - z) == pytest.approx(0.8, abs=0.01)


def test_equality_needs_as_many_examples_as_two_one_sided_tests_do() -> None:
    d = np.tile([1.0, -1.0], 50)
    seen = losses(d, np.ones(100))
    needed = examples_needed(seen, estimate(seen), 100, 0.1)
    stderr = d.std(ddof=1) / math.sqrt(needed)
    power = 2 * stats.norm.cdf(0.1 / stderr - stats.norm.ppf(0.95)) - 1
    assert power == pytest.approx(0.8, abs=0.01)
    assert examples_needed(seen, estimate(seen), 100, None) == math.inf


def test_examples_do_not_make_up_for_models() -> None:
    random = np.random.default_rng(11)
    x = 0.1 + random.normal(size=(4, 1)) + 0.01 * random.normal(size=(4, 50))
    seen = losses(x, np.ones(50))
    assert examples_needed(seen, estimate(seen), 50, None) == math.inf


# --- frames ------------------------------------------------------------------------------------------------------------------


def samples(trial: str, *, correct: Any = None, loglikelihood: Any = None, num_bytes: Any = None, **axes: Any) -> dict[str, Any]:
    """A row of samples; every axis that is not named has one value in all of them."""
    made = loglikelihood if loglikelihood is not None else [-1.0 - bool(right) for right in correct]
    outcomes = {"correct": correct, "correct_norm": None, "loglikelihood": made, "num_bytes": num_bytes}
    fixed = {
        "trial_id": trial,
        "task": "t",
        "task_key": "t@1",
        "requests_hash": "h",
        "seed": None,
        "calibration_seed": None,
        "bit_width": 4,
    }
    return {**row("samples"), **fixed, **outcomes, "model_content": axes.get("model", "x"), **axes}


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


RIGHT, WRONG = [True] * 12 + [False] * 8, [True] * 2 + [False] * 18


def test_more_right_answers_are_better_and_the_verdict_turns_with_the_arms() -> None:
    a, b = frame(samples("a", correct=RIGHT)), frame(samples("b", correct=WRONG, bit_width=3))
    (found,) = analysis.compare(a, b)
    assert (found.verdict, found.gained, found.lost, found.num_examples) == (BETTER, 10, 0, 20)
    assert (found.value_a, found.value_b, found.estimate.difference) == pytest.approx((0.6, 0.1, 0.5))
    assert analysis.compare(b, a)[0].verdict == WORSE
    listed = analysis.flips(a, b)
    assert listed["document"].tolist() == list(range(2, 12))
    assert set(listed["right"]) == {"A"}
    assert analysis.flips(b, a)["right"].eq("B").all()


def test_less_loss_is_better_weighted_by_bytes() -> None:
    random = np.random.default_rng(12)
    num_bytes = random.integers(200, 2000, 30)
    good = -num_bytes * random.normal(1.0, 0.05, 30)
    bad = good - num_bytes * random.normal(0.05, 0.01, 30)
    a, b = (frame(samples(name, loglikelihood=x, num_bytes=num_bytes, bit_width=k)) for name, x, k in (("a", good, 4), ("b", bad, 3)))
    (found,) = analysis.compare(a, b)
    assert (found.metric, found.verdict, found.gained) == ("bits_per_byte", BETTER, None)
    assert found.value_a == pytest.approx(-good.sum() / num_bytes.sum() / math.log(2))
    (perplexity,) = analysis.compare(a, b, metrics={"t": "byte_perplexity"})
    assert perplexity.value_a == pytest.approx(math.exp(-good.sum() / num_bytes.sum()))
    assert perplexity.estimate.difference == pytest.approx(math.log(perplexity.value_a / perplexity.value_b))
    (answer,) = analysis.compare(a, b, metrics="perplexity")
    assert answer.estimate.difference == pytest.approx((bad - good).mean())


def test_a_perplexity_of_windows_is_a_tokens() -> None:
    """Log-likelihoods of windows are sums over their tokens, which the table of metrics counts."""
    a, b = (frame(samples(n, loglikelihood=[-20.0 * k, -30.0 * k] * 8, bit_width=k)) for n, k in (("a", 4), ("b", 3)))
    with pytest.raises(ConfigurationError, match="of how many tokens"):
        analysis.compare(a, b)
    counted = [with_tokens(arm, arm[["trial_id", "task_key"]].assign(num_tokens=160)) for arm in (a, b)]
    (found,) = analysis.compare(*counted)
    assert (found.metric, found.verdict) == ("perplexity", WORSE)
    assert found.value_a == pytest.approx(math.exp(4 * 25 / 10))
    assert found.estimate.difference == pytest.approx(2.5)


def test_windows_of_two_tokenizers_are_refused_in_words() -> None:
    """Each tokenizer cuts a text into windows of its own: there is no example that both models have seen."""
    arms = [
        frame(*(samples(f"{n}{m}", model=f"m{m}", loglikelihood=[-20.0] * m, num_tokens=10 * m, bit_width=k) for m in (8, 9)))
        for n, k in (("a", 4), ("b", 3))
    ]
    with pytest.raises(ConfigurationError, match="has 8 and 9 examples, depending on the model"):
        analysis.compare(*arms)


def test_the_error_is_that_of_the_k_bit_studys_scoreboard() -> None:
    """Two pieces of the product, made apart, for one quantity: the difference of two trials in bits per byte."""
    random = np.random.default_rng(13)
    num_bytes = random.integers(200, 2000, 30)
    rows = [
        samples(name, loglikelihood=-num_bytes * random.normal(1, 0.1, 30), num_bytes=num_bytes, bit_width=k)
        for name, k in (("a", 4), ("b", 3))
    ]
    both = frame(*rows)
    (found,) = analysis.compare(both[:1], both[1:])
    score_table = pd.DataFrame({"bits_per_byte": [found.value_a, found.value_b]}, index=["a", "b"])
    score_table[["bits_per_byte_stderr", "bits_per_byte_examples"]] = 1.0
    score_table.attrs.update(accuracy_tasks={}, text_task="t@1")
    board = Scoreboard(score_table, "bits_per_byte", both)
    weights = {"a": -1.0, "b": 1.0}
    assert found.estimate.stderr == pytest.approx(board.stderr(weights), rel=1e-12)
    assert found.estimate.degrees == pytest.approx(board.degrees(weights), rel=1e-12)


def test_equal_needs_a_margin_and_examples_enough() -> None:
    many = [True, False] * 400
    one = [*many[:-2], False, True]
    a, b = frame(samples("a", correct=many)), frame(samples("b", correct=one, bit_width=3))
    assert analysis.compare(a, b)[0].verdict == UNDECIDED
    assert analysis.compare(a, b, margin=0.02)[0].verdict == EQUAL
    assert analysis.compare(a, b, margin={"acc": 0.02})[0].verdict == EQUAL
    assert analysis.compare(a, b, margin={"acc_norm": 0.02})[0].verdict == UNDECIDED
    few_a, few_b = (arm.assign(correct=[arm["correct"].iloc[0][-20:]], loglikelihood=[[0.0] * 20]) for arm in (a, b))
    assert analysis.compare(few_a, few_b, margin=0.02)[0].verdict == UNDECIDED
    for margin in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigurationError, match=f"^margin {margin:g} is no size of a difference"):
            analysis.compare(a, b, margin=margin)
    with pytest.raises(ConfigurationError, match="margin -1 of acc is no size of a difference"):
        analysis.compare(a, b, margin={"acc": -1.0})
    with pytest.raises(ConfigurationError, match="Did you mean 'acc'"):
        analysis.compare(a, b, margin={"ac": 0.1})


def test_equality_errs_in_one_case_of_twenty_at_the_margin() -> None:
    """At a true difference of exactly the margin two one-sided tests say equal in 5 %."""
    law, wrong = stats.multinomial(400, [0.12, 0.07, 0.81]), 0.0
    for a, b in itertools.product(range(20, 80), range(5, 55)):
        if (p := law.pmf([a, b, 400 - a - b])) > 1e-6:
            low, high = score_interval(a, b, 400, 0.9)
            wrong += p * (low > -0.05 and high < 0.05)
    assert 0.03 < wrong < 0.065


def test_clusters_are_those_that_are_given() -> None:
    random = np.random.default_rng(14)
    right = random.random(40) < 0.5
    wrong = right & ~np.repeat(random.random(10) < 0.3, 4)
    a, b = frame(samples("a", correct=right.tolist())), frame(samples("b", correct=wrong.tolist(), bit_width=3))
    given = clusters_of(pd.DataFrame({"task": "t", "document": range(40), "cluster": np.repeat(list("abcdefghij"), 4)}))
    (alone,), (together,) = analysis.compare(a, b), analysis.compare(a, b, clusters=given)
    assert (alone.num_clusters, together.num_clusters) == (40, 10)
    assert together.estimate.p > alone.estimate.p
    assert together.estimate.difference == alone.estimate.difference
    with pytest.raises(ConfigurationError, match="39 examples"):
        analysis.compare(a, b, clusters={"t": given["t"][:39]})
    with pytest.raises(ConfigurationError, match="once each"):
        clusters_of(pd.DataFrame({"task": "t", "document": [0, 2], "cluster": 0}))
    with pytest.raises(ConfigurationError, match="no column cluster"):
        clusters_of(pd.DataFrame({"task": ["t"], "document": [0]}))
    (nothing,) = analysis.compare(a, b, clusters={"t": [0] * 40})
    assert nothing.verdict == UNDECIDED
    assert "one cluster" in nothing.reason


def test_partners_agree_in_all_that_the_arms_share() -> None:
    arms = {
        k: frame(
            *(
                samples(f"{model}{block}-{k}", correct=RIGHT, model=model, block_size=block, bit_width=k)
                for model in "xy"
                for block in (64, 128)
            )
        )
        for k in (3, 4)
    }
    assert partners.pair_trials(arms[3], arms[4]) == [(f"{m}{b}-3", f"{m}{b}-4") for m in "xy" for b in (128, 64)]
    assert list(partners.differing_axes(arms[3], arms[4], partners.pair_trials(arms[3], arms[4]))) == ["bit_width"]
    baselines = frame(*(samples(f"{m}-0", correct=WRONG, model=m, bit_width=None, block_size=None, method="none") for m in "xy"))
    (found,) = analysis.compare(arms[3], baselines)
    assert (found.num_pairs, found.num_units, found.unit) == (4, 2, "model")
    assert found.estimate.difference == pytest.approx(0.5)
    one_model = {"model": "x", "model_content": "x"}
    with pytest.raises(ConfigurationError, match=r"4 trials of A and 4 of B fit each other alike .*block_size"):
        partners.pair_trials(arms[3].assign(**one_model), arms[4].assign(**one_model, block_size=[32, 32, 16, 16]))
    odd = frame(samples("p", correct=RIGHT, model="x", block_size=64), samples("q", correct=RIGHT, model="y", block_size=128))
    with pytest.raises(ConfigurationError, match="no trial of A has a partner"):
        partners.pair_trials(odd, odd.assign(trial_id=["r", "s"], block_size=[128, 64], bit_width=3))
    with pytest.raises(ConfigurationError, match="A has no trials"):
        partners.pair_trials(arms[3][:0], arms[4])


def test_the_baseline_of_a_model_is_as_it_was_planted_and_in_its_dtype() -> None:
    kinds = [
        {"model": m, "plant_channels": c, "dtype": d}
        for m, c, d in itertools.product("xy", (None, 4), ("float16", "float32"))
        if (m, c, d) != ("y", 4, "float16")
    ]
    quantized = frame(*(samples(f"q{k}", correct=RIGHT, compensation="lorc", **kind) for k, kind in enumerate(kinds)))
    baselines = frame(*(samples(f"b{k}", correct=WRONG, method="none", bit_width=None, **kind) for k, kind in enumerate(kinds)))
    assert partners.pair_trials(quantized, baselines) == [(f"q{k}", f"b{k}") for k in range(len(kinds))]
    pairs = partners.pair_trials(quantized, baselines[1:])
    assert len(pairs) == len(kinds) - 1
    alone = partners.without_partner(quantized, baselines[1:], pairs)
    assert alone == {"a": {"q0": "differs from the nearest of B in dtype float16 against float32"}, "b": {}}


def test_a_partner_that_answered_no_common_task_is_none() -> None:
    a = frame(samples("a", correct=RIGHT), samples("c", correct=RIGHT, block_size=32, task_key="u@1"))
    b = frame(samples("b", correct=WRONG, bit_width=3), samples("d", correct=RIGHT, block_size=32, bit_width=3))
    pairs = [(str(x["trial_id"]), str(y["trial_id"])) for same in analysis.comparison.arms.pairs_by_task(a, b).values() for x, y in same]
    assert pairs == [("a", "b")]
    alone = partners.without_partner(a, b, pairs)
    assert alone["a"] == {"c": "answered no task that its partner in B did"}
    assert alone["b"] == {"d": "answered no task that its partner in A did"}


def test_planted_copies_of_one_model_are_one_model() -> None:
    """They compute the same function: the second says nothing of how another model would do."""
    random = np.random.default_rng(16)
    good = random.random(60) < 0.8
    planted = [
        {"plant_channels": c, "plant_scale": s, "model": m, "model_content": "w"} for c, s, m in ((None, None, "m"), (4, 16.0, "mine"))
    ]
    a = frame(*(samples(f"a{k}", correct=(good & (random.random(60) < 0.7)).tolist(), **kind) for k, kind in enumerate(planted)))
    b = frame(*(samples(f"b{k}", correct=good.tolist(), method="none", bit_width=None, **kind) for k, kind in enumerate(planted)))
    (found,) = analysis.compare(a, b)
    assert (found.num_pairs, found.num_units, found.unit, found.verdict) == (2, 1, "model", WORSE)
    assert "models" not in found.estimate.interval
    (other,) = analysis.compare(a.assign(model_content=["w", "v"]), b.assign(model_content=["w", "v"]))
    assert other.num_units == 2


def test_options_that_follow_the_bit_width_do_not_part_partners() -> None:
    """Floats have other exponent bits at other widths, integers one option at all of them; a variant of floats is one of its own."""
    options = {("fp", 4): "2", ("fp", 5): "3", ("int", 4): "k", ("int", 5): "k"}
    rows = [
        samples(f"{name}{bits}", correct=RIGHT, data_type=name, bit_width=bits, data_type_options=o) for (name, bits), o in options.items()
    ]
    four, five = (frame(*(one for one in rows if one["bit_width"] == bits)) for bits in (4, 5))
    assert partners.pair_trials(four, five) == [("fp4", "fp5"), ("int4", "int5")]
    variant = samples("fp4e3", correct=RIGHT, data_type="fp", bit_width=4, data_type_options="3")
    assert ("fp4e3", "fp5") in (found := partners.pair_trials(pd.concat([four, frame(variant)]), five))
    assert ("fp4", "fp5") not in found


OTHER = {"correct": WRONG, "bit_width": 3}


@pytest.mark.parametrize(
    ("words", "left", "right"),
    [
        ("different requests", {}, {"requests_hash": "other"}),
        ("different requests", {"requests_hash": None}, {"requests_hash": None}),
        ("no task_key in common", {}, {"task_key": "t@1+limit3"}),
        ("no finite outcome in 1 example of 20", {}, {"correct": [None, *WRONG[1:]]}),
    ],
)
def test_what_cannot_be_paired_is_refused_in_words(words: str, left: dict[str, Any], right: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=words):
        analysis.compare(frame(samples("a", **{"correct": RIGHT, **left})), frame(samples("b", **{**OTHER, **right})))


def test_an_exploded_loss_is_refused_and_so_are_twins_and_metrics_that_samples_do_not_make() -> None:
    a = frame(samples("a", loglikelihood=[-1.0, -math.inf], num_bytes=[5, 5]))
    b = frame(samples("b", loglikelihood=[-1.0, -2.0], num_bytes=[5, 5], bit_width=3))
    with pytest.raises(ConfigurationError, match="no finite outcome"):
        analysis.compare(a, b)
    with pytest.raises(ConfigurationError, match=r"several times .*one, two"):
        analysis.compare(pd.concat([b, b]).assign(sweep=["one", "two"]), a)
    with pytest.raises(ConfigurationError, match="samples make bits_per_byte"):
        analysis.compare(b, b.assign(trial_id="c"), metrics="acc")
    with pytest.raises(ConfigurationError, match="unknown metric 'word_perplexity'"):
        analysis.compare(b, b.assign(trial_id="c"), metrics="word_perplexity")


def test_other_versions_of_libraries_are_told() -> None:
    a, b = (
        frame(samples(n, correct=RIGHT, versions=json.dumps({"lm_eval": v, "torch": "2"}))) for n, v in (("a", "0.4.11"), ("b", "0.4.12"))
    )
    assert partners.differing_versions(a, b) == {"lm_eval": (["0.4.11"], ["0.4.12"])}


# --- noise -------------------------------------------------------------------------------------------------------------------


def replicates(**values: list[float]) -> pd.DataFrame:
    rows = [
        {"trial_id": t, "task_key": "t@1", "metric": "acc", "attempt": f"{t}{k}", "value": v}
        for t, vs in values.items()
        for k, v in enumerate(vs)
    ]
    return pd.DataFrame(rows)


def test_a_difference_below_its_numerical_floor_is_no_finding() -> None:
    a, b = frame(samples("a", correct=RIGHT)), frame(samples("b", correct=WRONG, bit_width=3))
    (above,) = analysis.compare(a, b, ranges=noise.replicate_ranges(replicates(a=[0.6, 0.5], b=[0.1, 0.15])))
    assert above.floor == pytest.approx(0.15)
    assert above.verdict == BETTER
    (below,) = analysis.compare(a, b, ranges=noise.replicate_ranges(replicates(a=[0.6, 0.3], b=[0.1, 0.35])))
    assert below.verdict == UNDECIDED
    assert "below its numerical floor" in below.reason
    for alone in (replicates(a=[0.6, 0.5], b=[0.1]), replicates(a=[0.6, 0.5])):  # replicates of both arms, or nothing is known
        assert math.isnan(analysis.compare(a, b, ranges=noise.replicate_ranges(alone))[0].floor)


def test_replicates_are_attempts_and_perplexities_lie_apart_by_their_logarithms() -> None:
    rows = replicates(a=[2.0, 3.0])
    twice = noise.replicate_ranges(pd.concat([rows, rows]))
    assert twice["replicates"].tolist() == [2]
    assert noise.replicate_ranges(rows.assign(metric="perplexity"))["range"].tolist() == pytest.approx([math.log(1.5)])


def seeded(number: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    random = np.random.default_rng(15)
    good = random.random((number, 60)) < 0.9
    a = frame(*(samples(f"a{s}", correct=good[s].tolist(), seed=s) for s in range(number)))
    return a, frame(samples("b", correct=(random.random(60) < 0.3).tolist(), bit_width=3))


def test_seeds_are_drawn_like_models_and_a_method_needs_five() -> None:
    a, b = seeded(5)
    (found,) = analysis.compare(a, b)
    assert (found.num_units, found.unit, found.num_seeds, found.reason) == (5, "seed", 5, "")
    by_seed = [np.mean(x) - np.mean(b["correct"].iloc[0]) for x in a["correct"]]
    assert found.seed_spread == pytest.approx(np.std(by_seed, ddof=1))
    (few,) = analysis.compare(a[:2], b)
    assert "a method shows in 5 seeds or more, not in 2" in few.reason
    assert analysis.compare(b, b.assign(trial_id="c"))[0].reason == "no example differs"


def test_a_claim_about_a_method_takes_seeds_as_a_random_effect() -> None:
    differences = pd.DataFrame({"seed": [0, 0, 1, 2, 3, 4, None], "difference": [0.1, 0.3, 0.1, 0.3, 0.2, 0.15, 99.0]})
    mean, low, high = noise.method_effect(differences)
    reference = stats.ttest_1samp([0.2, 0.1, 0.3, 0.2, 0.15], 0.0).confidence_interval()
    assert (mean, low, high) == pytest.approx((0.19, reference.low, reference.high))
    with pytest.raises(ConfigurationError, match="5 seeds or more, and there are 4"):
        noise.method_effect(differences[differences["seed"] != 4])


def test_exact_ties_are_the_very_same_log_likelihoods() -> None:
    a = frame(samples("a", loglikelihood=np.float32([-1.0, -2.0, -3.0, -4.0]), num_bytes=[5] * 4))
    b = frame(
        samples(
            "b", loglikelihood=np.float32([-1.0, np.nextafter(np.float32(-2.0), np.float32(0)), -3.0, -4.5]), num_bytes=[5] * 4, bit_width=3
        )
    )
    assert analysis.compare(a, b)[0].ties == 0.5


# --- words -------------------------------------------------------------------------------------------------------------------


def test_words_and_json_hold_what_was_found() -> None:
    a, b = frame(samples("a", correct=RIGHT)), frame(samples("b", correct=WRONG, bit_width=3))
    (found,) = analysis.compare(a, b)
    said = text.text(found)
    for part in (
        "A 0.6000   B 0.1000   A − B +0.5000 share",
        "10 right only in A, 0 only in B",
        "p = 0.002 (exact McNemar)",
        "verdict: A is better",
    ):
        assert part in said
    flat = json.loads(json.dumps(text.as_json(found)))
    assert flat["p"] == pytest.approx(2 * 0.5**10)
    assert flat["floor"] is None
    assert "right only in A (10): 2, 3, 4" in text.flips_text(analysis.flips(a, b))
    assert "margin" not in said
    (within,) = analysis.compare(a, b, margin=0.9)
    low, high = within.estimate.low_inner, within.estimate.high_inner
    assert f"margin 0.9 share: 90 % from {low:+.4f} to {high:+.4f}" in text.text(within)
    (same,) = analysis.compare(a, a.assign(trial_id="c"))
    assert "--margin asks whether it is" in text.text(same)


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [(["better"], 0), (["better", "equal"], 10), (["undecided", "equal"], 12), (["better", "worse", "undecided"], 11)],
)
def test_scripts_are_told_the_worst_verdict(verdicts: list[str], status: int) -> None:
    assert of_verdicts(verdicts) == status == ExitStatus(status)
