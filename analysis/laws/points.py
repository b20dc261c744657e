"""The points that laws are fitted to: losses in nats, or what quantizing adds to them, with size, tokens and bits.

Perplexities become their logarithm, bits per byte become nats a byte.  The unit (a token's, a word's, a byte's) stays that of
the metric, and so do the constants that are fitted.  P is stored bits a weight, scales and all, where the table knows them.
"""

from __future__ import annotations

import math
import shlex

import numpy as np
import pandas as pd

from analysis.frames import LOSSES, PERPLEXITIES
from analysis.laws.forms import DEGRADATION, LOSS
from analysis.selection import BASELINE, HEADLINE
from analysis.uncertainty import Scoreboard
from quantsweep.errors import ConfigurationError
from quantsweep.words import count


def loss_points(board: Scoreboard, *, label: str | None = None, block: str | None = None) -> pd.DataFrame:
    """One row a trial of one configuration, and the baselines: model, parameters, tokens, bits, response (nats).

    label, block: the configuration; needed where there are several.  `attrs`: response, left_out (why rows are not there, in words).
    Raises ConfigurationError for scores that are no loss, and where configurations would be mixed.
    """
    table = _one_configuration(board.table, label, block)
    loss = _nats(table[board.score], str(table.attrs.get("metric", board.score)))
    points = _points(table, loss)
    known = np.isfinite(points["response"]) & (points["response"] > 0)
    left_out = () if known.all() else (f"{count(int((~known).sum()), 'trial')} without a finite loss",)
    return _described(points[known], LOSS, left_out)


def degradation_points(board: Scoreboard, *, label: str | None = None, block: str | None = None) -> pd.DataFrame:
    """One row a quantized trial of one configuration: what it adds to the loss of its model's baseline (nats), as `loss_points`.

    A law of the form C e^(−P/γ) knows no degradation of 0 or less, so such trials are left out, and `attrs["left_out"]` counts them.
    Where many are, the widest codes lost nothing that can be measured, and those that stay are too large on average: leave these
    widths out.
    """
    table = _one_configuration(board.table, label, block)
    loss = _nats(table[board.score], str(table.attrs.get("metric", board.score)))
    is_baseline = table["label"] == BASELINE
    before = table.loc[is_baseline, "model"].to_frame().assign(loss=loss[is_baseline]).set_index("model")["loss"]
    added = (loss - table["model"].map(before))[~is_baseline]
    points = _points(table[~is_baseline], added)
    unknown, negative = ~np.isfinite(points["response"]), points["response"] <= 0
    reasons = ((unknown, "without a finite loss or without a baseline"), (negative, "that lost nothing (0 or less)"))
    left_out = tuple(f"{count(int(rows.sum()), 'trial')} {why}" for rows, why in reasons if rows.any())
    return _described(points[~unknown & ~negative], DEGRADATION, left_out)


def _points(table: pd.DataFrame, response: pd.Series[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": table["model"],
            "parameters": table["num_parameters"].astype(float),
            "tokens": table.get("tokens", math.nan),
            "bits": table["bits_per_weight"].astype(float),
            "response": response,
        }
    )


def _described(points: pd.DataFrame, response: str, left_out: tuple[str, ...]) -> pd.DataFrame:
    points = points.reset_index(names="trial")
    points.attrs = {"response": response, "left_out": left_out}
    return points


def _nats(values: pd.Series[float], metric: str) -> pd.Series[float]:
    if metric in PERPLEXITIES:
        return values.where(values > 0).map(math.log, na_action="ignore")
    if metric in LOSSES:
        return values * math.log(2) if metric == HEADLINE else values
    known = ", ".join(sorted(PERPLEXITIES | LOSSES))
    raise ConfigurationError(f"laws are of losses, and {metric} is none. Choose one of: {known}")


def _one_configuration(table: pd.DataFrame, label: str | None, block: str | None) -> pd.DataFrame:
    """The rows of one label and block, and the baselines."""
    attrs = table.attrs
    for name, chosen in (("label", label), ("block", block)):
        quantized = table["label"] != BASELINE
        there = sorted(set(table.loc[quantized, name]))
        if chosen is None and len(there) > 1:
            raise ConfigurationError(
                f"a law is fitted to one configuration, and there are several: {', '.join(there[:12])}. "
                f"Choose one: --{name} {shlex.quote(there[0])}"
            )
        if chosen is not None and chosen not in there:
            raise ConfigurationError(f"no trial has {name} '{chosen}'. There are: {', '.join(there[:12]) or '(none)'}")
        table = table if chosen is None else table[~quantized | (table[name] == chosen)]
    table.attrs = attrs
    return table
