"""Figures as functions of the results frame; each returns the matplotlib Figure, saving is the caller's."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.selection import BASELINE, BASELINE_BITS, HEADLINE, block_order, documents, select
from quantsweep.errors import ConfigurationError

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Vector = npt.NDArray[np.float64]
PANEL_INCHES, HEIGHT_INCHES, LEGEND_INCHES = 4.6, 4.2, 1.6
PANELS_A_ROW = 2
LEGEND_LINE_INCHES = 0.22
TITLE_LETTERS = 40
"""Longer titles of a panel are broken, so that neighbours do not overlap."""
MARKERS = "osD^vP*X<>ph"
"""One a data type, in alphabetic order."""


def bits_against_size(
    results: pd.DataFrame, *, metric: str = HEADLINE, task: str | None = None, block_size: int | str = 64, family: str | None = None
) -> Figure:
    """`metric` against total model bits (log2): one panel a family, one curve a bit width and data type, and the baseline.

    Colours are bit widths, markers data types.  A point is a trial; a model whose trial is missing or not finite leaves a gap, and
    the figure counts these.  Models of one family are joined by straight lines, as Dettmers & Zettlemoyer (arXiv:2212.09720)
    interpolate.  There are no error bars: all curves share their documents, so that a bar would say nothing of their
    differences (`analysis.tables.against_baseline` does).  block_size: a number, "channel" or "tensor".
    """
    rows = _of_block(select(results, metric=metric, task=task, family=family), str(block_size))
    rows = rows.assign(label=[label.removesuffix(planted) for label, planted in zip(rows["label"], rows["planted"], strict=True)])
    families = sorted(rows["family"].unique())
    labels = sorted(set(rows["label"]) - {BASELINE})
    columns = min(len(families), PANELS_A_ROW)
    lines = -(-len(families) // columns)
    width = PANEL_INCHES * columns + LEGEND_INCHES
    height = max(HEIGHT_INCHES * lines, LEGEND_LINE_INCHES * (len(set(rows["bits"])) + len(labels) + 2))
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    left_out = 0
    for axis, name in zip(axes.flat, families, strict=False):
        of_family = rows[rows["family"] == name]
        for bits, label in _curves_of(of_family, rows):
            points = _curve(of_family, bits, label)
            left_out += int(points["value"].isna().sum())
            draw_curve(
                axis,
                bits,
                points["x"].to_numpy(float),
                points["value"].to_numpy(float),
                place=labels.index(label) if label != BASELINE else None,
            )
        axis.set_title("\n".join(textwrap.wrap(name, TITLE_LETTERS)), fontsize="medium")
    for line in axes:
        line[0].set_ylabel(metric.replace("_", " "))
    figure.suptitle(f"{metric.replace('_', ' ')} of {rows['task'].iloc[0]}, block size {block_size}", wrap=True)
    figure.supxlabel(_caption(rows, left_out, int(width * 14)), fontsize="small")
    legend(figure, set(rows["bits"]), labels)
    return figure


def _curves_of(of_family: pd.DataFrame, rows: pd.DataFrame) -> list[tuple[int, str]]:
    """(bit width, label) of the family's curves; the baseline's is there if any family has baselines."""
    baseline = {(BASELINE_BITS, BASELINE)} if (rows["label"] == BASELINE).any() else set[tuple[int, str]]()
    return sorted(set(zip(of_family["bits"], of_family["label"], strict=True)) | baseline)


def blocks_of(rows: pd.DataFrame) -> list[str]:
    """The block sizes of quantized rows, in order."""
    return sorted(set(rows["block"]) - {BASELINE}, key=block_order)


def _of_block(rows: pd.DataFrame, block: str) -> pd.DataFrame:
    """The rows of one block size, and the baselines."""
    blocks = blocks_of(rows)
    if blocks and block not in blocks:
        raise ConfigurationError(f"no rows with block size {block}. There are: {', '.join(blocks)}. Choose one: --block-size {blocks[0]}")
    return rows[rows["block"].isin([block, BASELINE])]


def _curve(of_family: pd.DataFrame, bits: int, label: str) -> pd.DataFrame:
    """One point a model of the family, by size; value is NaN where the trial is missing or not finite."""
    models = of_family.groupby("model")["num_parameters"].min().sort_values(kind="stable").index
    cells = of_family[(of_family["bits"] == bits) & (of_family["label"] == label)].replace([np.inf, -np.inf], np.nan)
    points = cells.set_index("model")[["total_model_bits", "value"]].reindex(models)
    return points.assign(x=np.log2(points["total_model_bits"].astype(float)))


def draw_curve(axis: Axes, bits: float, x: Vector, y: Vector, *, place: int | None = None) -> None:
    """One curve of a bit width, in the colour that it has in all figures.

    x: log2 of total model bits.  place: of its data type in the legend.
    """
    axis.grid(visible=True, alpha=0.25)
    axis.set_xlabel("total model bits (log2)")
    axis.plot(x, y, color=_color(bits), linestyle=_line(bits), linewidth=1.2, **_marker(place))


def _marker(place: int | None) -> dict[str, Any]:
    """Hollow markers, then filled ones; a dot for the baseline and where data types are not told apart."""
    if place is None:
        return {"marker": ".", "markersize": 6}
    return {"marker": MARKERS[place % len(MARKERS)], "markersize": 5, "fillstyle": "none" if place < len(MARKERS) else "full"}


def bit_width_name(bits: float) -> str:
    """A bit width as legends call it."""
    return "16-bit baseline" if bits == BASELINE_BITS else f"{bits:g}-bit"


def legend(figure: Figure, widths: Iterable[float], labels: Sequence[str] = ()) -> None:
    """The legend of all panels, beside them: one line a bit width, and a marker for each of `labels`."""
    shown = sorted(widths)
    colors = [Line2D([], [], color=_color(bits), linestyle=_line(bits)) for bits in shown]
    markers = [Line2D([], [], color="gray", linestyle="none", **_marker(place)) for place in range(len(labels))]
    names = [*map(bit_width_name, shown), *("\n".join(textwrap.wrap(label, TITLE_LETTERS)) for label in labels)]
    figure.legend(handles=[*colors, *markers], labels=names, loc="outside right center", frameon=False)


def _color(bits: float) -> str:
    return "black" if bits == BASELINE_BITS else f"C{(round(bits) - 2) % 10}"


def _line(bits: float) -> Literal["--", "-"]:
    return "--" if bits == BASELINE_BITS else "-"


def save(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.svg`, the same bytes for the same figure, and close it."""
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=150)
    with mpl.rc_context({"svg.hashsalt": "quantsweep"}):  # ids of the SVG's elements are random otherwise
        figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
    plt.close(figure)


def _caption(rows: pd.DataFrame, left_out: int, width: int) -> str:
    lines = [
        f"one point a trial, {documents(rows)}, the same for all curves",
        *([f"{left_out} point{'s' * (left_out != 1)} left out (not finite or missing)"] if left_out else []),
    ]
    return "\n".join(textwrap.fill(line, width) for line in lines)
