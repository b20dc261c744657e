"""How every task that was handed to Slurm stands: Slurm's word crossed with the workers' own records.

    Slurm says                the worker's record says      the task
    pending, running, …       –                             in flight
    completed, failed, …      –                             ended, with that state
    the array: cancelled      none                          ended, with that state: one line for all that had not begun
    the array, but not it     none                          ended (CANCELLED), where there are accounts: it was cancelled alone
    nothing                   ended                         ended (COMPLETED)
    nothing                   heard of lately               in flight: the scheduler forgot it, or never knew it
    nothing                   silent for long, or none      UNKNOWN: held for STALE_SECONDS, then ended as UNKNOWN

"Says" is squeue first, then sacct where the site keeps accounts: squeue forgets a job some minutes after
its end.  A task that nobody knows is unknown, not dead: it is not submitted again until its worker has been
silent for the stated time, or somebody who has looked says so (assume_dead=true).

`observe` only looks; `quantsweep.launching.settle` writes down what it means.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from quantsweep import slurm
from quantsweep.errors import SlurmError
from quantsweep.failures.holds import holding, read_holds
from quantsweep.launching.cluster import VISIBLE_SECONDS
from quantsweep.launching.submissions import Submission, SubmittedArray, job_prefix, read_submissions
from quantsweep.planning.plan_files import read_header, read_headers, read_numbered_trials, read_shard_trials, shard_trials
from quantsweep.storage.files import filesystem_now
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import STALE_SECONDS, Heard, read_records
from quantsweep.tables.forgetting import read_forgotten
from quantsweep.trial.specs import PlannedTrial

STUCK = re.compile(r"launch.failed.requeued.held|JobHoldMaxRequeue", re.IGNORECASE)
"""Reasons of squeue for a job that waits until an administrator looks (a prolog failed, a node has no such user)."""
_Accounts = Mapping[tuple[int, int | None], slurm.AccountedTask]
COLLECTOR = "collector"
"""Job names of collectors end so; they run no shard."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One array task that was submitted and has not been written down as ended.

    state: what is known of it; State.UNKNOWN where nobody knows.  ended: the word to write down, None while it may still run.
    to_cancel: Slurm still has it, but will never run it by itself.  is_hearsay: Slurm shows it no more; its worker was heard of lately.
    """

    submission: Path
    array: int
    index: int
    job_id: str
    plan: str
    shard_ids: tuple[int, ...]
    state: slurm.State
    node: str = ""
    ended: str | None = None
    to_cancel: bool = False
    is_hearsay: bool = False


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All tasks that are not yet written down as ended, and all submissions as they should be.

    adopted: submissions whose lost receipts were found in the queue, or whose arrays came to nothing (not yet saved).
    queued: every job of this user, of any kind (it counts towards the limits).  prefix: how this sweep's own begin.
    """

    submissions: tuple[Submission, ...]
    tasks: tuple[Task, ...]
    records: tuple[Heard, ...]
    queued: tuple[slurm.QueuedTask, ...]
    prefix: str = ""

    @property
    def in_flight(self) -> tuple[Task, ...]:
        """Tasks that are queued, running, or unknown."""
        return tuple(task for task in self.tasks if task.ended is None)

    @property
    def ended(self) -> tuple[Task, ...]:
        """Tasks that have ended and are not yet written down as such."""
        return tuple(task for task in self.tasks if task.ended is not None)

    @property
    def collectors(self) -> tuple[slurm.QueuedTask, ...]:
        """This sweep's collectors that have not started yet (known only while something of it is open)."""
        return tuple(
            task
            for task in self.queued
            if task.name.startswith(self.prefix) and task.name.endswith(COLLECTOR) and task.state is slurm.State.PENDING
        )


