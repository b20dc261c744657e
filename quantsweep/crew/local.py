"""Shards on this machine: worker threads, each with one child process, and a live display.

One worker a GPU, or one a core.  A worker keeps its child, and the model in it, from one shard to
the next.  Ctrl-C lets the tasks at hand finish, a second one drops
them; either way every finished task has its row, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from quantsweep.crew.display import Display, Tally, display
from quantsweep.crew.gpus import num_gpus, visible_gpus
from quantsweep.launching import budget
from quantsweep.launching.submissions import read_submissions, spent_by_job
from quantsweep.planning.plan_files import read_header, read_minutes, shard_samples
from quantsweep.running.stopping import Allotment, Stop, stopped_by_signals
from quantsweep.running.worker import JobContext, Worker
from quantsweep.storage.lock import check_not_lost
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import read_records
from quantsweep.trial.specs import ModelSpec, PlannedTrial

LOOK_SECONDS = 0.1
DROP_SECONDS = 30.0
"""How long workers that were told to drop everything are waited for."""


def num_workers(wanted: int | None, device: str) -> int:
    """How many workers run side by side: what was asked for, or one a GPU, or one a core."""
    gpus = 0 if device == "cpu" else num_gpus()
    return wanted or gpus or num_cores()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(index: int, workers: int, device: str, gpus_each: int = 1) -> dict[str, str]:
    """Each worker gets its GPUs, or its share of the cores: two that share cores by chance slow each other badly."""
    if names := [] if device == "cpu" else visible_gpus():
        first = index * gpus_each
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[(first + n) % len(names)] for n in range(gpus_each))}
    threads = str(max(1, num_cores() // workers))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class LocalSummary:
    """How the run went, in trials."""

    done: int = 0
    failed: int = 0
    evaluations: int = 0
    interrupted: bool = False
    budget_spent: bool = False
    held: int = 0
    superseded: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def run_local(plan_path: Path, shard_ids: Sequence[int], *, workers: int, device: str) -> LocalSummary:
    """Run shards on this machine until they are done, the budget is spent, or somebody presses Ctrl-C."""
    samples = shard_samples(plan_path)
    todo = _Todo({shard_id: samples[shard_id].trial.model for shard_id in shard_ids})
    gpus = _gpus_each(plan_path, shard_ids, device)
    workers = max(1, min(workers, len(shard_ids), *([num_gpus() // gpus] if gpus > 1 else [])))
    stop = Stop()
    summary = LocalSummary()
    started = time.monotonic()
    context = JobContext(shard_ids=tuple(shard_ids), gpus=gpus, allotment=_allotment(plan_path, gpus))
    makers = [
        partial(Worker, plan_path, extra_environment=worker_environment(index, workers, device, max(1, gpus)), stop=stop, context=context)
        for index in range(workers)
    ]
    wanted = set(shard_ids)
    trials = {trial_id: entry for trial_id, entry in read_minutes(plan_path).items() if entry[0] in wanted}
    tally = Tally(trials, workers)
    with stopped_by_signals(stop), display(tally) as shown:
        lock = plan_path.resolve().parent / "launch.lock"
        if not _attend([_Hand(make, stop, todo, summary, tally, lock) for make in makers], stop, shown):
            summary.problems.append(f"workers did not end within {DROP_SECONDS:.0f} s: does {plan_path.parent} answer?")
    if stop.reason == Stop.SUPERSEDED:  # all that was not begun is somebody else's, too
        summary.superseded = max(1, len(trials) - summary.done - summary.failed - summary.held)
    if stop.reason == Stop.BAD_NODE:
        summary.problems.append("trial after trial failed for this machine's fault, and the rest was left: see why they failed")
    summary.budget_spent = stop.reason == Stop.BUDGET
    summary.interrupted = stop.reason in (Stop.PERSON, Stop.ENDED) and not summary.problems
    summary.seconds = time.monotonic() - started
    return summary


def _gpus_each(plan_path: Path, shard_ids: Sequence[int], device: str) -> int:
    """GPUs of one worker: as many as the most demanding model asks for, as far as this machine has them; 0 without a GPU."""
    if device == "cpu" or not (here := num_gpus()):
        return 0
    samples = shard_samples(plan_path)
    return min(here, max(1, *(samples[shard_id].trial.model.resources.gpus for shard_id in shard_ids)))


def _allotment(plan_path: Path, gpus: int) -> Allotment:
    """What is left of the budget, for all workers of this machine together."""
    hours = read_header(plan_path).launch.gpu_hours
    if hours is None or not gpus:
        return Allotment()
    folder = SweepFolder(plan_path.resolve().parent.parent)
    return Allotment(budget.remaining(hours, [heard.record for heard in read_records(folder)], {}, spent_by_job(read_submissions(folder))))


class _Todo:
    """Shards that are left; a worker goes on with the model that it has loaded, then takes one that nobody has, in the end anybody's."""

    def __init__(self, models: Mapping[int, ModelSpec]) -> None:
        self._left = dict(models)
        self._loaded: dict[int, ModelSpec] = {}
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """The next shard of the calling thread; None if there is none."""
        with self._lock:
            if not self._left:
                return None
            loaded = self._loaded.pop(threading.get_ident(), None)
            others = self._loaded.values()
            shard_id = min(self._left, key=lambda one: (self._left[one] != loaded, self._left[one] in others))
            self._loaded[threading.get_ident()] = self._left.pop(shard_id)
            return shard_id


