"""`quantsweep status SWEEP [--json]`: counts by state and by failure, from files and at most one squeue and one sacct call."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from quantsweep import slurm
from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.errors import ResultsError, SlurmError
from quantsweep.failures.nodes import find_broken
from quantsweep.launching import budget
from quantsweep.launching.refill import waiting_shards
from quantsweep.launching.submissions import spent_by_job
from quantsweep.launching.tasks import Observation, in_flight_trials, observe
from quantsweep.operations.launches import dropped_trials, held_trials, left_of
from quantsweep.operations.messages import status_text
from quantsweep.operations.time_left import Ended, Running, seconds_left
from quantsweep.planning.plan_files import plan_files, read_asked_tasks, read_header, read_headers, read_minutes, shard_trials
from quantsweep.storage.lock import lock_holder
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import WorkerRecord, read_records
from quantsweep.tables import order, records
from quantsweep.tables.effective import effective

SECONDS = ("load_seconds", "quantize_seconds", "evaluate_seconds", "write_seconds", "restore_seconds")
"""Columns that together say how long a trial kept its worker."""
RATE_SECONDS = 60.0
"""Over less than this nothing is said of a rate."""
RATE_WINDOW = timedelta(minutes=30)
"""The rate is that of the trials that ended within this time of the last one."""

QUEUED = frozenset({slurm.State.PENDING, slurm.State.REQUEUED, slurm.State.REQUEUE_HOLD, slurm.State.SPECIAL_EXIT})
"""States of a job that runs on no node."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the state of the sweep."""
    facts = sweep_status(find_sweep(arguments))
    print(json.dumps(facts, indent=2) if arguments.json else status_text(facts))
    return 0


def sweep_status(folder: SweepFolder) -> dict[str, Any]:
    """The facts: everything that was ever asked of this sweep, by state, failures by fingerprint, time used.

    A trial that is not done is running (its job runs, whether or not it is its turn), queued (in Slurm's queue), waiting (for room
    in it, or for a worker of this machine), unknown, failed, or held; the rest is left to launch.  Each is in one state alone, so
    that the states add up to `trials`; what was dropped is not among them.  `at_hand` are those that workers are at this moment,
    by their own records.
    """
    asked = read_asked_tasks(folder.plan)
    if not asked:
        raise ResultsError(f"{folder.path} has no plan yet: nothing was launched")
    done = records.read_done(folder.path)
    left = left_of(asked, done)
    seen, silence = _observe(folder)
    states = _states(folder, seen, left)
    rows = _attempts(folder)
    attempts = rows.to_pylist()
    idle = left - set().union(*states.values())
    held = held_trials(folder, idle)
    dropped = dropped_trials(held)
    asked = {trial_id: tasks for trial_id, tasks in asked.items() if trial_id not in dropped}
    left, idle = left - dropped, idle - dropped
    failed = [row for row in effective(folder.path, "trials", rows).to_pylist() if row["status"] == "failed" and row["trial_id"] in idle]
    holds = {trial_id: hold for trial_id, hold in held.items() if trial_id in idle - {row["trial_id"] for row in failed}}
    num_done = sum((trial_id, task) in done for trial_id, tasks in asked.items() for task in tasks)
    per_hour = _trials_per_hour(attempts)
    launch = lock_holder(folder.plan / "launch.lock")
    if launch is not None:  # on this machine: Slurm knows nothing of it
        here = _newest_plan(folder) & (idle - holds.keys() - {row["trial_id"] for row in failed})
        states["waiting"], idle = states["waiting"] | here, idle - here
    in_work = states["running"] | states["queued"] | states["waiting"]
    hours = next((h.launch.gpu_hours for h in reversed(read_headers(folder.plan).values()) if h.root == h.name), None)
    return {
        "sweep": folder.name,
        "trials": len(asked),
        "done": len(asked) - len(left),
        **{name: len(ids) for name, ids in states.items()},
        "at_hand": len({heard.record.trial_id for heard in seen.records if heard.is_alive} & left),
        "held": len(holds),
        "failed": len(failed),
        "to_launch": len(idle) - len(holds) - len(failed),
        "dropped": len(dropped),
        "launch": launch,
        "slurm": silence,
        "evaluations": sum(map(len, asked.values())),
        "evaluations_done": num_done,
        "retried": _retried(attempts, seen, {row["trial_id"] for row in failed}),
        "failures": _by_fingerprint(failed),
        "holds": [{"words": hold.words, "because": hold.because, "by": hold.by} for hold in dict.fromkeys(holds.values())],
        "excluded_nodes": sorted(find_broken(attempts, datetime.now(UTC))),
        "ended_jobs": dict(Counter(task.ended for task in seen.ended)),
        "jobs": dict(Counter(task.state.word for task in seen.in_flight)),
        "worker_hours": sum(heard.record.seconds for heard in seen.records) / 3600,
        "gpu_hours": budget.used((heard.record for heard in seen.records), spent_by_job(seen.submissions)) / 3600,
        "budget_gpu_hours": hours,
        "trials_per_hour": per_hour,
        "workers": sum(heard.is_alive for heard in seen.records),
        "minutes_left": _minutes_left(folder, in_work, [heard.record for heard in seen.records if heard.is_alive], attempts),
    }


