"""How long the rest of a sweep takes, told by its own trials that have ended.

A trial's prediction (`quantsweep.operations.prediction`, kept in the plan) is right about proportions more than about seconds. So a
trial that is to come takes its prediction, times what the NEAREST trials of like length took over theirs; of equally near ones the
latest count, since machines get busier and idle again. Counting trials instead goes wrong by factors: small models come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NEAREST = 12
LEAST_ENDED = 3
"""Fewer trials that ended say nothing."""
LEAST_SHARE = 0.1
"""From this share of a trial on its own pace says how long it takes."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Ended(NamedTuple):
    """A trial that has ended: what was predicted of it, and the seconds of a worker that it took."""

    predicted: float
    seconds: float


@dataclass(frozen=True)
class Running:
    """A trial that a worker is at: what was predicted of it, its seconds so far, and the share of it that is done (0: unknown)."""

    predicted: float
    seconds: float
    share: float = 0.0

    @property
    def pace(self) -> Ended | None:
        """What it will have taken at its own pace; None while too little of it is done."""
        return Ended(self.predicted, self.seconds / self.share) if self.share >= LEAST_SHARE else None


def seconds_left(waiting: Sequence[float], running: Sequence[Running], ended: Sequence[Ended], workers: int) -> float | None:
    """Seconds until all trials are done, if `workers` go on; None as long as too little has ended to tell.

    waiting: what was predicted of each trial that has not begun, in any unit that all predictions share.  ended: oldest first.
    """
    ended = [*ended, *(one.pace for one in running if one.pace is not None)]
    if len(ended) < LEAST_ENDED and not any(one.pace for one in running):
        return None
    still = [
        max(0.0, one.pace.seconds - one.seconds) if one.pace is not None else max(0.0, whole - one.seconds)
        for one, whole in zip(running, expected_seconds([one.predicted for one in running], ended), strict=True)
    ]
    to_come = expected_seconds(waiting, ended)
    longest = max((*still, *to_come), default=0.0)
    return float(max(longest, (sum(still) + float(to_come.sum())) / max(1, workers)))


def expected_seconds(predicted: Sequence[float], ended: Sequence[Ended]) -> Floats:
    """Seconds of a worker that each of these trials will take."""
    lengths, places = np.unique(np.asarray(predicted, dtype=np.float64), return_inverse=True)
    known = np.array([(one.predicted, one.seconds) for one in reversed(ended)], dtype=np.float64)  # the latest first
    logs = np.log(np.maximum(known[:, 0], 1e-12))
    seconds = np.empty_like(lengths)
    for place, length in enumerate(lengths):
        near = np.argsort(np.abs(logs - np.log(max(length, 1e-12))), kind="stable")[:NEAREST]
        seconds[place] = length * known[near, 1].sum() / max(known[near, 0].sum(), 1e-12)
    return seconds[places]
