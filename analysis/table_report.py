"""`python -m analysis table …` and `python -m analysis law …`: what any table says, with n and interval by each figure."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

import quantsweep
from analysis.boards import board, mean_over_tasks
from analysis.command import in_full, results_of, sweep_folder
from analysis.curves import curves
from analysis.degradation import degradation, mean_degradation, recovery
from analysis.effects import factor_effects
from analysis.equal_bits import best_bit_width, leads, pareto, shares
from analysis.frames import PERPLEXITIES, from_results, read_table
from analysis.laws import (
    Fit,
    Law,
    degradation_points,
    effective_parameters,
    fit,
    influence,
    largest_out,
    loss_of_size,
    loss_points,
    offsets,
    post_training,
)
from analysis.laws.forms import DEGRADATION
from analysis.selection import ACCURACIES, BASELINE, HEADLINE
from analysis.uncertainty import Scoreboard
from quantsweep.errors import ConfigurationError
from quantsweep.words import count

LAWS = ("post_training", "effective_parameters", "loss_of_size", "offsets")
_FILES = (".csv", ".parquet")


def show_table(arguments: list[str]) -> None:
    """Print degradation, recovery, the best precision at equal bits, the frontier and the effects of each factor."""
    asked = _parser("table", "Degradation, recovery, best precision at equal bits, frontier, effects.").parse_args(arguments)
    scoreboard = _board(asked)
    table = scoreboard.table
    about, models = table.attrs, table["model"].nunique()
    of_task = f" of {about['task']}" if about["task"] else ""
    print(f"\n{about['metric']}{of_task}: {count(len(table), 'trial')} of {count(models, 'model')}")
    _section("degradation against the same model's baseline: mean over models, 95 % interval over models", _degradation, scoreboard)
    if scoreboard.sign > 0:
        _section("recovery, per cent of the baseline's score: mean over models, 95 % interval over models", _recovery, scoreboard)
    _section("best precision at equal bits: share of the sizes that a family's precisions have in common", _winners, scoreboard)
    _section("each two precisions at equal bits: mean lead of the first, 95 % interval over examples", _leads, scoreboard)
    _section("Pareto frontier: no trial of as few bits scores better", _frontier, scoreboard)
    for factor in about["factors"]:
        if table.loc[table["label"] != BASELINE, factor].nunique() > 1:
            title = f"effect of {factor}, all else equal (margin: 95 % over examples; low, high: 95 % over models)"
            _section(title, partial(factor_effects, factor=factor), scoreboard)


def show_law(arguments: list[str]) -> None:
    """Print a law's constants with intervals, and what they hang on."""
    parser = _parser("law", "Fit a scaling law, and ask what it hangs on: the largest model, the points that move it most.")
    parser.add_argument("--law", choices=LAWS, default=LAWS[0], help=f"default: {LAWS[0]}")
    parser.add_argument(
        "--tokens",
        action=argparse.BooleanOptionalAction,
        help="with a term of training tokens, or without (default: with one where column tokens varies and tells its constants)",
    )
    parser.add_argument("--label", help="configuration, as `table` names it; needed where there are several")
    parser.add_argument("--block", help="block size, likewise")
    asked = parser.parse_args(arguments)
    scoreboard = _board(asked)
    make = degradation_points if _law(asked.law, False, scoreboard).response == DEGRADATION else loss_points
    points = make(scoreboard, label=asked.label, block=asked.block)
    found, about_tokens = _fitted(asked.law, asked.tokens, scoreboard, points)
    law = found.law
    models = count(found.models, "model")
    ended = f"{found.agreeing} of {found.starts} starts ended here"
    print(f"\n{law.formula}\n{count(len(points), 'point')} of {models}; {ended}; median error {found.error:.2%}")
    if about_tokens:
        print(about_tokens)
    for why in points.attrs["left_out"]:
        print(f"left out: {why}")
    print(f"\nconstants with 95 % intervals (bootstrap over {models})\n\n{in_full(found.estimates)}\n\n{_largest(found)}\n")
    for name in law.names:
        moved = influence(found, name)
        without = f"{moved.without:.4g} without the {len(moved.worst)} points that move it most ({', '.join(moved.worst)})"
        print(f"{name}: {moved.value:.4g}; {without}")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m analysis {name}", description=description, epilog="Columns: see analysis/frames.py.")
    parser.add_argument("table", help="a .csv or .parquet file, one row a model, configuration, task and metric; or a sweep")
    parser.add_argument("--rename", action="append", default=[], metavar="THEIRS=OURS", help="a column of the file: bit_width=bits")
    parser.add_argument("--metric", help="needed where the table has several")
    parser.add_argument("--task", help="needed where several have the metric; `mean` is the mean over all of them")
    return parser