def observe(folder: SweepFolder, *, assume_dead: bool = False) -> Observation:
    """Look once: at most one squeue and one sacct call, none if nothing of this sweep is open.

    Raises SlurmError if Slurm does not answer, or if jobs of another user, or of another cluster, are open;
    ResultsError if a plan is damaged.
    """
    submissions = read_submissions(folder) if folder.plan.is_dir() else []
    _refuse_unreadable_plans(folder, submissions)
    open_ones = [submission for submission in submissions if not submission.closed]
    records = tuple(read_records(folder))
    if not open_ones:
        return Observation(submissions=tuple(submissions), tasks=(), records=records, queued=())
    _refuse_strangers(folder, open_ones)
    queued = slurm.queue()
    if strange := _unseen(folder, submissions, queued):
        submissions = _wait_for(folder, strange)
        open_ones = [submission for submission in submissions if not submission.closed]
    numbers = _numbers(queued, records)
    known = {submission.path: _with_receipts(submission, numbers) for submission in open_ones}
    tasks = _tasks(folder, list(known.values()), queued, records, assume_dead=assume_dead)
    mine = tuple(task for task in queued if task.name.startswith(job_prefix(folder)) or task.state.is_active)
    return Observation(
        submissions=tuple(known.get(submission.path, submission) for submission in submissions),
        tasks=tuple(tasks),
        records=records,
        queued=mine,
        prefix=job_prefix(folder),
    )


def _refuse_unreadable_plans(folder: SweepFolder, submissions: Iterable[Submission]) -> None:
    """Raise ResultsError for a plan that is damaged, or that was moved away while jobs of it may be in the queue."""
    headers = read_headers(folder.plan)
    for submission in submissions:
        for array in submission.arrays:
            if not submission.closed and not array.is_over and array.plan not in headers:
                read_header(folder.plan / array.plan)


def to_leave_alone(folder: SweepFolder, seen: Observation) -> frozenset[str]:
    """Trials that a launch must not plan: jobs in flight will run them (or are at them), and no hold makes them skip them."""
    flying = in_flight_trials(folder, seen.in_flight)
    holds = read_holds(folder)
    if not holds or not flying:
        return flying
    at_hand = {heard.record.trial_id for heard in seen.records if heard.is_alive}
    roots = {name: header.root for name, header in read_headers(folder.plan).items()}
    # What one job skips another may run: that of a launch since the hold.
    return flying & {
        planned.trial.trial_id
        for plan, planned in _planned(folder, seen.in_flight)
        if planned.trial.trial_id in at_hand or holding(holds, planned, roots[plan]) is None
    }


def in_flight_trials(folder: SweepFolder, tasks: Iterable[Task]) -> frozenset[str]:
    """Trial ids that some of these tasks have in their shards; not those of which something is forgotten: jobs leave that alone."""
    forgotten = read_forgotten(folder.path)
    if not forgotten:
        return frozenset().union(*(shard_trials(folder.plan / plan, ids) for plan, ids in _shards(tasks).items()))
    launched = {name: header.launched for name, header in read_headers(folder.plan).items()}
    return frozenset(
        planned.trial.trial_id for plan, planned in _planned(folder, tasks) if forgotten.still_asked(planned, launched[plan]) is planned
    )


def idle_tasks(folder: SweepFolder, tasks: Sequence[Task], is_wanted: Callable[[str, PlannedTrial], bool]) -> list[Task]:
    """Those of some tasks in whose shards no trial is wanted; `is_wanted` is asked with the plan's name and the trial."""
    wanted = {
        (plan, shard_id)
        for plan, ids in _shards(tasks).items()
        for shard_id, planned in read_numbered_trials(folder.plan / plan, ids)
        if is_wanted(plan, planned)
    }
    return [task for task in tasks if not any((task.plan, shard_id) in wanted for shard_id in task.shard_ids)]


def _planned(folder: SweepFolder, tasks: Iterable[Task]) -> Iterator[tuple[str, PlannedTrial]]:
    """(plan, trial) of everything that some of these tasks have in their shards."""
    return ((plan, planned) for plan, ids in _shards(tasks).items() for planned in read_shard_trials(folder.plan / plan, ids))


def _shards(tasks: Iterable[Task]) -> dict[str, set[int]]:
    """Plan → shards of some tasks."""
    by_plan: dict[str, set[int]] = {}
    for task in tasks:
        by_plan.setdefault(task.plan, set()).update(task.shard_ids)
    return by_plan


