"""Which precision is best at equal bits: the winner along scaling curves, and the Pareto frontier of single trials.

A wider code makes a better model of the same parameters, and a smaller model of the same bits.  So bit widths are compared at equal total
bits, on their curves over the sizes of a family (`analysis.curves`): the curve on top wins there.  The frontier asks without curves: which
trials have no trial of as few bits that scores better?  Both work on a `Scoreboard`, which knows the intervals.

    best_bit_width(curves(board), board, block=None)
    leads(curves(board), board)
    pareto(board)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import pandas as pd

from analysis.curves import Curve, combine, common_grid, contenders, mean_lead, whole
from analysis.scores import SIZES
from analysis.uncertainty import Scoreboard

GRID_POINTS = 101
"""Positions at which curves are compared, so that shares are known to a hundredth."""


def best_bit_width(found: Sequence[Curve], board: Scoreboard, *, block: str | None = "64", label: str | None = None) -> pd.DataFrame:
    """Which bit width's curve is on top at equal total bits: one row a family and position.

    found: `curves(board)`.  block, label: the configuration of each bit width; None for its best (`contenders`).
    Columns: family, x (log2 bits), bits, label, block, value, second_bits, lead (over the second, positive in either
    direction of the score), lead_stderr, lead_margin (half a 95 % interval).  Positions where one of the family's widths has a
    gap have no winner (NaN); a family whose widths share no range, or with one width only, has no rows.
    """
    rows = []
    for family in sorted({curve.family for curve in found}):
        compared = contenders(found, board.sign, family=family, block=block, label=label)
        if len(compared) > 1:
            rows += [_winner(family, x, list(compared.values()), board) for x in common_grid(compared.values(), GRID_POINTS)]
    columns = ["family", "x", "bits", "label", "block", "value", "second_bits", "lead", "lead_stderr", "lead_margin"]
    return pd.DataFrame(rows, columns=columns)


def _winner(family: str, x: float, compared: Sequence[Curve], board: Scoreboard) -> dict[str, object]:
    at = {curve.bits: curve.at(x) for curve in compared}
    if not all(at.values()):
        return {"family": family, "x": x}
    sign = board.sign
    first, second, *_ = sorted(compared, key=lambda curve: -sign * board.value(at[curve.bits]))
    lead = combine((at[first.bits], 1.0), (at[second.bits], -1.0))
    return {
        "family": family,
        "x": x,
        "bits": first.bits,
        "label": first.label,
        "block": first.block,
        "value": board.value(at[first.bits]),
        "second_bits": second.bits,
        "lead": sign * board.value(lead),
        "lead_stderr": board.stderr(lead),
        "lead_margin": board.margin(lead),
    }


def shares(best: pd.DataFrame) -> pd.DataFrame:
    """How much of a family's common range each bit width wins: one row a family and winning width.

    best: from `best_bit_width`.  Columns: family, bits, share (of the positions), distinguishable (share where the lead is
    more than its margin), mean_lead, low and high (log2 bits between which it wins).  Positions without a winner
    count in the denominator, so shares may add up to less than 1.
    """
    rows = []
    for key, won in best.dropna(subset="bits").groupby(["family", "bits"]):
        family, bits = cast("tuple[str, float]", key)
        positions = int((best["family"] == family).sum())
        rows.append(
            {
                "family": family,
                "bits": whole(bits),
                "share": len(won) / positions,
                "distinguishable": int((won["lead"] > won["lead_margin"]).sum()) / positions,
                "mean_lead": float(won["lead"].mean()),
                "low": float(won["x"].min()),
                "high": float(won["x"].max()),
            }
        )
    return pd.DataFrame(rows, columns=["family", "bits", "share", "distinguishable", "mean_lead", "low", "high"])


def leads(found: Sequence[Curve], board: Scoreboard, *, block: str | None = None, label: str | None = None) -> pd.DataFrame:
    """Each two precisions of a family at equal bits, on average over the sizes that these two have in common.

    found, block, label: as in `best_bit_width`, which asks of all widths at once and has no answer where they do not all share a range.
    Columns: family, bits, over (the other one), lead (positive: `bits` is better), low and high (95 %, over examples), models (behind
    both curves).
    """
    rows = []
    for family in sorted({curve.family for curve in found}):
        compared = contenders(found, board.sign, family=family, block=block, label=label)
        for (bits, curve), (over, other) in itertools.combinations(compared.items(), 2):
            weights = mean_lead(curve, other, GRID_POINTS)
            if weights:
                lead, half = board.sign * board.value(weights), board.margin(weights)
                interval = {"low": lead - half, "high": lead + half}
                models = {"models": int(board.table.loc[list(weights), "model"].nunique())}
                rows.append({"family": family, "bits": bits, "over": over, "lead": lead} | interval | models)
    return pd.DataFrame(rows, columns=["family", "bits", "over", "lead", "low", "high", "models"])


def pareto(board: Scoreboard, *, size: str = SIZES[0]) -> pd.DataFrame:
    """Trials by size, and which of them no other beats: one row a trial that has a number.

    A trial is off the frontier where one of as few bits or fewer scores better.  Columns: family, model, bits, label, block, total_bits,
    value, on_frontier, beaten_by (the index of the best trial of as few bits), behind (by how much, positive in either direction
    of the score), low and high (its 95 % interval over examples; where low is below 0, the trial cannot be told from the
    frontier).  `attrs`: `trials` (how many there are) and `left_out` (those without a number, which are in no row).
    """
    table = board.table.assign(value=[board.value({str(trial): 1.0}) for trial in board.table.index])
    known = (
        table.dropna(subset=["value"]).assign(order=lambda rows: -board.sign * rows["value"]).sort_values([size, "order"], kind="stable")
    )
    best: str | None = None
    rows = []
    for trial, row in known.iterrows():
        beaten_by = best if best is not None and board.sign * (board.value({best: 1.0}) - row["value"]) > 0 else None
        weights = {} if beaten_by is None else combine(({beaten_by: board.sign}, 1.0), ({str(trial): board.sign}, -1.0))
        behind, half = (board.value(weights), board.margin(weights)) if weights else (math.nan, math.nan)
        about = {name: row[name] for name in ("family", "model", "bits", "label", "block")}
        rows.append(
            about
            | {"total_bits": row[size], "value": row["value"], "on_frontier": beaten_by is None, "beaten_by": beaten_by}
            | {"behind": behind, "low": behind - half, "high": behind + half}
        )
        best = str(trial) if beaten_by is None else best
    columns = ["family", "model", "bits", "label", "block", "total_bits", "value", "on_frontier", "beaten_by", "behind", "low", "high"]
    found = pd.DataFrame(rows, columns=columns, index=known.index)
    found.attrs.update(trials=len(table), left_out=len(table) - len(known))
    return found
