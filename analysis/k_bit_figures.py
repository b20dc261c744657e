"""Figures of the k-bit inference study: curves at equal bits, and what data type and block size change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from analysis.curves import Curve, contenders, curves, plain_curves
from analysis.effects import Setting, paired
from analysis.figures import HEIGHT_INCHES, LEGEND_INCHES, PANEL_INCHES, PANELS_A_ROW, bit_width_name, draw_curve, legend
from analysis.scores import ACCURACY, BITS_PER_BYTE
from analysis.selection import BASELINE, block_order
from analysis.uncertainty import Scoreboard
from quantsweep.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {ACCURACY: "mean zero-shot accuracy", BITS_PER_BYTE: "bits per byte"}
EFFECT_WIDTHS = (3, 4)


def curves_at_equal_bits(board: Scoreboard, *, block: str | None = "64") -> Figure:
    """The score against log2 total bits: one panel a family, one curve a bit width with its best data type (default options).

    block: of all curves; None for the best of each.  No bars: all curves share their examples, so bars would
    say nothing of their differences.
    Raises ConfigurationError where no trial has such a block.
    """
    found = plain_curves(curves(board))
    families = sorted({curve.family for curve in found})
    compared = {family: contenders(found, board.sign, family=family, block=block) for family in families}
    drawn = {family: list(best.values()) for family, best in compared.items() if any(curve.label != BASELINE for curve in best.values())}
    if not drawn:
        there = sorted({curve.block for curve in found if curve.label != BASELINE}, key=block_order)
        raise ConfigurationError(f"no curve of {board.score} has block size {block}. There are: {', '.join(there) or '(none)'}")
    columns = min(len(drawn), PANELS_A_ROW)
    rows = -(-len(drawn) // columns)
    size = (PANEL_INCHES * columns + LEGEND_INCHES, HEIGHT_INCHES * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (family, best) in zip(axes.flat, drawn.items(), strict=False):
        for curve in best:
            draw_curve(axis, curve.bits, np.asarray(curve.x), np.asarray(curve.y))
        axis.set_title(f"{family}\n{_chosen(best)}", fontsize="small")
    for row in axes:
        row[0].set_ylabel(NAMES[board.score])
    shown = f"block size {block}" if block else "best block size"
    figure.suptitle(f"{NAMES[board.score]}, best data type of each bit width, {shown}")
    figure.supxlabel("all curves answer the same examples; differences with their intervals: `best_bit_width`", fontsize="small")
    legend(figure, {curve.bits for best in drawn.values() for curve in best})
    return figure


def _chosen(best: Sequence[Curve]) -> str:
    """The data type of each bit width, in short lines."""
    words = [f"{curve.bits}: {curve.label}" for curve in best if curve.label != BASELINE]
    return "\n".join(", ".join(words[first : first + 3]) for first in range(0, len(words), 3))


def effects_of_type_and_block(board: Scoreboard) -> Figure:
    """What data type and block size change at 3 and 4 bit: difference to `int` in the largest block, mean over models.

    One panel a bit width, one line a data type with its default options, block sizes from large to small.  Bars are
    standard errors of the difference.  Raises ConfigurationError where neither width has `int` in two blocks.
    """
    table = board.table
    plain = table[table["label"] == table["data_type"]]
    widths = [bits for bits in EFFECT_WIDTHS if plain[(plain["bits"] == bits) & (plain["label"] == "int")]["block"].nunique() > 1]
    if not widths:
        raise ConfigurationError("no int trials in two block sizes at 3 or 4 bit, to which effects of data type and block are compared")
    figure, axes = plt.subplots(
        1, len(widths), figsize=(PANEL_INCHES * len(widths) + LEGEND_INCHES, HEIGHT_INCHES), squeeze=False, layout="constrained"
    )
    for axis, bits in zip(axes[0], widths, strict=True):
        blocks = sorted(set(plain.loc[plain["bits"] == bits, "block"]), key=block_order, reverse=True)
        for index, label in enumerate(sorted(set(plain["label"]))):
            _draw_effect(axis, board, bits, label, blocks, color=f"C{index}")
        axis.set_xticks(range(len(blocks)), blocks)
        axis.set_xlabel("block size")
        axis.set_title(bit_width_name(bits), fontsize="medium")
        axis.grid(visible=True, alpha=0.25)
    axes[0][0].set_ylabel(f"{NAMES[board.score]}:\ndifference to int in the largest block")
    better = "higher" if board.score == ACCURACY else "lower"
    figure.supxlabel(f"mean over models, {better} is better; bars: standard error", fontsize="small")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _draw_effect(axis: Axes, board: Scoreboard, bits: int, label: str, blocks: Sequence[str], *, color: str) -> None:
    against = Setting(bits=bits, label="int", block=blocks[0])
    differences = [paired(board, Setting(bits=bits, label=label, block=block), against) for block in blocks]
    values = [board.value(weights) if weights else math.nan for weights in differences]
    bars = [board.stderr(weights) if weights else math.nan for weights in differences]
    axis.errorbar(range(len(blocks)), values, yerr=bars, label=label, color=color, marker="o", markersize=4, capsize=2)
