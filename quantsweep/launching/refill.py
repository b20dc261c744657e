"""Submitting what waits: shards that no array has, as many as there is room and budget for.

A shard *waits* while it owns a trial that is not done and no live array has it.  Whoever holds the
launch lock submits waiting shards: the launch command first, then the running sweep itself (each
worker that ends, and the collector), so that a sweep of any length passes under any submit limit
without a process on the login node.

    room = min(HEADROOM · tightest submit limit, JOB_COUNT_SHARE · MaxJobCount) − jobs of this user

Order of steps, each durable before the next: intent (all arrays of this round) → sbatch → receipt.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from quantsweep import slurm
from quantsweep.errors import SlurmError
from quantsweep.failures.holds import holding, read_holds
from quantsweep.failures.nodes import broken_nodes
from quantsweep.launching import budget
from quantsweep.launching import cluster as sbatch
from quantsweep.launching.cluster import NoRoomError, RefusedError
from quantsweep.launching.submissions import Submission, SubmittedArray, job_prefix, new_submission, spent_by_job
from quantsweep.launching.tasks import COLLECTOR, Observation
from quantsweep.operations.prediction import Predictor, sweep_folders
from quantsweep.planning.plan_files import (
    PlanHeader,
    plan_files,
    read_header,
    read_headers,
    read_numbered_trials,
    read_owned_tasks,
    shard_samples,
    shard_sizes,
)
from quantsweep.planning.shards import predicted_minutes
from quantsweep.storage.files import checked_file, filesystem_now, write_text
from quantsweep.storage.lock import check_held
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables.forgetting import read_forgotten
from quantsweep.tables.records import read_done
from quantsweep.trial.specs import ClusterSpec, Resources

HEADROOM = 0.9
"""Share of a submit limit that one sweep uses; the rest is for the user's other work."""
JOB_COUNT_SHARE = 0.5
"""Share of the cluster-wide MaxJobCount that one sweep fills at most: it belongs to everybody."""
LIMITS_SECONDS = 600.0
"""How long limits that were read are believed by the running sweep; a launch command always reads them."""
BACK_OFF_SECONDS = (1.0, 4.0, 16.0)
"""Pauses before an array is tried again that Slurm neither took nor refused."""

Waiting = tuple[str, int]
"""A shard that waits: (plan, shard)."""


