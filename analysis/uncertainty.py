"""Standard errors of sums of scores, with the examples that trials share.

All trials answer the same examples, so a difference of two trials is known better than either of them: what counts is
how often their answers differ.  Whatever is compared here is a weighted sum L = Σ w_i · score_i over trials (a
difference, a mean of differences over models, a point between two models on a curve), and its standard error is

    with samples      √ Σ_e (Σ_i w_i u_ie)²        u_ie: what example e moves the score of trial i by
    without           √ Σ_i w_i² se_i²             as if each trial had examples of its own

With f = √(n/(n−1)) for a task of n examples:

    mean accuracy of k tasks    u_ie = f · (x_ie − x̄_i) / (n k)                          x: right or wrong
    bits per byte               u_ie = −f · (x_ie − r_i b_e) / (Σ b · ln 2)              x: log-likelihood, b: bytes, r = Σx/Σb

An interval is Student's t with the degrees of freedom of the estimated variance S² = Σ_e u_e² (u_e = Σ_i w_i u_ie, N examples),

    ν = 2 S⁴ / (Σ_e u_e⁴ − S⁴ / N), at most N − 1

(Satterthwaite with the sample's own fourth moment): few examples, or few whose answers differ, make it wide.  Without samples
ν is the examples of the smallest task less one.  The accuracy of one trial in one task has the exact binomial interval of
Clopper & Pearson (1934) instead: √(p(1 − p)/n) knows nothing of a rare answer that was never seen.

For one trial, both lines are the standard errors of the results table; see `quantsweep.evaluation.statistics`.  Where all answers
correlate alike, the second line is too wide for differences (weights that add up to 0) by 1/√(1 − correlation), and too narrow
for means over models; only samples tell.  Neither knows of models that were not run: an interval is about these
models on other examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from analysis.scores import ACCURACY, SIGN
from quantsweep.errors import ResultsError

Weights = Mapping[str, float]
"""A weighted sum of scores: trial_id → weight."""
Vector = npt.NDArray[np.float64]
LEVEL = 0.95
"""Of all intervals, two-sided."""
_CORRECT = {"acc": "correct", "acc_norm": "correct_norm"}
_KEPT = 1_024
"""Trials whose vectors are kept: 150 MB at the 18,000 examples of the k-bit paper's tasks."""