def _board(asked: argparse.Namespace) -> Scoreboard:
    renames = dict(pair.partition("=")[::2] for pair in asked.rename)
    for theirs, ours in renames.items():
        if not theirs or not ours:
            raise ConfigurationError(f"--rename {theirs or ours} names one column: write --rename THEIRS=OURS, as in bit_width=bits")
    samples = None
    if Path(asked.table).suffix in _FILES:
        frame = read_table(asked.table, rename=renames)
    else:
        folder = sweep_folder(asked.table)
        frame = from_results(results_of([folder]))
        if asked.metric in (HEADLINE, *ACCURACIES) and asked.task != "mean":
            samples = quantsweep.load_samples(folder)
    if asked.task == "mean":
        return board(mean_over_tasks(frame, asked.metric))
    return board(frame, metric=asked.metric, task=asked.task, samples=samples)


def _fitted(name: str, tokens: bool | None, scoreboard: Scoreboard, points: pd.DataFrame) -> tuple[Fit, str]:
    """The law's fit, and a sentence on training tokens where they vary: they are a term of every published form (`analysis.laws.forms`).

    tokens: with their term, or without; None: with it where the points tell its constants.
    """
    seen = points["tokens"].dropna()
    if seen.nunique() < 2:
        return fit(_law(name, bool(tokens), scoreboard), points), ""
    vary = f"training tokens vary ({seen.min():g} to {seen.max():g})"
    if tokens is False:
        return fit(_law(name, False, scoreboard), points), f"{vary} and are left out, as --no-tokens says; --tokens takes them in"
    try:
        return fit(_law(name, True, scoreboard), points), f"{vary} and are in the law; --no-tokens leaves them out"
    except ConfigurationError as error:
        if tokens:
            raise
        return fit(_law(name, False, scoreboard), points), f"{vary} and are LEFT OUT: {error}"


def _law(name: str, tokens: bool, scoreboard: Scoreboard) -> Law:
    if name == "offsets":
        if tokens:
            raise ConfigurationError("the law of offsets has no term of tokens: leave out --tokens")
        return offsets(sorted(set(scoreboard.table["bits_per_weight"])))
    return {"post_training": post_training, "effective_parameters": effective_parameters, "loss_of_size": loss_of_size}[name](tokens=tokens)


def _section(title: str, make: Callable[[Scoreboard], pd.DataFrame], scoreboard: Scoreboard) -> None:
    """A table under its title, or the reason why there is none."""
    print(f"\n{title}\n")
    try:
        table = make(scoreboard)
    except ConfigurationError as error:
        print(f"none: {error}")
        return
    print(in_full(table.round(4)) if len(table) else "none")
    for reason in table.attrs.get("reasons", ()):
        print(f"left out: {reason}")


def _degradation(scoreboard: Scoreboard) -> pd.DataFrame:
    found = degradation(scoreboard)
    if found.attrs["without_baseline"]:
        print(f"without a baseline, left out: {', '.join(found.attrs['without_baseline'])}")
    is_perplexity = scoreboard.table.attrs["metric"] in PERPLEXITIES
    return mean_degradation(found, column="nats" if is_perplexity else "degradation")


def _recovery(scoreboard: Scoreboard) -> pd.DataFrame:
    found = recovery(scoreboard).assign(exploded=False)
    return mean_degradation(found, column="recovery").drop(columns="exploded")


def _winners(scoreboard: Scoreboard) -> pd.DataFrame:
    return shares(best_bit_width(curves(scoreboard), scoreboard, block=None))


def _leads(scoreboard: Scoreboard) -> pd.DataFrame:
    return leads(curves(scoreboard), scoreboard)


def _frontier(scoreboard: Scoreboard) -> pd.DataFrame:
    found = pareto(scoreboard)
    print(f"{int(found['on_frontier'].sum())} of {count(found.attrs['trials'], 'trial')}; without a number: {found.attrs['left_out']}")
    return found.loc[found["on_frontier"], ["family", "model", "bits", "label", "block", "total_bits", "value"]].reset_index(drop=True)


def _largest(found: Fit) -> str:
    try:
        out = largest_out(found)
    except ConfigurationError as error:
        return f"without the largest model: {error}"
    return (
        f"fitted without {out.model}, the law foretells its {count(out.n, 'point')} with an error of {math.expm1(out.error):+.2%} "
        f"(median error of the other {out.n_inside}: {out.inside:.2%})"
    )