@dataclass(frozen=True, kw_only=True)
class SubmitSummary:
    """What was submitted, and what has to wait for room or for budget."""

    shards: int = 0
    array_job_ids: tuple[int, ...] = ()
    waiting: int = 0
    limits: slurm.Limits | None = None
    refusal: str | None = None
    refused: tuple[str, ...] = ()
    budget_spent: bool = False
    collector: str | None = None
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Tasks that may share an array: one plan, one resource class."""

    plan: str
    resources: Resources
    workers: int
    tasks: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    """Predicted seconds of each task, all its workers together."""
    granted: tuple[float, ...] = ()
    """GPU-seconds that each task may use; empty without a budget."""


def waiting_shards(folder: SweepFolder, submissions: Iterable[Submission]) -> list[Waiting]:
    """Shards for Slurm that no live array has and that own a trial which is neither done nor forgotten, oldest plan first."""
    taken = {
        (array.plan, shard_id)
        for submission in submissions
        for array in submission.arrays
        if not array.abandoned
        for ids in array.tasks
        for shard_id in ids
    }
    launched = {name: header.launched for name, header in read_headers(folder.plan).items() if header.launch.cluster.kind == "slurm"}
    if not launched:
        return []
    done, forgotten = read_done(folder.path), read_forgotten(folder.path)
    waiting = {
        shard
        for trial_id, (shard, tasks) in read_owned_tasks(folder.plan).items()
        if shard[0] in launched
        and shard not in taken
        and any((trial_id, task) not in done and not forgotten.covers(trial_id, task, launched[shard[0]]) for task in tasks)
    }
    waiting -= _held_shards(folder, waiting)
    order = {path.name: number for number, path in enumerate(plan_files(folder.plan))}
    return sorted(waiting, key=lambda shard: (order[shard[0]], shard[1]))


def _held_shards(folder: SweepFolder, waiting: Iterable[Waiting]) -> set[Waiting]:
    """Shards all of whose trials are held; nothing is read where nothing is held."""
    holds = read_holds(folder)
    by_plan: dict[str, set[int]] = {}
    for plan, shard_id in waiting if holds else ():
        by_plan.setdefault(plan, set()).add(shard_id)
    free: set[Waiting] = set()
    for plan, ids in by_plan.items():
        root = read_header(folder.plan / plan).root
        trials = read_numbered_trials(folder.plan / plan, ids)
        free |= {(plan, shard_id) for shard_id, planned in trials if holding(holds, planned, root) is None}
    return {(plan, shard_id) for plan, ids in by_plan.items() for shard_id in ids} - free


def room(limits: slurm.Limits, queued: int, cluster: ClusterSpec) -> int:
    """How many more tasks may be submitted now, with head-room left (and one for the collector)."""
    bounds = [int(limits.max_job_count * JOB_COUNT_SHARE) - 1]
    if limits.max_submit_jobs is not None:
        bounds.append(max(1, int(limits.max_submit_jobs * HEADROOM) - 1))
    if cluster.max_submitted is not None:
        bounds.append(cluster.max_submitted)
    return max(0, min(bounds) - queued)


def array_size(cluster: ClusterSpec, limits: slurm.Limits) -> int:
    """Tasks that one array may have: the largest index stays below MaxArraySize."""
    return max(1, min(cluster.max_array_size or limits.max_array_size, limits.max_array_size))


def submit_waiting(folder: SweepFolder, seen: Observation, *, fresh_limits: bool = False) -> SubmitSummary:
    """Submit as many waiting shards as there is room for; the launch lock must be held.

    seen: what `settle` returned.
    Raises SlurmError if not even the first array was accepted for a reason other than want of room.
    """
    headers = read_headers(folder.plan)
    waiting = waiting_shards(folder, seen.submissions)
    if not waiting:
        return SubmitSummary()
    newest = [header for header in headers.values() if header.root == header.name][-1]
    limits = _limits(folder, newest.launch.cluster, fresh=fresh_limits)
    places = room(limits, _queued(seen), newest.launch.cluster)
    groups = _groups(folder, waiting, headers)
    chosen, spent = _within_budget(folder, _first(groups, places), seen, newest)
    if not chosen:
        return SubmitSummary(waiting=len(waiting), limits=limits, budget_spent=spent)
    broken = tuple(sorted(broken_nodes(folder)))
    excluded = _to_exclude(broken, newest.launch.cluster)
    if excluded:  # what waits in the queue already is kept off them too; where Slurm does not let us, a retry will be
        _keep_off(seen, headers, excluded)
    arrays = [array for group in chosen for array in _arrays(group, array_size(newest.launch.cluster, limits))]
    submission, refusals = _submit(folder, new_submission(folder, arrays, broken), headers, excluded)
    accepted = [array for array in submission.arrays if array.array_job_id is not None]
    count = sum(len(ids) for array in accepted for ids in array.tasks)
    collector = _ensure_collector(folder, seen, submission, newest) if accepted else None
    return SubmitSummary(
        shards=count,
        array_job_ids=tuple(array.array_job_id for array in accepted if array.array_job_id is not None),
        waiting=len(waiting) - count,
        limits=limits,
        refusal=refusals.no_room,
        refused=refusals.for_good,
        budget_spent=spent,
        collector=collector,
        excluded=excluded,
    )


def _to_exclude(broken: tuple[str, ...], cluster: ClusterSpec) -> tuple[str, ...]:
    """Nodes to keep off; none if no other node would be left."""
    try:
        return () if broken and len(broken) >= slurm.partition_limits(cluster.partition).num_nodes else broken
    except slurm.CommandMissing:
        return ()  # a node without scontrol: whoever submits from elsewhere keeps them off


def _keep_off(seen: Observation, headers: Mapping[str, PlanHeader], excluded: Sequence[str]) -> None:
    pending = [task for task in seen.in_flight if task.state is slurm.State.PENDING]
    own = {task.job_id.partition("_")[0]: headers[task.plan].launch.cluster.exclude for task in pending}
    for job_id, nodes in sorted(own.items()):  # Slurm replaces the list: what the cluster's yaml excludes stays in it
        slurm.exclude_nodes([job_id], [*filter(None, [nodes]), *excluded])


# --- what, how many -------------------------------------------------------------------------------------------------------


def _limits(folder: SweepFolder, cluster: ClusterSpec, *, fresh: bool) -> slurm.Limits:
    """The cluster's limits; the running sweep believes what was read some minutes ago, since each reading is several requests."""
    path = folder.plan / "limits.json"
    known: slurm.Limits | None = None
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # nothing is lost with it
        content = json.loads(checked_file(path).read_text())
        known = slurm.Limits(**{**content, "notes": tuple(content["notes"])})
        if not fresh and filesystem_now(folder.plan) - path.stat().st_mtime < LIMITS_SECONDS:
            return known
    try:
        limits = slurm.read_limits(cluster.account, cluster.qos, cluster.partition)
    except slurm.CommandMissing:
        if known is None:
            raise
        return known  # a node without scontrol believes what the launch command read
    with contextlib.suppress(IsADirectoryError):  # then they are asked for each time
        write_text(path, json.dumps(asdict(limits)), durable=False)
    return limits


