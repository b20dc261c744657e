"""What each task says of A − B.

    import analysis, quantsweep
    samples = quantsweep.load_samples("results/quickstart")
    analysis.compare(samples[samples.bit_width == 4], samples[samples.method == "none"])

A difference is A − B: of accuracies a share, of bits per byte bits, of perplexities the natural logarithm of their ratio.  With several
models it is the mean over pairs of trials, and its interval is about other models and other examples; with one model it
is about this model on other examples, or, where it was calibrated with several seeds, on other examples with other seeds.

The verdict, with an error of 5 %:

    equal       two one-sided tests: the 90 % interval lies within ± margin (only where a margin is given)
    better      the test of no difference rejects, in A's favour, and the difference is above the numerical floor
    worse       the same, in B's favour
    undecided   anything else
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.comparison.noise import LEAST_SEEDS, floor_of, seed_spread
from analysis.comparison.outcomes import (
    METRICS,
    Clusters,
    Metric,
    Pair,
    Row,
    cluster_codes,
    metric_of,
    refuse_other_requests,
    tie_share,
    values,
)
from analysis.comparison.paired import Estimate, OnProgress, Paired, Vector, estimate
from analysis.comparison.partners import pair_trials
from analysis.comparison.power import detectable, examples_needed
from analysis.uncertainty import LEVEL
from quantsweep.errors import ConfigurationError, did_you_mean

BETTER, WORSE, EQUAL, UNDECIDED = "better", "worse", "equal", "undecided"
SEED_AXES = ("seed", "calibration_seed")
_FLIPS = ["model", "trial_a", "trial_b", "task_key", "document", "right"]
Margin = Mapping[str, float] | float | None
"""Of all metrics, or by metric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What one task says of A − B.

    value_a, value_b: means over pairs (of perplexities geometric ones).  estimate: the difference with its interval and test.
    gained, lost: answers that only A, only B has right, of all pairs together; None for losses.  num_units, unit: what is drawn
    beside the examples ("model", "seed").  ties: share of examples on which both arms have the very same log-likelihood.
    detectable, examples_needed: see `analysis.comparison.power`.  floor: what other batch sizes or cards would make of nothing,
    num_seeds, seed_spread: seeds that were compared and the standard deviation of the difference over them (`analysis.comparison.noise`).
    verdict: of A.  reason: why it is undecided, or what is to be known beside it; may be empty.
    """

    task_key: str
    metric: str
    unit_of_difference: str
    num_pairs: int
    num_examples: int
    num_clusters: int
    num_units: int
    unit: str
    value_a: float
    value_b: float
    estimate: Estimate
    gained: int | None
    lost: int | None
    ties: float
    detectable: float
    examples_needed: float
    margin: float | None
    floor: float
    num_seeds: int
    seed_spread: float
    verdict: str
    reason: str


def compare(
    a: pd.DataFrame,
    b: pd.DataFrame,
    *,
    metrics: Mapping[str, str] | str | None = None,
    margin: Margin = None,
    clusters: Clusters | None = None,
    ranges: pd.DataFrame | None = None,
    on_progress: OnProgress | None = None,
) -> list[Comparison]:
    """One comparison for each task that both arms answered.

    a, b: rows of `quantsweep.load_samples`.  metrics: of METRICS, by task or task_key, or one for all; by default acc, of documents
    bits_per_byte.  margin: the difference that would not matter.  clusters: examples that belong together.  ranges: from
    `analysis.comparison.noise.replicate_ranges`.  on_progress: is told the share of a bootstrap that is done.
    Raises ConfigurationError where nothing can be paired: other tasks, other requests, trials that fit several partners.
    """
    return [
        _compared(task, pairs, metric_of(task, pairs[0][0], metrics), margin, clusters, ranges, on_progress)
        for task, pairs in pairs_by_task(a, b).items()
    ]


def pairs_by_task(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, list[Pair]]:
    """The rows of partners, by task_key; raises ConfigurationError where they have no task in common."""
    of_a, of_b = _by_evaluation(a, "A"), _by_evaluation(b, "B")
    found: dict[str, list[Pair]] = {}
    for left, right in pair_trials(a, b):
        for task in of_a[left].keys() & of_b[right].keys():
            found.setdefault(task, []).append((of_a[left][task], of_b[right][task]))
    if not found:
        keys_a, keys_b = (", ".join(sorted(set(rows["task_key"]))) for rows in (a, b))
        raise ConfigurationError(
            f"A and B have no task_key in common: A has {keys_a}; B has {keys_b}. Limit, few-shot count and version are part of it"
        )
    for task, pairs in found.items():
        refuse_other_requests(task, pairs)
    return dict(sorted(found.items()))


def flips(a: pd.DataFrame, b: pd.DataFrame, *, metrics: Mapping[str, str] | str | None = None) -> pd.DataFrame:
    """The answers that only one of two partners has right: model, trial_a, trial_b, task_key, document, right ("A" or "B").

    document: the place of the example in its task, from 0.  Tasks whose metric is a loss have no rows.
    """
    rows = []
    for task, pairs in pairs_by_task(a, b).items():
        metric = metric_of(task, pairs[0][0], metrics)
        for left, right in pairs if metric.is_count else ():
            difference = values(task, left, metric)[0] - values(task, right, metric)[0]
            about = {"model": left["model"], "trial_a": left["trial_id"], "trial_b": right["trial_id"], "task_key": task}
            rows += [{**about, "document": int(k), "right": "A" if difference[k] > 0 else "B"} for k in np.flatnonzero(difference)]
    return pd.DataFrame(rows, columns=_FLIPS)


def _compared(
    task: str,
    pairs: Sequence[Pair],
    metric: Metric,
    margins: Margin,
    clusters: Clusters | None,
    ranges: pd.DataFrame | None,
    on_progress: OnProgress | None,
) -> Comparison:
    margin = _margin(margins, metric)
    scored = [(values(task, left, metric), values(task, right, metric)) for left, right in pairs]
    if len(numbers := {len(x) for (x, _), _ in scored}) > 1:
        told = " and ".join(f"{number:,}" for number in sorted(numbers))
        raise ConfigurationError(
            f"task '{task}' has {told} examples, depending on the model (windows follow its tokenizer and context): "
            "compare models of one tokenizer at a time, model=… in A and in B"
        )
    means = np.array([[x.sum() / w.sum() for x, w in arms] for arms in scored])
    differences = np.array([left[0] - right[0] for left, right in scored])
    codes = cluster_codes(pairs[0][0], clusters)
    unit, units = _units(pairs)
    paired = _summed(differences, scored[0][0][1], codes, units, unit=unit, is_count=metric.is_count)
    found = estimate(paired, on_progress)
    with np.errstate(over="ignore"):  # an exploded perplexity is infinite, its logarithm is not
        value_a, value_b = map(float, np.exp(means.mean(axis=0)) if metric.is_log else means.mean(axis=0))
    floor = floor_of(ranges, pairs, metric)
    seeds = _seeds(pairs)
    verdict, reason = judge(found, metric, margin, floor)
    num_seeds = len(set(seeds) - {None})
    if 0 < num_seeds < LEAST_SEEDS:
        of_method = f"this is about these trials: a method shows in {LEAST_SEEDS} seeds or more, not in {num_seeds}"
        reason = f"{reason}; {of_method}" if reason else of_method
    return Comparison(
        task_key=task,
        metric=metric.name,
        unit_of_difference=metric.unit,
        num_pairs=len(pairs),
        num_examples=len(codes),
        num_clusters=paired.x_UK.shape[1],
        num_units=len(paired.share_U),
        unit=unit,
        value_a=value_a,
        value_b=value_b,
        estimate=found,
        gained=int((differences > 0).sum()) if metric.is_count else None,
        lost=int((differences < 0).sum()) if metric.is_count else None,
        ties=tie_share(pairs),
        detectable=detectable(paired, found),
        examples_needed=examples_needed(paired, found, len(codes), margin),
        margin=margin,
        floor=floor,
        num_seeds=num_seeds,
        seed_spread=seed_spread(pd.DataFrame({"seed": seeds, "difference": means[:, 0] - means[:, 1]})),
        verdict=verdict,
        reason=reason,
    )


def judge(found: Estimate, metric: Metric, margin: float | None, floor: float) -> tuple[str, str]:
    """(verdict of A, what is to be said beside it); see this page."""
    if math.isnan(found.p):
        return UNDECIDED, "all examples belong to one cluster: how another would differ is not known"
    differs = found.p <= 1 - LEVEL
    if margin is not None and -margin < found.low_inner and found.high_inner < margin:
        return EQUAL, "there is a difference, and it is smaller than the margin" if differs else ""
    if not differs:
        return UNDECIDED, "no example differs" if found.stderr == 0 and found.difference == 0 else ""
    if abs(found.difference) <= floor:
        return UNDECIDED, "the difference is below its numerical floor: another batch size or card makes as much of nothing"
    return (BETTER if (found.difference > 0) == metric.is_count else WORSE), ""


def _margin(margins: Margin, metric: Metric) -> float | None:
    margin = margins.get(metric.name) if isinstance(margins, Mapping) else margins
    if isinstance(margins, Mapping) and (unknown := sorted(set(margins) - set(METRICS))):
        raise ConfigurationError(f"margin: {did_you_mean('metric', unknown[0], METRICS)}")
    if margin is not None and not 0 < margin < math.inf:
        of_metric = f" of {metric.name}" if isinstance(margins, Mapping) else ""
        raise ConfigurationError(f"margin {margin:g}{of_metric} is no size of a difference: give a number above 0")
    return margin


def _summed(
    differences_PE: Vector, weights_E: Vector, codes_E: npt.NDArray[np.int64], units_P: Sequence[str], *, unit: str, is_count: bool
) -> Paired:
    """Sums over the pairs of each unit and the examples of each cluster."""
    unit_of, names = pd.factorize(pd.Series(units_P, dtype=object))
    num_units, num_clusters = len(names), int(codes_E.max()) + 1
    pairs_U = np.bincount(unit_of, minlength=num_units).astype(np.float64)
    by_unit = np.zeros((num_units, len(codes_E)))
    np.add.at(by_unit, unit_of, differences_PE)
    x_UK = np.array([np.bincount(codes_E, weights=row, minlength=num_clusters) for row in by_unit])
    w_K = np.bincount(codes_E, weights=weights_E, minlength=num_clusters)
    is_single = num_clusters == len(codes_E)
    return Paired(
        x_UK=x_UK,
        w_UK=pairs_U[:, None] * w_K,
        share_U=pairs_U / pairs_U.sum(),
        is_count=is_count,
        is_single=is_single,
        num_pairs=len(units_P),
        unit=unit,
    )


def _units(pairs: Sequence[Pair]) -> tuple[str, list[str]]:
    """What is drawn beside the examples, and which one each pair belongs to: models, or the seeds of one model.

    A model is its weights: what was planted into them, and another name for them, make no other draw.
    """
    models = [str(left["model"] if pd.isna(left.get("model_content")) else left["model_content"]) for left, _ in pairs]
    if len(set(models)) > 1:
        return "model", models
    seeds = _seeds(pairs)
    return ("seed", [str(seed) for seed in seeds]) if len(set(seeds) - {None}) > 1 else ("model", models)


def _seeds(pairs: Iterable[Pair]) -> list[str | None]:
    """What was random in each pair, as text; None where nothing was."""
    given = [{f"{arm}.{axis}": row.get(axis) for arm, row in zip("AB", pair, strict=True) for axis in SEED_AXES} for pair in pairs]
    texts = [" ".join(f"{axis}={seed}" for axis, seed in seeds.items() if not pd.isna(seed)) for seeds in given]
    return [text or None for text in texts]


def _by_evaluation(samples: pd.DataFrame, arm: str) -> dict[str, dict[str, Row]]:
    """Rows by trial and task; raises ConfigurationError where an evaluation stands twice."""
    twins = samples[samples.duplicated(["trial_id", "task_key"], keep=False)]
    if len(twins):
        where = f" (sweeps {', '.join(sorted(set(twins['sweep'])))})" if "sweep" in twins else ""
        raise ConfigurationError(
            f"{arm} has trial {twins['trial_id'].iloc[0]} several times in task '{twins['task_key'].iloc[0]}'{where}. Keep one of them"
        )
    found: dict[str, dict[str, Row]] = {}
    for row in samples.to_dict("records"):
        found.setdefault(str(row["trial_id"]), {})[str(row["task_key"])] = {str(key): value for key, value in row.items()}
    return found