def _refuse_strangers(folder: SweepFolder, submissions: Sequence[Submission]) -> None:
    strangers = {submission.user for submission in submissions} - {slurm.user_name()}
    if strangers:
        who = ", ".join(sorted(strangers))
        raise SlurmError(
            f"sweep {folder.name} has jobs submitted by {who}: whether they still run cannot be seen by {slurm.user_name()}. "
            "Ask them for the state, or use a results_dir of your own"
        )
    clusters = {submission.cluster for submission in submissions if submission.cluster}
    elsewhere = clusters - {slurm.cluster_name()} if clusters else clusters
    if elsewhere:
        raise SlurmError(
            f"sweep {folder.name} has jobs on cluster {', '.join(sorted(elsewhere))}, of which Slurm knows nothing here. "
            "Go on there until they have ended, or use another sweep=… here"
        )


# --- files that are not seen yet, receipts that were lost -----------------------------------------------------------------


def _unseen(folder: SweepFolder, submissions: Iterable[Submission], queued: Iterable[slurm.QueuedTask]) -> set[str]:
    """Names of live jobs of this sweep that no submission speaks of: another host wrote it, and it is not seen here yet."""
    names = {array.job_name for submission in submissions for array in submission.arrays}
    prefix = job_prefix(folder)
    return {
        task.name
        for task in queued
        if task.name.startswith(prefix) and not task.name.endswith(COLLECTOR) and task.state.is_active and task.name not in names
    }


def _wait_for(folder: SweepFolder, strange: set[str]) -> list[Submission]:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        filesystem_now(folder.plan)
        submissions = read_submissions(folder)
        if strange <= {array.job_name for submission in submissions for array in submission.arrays}:
            return submissions
        time.sleep(1.0)
    raise SlurmError(
        f"jobs of this sweep are in the queue that no file in {folder.plan} speaks of ({', '.join(sorted(strange)[:3])}): "
        "nothing was submitted. Cancel them (scancel --name=…), or find the submission-*.json that is missing"
    )


def _numbers(queued: Iterable[slurm.QueuedTask], records: Iterable[Heard]) -> dict[str, int]:
    """Job name to array job id: from the queue, and from workers, whose word goes first.

    The queue may have forgotten the job; or it has two of that name, and the one that works counts.
    """
    worked = (heard.record for heard in records)
    found = {record.job_name: int(record.job.partition("_")[0]) for record in worked if record.job_name and record.job}
    return {task.name: task.array_job_id for task in queued} | found


def _with_receipts(submission: Submission, numbers: Mapping[str, int]) -> Submission:
    """The submission with every receipt that can still be had."""
    arrays = tuple(
        replace(array, array_job_id=numbers[array.job_name])
        if array.array_job_id is None and not array.abandoned and array.job_name in numbers
        else array
        for array in submission.arrays
    )
    return replace(submission, arrays=arrays)


# --- tasks ----------------------------------------------------------------------------------------------------------------


def _tasks(
    folder: SweepFolder, submissions: list[Submission], queued: Iterable[slurm.QueuedTask], records: Iterable[Heard], *, assume_dead: bool
) -> list[Task]:
    # By name too: a controller that lost its state gives numbers out again, and another cluster has the same ones.
    in_queue = {(task.name, task.array_job_id, task.array_task_id): task for task in queued}
    arrays = {(name, number) for name, number, _ in in_queue}
    by_job = _by_job(records)
    now = filesystem_now(folder.plan)
    found: list[Task] = []
    silent: list[_Silent] = []
    for submission in submissions:
        age = now - submission.declared
        for number, array in enumerate(submission.arrays):
            if array.abandoned or array.array_job_id is None:
                continue
            for task in _of_array(submission, number, array, array.array_job_id):
                known = in_queue.get((array.job_name, array.array_job_id, task.index))
                if known is not None:
                    found.append(_stuck(task, known) or _from_slurm(task, known.state, known.node))
                    continue
                whole = in_queue.get((array.job_name, array.array_job_id, None))
                silent.append(
                    _Silent(
                        task=task,
                        number=array.array_job_id,
                        age=age,
                        workers=by_job.get(task.job_id, []),
                        whole=whole,
                        is_array_shown=(array.job_name, array.array_job_id) in arrays,
                    )
                )
    return [*found, *_forgotten(silent, now, assume_dead=assume_dead)]