class _Hand(threading.Thread):
    """One worker thread: takes shards until there are none."""

    def __init__(self, make: Callable[[], Worker], stop: Stop, todo: _Todo, summary: LocalSummary, tally: Tally, lock: Path) -> None:
        super().__init__(daemon=True)
        self._make, self._stop_asked, self._todo, self._summary, self._tally, self._lock = make, stop, todo, summary, tally, lock
        self._is_warm = False
        self.worker: Worker | None = None

    def run(self) -> None:
        """Until the queue is empty, a stop, or results that cannot be written."""
        try:
            with contextlib.closing(self._make()) as self.worker:
                while not self._stop_asked.is_set() and (shard_id := self._todo.take()) is not None:
                    ended = self.worker.run(shard_id, self._observe)
                    self._summary.held += ended.held
                    self._summary.superseded += ended.superseded
                    self._tally.end_shard(shard_id)
        except BaseException as error:  # noqa: BLE001 - said by the launcher at the end, an exit too; the other hands stop as well
            problem = f"{type(error).__name__}: {error}"
            if problem not in self._summary.problems:  # a full disk stops all hands with the same words
                self._summary.problems.append(problem)
            self._stop_asked.set(Stop.ERROR)

    def _observe(self, planned: PlannedTrial, status: str, evaluations: int) -> None:
        self._summary.evaluations += evaluations
        if status == "done":
            self._summary.done += 1
        elif status == "failed":
            self._summary.failed += 1
        if status != "stopped":
            began = None if self.worker is None else self.worker.beat.record.trial_started
            # The first trial of a worker starts its child, which says nothing of the others.
            seconds = time.time() - began if began is not None and self._is_warm else None
            self._tally.end(planned.trial.trial_id, failed=status == "failed", seconds=seconds)
            self._is_warm = True
        check_not_lost(self._lock)  # this machine may have slept, and another launch be at work: what is written stays, no more is begun


def _attend(crew: list[_Hand], stop: Stop, shown: Display) -> bool:
    """Wait for the crew while signals are heard (`stopping.stopped_by_signals`); False if somebody dropped it and it does not end."""
    for hand in crew:
        hand.start()
    said: set[str] = set()
    latest = math.inf
    while any(hand.is_alive() for hand in crew):
        if time.monotonic() > latest:
            return False
        if stop.drops_now():
            latest = min(latest, time.monotonic() + DROP_SECONDS)
        time.sleep(LOOK_SECONDS)
        shown.tick([hand.worker.beat.record for hand in crew if hand.worker is not None])
        for text in _stopping_words(stop):
            if text not in said:
                said.add(text)
                shown.say(text)
    return True


def _stopping_words(stop: Stop) -> Iterator[str]:
    if stop.reason == Stop.PERSON:
        by_hand = stop.signal in (None, signal.SIGINT.name)
        asked, again = ("", "press Ctrl-C again to drop them") if by_hand else (f" ({stop.signal})", "a second signal drops them")
        yield f"stopping{asked}: the tasks at hand finish first; {again}"
        if stop.drops_now():
            yield "stopping now: the tasks at hand are dropped"
