"""`python -m analysis k_bit_inference [SWEEP …]`: tables, claims and figures of the k-bit inference study.

On the screen: which bit width wins, and the claims.  The long tables (what block sizes and data types change, at every bit width) and the
figures go to files.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

import quantsweep
from analysis.claims import Finding
from analysis.command import results_of, sweep_folder
from analysis.correlation import Correlation, correlation
from analysis.curves import curves, plain_curves
from analysis.equal_bits import best_bit_width, shares
from analysis.figures import save
from analysis.k_bit_claims import claims
from analysis.k_bit_figures import NAMES, curves_at_equal_bits, effects_of_type_and_block
from analysis.k_bit_inference import block_size_effects, data_type_effects
from analysis.scores import SIGN, SIZES, scores
from analysis.selection import PLAIN_MODELS, variants
from analysis.uncertainty import Scoreboard
from quantsweep.errors import ConfigurationError
from quantsweep.words import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 140
STUDY = "k_bit_inference"
_NO_WINNER = "(none: it takes a family with two models or more at two bit widths, whose curves share a range of sizes)"


def show(arguments: list[str]) -> None:
    """Print the study's winners and claims; write tables (CSV) and figures (PNG and SVG) into the first folder."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis k_bit_inference",
        description="The k-bit inference study of a sweep.",
        epilog="Written: k_bit_*.csv, .png and .svg.",
    )
    parser.add_argument(
        "sweeps",
        type=sweep_folder,
        nargs="*",
        default=[sweep_folder(STUDY)],
        help=f"names or folders of sweeps (default: {STUDY}); files go to the first",
    )
    folders = parser.parse_args(arguments).sweeps
    results, samples = results_of(folders), quantsweep.load_samples(folders)
    table = scores(results, samples)
    known = [score for score in SIGN if table[score].notna().any()]
    if not known:
        raise ConfigurationError("no trial has all accuracy tasks of the table, and none has bits per byte. See quantsweep status")
    effects: dict[str, list[pd.DataFrame]] = {}
    for title, models in variants(results):
        outcomes = samples[samples["trial_id"].isin(set(models["trial_id"]))]
        print(f"\n{f' {title} ':=^{_WIDTH}}")
        of_variant = scores(models, outcomes)
        for score in known:
            board = Scoreboard(of_variant, score, outcomes)
            _print_winners(board)
            print(f"\nClaims, tested on {NAMES[score]}\n")
            print("\n\n".join(in_words(finding) for finding in claims(models, outcomes, score=score)))
            for name, effect in (("block_size", block_size_effects(board)), ("data_type", data_type_effects(board))):
                effects.setdefault(f"k_bit_{name}_{score}.csv", []).append(effect.assign(variant=title))
            _draw_effects(board, folders[0], title)
        print(f"\n{correlation_in_words(correlation(of_variant))}")
    for file, parts in effects.items():
        pd.concat(parts).to_csv(folders[0] / file, index=False)
    for score in known:
        _draw(curves_at_equal_bits, Scoreboard(table, score, samples), folders[0] / f"k_bit_curves_{score}")
    print(f"\ntables and figures: {folders[0]}/k_bit_*")


def _print_winners(board: Scoreboard) -> None:
    for size in SIZES:
        best = best_bit_width(plain_curves(curves(board, size=size)), board)
        _print(f"{NAMES[board.score]}: best bit width at equal {size.replace('_', ' ')}, best data type of each, block 64", shares(best))


def correlation_in_words(r: Correlation) -> str:
    """The correlation with its interval, or that there is none to be had."""
    found = f"r of cross entropy and accuracy: {r.r:.3f}" if not math.isnan(r.r) else "no r of cross entropy and accuracy"
    interval = "" if math.isnan(r.low) else f" ({r.low:.3f} to {r.high:.3f}, over models)"
    return f"{found}{interval}, {count(r.n, 'trial')} with both"


def _print(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.round(4).to_string(index=False) if len(table) else _NO_WINNER}")


def in_words(finding: Finding) -> str:
    """A finding as a paragraph: the claim, the verdict, the statement that decides, what stands behind it, what is missing."""
    claim = finding.claim
    lines = [f"({claim.id}) {claim.text} [{claim.source}]", f"{finding.verdict.upper()}"]
    if finding.decides and finding.num_trials:
        interval = f"{finding.effect:.4f} (95 %: {finding.low:.4f} to {finding.high:.4f})"
        lines.append(f"{finding.decides}: {interval}; {finding.num_models} models, {finding.num_trials} trials: {finding.scope}")
    if finding.missing:
        lines.append(f"missing: {'; '.join(finding.missing)}")
    first, *rest = (textwrap.fill(line, _WIDTH, subsequent_indent="      ") for line in lines)
    return "\n".join([first, *(textwrap.indent(line, "    ") for line in rest)])


def _draw_effects(board: Scoreboard, folder: Path, title: str) -> None:
    suffix = "" if title == PLAIN_MODELS else f"_{title.replace(' ', '_').replace('×', 'x')}"
    _draw(effects_of_type_and_block, board, folder / f"k_bit_effects_{board.score}{suffix}")


def _draw(draw: Callable[[Scoreboard], Figure], board: Scoreboard, path: Path) -> None:
    try:
        figure = draw(board)
    except ConfigurationError as error:
        print(f"\nno figure {path.name}: {error}")
    else:
        save(figure, path)
