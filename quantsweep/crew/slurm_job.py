"""What a Slurm job of a sweep runs.

    python -m quantsweep.crew.slurm_job task SUBMISSION ARRAY       one array task: its shards, then a step of the sweep
    python -m quantsweep.crew.slurm_job collect FOLDER              the collector: a step of the sweep

Signals.  USR2 comes some time before the time limit: the trial at hand may end if it can in that time, or is
dropped; then the job is put back into the queue under its own id and goes on where it was.  TERM
comes with preemption and scancel, perhaps only moments before KILL: the trial at hand is dropped, and
whether the job runs again is Slurm's business.  Where no signal comes nothing is lost either:
a finished task's rows are on disk, and the trial at hand is known from the worker's record.

Files that another host has just written may not be seen yet: they are waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import quantsweep
from quantsweep import slurm
from quantsweep.crew.local import worker_environment
from quantsweep.errors import LockedError, QuantsweepError, ResultsError, SlurmError
from quantsweep.launching import budget
from quantsweep.launching.advance import advance, advance_now_and_then, step_text
from quantsweep.launching.cluster import VISIBLE_SECONDS, RefusedError, warning_seconds
from quantsweep.launching.refill import come_back
from quantsweep.launching.submissions import SubmittedArray, read_submission
from quantsweep.planning.plan_files import read_header
from quantsweep.running import environment
from quantsweep.running.stopping import Allotment, Stop
from quantsweep.running.worker import JobContext, Worker
from quantsweep.storage.files import filesystem_now, own_umask
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import read_records
from quantsweep.tables.compaction import compact
from quantsweep.trial.specs import LaunchSettings
from quantsweep.words import count

COLLECTOR_PAUSE_MINUTES = 10
RECEIPT_SECONDS = 60.0
"""How long a job waits for its own receipt, which the launcher writes moments after sbatch has answered."""
FINISH_SHARE = 0.6
"""Of the time between USR2 and the limit, the part in which the trial at hand may still end."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How the workers of this job ended.

    problems: what went wrong with results (not with trials).  is_left: something of the shards is left to run.
    num_superseded: trials that others have by now.  is_closed: it was taken for gone.
    """

    problems: tuple[str, ...]
    is_left: bool
    num_superseded: int
    is_closed: bool


def main(argv: list[str] | None = None) -> int:
    """Run one task, or the collector; returns the exit status (1: something is wrong that a person must see)."""
    own_umask()
    parser = argparse.ArgumentParser(prog="python -m quantsweep.crew.slurm_job", description="What a Slurm job of a sweep runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    task = commands.add_parser("task", help="run one array task")
    task.add_argument("submission", type=Path)
    task.add_argument("array", type=int)
    collect = commands.add_parser("collect", help="look after the sweep")
    collect.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    try:
        return _collect(SweepFolder(arguments.folder)) if arguments.command == "collect" else _task(arguments.submission, arguments.array)
    except QuantsweepError as error:
        print(error, file=sys.stderr)
        return 1


def _collect(folder: SweepFolder) -> int:
    """A step of the sweep; comes back later where it cannot be taken now, and nobody else is left to take it."""
    folder.check()
    again: str | None = None
    try:
        step = advance(folder)
        print(step_text(step), flush=True)
        again = "there is no room in the queue, or jobs are unknown" if step.is_stuck else None
    except RefusedError as error:
        print(f"a person is needed: {error}", flush=True)
    except (LockedError, SlurmError, OSError) as error:
        again = str(error)
    if again is not None:
        return _come_back(folder, again)
    try:
        summary = compact(folder)
    except QuantsweepError as error:  # the sweep itself is looked after: this only makes reading it faster
        print(f"not compacted: {error}", flush=True)
    else:
        print(f"compacted {count(summary.total('files_before'), 'file')} into {summary.total('files_after')}", flush=True)
    return 0


def _come_back(folder: SweepFolder, why: str) -> int:
    """Another collector in some minutes; where the queue is too full even for that, this very job goes back into it."""
    print(f"another collector in {COLLECTOR_PAUSE_MINUTES} minutes: {why}", flush=True)
    try:
        come_back(folder, COLLECTOR_PAUSE_MINUTES)
    except SlurmError as error:
        print(f"not accepted ({error}): this one is requeued", flush=True)
        return 0 if slurm.requeue(str(environment.slurm_job())) else 1
    return 0


def _task(path: Path, number: int) -> int:
    folder = SweepFolder(path.parent.parent)
    _wait_for(path)
    folder.check()
    array = _own_array(path, number)
    if array is None:
        return 0
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    plan = folder.plan / array.plan
    _wait_for(plan)
    launch = read_header(plan).launch
    _check_code(folder, launch)
    stop = Stop()
    _listen(stop, warning_seconds(launch.cluster, array.resources) * FINISH_SHARE)
    outcome = _run_shards(plan, array, index, stop)
    for problem in outcome.problems:
        print(problem, file=sys.stderr, flush=True)
    if outcome.num_superseded:
        print(f"{count(outcome.num_superseded, 'trial was', 'trials were')} left alone: a newer launch or a rerun has them", flush=True)
    if outcome.is_closed:
        print("this job was taken for gone, and others have its trials: it ends (superseded)", flush=True)
        return 0  # nothing failed: Slurm's mails and accounts must not say so
    if stop.reason == Stop.TIME_LIMIT and outcome.is_left:
        if not slurm.requeue(str(environment.slurm_job())):
            print("Slurm does not let this job go back into the queue: what is left is submitted anew", flush=True)
        return 0
    if not outcome.problems and stop.reason in (None, Stop.TIME_LIMIT) and launch.cluster.submit_from_nodes:
        print(advance_now_and_then(folder), flush=True)
    return 1 if outcome.problems else 0


def _own_array(path: Path, number: int) -> SubmittedArray | None:
    """The array that this job is a task of, once its receipt is there; None if this job is not wanted (any more).

    An sbatch that Slurm was slow to answer may have been heard twice: the receipt names the one job that counts.
    """
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    deadline = time.monotonic() + RECEIPT_SECONDS
    while True:
        filesystem_now(path.parent)  # what it says now: a moment ago it may have been given up
        array = read_submission(path).arrays[number]
        if array.abandoned:
            print(f"{array.job_name} was given up before it began (its shards are, or will be, submitted under another name)", flush=True)
            return None
        if array.array_job_id is not None and job is not None and int(job) != array.array_job_id:
            print(f"{array.job_name} is job {array.array_job_id}; this is {job}, of which nobody knows: it ends", flush=True)
            return None
        # A launcher that was killed before it wrote the receipt: this job is the one, and it is found by its name.
        if array.array_job_id is not None or job is None or time.monotonic() > deadline:
            return array
        time.sleep(0.5)


def _check_code(folder: SweepFolder, launch: LaunchSettings) -> None:
    """Refuse to run any code but the copy that was made at launch."""
    if launch.code is None:
        return
    wanted, here = (folder.code / launch.code).resolve(), Path(quantsweep.__file__).resolve()
    if not here.is_relative_to(wanted):
        raise ResultsError(f"this job would run {here}, not the copy that was made at launch in {wanted}. Does this node see that folder?")


def _wait_for(path: Path) -> None:
    """A file that another host has written a moment ago may take a while to be seen."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ResultsError(f"{path} is not there, {VISIBLE_SECONDS:.0f} s after this job began. Does this node see that file system?")
        time.sleep(0.5)
        if path.parent.is_dir():
            filesystem_now(path.parent)