@dataclass(frozen=True, kw_only=True)
class _Silent:
    """A task that squeue does not show: its array's number, seconds since it was declared, what its workers said.

    whole: the one line, without a task's number, that Slurm keeps for all tasks of an array that were cancelled before they began.
    is_array_shown: squeue shows some task of its array.
    """

    task: Task
    number: int
    age: float
    workers: list[Heard]
    whole: slurm.QueuedTask | None
    is_array_shown: bool


def _of_array(submission: Submission, number: int, array: SubmittedArray, array_job_id: int) -> Iterable[Task]:
    """The tasks of an array that are not written down as ended, as yet of unknown state."""
    for index, shard_ids in enumerate(array.tasks):
        if index not in array.ended:
            yield Task(
                submission=submission.path,
                array=number,
                index=index,
                job_id=f"{array_job_id}_{index}",
                plan=array.plan,
                shard_ids=shard_ids,
                state=slurm.State.UNKNOWN,
            )


def _stuck(task: Task, known: slurm.QueuedTask) -> Task | None:
    """A task that Slurm holds after it could not be launched: it would wait for ever, so it counts as lost with its node."""
    if known.state not in (slurm.State.PENDING, slurm.State.REQUEUE_HOLD) or not STUCK.search(known.reason):
        return None
    return replace(task, state=known.state, node=known.node, ended=slurm.State.NODE_FAIL.word, to_cancel=True)


def _from_slurm(task: Task, state: slurm.State, node: str) -> Task:
    return replace(task, state=state, node=node, ended=state.word if state.is_finished else None)


def _by_job(records: Iterable[Heard]) -> dict[str, list[Heard]]:
    """A job has several workers where it has a whole node, and others before them where it was requeued."""
    found: dict[str, list[Heard]] = {}
    for heard in records:
        if heard.record.job is not None:
            found.setdefault(heard.record.job, []).append(heard)
    return found


def _forgotten(silent: list[_Silent], now: float, *, assume_dead: bool) -> list[Task]:
    """Tasks that squeue does not show: accounts first, then the workers' own records, then patience."""
    if not silent:
        return []
    # By the file system's clock, as the submission's age: this machine's may be hours off.  (slurm.accounting looks an hour further back.)
    since = datetime.fromtimestamp(now - max(one.age for one in silent)).astimezone()
    try:
        accounts = slurm.accounting({one.number for one in silent}, since)
    except slurm.SlurmUnavailable:
        accounts = None  # the database is away: what it knows stays unknown, what workers said of themselves does not
    return [_from_accounts(one, accounts) or _from_records(one, assume_dead=assume_dead) for one in silent]


def _from_accounts(one: _Silent, accounts: _Accounts | None) -> Task | None:
    """How Slurm says that the task ended, if it does."""
    own = (accounts or {}).get((one.number, one.task.index))
    if own is not None and own.state.is_finished:
        return _from_slurm(one.task, own.state, own.node)
    if one.workers:
        return None  # it began
    whole = one.whole or (accounts or {}).get((one.number, None))
    if whole is not None and whole.state.is_finished:
        return _from_slurm(one.task, whole.state, whole.node)
    # scancel of some pending tasks leaves no trace: Slurm knows the array, and them no more.  Had one begun, the accounts would know.
    if accounts is None:
        is_gone = False
    elif own is None:
        is_gone = any(number == one.number for number, _ in accounts)
    else:
        is_gone = own.state is slurm.State.PENDING and one.is_array_shown  # the accounts lag behind the queue
    return _from_slurm(one.task, slurm.State.CANCELLED, "") if is_gone else None


def _from_records(one: _Silent, *, assume_dead: bool) -> Task:
    task, workers = one.task, one.workers
    if workers and all(heard.record.ended is not None for heard in workers):
        return replace(task, state=slurm.State.COMPLETED, ended=slurm.State.COMPLETED.word, node=workers[0].record.node)
    if any(heard.is_alive for heard in workers) and not assume_dead:
        return replace(task, state=slurm.State.RUNNING, node=workers[0].record.node, is_hearsay=True)
    silence = min([one.age, *(heard.age for heard in workers)])
    if assume_dead or silence > STALE_SECONDS:
        return replace(task, ended=slurm.State.UNKNOWN.word)
    return task