def _queued(seen: Observation) -> int:
    # Nothing of this sweep was open, so nobody has asked for the queue yet: other jobs of the user count too.
    queued = seen.queued or slurm.queue()
    return sum(task.state.is_active for task in queued)


def _groups(folder: SweepFolder, waiting: Sequence[Waiting], headers: Mapping[str, PlanHeader]) -> list[_Group]:
    budgeted = any(headers[plan].launch.gpu_hours is not None for plan, _ in waiting)
    # Only a budget needs to know: past rows say it best, and cost a reading of them.
    predict = Predictor.from_tables(sweep_folders(folder.path.parent)).minutes if budgeted else predicted_minutes
    known: dict[str | None, int | None] = {}
    by_class: dict[tuple[str, Resources], list[int]] = {}
    minutes: dict[Waiting, float] = {}
    for plan in dict.fromkeys(plan for plan, _ in waiting):
        samples, sizes = shard_samples(folder.plan / plan), shard_sizes(folder.plan / plan)
        longest = _longest(headers[plan].launch.cluster.partition, known)
        for _, shard_id in (shard for shard in waiting if shard[0] == plan):
            needs = headers[plan].launch.cluster.resources(samples[shard_id].trial.model.resources)
            needs = replace(needs, minutes=min(needs.minutes, longest)) if longest is not None else needs
            by_class.setdefault((plan, needs), []).append(shard_id)
            minutes[plan, shard_id] = predict(samples[shard_id]) * sizes[shard_id]
    return [_group(plan, needs, ids, headers[plan].launch.cluster.workers(needs), minutes) for (plan, needs), ids in by_class.items()]


def _group(plan: str, needs: Resources, ids: Sequence[int], workers: int, minutes: Mapping[Waiting, float]) -> _Group:
    tasks = tuple(tuple(ids[i : i + workers]) for i in range(0, len(ids), workers))
    seconds = tuple(60 * sum(minutes[plan, shard_id] for shard_id in task) for task in tasks)
    return _Group(plan=plan, resources=needs, workers=workers, tasks=tasks, seconds=seconds)


def _longest(partition: str | None, known: dict[str | None, int | None]) -> int | None:
    """The partition's time limit in minutes, asked once; None if it has none or is not there (then sbatch says so)."""
    if partition not in known:
        try:
            known[partition] = slurm.partition_limits(partition).max_minutes
        except slurm.CommandMissing:
            known[partition] = None  # a node without scontrol
        except slurm.SlurmUnavailable:
            raise
        except SlurmError:
            known[partition] = None
    return known[partition]


def _first(groups: Iterable[_Group], places: int) -> list[_Group]:
    """The first `places` tasks."""
    chosen = []
    for group in groups:
        if places > 0:
            chosen.append(replace(group, tasks=group.tasks[:places], seconds=group.seconds[:places]))
            places -= len(group.tasks)
    return chosen


def _within_budget(folder: SweepFolder, groups: list[_Group], seen: Observation, newest: PlanHeader) -> tuple[list[_Group], bool]:
    """Those tasks that the budget has room for; True if it stopped any."""
    hours = newest.launch.gpu_hours
    if hours is None:
        return groups, False
    left = budget.remaining(hours, [heard.record for heard in seen.records], _reserved(seen), spent_by_job(seen.submissions))
    chosen, stopped = [], False
    for group in groups:
        if group.resources.gpus == 0:
            chosen.append(group)
            continue
        granted: list[float] = []
        for seconds in group.seconds:
            if left <= 0:
                stopped = True
                break
            granted.append(min(left, budget.allotment(seconds * group.resources.gpus)))
            left -= granted[-1]
        if granted:
            count = len(granted)
            chosen.append(replace(group, tasks=group.tasks[:count], seconds=group.seconds[:count], granted=tuple(granted)))
    return chosen, stopped


def _reserved(seen: Observation) -> dict[str, float]:
    """What tasks in flight may use of the budget, by job."""
    by_path = {submission.path: submission for submission in seen.submissions}
    reserved = {}
    for task in seen.in_flight:
        granted = by_path[task.submission].arrays[task.array].gpu_seconds
        if granted:
            reserved[task.job_id] = granted[task.index]
    return reserved


