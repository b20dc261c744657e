"""From the results table to tables and figures: pure functions of a DataFrame, and a small command over them."""

from analysis.comparison.arms import Comparison, compare, flips

__all__ = ["Comparison", "compare", "flips"]