def _listen(stop: Stop, grace_seconds: float) -> None:
    def handler(reason: str, grace: float) -> Callable[[int, FrameType | None], None]:
        return lambda number, frame: stop.set(reason, grace)

    signal.signal(signal.SIGUSR2, handler(Stop.TIME_LIMIT, grace_seconds))
    signal.signal(signal.SIGTERM, handler(Stop.ENDED, 0.0))


def _run_shards(plan: Path, array: SubmittedArray, index: int, stop: Stop) -> _Outcome:
    """Run this task's shards, one worker each, side by side."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    shard_ids = array.tasks[index]
    for shard_id in shard_ids:
        todo.put(shard_id)
    folder = SweepFolder(plan.parent.parent)
    allotment = Allotment(array.gpu_seconds[index] if array.gpu_seconds else None)
    if array.gpu_seconds:  # a job that was requeued has used some of it already
        job = environment.slurm_job()
        allotment.use(budget.used(heard.record for heard in read_records(folder) if heard.record.job == job))
    context = JobContext(
        job_name=array.job_name,
        shard_ids=shard_ids,
        gpus=array.resources.gpus,
        minutes=array.resources.minutes,
        allotment=allotment,
    )
    workers = min(array.workers, len(shard_ids))
    device = read_header(plan).settings.device
    problems: list[str] = []
    left: list[int] = []
    superseded: list[int] = []
    closed: list[bool] = []

    def work(number: int) -> None:
        # The last task of a whole node may have one shard: it gets its own GPUs there, not all.
        extra = worker_environment(number, workers, device, max(1, array.resources.gpus)) if array.workers > 1 else {}
        try:
            worker = Worker(plan, extra_environment=extra, stop=stop, context=context)
            with contextlib.closing(worker), contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    ended = worker.run(todo.get_nowait())
                    left.append(ended.left)
                    superseded.append(ended.superseded)
            closed.append(worker.wanted.closed is not None)
        except BaseException as error:  # noqa: BLE001 - said at the end of the job, an exit too; the other workers go on
            problems.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # signals are handled between two joins
            thread.join(timeout=0.5)
    return _Outcome(
        problems=tuple(problems),
        is_left=bool(sum(left)) or not todo.empty(),
        num_superseded=sum(superseded),
        is_closed=any(closed),
    )


if __name__ == "__main__":
    sys.exit(main())
