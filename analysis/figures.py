"""Figures as functions of the results frame; each returns the matplotlib Figure, saving is the caller's."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.selection import BASELINE, BASELINE_BITS, HEADLINE, block_order, documents, select
from quantsweep.errors import ConfigurationError

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

Vector = npt.NDArray[np.float64]
PANEL_INCHES, HEIGHT_INCHES, LEGEND_INCHES = 4.6, 4.2, 1.6


def bits_against_size(
    results: pd.DataFrame, *, metric: str = HEADLINE, task: str | None = None, block_size: int | str = 64, family: str | None = None
) -> Figure:
    """`metric` against total model bits (log2), one panel a family, one curve a bit width (mean over data types) and the baseline.

    A point is the mean over all data types that its family has at that bit width; where one of them is
    missing or not finite the point is left out, which the figure counts.  Bars are the mean standard
    error over the examples of the task; models of one family are joined by straight lines, as Dettmers &
    Zettlemoyer (arXiv:2212.09720) interpolate.  block_size: a number, "channel" or "tensor".
    """
    rows = select(results, metric=metric, task=task, family=family)
    rows = _of_block(rows, str(block_size))
    families = sorted(rows["family"].unique())
    width = PANEL_INCHES * len(families) + LEGEND_INCHES
    figure, axes = plt.subplots(1, len(families), figsize=(width, HEIGHT_INCHES), sharey=True, squeeze=False, layout="constrained")
    handles: dict[int, ErrorbarContainer] = {}
    left_out = 0
    for axis, name in zip(axes[0], families, strict=True):
        curves = {bits: _curve(rows[rows["family"] == name], bits) for bits in _bit_widths(rows, name)}
        left_out += sum(int(points["value"].isna().sum()) for points in curves.values())
        handles |= {
            bits: draw_curve(axis, bits, *(points[column].to_numpy(float) for column in ("x", "value", "stderr")))
            for bits, points in curves.items()
        }
        axis.set_title(name, fontsize="medium")
    axes[0][0].set_ylabel(metric.replace("_", " "))
    figure.suptitle(f"{metric.replace('_', ' ')} of {rows['task'].iloc[0]}, block size {block_size}")
    figure.supxlabel(_caption(rows, left_out, int(width * 14)), fontsize="small")
    legend(figure, handles)
    return figure


def _of_block(rows: pd.DataFrame, block: str) -> pd.DataFrame:
    """The rows of one block size, and the baselines."""
    blocks = sorted(set(rows["block"]) - {BASELINE}, key=block_order)
    if blocks and block not in blocks:
        raise ConfigurationError(f"no rows with block size {block}. There are: {', '.join(blocks)}. Choose one: --block-size {blocks[0]}")
    return rows[rows["block"].isin([block, BASELINE])]


def _bit_widths(rows: pd.DataFrame, family: str) -> list[int]:
    """Bit widths of the family's curves; the baseline's is there if any family has baselines."""
    baseline = {BASELINE_BITS} & set(rows["bits"])
    return sorted(set(rows.loc[rows["family"] == family, "bits"]) | baseline)


def _curve(rows: pd.DataFrame, bits: int) -> pd.DataFrame:
    """One point a model of the family, by size; value is NaN where a data type of this bit width is missing or not finite."""
    models = rows.groupby("model")["num_parameters"].min().sort_values(kind="stable").index
    cells = rows[rows["bits"] == bits].replace([np.inf, -np.inf], np.nan)
    means = {
        name: cells.pivot(index="model", columns="label", values=name).reindex(models).mean(axis=1, skipna=False)
        for name in ("total_model_bits", "value", "stderr")
    }
    return pd.DataFrame(means).assign(x=np.log2(means["total_model_bits"]))


def draw_curve(axis: Axes, bits: int, x: Vector, y: Vector, bar: Vector) -> ErrorbarContainer:
    """One curve of a bit width, in the colour that it has in all figures; x: log2 of total model bits, bar: standard errors of y."""
    axis.grid(visible=True, alpha=0.25)
    axis.set_xlabel("total model bits (log2)")
    color, line = ("black", "--") if bits == BASELINE_BITS else (f"C{bits - 2}", "-")
    return axis.errorbar(x, y, yerr=bar, color=color, linestyle=line, marker="o", markersize=4, capsize=2)


def bit_width_name(bits: int) -> str:
    """A bit width as legends call it."""
    return "16-bit baseline" if bits == BASELINE_BITS else f"{bits}-bit"


def legend(figure: Figure, handles: Mapping[int, ErrorbarContainer]) -> None:
    """The legend of all panels, beside them: one line a bit width."""
    shown = sorted(handles)
    names = [bit_width_name(bits) for bits in shown]
    figure.legend(handles=[handles[bits] for bits in shown], labels=names, loc="outside right center", frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.svg`, the same bytes for the same figure, and close it."""
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=150)
    with mpl.rc_context({"svg.hashsalt": "quantsweep"}):  # ids of the SVG's elements are random otherwise
        figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
    plt.close(figure)


def _caption(rows: pd.DataFrame, left_out: int, width: int) -> str:
    lines = [
        f"{_averaged(rows)}{documents(rows)}",
        "bars: standard error over documents (the same documents for all curves)",
        *([f"{left_out} point{'s' * (left_out != 1)} left out (not finite or missing)"] if left_out else []),
    ]
    return "\n".join(textwrap.fill(line, width) for line in lines)


def _averaged(rows: pd.DataFrame) -> str:
    """What each point averages over, with the bit widths where that is not every data type."""
    quantized = rows[rows["method"] != BASELINE]
    if quantized.empty:
        return ""
    whole = tuple(sorted(set(quantized["label"])))
    sets = {key: tuple(sorted(set(labels))) for key, labels in quantized.groupby(["family", "bits"])["label"]}
    fewer = [f"{family} {bits}-bit: {', '.join(labels)}" for (family, bits), labels in sets.items() if labels != whole]
    but = f" (only {'; '.join(fewer)})" if fewer else ""
    return f"mean over {', '.join(whole)}{but} · "
