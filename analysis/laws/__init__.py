"""Scaling laws: forms, robust fits with intervals over models, and what an answer hangs on.

    points = loss_points(board(frame, metric="loss"), label="int", block="64")
    found = fit(effective_parameters(), points)
    found.estimates                       each constant with its 95 % interval
    largest_out(found)                    does the law foretell the largest model?
    influence(found, "alpha")             how far do a few points move it?
    predict(found, sizes)                 with intervals; what lies outside the data says so

`forms` has the laws, `points` makes their data from a board, `fitting` fits, `checks` asks.
"""

from analysis.laws.checks import influence, largest_out, predict
from analysis.laws.fitting import Fit, fit
from analysis.laws.forms import Law, effective_parameters, loss_of_size, offsets, post_training
from analysis.laws.points import degradation_points, loss_points

__all__ = [
    "Fit",
    "Law",
    "degradation_points",
    "effective_parameters",
    "fit",
    "influence",
    "largest_out",
    "loss_of_size",
    "loss_points",
    "offsets",
    "post_training",
    "predict",
]
