"""The k-bit inference study: which bit width, data type and block size is best at equal total model bits?

After Dettmers & Zettlemoyer 2022, "The case for 4-bit precision: k-bit inference scaling laws" (arXiv:2212.09720):
the best bit width is that whose scaling curve is on top at equal bits (`analysis.equal_bits`), and the effect of
block size and of data type is a difference at equal bit width, paired over models (`analysis.effects`), beside what it costs
in bits a weight.  Here stands which of these the study asks for; the paper's claims are in `analysis.k_bit_claims`.

    board = Scoreboard(scores(results, samples), "accuracy", samples)
    block_size_effects(board)
"""

from __future__ import annotations

import pandas as pd

from analysis.effects import effects_at_fixed
from analysis.selection import block_order
from analysis.uncertainty import Scoreboard


def block_size_effects(board: Scoreboard) -> pd.DataFrame:
    """What smaller blocks change: each block size against the largest, one row a bit width, label and smaller block.

    Columns: bits, label, block, against, then those of `analysis.effects.effect` but the interval over models.
    Raises ConfigurationError where planted and plain models are mixed.
    """
    found = effects_at_fixed(board, "block", fixed=("label",), reference=lambda blocks: max(blocks, key=block_order))
    return found.sort_values(["bits", "label", "block"], key=_ordered, kind="stable", ignore_index=True).drop(columns=["low", "high"])


def data_type_effects(board: Scoreboard, *, against: str = "int") -> pd.DataFrame:
    """What another data type changes: each label against `against`, one row a bit width, block size and label.

    Columns: bits, block, label, against, then those of `analysis.effects.effect` but the interval over models.
    Raises ConfigurationError where planted and plain models are mixed.
    """
    found = effects_at_fixed(board, "label", fixed=("block",), reference=lambda labels: against if against in labels else None)
    return found.sort_values(["bits", "block", "label"], key=_ordered, kind="stable", ignore_index=True).drop(columns=["low", "high"])


def _ordered(column: pd.Series[str]) -> pd.Series[int]:
    return column.map(lambda block: 10**9 * block_order(block)[0] + block_order(block)[1]) if column.name == "block" else column  # type: ignore[return-value]
