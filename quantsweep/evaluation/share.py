"""How much of the trial at hand is done: its tasks that are, and the scored part of the one at hand.

Tasks count by the seconds that they took in the trial before, on the same model; all alike in the first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence


class Share:
    """The share of one trial after the other."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._tasks: tuple[str, ...] = ()
        self._over: set[str] = set()
        self._now: str | None = None
        self._began = 0.0

    def begin(self, tasks: Sequence[str]) -> None:
        """A trial with these tasks (their keys) begins."""
        self._tasks, self._over, self._now = tuple(tasks), set(), None

    def begin_task(self, task: str) -> None:
        """One of its tasks begins; what it was at before is over."""
        self.end_task()
        self._now, self._began = task, time.monotonic()

    def end_task(self) -> None:
        """The task at hand is over."""
        if self._now is not None:
            self._seconds[self._now] = time.monotonic() - self._began
            self._over.add(self._now)
            self._now = None

    def read(self, scored: float) -> float:
        """The share that is done, 0 to 1; scored: the part of the task at hand that is."""
        known = [self._seconds[task] for task in self._tasks if task in self._seconds]
        usual = sum(known) / len(known) if known else 1.0
        weights = {task: self._seconds.get(task, usual) for task in self._tasks}
        done = sum(weights[task] for task in self._over) + (weights[self._now] * scored if self._now is not None else 0.0)
        return done / max(sum(weights.values()), 1e-9)