def _arrays(group: _Group, size: int) -> list[SubmittedArray]:
    return [
        SubmittedArray(
            job_name="",
            plan=group.plan,
            tasks=group.tasks[i : i + size],
            resources=group.resources,
            workers=group.workers,
            gpu_seconds=group.granted[i : i + size],
        )
        for i in range(0, len(group.tasks), size)
    ]


# --- sbatch ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Refusals:
    """no_room: Slurm has none now, or fell silent.  for_good: words of arrays that it would never take."""

    no_room: str | None = None
    for_good: tuple[str, ...] = ()


def _submit(
    folder: SweepFolder, submission: Submission, headers: Mapping[str, PlanHeader], excluded: Sequence[str]
) -> tuple[Submission, _Refusals]:
    """sbatch every array of a declared submission.

    One that is refused for what it asks for is given up, and the others go on; where there is no room the rest waits again.
    Where Slurm falls silent it is not known whether the last array was taken: it stays an intent, and whoever settles next asks.
    Raises what was refused if nothing at all was accepted.
    """
    for_good: list[RefusedError] = []
    no_room: str | None = None
    index = 0
    while index < len(submission.arrays):
        array = submission.arrays[index]
        try:
            number = _submit_patiently(folder, submission, index, headers[array.plan], excluded)
        except NoRoomError as error:
            if index > 0 or len(array.tasks) == 1:
                no_room = str(error)
                break
            submission = submission.halved(index)  # limits that were read may be filled by others: half of it may still fit
            continue
        except RefusedError as error:
            for_good.append(error)
            submission = submission.with_array(index, replace(array, abandoned=True))
        except slurm.SlurmUnavailable as error:
            if index == 0:
                raise
            return submission, _Refusals(no_room=str(error), for_good=tuple(map(str, for_good)))
        except SlurmError as error:
            submission = submission.abandon()
            if index == 0:
                raise
            return submission, _Refusals(no_room=str(error), for_good=tuple(map(str, for_good)))
        else:
            check_held(folder.plan / "launch.lock")  # else another launch has judged this intent meanwhile, and its word stands
            submission = submission.with_array(index, replace(array, array_job_id=number))
        index += 1
    if for_good and len(for_good) == len(submission.arrays):
        raise for_good[0]
    return submission.abandon() if no_room else submission, _Refusals(no_room=no_room, for_good=tuple(map(str, for_good)))


def _submit_patiently(folder: SweepFolder, submission: Submission, index: int, header: PlanHeader, excluded: Sequence[str]) -> int:
    """sbatch one array; where it is not clear whether Slurm has it, the queue is asked before it is tried again."""
    array = submission.arrays[index]
    for pause in (*BACK_OFF_SECONDS, None):
        check_held(folder.plan / "launch.lock")
        try:
            return sbatch.submit_array(folder, submission.path, index, array, header.launch, excluded)
        except RefusedError:
            raise
        except SlurmError:
            if (number := _find(array.job_name)) is not None:
                return number
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last pause is None")


def _find(job_name: str) -> int | None:
    return next((task.array_job_id for task in slurm.queue([job_name])), None)


def _ensure_collector(folder: SweepFolder, seen: Observation, submission: Submission, header: PlanHeader) -> str | None:
    """One collector waits for all arrays that may still run; says why if there is none.

    It is a convenience: workers that end, and the launch command, do the same work.
    """
    if not header.launch.cluster.submit_from_nodes:
        return "nodes may not submit (cluster.submit_from_nodes=false)"
    old = {task.job_id.partition("_")[0] for task in seen.in_flight}
    after = sorted({int(number) for number in old} | {a.array_job_id for a in submission.arrays if a.array_job_id is not None})
    try:
        for waiting in seen.collectors:
            if slurm.set_dependency(waiting.job_id, sbatch.afterany(after)):
                return None
        number = sbatch.submit_collector(folder, f"{job_prefix(folder)}{submission.path.stem[-8:]}-{COLLECTOR}", header.launch, after)
    except SlurmError as error:
        return str(error)
    replace(submission, collector=number).save()
    return None


def come_back(folder: SweepFolder, minutes: int) -> None:
    """Submit a collector that begins in some minutes; raises SlurmError if Slurm does not take it."""
    newest = list(read_headers(folder.plan).values())[-1]
    sbatch.submit_collector(folder, f"{job_prefix(folder)}later-{COLLECTOR}", newest.launch, begin_minutes=minutes)