def _observe(folder: SweepFolder) -> tuple[Observation, str | None]:
    """How the jobs stand; where Slurm does not answer, what it said, and nothing is concluded of the jobs."""
    try:
        return observe(folder), None
    except SlurmError as error:
        return Observation(submissions=(), tasks=(), records=tuple(read_records(folder)), queued=()), str(error)


def _newest_plan(folder: SweepFolder) -> set[str]:
    """Trials that the newest plan is to run, if that is on this machine."""
    newest = plan_files(folder.plan)[-1]
    return set(read_minutes(newest)) if read_header(newest).launch.cluster.kind == "local" else set()


def _minutes_left(
    folder: SweepFolder, in_work: Collection[str], workers: Sequence[WorkerRecord], attempts: Sequence[Mapping[str, Any]]
) -> float | None:
    """Minutes until all that is in work is done if as many workers go on as there are now; None if that cannot be told yet."""
    if not in_work or not workers:
        return None
    predicted: dict[str, float] = {}
    for path in plan_files(folder.plan):
        predicted |= {trial_id: minutes for trial_id, (_, minutes) in read_minutes(path).items()}
    now = time.time()
    at_hand = {record.trial_id: record for record in workers if record.trial_id in in_work}
    running = [
        Running(predicted[trial_id], max(0.0, now - (record.trial_started or now)), record.share)
        for trial_id, record in at_hand.items()
        if trial_id in predicted
    ]
    waiting = [predicted[trial_id] for trial_id in in_work if trial_id in predicted and trial_id not in at_hand]
    done = sorted((row for row in attempts if row["status"] == "done"), key=lambda row: row["finished_at"])
    ended = [Ended(predicted[row["trial_id"]], sum(row[name] or 0.0 for name in SECONDS)) for row in done if row["trial_id"] in predicted]
    left = seconds_left(waiting, running, ended, len(workers))
    return None if left is None else left / 60


def _states(folder: SweepFolder, seen: Observation, left: Collection[str]) -> dict[str, set[str]]:
    """Trials that are not done, by what their jobs do."""
    remaining = set(left)
    states: dict[str, set[str]] = {}
    for name in ("running", "queued", "unknown"):
        tasks = [task for task in seen.in_flight if _state_name(task.state) == name]
        states[name] = set(in_flight_trials(folder, tasks)) & remaining
        remaining -= states[name]
    by_plan: dict[str, list[int]] = {}
    for plan, shard_id in waiting_shards(folder, seen.submissions) if seen.submissions else ():
        by_plan.setdefault(plan, []).append(shard_id)
    states["waiting"] = set().union(*(shard_trials(folder.plan / plan, ids) for plan, ids in by_plan.items())) & remaining
    return states


def _state_name(state: slurm.State) -> str:
    if state is slurm.State.UNKNOWN:
        return "unknown"
    return "queued" if state in QUEUED else "running"


# --- attempts -------------------------------------------------------------------------------------------------------------


def _attempts(folder: SweepFolder) -> pa.Table:
    columns = [
        "trial_id",
        "status",
        "failure_class",
        "failure_message",
        "failure_fingerprint",
        "finished_at",
        "config",
        "host",
        "slurm_job",
        *order.COLUMNS,
        *SECONDS,
    ]
    return records.read_table(folder.path, "trials", columns)


def _retried(attempts: list[dict[str, Any]], seen: Observation, failed: Collection[str]) -> dict[str, int]:
    """Cause → trials that failed with it and have been, or will be, tried again; and jobs that came back after a requeue."""
    causes = {(row["trial_id"], row["failure_class"]) for row in attempts if row["status"] == "failed" and row["trial_id"] not in failed}
    counts = Counter(cause for _, cause in causes)
    requeued = sum(heard.record.restarts > 0 for heard in seen.records)
    return dict(counts.most_common()) | ({"requeued jobs": requeued} if requeued else {})


def _by_fingerprint(failed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts = Counter(row["failure_fingerprint"] for row in failed)
    first: Mapping[str, dict[str, Any]] = {row["failure_fingerprint"]: row for row in reversed(failed)}
    return [
        {
            "count": count,
            "fingerprint": fingerprint,
            "class": first[fingerprint]["failure_class"],
            "message": first[fingerprint]["failure_message"],
            "trial_id": first[fingerprint]["trial_id"],
        }
        for fingerprint, count in counts.most_common()
    ]


def _trials_per_hour(attempts: list[dict[str, Any]]) -> float:
    """Trials that were done in the last half hour; 0 where the last one is longer ago than that."""
    ends = sorted(row["finished_at"] for row in attempts if row["status"] == "done")
    if not ends or datetime.now(UTC) - ends[-1] > RATE_WINDOW:
        return 0.0
    recent = [end for end in ends if ends[-1] - end <= RATE_WINDOW]
    span = (recent[-1] - recent[0]).total_seconds()
    return (len(recent) - 1) / span * 3600 if span > RATE_SECONDS else 0.0
