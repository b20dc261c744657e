"""How long the rest of a sweep takes, told by its own trials that have ended.

A trial's prediction (`quantsweep.operations.prediction`, kept in the plan) is right about proportions more than about seconds. So a
trial that is to come takes its prediction, times what the NEAREST trials of like length took over theirs; of equally near ones the
latest count, since machines get busier and idle again. Counting trials instead goes wrong by factors: small models come first.

What is longer than all that ended (the large models, which come last) follows the slope of those: a part of each trial's time is the same
for all, and in proportion to the longest too much would be said. In the first trials that slope is mostly noise, and bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NEAREST = 12
LEAST_ENDED = 3
"""Fewer trials that ended say nothing."""
LENGTHS_A_FACTOR = 20
"""Lengths within 5 % are one."""
LEAST_PROPORTION = 0.5
"""What is longer than all that ended takes at least this part of what it would take in proportion to the longest."""
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
    known = np.array([(max(one.predicted, 1e-12), one.seconds) for one in reversed(ended)], dtype=np.float64)  # the latest first
    seconds = np.array([_like_the_nearest(length, known) for length in lengths], dtype=np.float64)
    longest, slope = known[:, 0].max(), _slope(known)
    beyond = lengths > longest
    if slope is not None and beyond.any():
        along = _like_the_nearest(longest, known) + slope * (lengths[beyond] - longest)
        seconds[beyond] = np.clip(along, LEAST_PROPORTION * seconds[beyond], seconds[beyond])
    return seconds[places]


def _like_the_nearest(length: float, known: Floats) -> float:
    """A length, times what the nearest in length took over theirs.  known: predicted and seconds, the latest first."""
    distances = np.abs(np.log(known[:, 0] / max(length, 1e-12)))
    near = known[np.argsort(distances, kind="stable")[:NEAREST]]
    return float(length * near[:, 1].sum() / near[:, 0].sum())


def _slope(known: Floats) -> float | None:
    """Seconds more for each more that was predicted: the median over all pairs of lengths (Theil 1950, Sen 1968); None for one length."""
    lengths, places = np.unique(np.round(LENGTHS_A_FACTOR * np.log(known[:, 0])), return_inverse=True)
    points = np.array([np.median(known[places == place], axis=0) for place in range(len(lengths))])
    first, second = np.triu_indices(len(points), 1)
    if not first.size:
        return None
    return float(np.median((points[second, 1] - points[first, 1]) / (points[second, 0] - points[first, 0])))
