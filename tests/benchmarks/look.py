"""What a worker's look before each trial costs, beside what a trial itself does with its files: a ratio, also where listing is slow.

    python -m tests.benchmarks.look [--pairs 50000] [--delay 0.005] [--trials 40]

Makes a sweep of so many pairs (trial, task) in 40 plans with as many submissions, ten fences and five holds, and looks around in it.
delay: what every call of the file system takes besides, as on a network file system (it is put before the calls that Python makes).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantsweep.failures.holds import Hold
from quantsweep.planning.plan_files import read_header
from quantsweep.running import wanted
from quantsweep.running.wanted import Wanted
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import WorkerRecord, write_record
from quantsweep.tables import records
from quantsweep.tables.forgetting import Kind, Tombstone, write_fence
from quantsweep.trial.specs import PlannedTrial
from tests.benchmarks.read_results import metric_rows, trial_row
from tests.unit.engine_cases import trial, write

PLANS, FENCES, HOLDS = 40, 10, 5
CALLS = ("open", "stat", "scandir", "listdir", "unlink", "replace", "fsync", "link")


def make(folder: SweepFolder, pairs: int) -> list[PlannedTrial]:
    """The trials of the oldest plan; newer ones own some of them."""
    folder.create()
    trials = [trial(2 + n % 7, model=n // 7, block=16 * (1 + n % 5)) for n in range(pairs // 2)]
    size = len(trials) // PLANS
    write(folder, trials, shard_minutes=60)
    for n in range(1, PLANS):
        write(folder, trials[n * size : (n + 1) * size : 4], shard_minutes=60)
        (folder.plan / f"submission-{n:016x}-{n:08x}.json").write_text("{}")
    for n in range(FENCES):
        write_fence(folder, [Tombstone(None, one.trial.trial_id, None, Kind.TRIAL) for one in trials[n::100]])
    for n in range(HOLDS):
        Hold(name=f"h{n}", by="breaker", filters=(f"model=none-{n}",), because="a benchmark", up_to=PLANS).save(folder)
    return trials


@contextmanager
def slow(delay: float) -> Iterator[list[int]]:
    """Every call of the file system takes so much longer; counts them."""
    calls = [0]
    genuine = {name: getattr(os, name) for name in CALLS} | {"io.open": Path.open}

    def late(call: Callable[..., Any]) -> Callable[..., Any]:
        def delayed(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            time.sleep(delay)
            return call(*arguments, **options)

        return delayed

    for name in CALLS:
        setattr(os, name, late(genuine[name]))
    Path.open = late(genuine["io.open"])  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for name in CALLS:
            setattr(os, name, genuine[name])
        Path.open = genuine["io.open"]  # type: ignore[method-assign]


def seconds(call: Callable[[int], object], times: int) -> float:
    """The median of some calls."""
    taken = []
    for n in range(times):
        began = time.perf_counter()
        call(n)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    """Look, write what a trial writes, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--delay", type=float, default=0.005)
    parser.add_argument("--trials", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = SweepFolder(Path(place) / "sweep")
        trials = make(folder, arguments.pairs)
        plan = min(folder.plan.glob("plan-*"))
        for delay in (0.0, arguments.delay):
            share, wanted.LOOK_SHARE = wanted.LOOK_SHARE, float("inf")
            around = Wanted(folder, read_header(plan), "w")
            record = WorkerRecord(worker="w", host="h", pid=1, plan=plan.name)
            writer = records.Writer(folder, f"w-{delay}")

            def look(n: int, around: Wanted = around) -> None:
                around.look()
                around.superseded(trials[n])
                around.is_held(trials[n])

            def run(n: int, record: WorkerRecord = record, writer: records.Writer = writer) -> None:
                write_record(folder, dataclasses.replace(record, seconds=float(n)))
                for _ in range(2):
                    writer.add("metrics", list(metric_rows(n, 1, 2)))
                writer.add("trials", [trial_row(n)])

            with slow(delay) as calls:
                began = time.perf_counter()
                look(0)
                first, before = time.perf_counter() - began, calls[0]
                looking = seconds(look, arguments.trials)
                per_look = (calls[0] - before) / arguments.trials
                writing = seconds(run, arguments.trials)
            wanted.LOOK_SHARE = share
            print(
                f"each call {delay * 1e3:.0f} ms late: the first look {first * 1e3:.1f} ms, one more {looking * 1e3:.2f} ms "
                f"({per_look:.0f} calls); a trial's own writing {writing * 1e3:.1f} ms: {looking / writing:.1%} of it; "
                f"1 % of a trial of {looking * 100:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
