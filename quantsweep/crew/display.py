"""How far a run on this machine is: a live bar on a terminal, a line now and then in a log.

    ━━━━━━━━━━━━━━──  121/175   0 failed   2:10   about 50 s left   mini-neox-2.2m quantile 4-bit …

The bar is work, not trials: each trial counts by what was predicted of it, those at hand by the share of them that is done.
Where a terminal is narrow the trial's name is cut, never a number.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from quantsweep.operations.time_left import Ended, Running, seconds_left
from quantsweep.storage.workers import WorkerRecord
from quantsweep.words import about

REPORT_SECONDS = 15.0
"""Without a terminal, one line this often."""
DRAW_SECONDS = 0.5
BAR_WIDTH = 16


class Tally:
    """What has ended, what is at hand and what is to come, in trials and in work.

    minutes: trial id to (shard, predicted minutes) of everything that this run is to do.
    """

    def __init__(self, minutes: Mapping[str, tuple[int, float]], workers: int) -> None:
        self._minutes, self._workers = dict(minutes), workers
        self._left = dict(minutes)
        self._ended: list[Ended] = []
        self._lock = threading.Lock()
        self.total, self.work = len(minutes), sum(work for _, work in minutes.values())
        self.done = self.failed = 0

    def end(self, trial_id: str, *, failed: bool, seconds: float | None) -> None:
        """One more trial has ended; seconds: of its worker, None where they say nothing of other trials."""
        with self._lock:
            self._left.pop(trial_id, None)
            self.done, self.failed = self.done + (not failed), self.failed + failed
            if seconds is not None and not failed and trial_id in self._minutes:
                self._ended.append(Ended(self._minutes[trial_id][1], seconds))

    def end_shard(self, shard_id: int) -> None:
        """What is left of the shard is not run: it is done already, held, or somebody else's."""
        with self._lock:
            self._left = {trial_id: left for trial_id, left in self._left.items() if left[0] != shard_id}

    def look(self, records: Iterable[WorkerRecord], now: float) -> tuple[float, float | None]:
        """(share of the work that is done, seconds left or None).  records: of the workers.  now: time.time()."""
        with self._lock:
            left, ended = dict(self._left), list(self._ended)
        running = {
            record.trial_id: Running(left[record.trial_id][1], max(0.0, now - (record.trial_started or now)), record.share)
            for record in records
            if record.trial_id in left and record.trial_id is not None
        }
        waiting = [minutes for trial_id, (_, minutes) in left.items() if trial_id not in running]
        at_hand = list(running.values())
        to_do = sum(waiting) + sum(one.predicted * (1 - one.share) for one in at_hand)
        return 1 - to_do / self.work if self.work else 1.0, seconds_left(waiting, at_hand, ended, self._workers)

    def text(self, seconds: float, left: float | None) -> str:
        """The numbers, and nothing that would have to be cut."""
        words = "" if left is None else f"   about {about(left)} left"
        return f"{self.done + self.failed:,}/{self.total:,}   {self.failed:,} failed   {_clock(seconds)}{words}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}" if minutes >= 60 else f"{minutes}:{second:02d}"


class Display:
    """Shows a Tally."""

    def __init__(self, tally: Tally, progress: Progress | None) -> None:
        self.tally, self._progress = tally, progress
        self._started = time.monotonic()
        self._next = self._started + (DRAW_SECONDS if progress else REPORT_SECONDS)
        self._task = None if progress is None else progress.add_task("", total=1.0, numbers=tally.text(0, None), now="starting")

    def tick(self, records: Iterable[WorkerRecord]) -> None:
        """Called a few times a second; records: of the workers."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (DRAW_SECONDS if self._progress else REPORT_SECONDS)
        records = list(records)
        share, left = self.tally.look(records, time.time())
        numbers = self.tally.text(now - self._started, left)
        if self._progress is not None and self._task is not None:
            labels = [record.label for record in records if record.label]
            self._progress.update(self._task, completed=share, numbers=numbers, now=labels[0] if labels else "")
        elif self.tally.done + self.tally.failed or left is not None:
            print(f"{numbers}   {share:.0%} of the work", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def display(tally: Tally, console: Console | None = None) -> Iterator[Display]:
    """A display on the terminal, or on stderr as it is."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Display(tally, None)
        return
    whole = Column(no_wrap=True, overflow="ignore")
    cut = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (
        BarColumn(bar_width=BAR_WIDTH),
        TextColumn("{task.fields[numbers]}", table_column=whole, markup=False),
        TextColumn("{task.fields[now]}", table_column=cut, style="dim", markup=False),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Display(tally, progress)
