"""Figures as functions of the results frame; each returns the matplotlib Figure, saving is the caller's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE_BITS = 16


def bits_against_size(results: pd.DataFrame, *, metric: str = "bits_per_byte", block_size: int = 64) -> Figure:
    """`metric` against total model bits (log2), one panel a family, one curve a bit width (mean over data types) and the baseline.

    Bars are the mean standard error over the examples of the task; models of one family are joined by straight lines,
    as Dettmers & Zettlemoyer (arXiv:2212.09720) interpolate.
    """
    rows = results[results["metric"] == metric]
    families = sorted(rows["family"].unique())
    figure, axes = plt.subplots(1, len(families), figsize=(4.6 * len(families), 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, family in zip(axes[0], families, strict=True):
        _panel(axis, rows[rows["family"] == family], block_size)
        axis.set_title(family)
        axis.set_xlabel("total model bits (log2)")
    axes[0][0].set_ylabel(metric.replace("_", " "))
    axes[0][-1].legend(frameon=False)
    return figure


def _panel(axis: Axes, rows: pd.DataFrame, block_size: int) -> None:
    quantized = rows[(rows["method"] != "none") & (rows["block_size"] == block_size)]
    curves = {bits: quantized[quantized["bit_width"] == bits] for bits in quantized["bit_width"].astype(int).unique()}
    curves[BASELINE_BITS] = rows[rows["method"] == "none"]
    for bits, group in sorted(curves.items()):
        points = group.groupby("model")[["total_model_bits", "value", "stderr"]].mean().sort_values("total_model_bits")
        axis.errorbar(
            np.log2(points["total_model_bits"]),
            points["value"],
            yerr=points["stderr"],
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{bits}-bit" if bits != BASELINE_BITS else "16-bit baseline",
        )
    axis.grid(alpha=0.25)
