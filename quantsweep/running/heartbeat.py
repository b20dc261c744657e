"""A worker's record while it works: written again at each trial and at least every BEAT_SECONDS, with one last word at its end.

A worker that is killed says no last word: its record grows old, or the job that Slurm starts again closes it.
What a record holds, and how it is read, is in `quantsweep.storage.workers`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from typing import Any

from quantsweep.running.stopping import Allotment
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import (
    BEAT_SECONDS,
    ENDED_AND_REQUEUED,
    ENDED_BY_SLURM,
    LOST_AND_REQUEUED,
    WorkerRecord,
    close_record,
    overwrite_record,
    read_records,
    write_record,
)

LAST_WORDS = {None: LOST_AND_REQUEUED, ENDED_BY_SLURM: ENDED_AND_REQUEUED}
"""What a job that runs again writes into the record of its forerunner, by what that said last."""
MAX_RESTARTS_OF_A_TRIAL = 3
"""A trial at which its job was lost so often, and requeued, is left to the retries."""


class Beat(threading.Thread):
    """Keeps the worker's record fresh, and counts GPU-seconds while it does."""

    def __init__(self, folder: SweepFolder, record: WorkerRecord, allotment: Allotment) -> None:
        super().__init__(daemon=True)
        self.record = record
        self._folder, self._allotment = folder, allotment
        self._began = self._counted = time.monotonic()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.update()

    def run(self) -> None:
        """Until the worker ends; a file system that fails for a moment must not end it."""
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                self.update()

    def update(self, **changes: Any) -> None:
        """Change the record and write it."""
        with self._lock:
            now = time.monotonic()
            self._allotment.use(self.record.gpus * (now - self._counted))
            self._counted = now
            self.record = replace(self.record, seconds=now - self._began, **changes)
            write_record(self._folder, self.record)

    def note(self, **changes: Any) -> None:
        """Change the record; it is written with the next beat."""
        with self._lock:
            self.record = replace(self.record, **changes)

    def end(self, word: str) -> None:
        """The last word; a second one is not heard."""
        if self._ended.is_set():
            return
        self._ended.set()
        try:
            self.update(ended=word, **({} if word == ENDED_BY_SLURM else {"trial_id": None, "label": None}))
        except OSError:  # a full disk, say, and whoever settles must hear of just that
            with contextlib.suppress(OSError):  # else the record grows old by itself
                overwrite_record(self._folder, self.record)


def close_earlier_runs(folder: SweepFolder, mine: WorkerRecord) -> dict[str, WorkerRecord]:
    """If Slurm has requeued this job, its earlier workers are gone, whatever their records say; returns trials that keep taking it down."""
    lost: dict[str, list[WorkerRecord]] = {}
    for heard in read_records(folder) if mine.job is not None and mine.restarts else ():
        record = heard.record
        if record.job != mine.job or record.restarts >= mine.restarts or record.worker == mine.worker:
            continue
        if record.ended in LAST_WORDS:
            close_record(folder, record.worker, LAST_WORDS[record.ended])
        if record.trial_id is not None and record.ended not in (ENDED_BY_SLURM, ENDED_AND_REQUEUED):
            lost.setdefault(record.trial_id, []).append(record)
    return {trial_id: records_[-1] for trial_id, records_ in lost.items() if len(records_) >= MAX_RESTARTS_OF_A_TRIAL}
