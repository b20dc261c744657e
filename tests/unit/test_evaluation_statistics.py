"""Standard errors: against lm-eval's, against the bootstrap, and at the edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api import metrics as lm_eval_metrics

from quantsweep.evaluation.statistics import aggregate, standard_error

FUNCTIONS = {
    "mean": lm_eval_metrics.mean,
    "perplexity": lm_eval_metrics.perplexity,
    "weighted_perplexity": lm_eval_metrics.weighted_perplexity,
    "bits_per_byte": lm_eval_metrics.bits_per_byte,
}


def documents(name: str, n: int = 400) -> list[Any]:
    """Plausible items: outcomes, log-likelihoods of words, or (log-likelihood, bytes) of documents of uneven length."""
    rng = np.random.default_rng(0)
    if name == "mean":
        return [float(outcome) for outcome in rng.random(n) < 0.3]
    if name == "perplexity":
        return list(rng.normal(-1.5, 0.4, n))
    sizes = rng.integers(200, 3000, n)
    return [(float(-size * rate), int(size)) for size, rate in zip(sizes, rng.normal(0.9, 0.15, n), strict=True)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_closed_form_agrees_with_the_bootstrap(name: str) -> None:
    items = documents(name)
    value = aggregate(FUNCTIONS[name], items)
    rng = np.random.default_rng(1)
    resampled = [aggregate(FUNCTIONS[name], [items[i] for i in rng.integers(0, len(items), len(items))]) for _ in range(1000)]
    assert standard_error(name, items, value) == pytest.approx(float(np.std(resampled)), rel=0.1)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_the_mean_s_is_lm_evals(outcomes: list[bool]) -> None:
    items = [float(outcome) for outcome in outcomes]
    assert standard_error("mean", items, 0.0) == pytest.approx(lm_eval_metrics.mean_stderr(items), abs=1e-12)


def test_documents_of_one_rate_have_no_error_whatever_their_lengths() -> None:
    items = [(-0.7 * size, size) for size in (10, 500, 3000)]
    assert standard_error("bits_per_byte", items, 1.0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_examples_have_no_error(name: str, count: int) -> None:
    assert math.isnan(standard_error(name, documents(name)[:count], 1.0))


def test_an_aggregate_without_a_formula_has_no_error() -> None:
    assert math.isnan(standard_error("f1", [(1, 1), (0, 1), (1, 0)], 0.5))


@pytest.mark.parametrize(
    ("function", "items", "expected"),
    [
        (lm_eval_metrics.perplexity, [-800.0, -900.0], math.inf),
        (lm_eval_metrics.perplexity, [-math.inf, -1.0], math.inf),
        (lm_eval_metrics.perplexity, [math.nan, -1.0], math.nan),
        (lm_eval_metrics.weighted_perplexity, [(-1e6, 10), (-1.0, 10)], math.inf),
        (lm_eval_metrics.bits_per_byte, [(-math.inf, 10), (-1.0, 10)], math.inf),
        (lm_eval_metrics.bits_per_byte, [(math.nan, 10), (-1.0, 10)], math.nan),
    ],
)
def test_exploded_and_undefined_values_are_values(function: Any, items: list[Any], expected: float) -> None:
    value = aggregate(function, items)
    assert value == expected or (math.isnan(value) and math.isnan(expected))
    name = next(name for name, candidate in FUNCTIONS.items() if candidate is function)
    assert not math.isfinite(standard_error(name, items, value))
