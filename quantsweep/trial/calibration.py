"""The text that calibrated steps of a trial may look at, as a part of its identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantsweep.trial.canonical import set_fields

_CALIBRATION_ALWAYS = frozenset({"name", "dataset", "num_samples", "sequence_length", "seed"})


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """Text that calibrated steps may look at; a trial without such a step has none."""

    name: str
    dataset: str
    num_samples: int
    sequence_length: int
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """All of it: other text gives other numbers."""
        return set_fields(self, _CALIBRATION_ALWAYS)
