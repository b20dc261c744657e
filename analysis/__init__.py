"""From results to answers: pure functions of tables, and a small command over them (`python -m analysis`).

Any table with model, family, parameters, bits, metric and value can be asked (`frames`), ours among them:

    frame = read_table("theirs.csv", rename={"bit_width": "bits"})      or from_results(quantsweep.load_results(…))
    scoreboard = board(frame, metric="acc", task="lambada")             one score; what cannot be compared is refused
    degradation(scoreboard), recovery(scoreboard)                       against the same model's baseline
    best_bit_width(curves(scoreboard), scoreboard, block=None)          at equal bits; leads, pareto
    factor_effects(scoreboard, "block_size")                            one factor at a time
    laws.fit(laws.post_training(), laws.degradation_points(scoreboard))

Modules: `frames`, `boards` (tables); `scores`, `uncertainty`, `curves` (what a score and its error are); `degradation`, `equal_bits`,
`effects`, `correlation`, `comparison`, `sensitivity`, `laws` (answers); `claims`, `k_bit_…` (a paper's claims, tested); `tables`,
`figures`, `…_report` (what is shown).
"""

from analysis.boards import board
from analysis.comparison.arms import Comparison, compare, flips
from analysis.frames import from_results, read_table

__all__ = ["Comparison", "board", "compare", "flips", "from_results", "read_table"]
