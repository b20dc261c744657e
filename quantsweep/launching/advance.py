"""One step of a running sweep: write down what ended, plan what may be tried again, submit what waits.

    settle → retry plan → submit waiting shards (→ a collector that comes after them)

Three take this step, under the launch lock: the launch command, each worker that ends (not more often
than every PAUSE_SECONDS, and not if somebody else is at it), and the collector, a small job that Slurm
starts once all arrays have ended, however they ended.  Each of them may die in the middle: what is done is in
the tables, what is submitted is in the submissions, and the next one goes on from there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantsweep.errors import LockedError, QuantsweepError
from quantsweep.failures import breaker
from quantsweep.failures.holds import Hold, holding, read_holds
from quantsweep.failures.nodes import broken_nodes
from quantsweep.failures.retries import Verdict, decide
from quantsweep.launching.refill import SubmitSummary, submit_waiting
from quantsweep.launching.settle import NOT_BY_ITSELF, settle
from quantsweep.launching.submissions import read_submissions
from quantsweep.launching.tasks import Observation, in_flight_trials
from quantsweep.planning.plan import Expansion, Plan, remaining_tasks
from quantsweep.planning.plan_files import PlanHeader, count_assignments, read_headers, read_owned_tasks, read_shard_trials, write_plan
from quantsweep.planning.shards import cut
from quantsweep.slurm import State
from quantsweep.storage.files import filesystem_now
from quantsweep.storage.lock import check_not_lost, launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.tables.compaction import compact
from quantsweep.tables.forgetting import forgotten_since, read_forgotten
from quantsweep.trial.specs import PlannedTrial
from quantsweep.words import count

PAUSE_SECONDS = 30.0
"""Workers that end take the step at most this often: it costs Slurm a request or two."""
MANY_RUNNING = 2
"""Retries wait only while others run: where this worker is the last one, what is queued may not be able to begin."""
GATHER_SECONDS = 600.0
"""While queued tasks keep all running places busy, retries are planned at most this often: each plan makes shards of its own,
and each shard loads its model anew."""
COMPACT_FILES = 1_000
"""A step folds the small files of a running sweep once a table has so many."""
MAX_ASSIGNMENTS = 100
"""A trial that was submitted so often without leaving any row is left to a person."""


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """What one step did.  given_up: reason → trials that are not tried again by themselves."""

    retried: int = 0
    given_up: Mapping[str, int] = field(default_factory=dict)
    submitted: SubmitSummary = field(default_factory=SubmitSummary)
    in_flight: int = 0
    unknown: int = 0

    @property
    def is_stuck(self) -> bool:
        """True if something is left to do (shards wait for room, tasks are unknown), and no task of this sweep lives to go on with it."""
        waits = self.submitted.waiting > 0 and not self.submitted.budget_spent and not self.submitted.refused
        return not self.submitted.shards and not self.in_flight and (waits or self.unknown > 0)


def advance(folder: SweepFolder) -> StepSummary:
    """Take the step; raises LockedError if somebody else is at it, SlurmError if Slurm does not answer."""
    with launch_lock(folder.plan / "launch.lock", purpose="advance", wait_seconds=60.0):
        return step(folder)


def step(folder: SweepFolder) -> StepSummary:
    """The same for who holds the launch lock already."""
    seen = settle(folder)
    retried, given_up = plan_retries(folder, seen)
    submitted = submit_waiting(folder, seen)
    # What only its worker's record speaks for may have died since: somebody must come back and look.
    unknown = sum(task.state is State.UNKNOWN or task.is_hearsay for task in seen.in_flight)
    return StepSummary(retried=retried, given_up=given_up, submitted=submitted, in_flight=len(seen.in_flight) - unknown, unknown=unknown)


def advance_now_and_then(folder: SweepFolder) -> str:
    """For a worker that ends: take the step unless it was taken just now or somebody is at it; says what came of it."""
    stamp = folder.plan / ".advanced"
    try:
        if stamp.exists() and (rest := PAUSE_SECONDS - (filesystem_now(folder.plan) - stamp.stat().st_mtime)) > 0:
            if _has_collector(folder):
                return "the sweep was looked after just now"
            time.sleep(rest)  # nobody comes after this worker, perhaps
        stamp.touch()
        text = step_text(advance(folder))
        if len(list(folder.table("metrics").iterdir())) > COMPACT_FILES:
            compact(folder)
        return text
    except LockedError:
        return "somebody else is looking after the sweep"
    except (QuantsweepError, OSError) as error:
        return f"the sweep could not be looked after from here: {error}"


def _has_collector(folder: SweepFolder) -> bool:
    return any(submission.collector is not None for submission in read_submissions(folder) if not submission.closed)


def step_text(step: StepSummary) -> str:
    """A line for the log."""
    done = step.submitted
    text = f"planned {count(step.retried, 'trial')} again, submitted {count(done.shards, 'shard')}, {count(done.waiting, 'waits', 'wait')}"
    text += "".join(f"; {number} given up: {reason}" for reason, number in step.given_up.items())
    text += "".join(f"; not submitted: {why}" for why in done.refused)
    text += f"; no collector: {done.collector}" if done.collector else ""
    return text + (f"; then Slurm said no: {done.refusal}" if done.refusal else "")


# --- retries --------------------------------------------------------------------------------------------------------------


def plan_retries(folder: SweepFolder, seen: Observation) -> tuple[int, dict[str, int]]:
    """Write plans of trials whose jobs have ended without a result and that may be tried again; returns how many, and who was given up."""
    headers = read_headers(folder.plan)
    left = _left_behind(folder, seen, headers)
    if not left:
        return 0, {}
    causes = _causes(folder, headers)
    for root in {headers[plan].root for plan, _ in left}:
        breaker.check(folder, root, headers[root].launch.breaker_trials)
    if _can_wait(folder, seen, headers):
        return 0, {}
    holds = read_holds(folder)
    often = count_assignments(folder.plan)
    again: dict[str, list[PlannedTrial]] = {}
    given_up: Counter[str] = Counter()
    for plan, planned in left:
        trial_id, root = planned.trial.trial_id, headers[plan].root
        mine = [(name, cause) for name, cause in causes.get(trial_id, []) if headers[name].root == root]
        verdict = _verdict(planned, headers[plan], mine, holds)
        if often.get((trial_id, root), 0) - len(mine) >= MAX_ASSIGNMENTS:
            verdict = Verdict(resources=None, reason=f"submitted {MAX_ASSIGNMENTS} times without an end")
        if verdict.resources is None:
            given_up[verdict.reason] += 1
            continue
        model = replace(planned.trial.model, resources=verdict.resources)
        again.setdefault(root, []).append(replace(planned, trial=replace(planned.trial, model=model)))
    check_not_lost(folder.plan / "launch.lock")
    for root, trials in again.items():
        _write_retry(folder, headers[root], trials)
    return sum(map(len, again.values())), dict(given_up)


def _can_wait(folder: SweepFolder, seen: Observation, headers: Mapping[str, PlanHeader]) -> bool:
    """True while there is enough queued work and a plan was written lately (a launch's counts): a later step gathers into fuller shards.

    Not where a node has just proved broken: it may swallow the queue, and the next submission keeps what is queued off it.
    """
    states = Counter(task.state for task in seen.in_flight)
    if states[State.PENDING] <= states[State.RUNNING] or states[State.RUNNING] < MANY_RUNNING:
        return False
    newest = folder.plan / list(headers)[-1]
    known = {node for submission in seen.submissions[-1:] for node in submission.known_broken}
    return filesystem_now(folder.plan) - newest.stat().st_mtime < GATHER_SECONDS and broken_nodes(folder).keys() <= known


def _left_behind(folder: SweepFolder, seen: Observation, headers: Mapping[str, PlanHeader]) -> list[tuple[str, PlannedTrial]]:
    """(plan, trial with the tasks that are missing) of shards whose last job has ended, unless its end was wanted."""
    last = _last_words(seen)
    flying = in_flight_trials(folder, seen.in_flight)
    done = records.read_done(folder.path)
    roots = {header.root for header in headers.values()}
    # What somebody forgot on purpose comes back with the next launch, and its code; not by itself, with the old one.
    by_name = {root: forgotten_since(folder.path, folder.plan / root) for root in roots if (folder.plan / root).exists()}
    forgotten = read_forgotten(folder.path)
    shards: dict[str, set[int]] = {}
    mine: set[tuple[str, str]] = set()
    for trial_id, ((plan, shard_id), tasks) in read_owned_tasks(folder.plan).items():
        word = last.get((plan, shard_id))
        if word is None or word in NOT_BY_ITSELF or plan not in headers or trial_id in flying:
            continue
        header = headers[plan]
        missing = [task for task in tasks if (trial_id, task) not in done and not forgotten.covers(trial_id, task, header.launched)]
        if missing and trial_id not in by_name.get(header.root, ()):
            shards.setdefault(plan, set()).add(shard_id)
            mine.add((plan, trial_id))
    rest = (
        (plan, forgotten.still_asked(remaining_tasks(planned, done), headers[plan].launched))
        for plan, ids in shards.items()
        for planned in read_shard_trials(folder.plan / plan, ids)
        if (plan, planned.trial.trial_id) in mine  # an older plan's shard has trials that a newer plan took over
    )
    return [(plan, planned) for plan, planned in rest if planned.tasks]


def _last_words(seen: Observation) -> dict[tuple[str, int], str]:
    """(plan, shard) → how its task ended; the last one, if it was submitted more than once."""
    ended = {(task.submission, task.array, task.index): task.ended for task in seen.ended}
    words: dict[tuple[str, int], str] = {}
    for submission in seen.submissions:
        for number, array in enumerate(submission.arrays):
            for index, shard_ids in enumerate(array.tasks):
                word = array.ended.get(index) or ended.get((submission.path, number, index))
                for shard_id in shard_ids:
                    if word:
                        words[array.plan, shard_id] = word
                    elif not array.abandoned:
                        words.pop((array.plan, shard_id), None)  # submitted again since
    return words


def _causes(folder: SweepFolder, headers: Mapping[str, PlanHeader]) -> dict[str, list[tuple[str, str]]]:
    """Trial id → (plan, cause) of each failed attempt, once each."""
    columns = ["trial_id", "attempt", "plan", "status", "failure_class"]
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for row in records.read_table(folder.path, "trials", columns).to_pylist():
        if row["status"] == "failed" and row["plan"] in headers:
            found.setdefault(row["trial_id"], {})[row["attempt"]] = (row["plan"], row["failure_class"])
    return {trial_id: list(attempts.values()) for trial_id, attempts in found.items()}


def _verdict(planned: PlannedTrial, header: PlanHeader, causes: Sequence[tuple[str, str]], holds: Iterable[Hold]) -> Verdict:
    held = holding(holds, planned, header.root)
    if held is not None:
        return Verdict(resources=None, reason=f"held ({held.words}: {held.because})")
    return decide(
        (cause for _, cause in causes),
        (cause for plan, cause in causes if plan == header.name),
        planned.trial.model.resources,
        header.launch.cluster,
        header.launch.max_retries,
    )


def _write_retry(folder: SweepFolder, root: PlanHeader, trials: list[PlannedTrial]) -> Path:
    plan = Plan(
        sweep=root.sweep,
        expansion=Expansion(trials=tuple(trials), duplicates=0, skipped={}, candidates=len(trials)),
        done=frozenset(),
        in_flight=frozenset(),
        shards=cut(trials, max_minutes=root.launch.shard_minutes),
        settings=root.settings,
        launch=root.launch,
    )
    return write_plan(folder.plan, plan, root=root.name)
