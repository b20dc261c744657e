"""A comparison in words, as a table, and as JSON.

Numbers that a reader would act on stand with what they are: a difference with its interval, an interval with how it was made, a verdict
with the number of examples that would decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from analysis.comparison.arms import BETTER, EQUAL, UNDECIDED, WORSE, Comparison
from quantsweep.words import count, rounded

_VERDICTS = {BETTER: "A is better", WORSE: "A is worse", EQUAL: "equal within the margin"}


def text(found: Comparison) -> str:
    """One task, a few lines."""
    draws = count(found.num_examples, "example") + (
        f" in {count(found.num_clusters, 'cluster')}" if found.num_clusters < found.num_examples else ""
    )
    pairs = f", {count(found.num_pairs, 'pair')} of trials" + (f", {count(found.num_units, found.unit)}" if found.num_units > 1 else "")
    lines = [
        f"{found.task_key}  {found.metric}  ({draws}{pairs})",
        f"  A {found.value_a:.4f}   B {found.value_b:.4f}   A − B {_difference(found)}",
    ]
    if found.num_units > 1:
        lines.append(f"  on these {found.unit}s alone {_range(found.estimate.low_these, found.estimate.high_these)}")
    if found.gained is not None:
        lines.append(f"  answers: {found.gained:,} right only in A, {found.lost:,} only in B; {_p(found)}")
    else:
        lines.append(f"  {_p(found)}")
    if found.margin is not None:
        lines.append(f"  margin {found.margin:g} {found.unit_of_difference}: {_inner_range(found)}")
    lines.append(f"  {_power(found)}")
    lines.append(f"  noise: {_noise(found)}")
    lines.append(f"  verdict: {_VERDICTS.get(found.verdict, found.verdict)}" + (f" ({found.reason})" if found.reason else ""))
    return "\n".join(lines)


def flips_text(rows: pd.DataFrame) -> str:
    """The answers that differ, by task and pair: document numbers, from 0."""
    lines = []
    for (task, trial_a, trial_b), same in rows.groupby(["task_key", "trial_a", "trial_b"], sort=True):
        lines.append(f"{task}  {same['model'].iloc[0]}  {trial_a} against {trial_b}")
        for arm in "AB":
            documents = same.loc[same["right"] == arm, "document"]
            lines.append(f"  right only in {arm} ({len(documents)}): {', '.join(map(str, documents)) or '-'}")
    return "\n".join(lines) or "no answer differs"


def as_json(found: Comparison) -> dict[str, Any]:
    """All fields, the estimate's beside the others; what is not a number is null."""
    fields = dataclasses.asdict(found)
    flat = {**{key: value for key, value in fields.items() if key != "estimate"}, **fields["estimate"]}
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in flat.items()}


def axes_text(axes: Mapping[str, tuple[Iterable[str], Iterable[str]]], most: int = 4) -> str:
    """What A and B differ in: `bit_width 3 against 4`.

    What only one of them has at all is left out, but for planted outliers; so are options, and versions of what differs itself.
    """
    both = {axis: arms for axis, arms in axes.items() if axis.startswith("plant_") or ["null"] not in [list(values) for values in arms]}
    left_out = {axis for axis in both if axis.endswith("_options") or (axis.endswith("_version") and axis.removesuffix("_version") in axes)}
    told = [f"{axis} {_some(a, most)} against {_some(b, most)}" for axis, (a, b) in both.items() if axis not in left_out]
    return "; ".join(told) or ("nothing that makes a trial" if not axes else ", ".join(axes))


def _some(values: Iterable[str], most: int) -> str:
    known = list(values)
    return ", ".join([*known[:most], *(["…"] if len(known) > most else [])])


def _difference(found: Comparison) -> str:
    seen = found.estimate
    if math.isnan(seen.low):
        return f"{_signed(seen.difference)} {found.unit_of_difference}, no interval"
    ratio = f", A is {math.exp(seen.difference):.4f} times B" if found.unit_of_difference == "log of the ratio" else ""
    return f"{_signed(seen.difference)} {found.unit_of_difference}{ratio}, {_range(seen.low, seen.high)} ({seen.interval})"


def _inner_range(found: Comparison) -> str:
    seen = found.estimate
    if math.isnan(seen.low_inner):
        return "no interval"
    return f"90 % from {_signed(seen.low_inner)} to {_signed(seen.high_inner)}"


def _range(low: float, high: float) -> str:
    return f"95 % from {_signed(low)} to {_signed(high)}"


def _signed(number: float) -> str:
    """Four decimals; of what they would make nothing, two digits."""
    return f"{number:+.4f}" if number == 0 or abs(number) >= 5e-4 else f"{number:+.1e}"


def _p(found: Comparison) -> str:
    p = found.estimate.p
    return "no test" if math.isnan(p) else f"p {'< 0.0005' if p < 0.0005 else f'= {p:.3f}'} ({found.estimate.test})"


def _power(found: Comparison) -> str:
    could = "power not known" if math.isnan(found.detectable) else f"finds differences from {found.detectable:.2g} on with 80 % power"
    if found.verdict != UNDECIDED or math.isnan(found.examples_needed):
        return could
    if math.isfinite(found.examples_needed):
        return f"{could}; about {rounded(found.examples_needed)} examples would decide, were the difference what it seems"
    if found.num_units > 1 and found.estimate.difference != 0:
        return f"{could}; no number of examples would decide, more {found.unit}s would"
    return f"{could}; no number of examples would decide: the difference seems to be nothing, and --margin asks whether it is"


def _noise(found: Comparison) -> str:
    floor = "numerical floor not known (--replicates)" if math.isnan(found.floor) else f"numerical floor {found.floor:.2g}"
    seeds = "" if math.isnan(found.seed_spread) else f"; spread over {count(found.num_seeds, 'seed')} {found.seed_spread:.2g}"
    return f"{floor}{seeds}; {100 * found.ties:.3g} % exact ties"