class Scoreboard:
    """The scores of trials, and sums of them with their standard errors.

    table: from `analysis.scores.scores`.  score: `accuracy` or `bits_per_byte`.  samples: as `quantsweep.load_samples` gives
    them, of the same trials; None to treat trials as independent.  sign: × score, more is better; needed for a score of another name.
    Raises ResultsError where the samples of one task are of different examples.
    """

    def __init__(self, table: pd.DataFrame, score: str, samples: pd.DataFrame | None = None, *, sign: float | None = None) -> None:
        self.table = table
        self.score = score
        self.sign = SIGN[score] if sign is None else sign
        finite = np.isfinite(table[score])
        self._values = _by_trial(table[score].where(finite))
        self._stderrs = _by_trial(table[f"{score}_stderr"].where(finite))
        self._examples = _by_trial(table[f"{score}_examples"])
        self._samples = None if samples is None else _by_evaluation(samples, self._tasks(), set(table.index))
        self._moves = lru_cache(maxsize=_KEPT)(self._moves_of)

    def value(self, weights: Weights) -> float:
        """Σ w_i · score_i; NaN if one of the scores is missing or not finite."""
        return math.fsum(weight * self._values[trial] for trial, weight in weights.items())

    def stderr(self, weights: Weights) -> float:
        """Standard error of `value(weights)` over the examples."""
        if math.isnan(self.value(weights)):
            return math.nan
        if self._samples is None:
            return math.sqrt(math.fsum((weight * self._stderrs[trial]) ** 2 for trial, weight in weights.items()))
        return float(np.linalg.norm(self._moves_together(weights)))

    def margin(self, weights: Weights, level: float = LEVEL) -> float:
        """Half width of the t interval of `value(weights)`; NaN without a standard error, and where no answer differs (it is 0)."""
        stderr = self.stderr(weights)
        return math.nan if math.isnan(stderr) or stderr == 0 else half_width(stderr, self.degrees(weights), level)

    def interval(self, weights: Weights, level: float = LEVEL) -> tuple[float, float]:
        """(low, high) of `value(weights)`: exact for one trial's accuracy in one task, else `value` ± `margin`."""
        value = self.value(weights)
        if self.score == ACCURACY and len(self._tasks()) == 1 and list(weights.values()) == [1.0] and not math.isnan(value):
            number = self._examples[next(iter(weights))]
            return proportion_interval(round(value * number), int(number), level)
        half = self.margin(weights, level)
        return value - half, value + half

    def degrees(self, weights: Weights) -> float:
        """Degrees of freedom of `stderr(weights)`, at least 1."""
        if self._samples is None:
            return max(min(self._examples[trial] for trial in weights) - 1.0, 1.0)
        return degrees_of_freedom(self._moves_together(weights))

    def _moves_together(self, weights: Weights) -> Vector:
        """Σ_i w_i u_ie, one number an example."""
        return sum((weight * self._moves(trial) for trial, weight in weights.items()), np.zeros(1))

    def noise(self, trials: Sequence[str]) -> float:
        """Variance of the scores over `trials` that the choice of examples makes: Σ_e var_i(u_ie), or the mean of se_i² without samples.

        What an example does to all trials alike does not set them apart.
        """
        if self._samples is None:
            return math.fsum(self._stderrs[trial] ** 2 for trial in trials) / len(trials)
        total, squares = 0.0 * self._moves(trials[0]), 0.0 * self._moves(trials[0])
        for trial in trials:
            total += self._moves(trial)
            squares += self._moves(trial) ** 2
        return float((squares - total**2 / len(trials)).sum()) / (len(trials) - 1)

    def _tasks(self) -> list[str]:
        about = self.table.attrs
        return list(about["accuracy_tasks"]) if self.score == ACCURACY else [about["text_task"]] if about["text_task"] else []

    def _moves_of(self, trial: str) -> Vector:
        """u of one trial, the examples of all tasks one after the other."""
        return np.concatenate([self._moves_in(trial, task) for task in self._tasks()])

    def _moves_in(self, trial: str, task: str) -> Vector:
        assert self._samples is not None
        row = self._samples.get((trial, task))
        if row is None:
            raise ResultsError(f"no samples of trial '{trial}' in task '{task}'. Load the samples of the same sweeps: load_samples([…])")
        if self.score == ACCURACY:
            tasks: dict[str, str] = self.table.attrs["accuracy_tasks"]
            outcomes: Vector = np.asarray(row[_CORRECT[tasks[task]]], dtype=np.float64)
            return _unbiased(outcomes - outcomes.mean()) / (len(outcomes) * len(tasks))
        x, b = (np.asarray(row[name], dtype=np.float64) for name in ("loglikelihood", "num_bytes"))
        return -_unbiased(x - x.sum() / b.sum() * b) / float(b.sum() * math.log(2))


def degrees_of_freedom(moves: Vector) -> float:
    """ν of the variance Σ m² (this page's formula), at least 1; `moves`: what each independent example moves the sum by."""
    squares = moves**2
    most = max(len(squares) - 1.0, 1.0)
    total = float(squares.sum())
    spread = float((squares**2).sum()) - total**2 / len(squares)
    return most if spread <= 0 else min(max(2 * total**2 / spread, 1.0), most)


def half_width(stderr: float, degrees: float, level: float = LEVEL) -> float:
    """Half of a two-sided t interval."""
    return stderr * float(stats.t.ppf((1 + level) / 2, degrees))


def proportion_interval(successes: int, number: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact binomial interval of a share, `successes` of `number` (Clopper & Pearson 1934); it covers at least `level`."""
    found = stats.binomtest(successes, number).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


def _by_trial(column: pd.Series[float]) -> dict[str, float]:
    return dict(zip(map(str, column.index), column, strict=True))


def _unbiased(residuals: Vector) -> Vector:
    n = len(residuals)
    return residuals * (math.sqrt(n / (n - 1)) if n > 1 else math.nan)


def _by_evaluation(samples: pd.DataFrame, tasks: list[str], trials: set[str]) -> dict[tuple[str, str], dict[str, Any]]:
    rows = samples[samples["task_key"].isin(tasks) & samples["trial_id"].isin(trials)]
    for task, same in rows.groupby("task_key"):
        if same["requests_hash"].nunique(dropna=False) > 1:
            raise ResultsError(
                f"the trials answered different examples of task '{task}' (requests_hash differs), so they cannot be paired. "
                "Leave the samples out, or keep trials with one requests_hash"
            )
    columns = ["correct", "correct_norm", "loglikelihood", "num_bytes"]
    keys = zip(rows["trial_id"], rows["task_key"], strict=True)
    return dict(zip(keys, rows[columns].to_dict("records"), strict=True))  # type: ignore[arg-type]
