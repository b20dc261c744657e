"""Two kinds of noise beside a difference, which no number of examples makes smaller.

    the numerical floor   the same trials under other batch sizes or on other cards: the order of sums differs, and with it last bits,
                          near ties, answers.  Replicates of both arms tell how far the difference moves with nothing changed
    the seeds' spread     calibration draws text by a seed; the quantized model is one of many that the method might have made

The floor of a difference is the range of A's replicates and that of B's together: the farthest that one choice of replicates
moves it against another.  A difference that is not above it is no finding, whatever its interval.

A claim about a *method* is about all of its seeds: these are a random effect, paired where both arms have them, with the degrees of
freedom of their number less one.  Fewer than LEAST_SEEDS tell too little of a spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.comparison.outcomes import METRICS, Metric, Pair
from analysis.uncertainty import half_width
from quantsweep.errors import ConfigurationError

LEAST_SEEDS = 5


def replicate_ranges(results: pd.DataFrame) -> pd.DataFrame:
    """How far the replicates of each evaluation lie apart: one row a trial_id, task_key and metric, columns `range` and `replicates`.

    Of perplexities, whose logarithms are compared, it is the range of the logarithm.

    results: rows of `quantsweep.load_results` of several sweeps (or any frame with trial_id, task_key, metric, attempt and value)
    in which the same trials ran under other batch sizes (`batch_size=…`) or on other cards.  One attempt counts once.
    """
    rows = results.drop_duplicates(["trial_id", "task_key", "metric", "attempt"])
    is_log = rows["metric"].isin([metric.name for metric in METRICS.values() if metric.is_log])
    rows = rows.assign(value=rows["value"].where(~is_log, np.log(rows["value"].where(is_log, 1.0))))
    grouped = rows.groupby(["trial_id", "task_key", "metric"], sort=True)["value"]
    return pd.DataFrame({"range": grouped.max() - grouped.min(), "replicates": grouped.size()}).reset_index()


def floor_of(ranges: pd.DataFrame | None, pairs: Sequence[Pair], metric: Metric) -> float:
    """The numerical floor of the mean difference of `pairs`; NaN unless every trial of both arms has two replicates or more.

    ranges: of `replicate_ranges`.
    """
    if ranges is None:
        return math.nan
    rows = ranges[(ranges["metric"] == metric.name) & (ranges["replicates"] > 1)]
    known = dict(zip(zip(rows["trial_id"], rows["task_key"], strict=True), rows["range"], strict=True))
    found = [known.get((row["trial_id"], row["task_key"]), math.nan) for pair in pairs for row in pair]
    return float(np.sum(found) / len(pairs))


def seed_spread(differences: pd.DataFrame) -> float:
    """Standard deviation over seeds of the mean difference of each; NaN of fewer than two.

    differences: one row a pair of trials, columns `seed` (None where nothing was random) and `difference`.
    """
    by_seed = differences.dropna(subset="seed").groupby("seed")["difference"].mean()
    return float(by_seed.std(ddof=1)) if len(by_seed) > 1 else math.nan


def method_effect(differences: pd.DataFrame) -> tuple[float, float, float]:
    """(mean difference, low, high): what the *method* does, its seeds a random effect; a 95 % interval by Student's t over seeds.

    differences: as in `seed_spread`.  Raises ConfigurationError for fewer than LEAST_SEEDS seeds.
    """
    by_seed = differences.dropna(subset="seed").groupby("seed")["difference"].mean()
    if len(by_seed) < LEAST_SEEDS:
        raise ConfigurationError(
            f"a claim about a method needs {LEAST_SEEDS} seeds or more, and there are {len(by_seed)}: "
            f"launch it with seed={','.join(map(str, range(LEAST_SEEDS)))}"
        )
    mean = float(by_seed.mean())
    half = half_width(float(by_seed.std(ddof=1)) / math.sqrt(len(by_seed)), len(by_seed) - 1)
    return mean, mean - half, mean + half
