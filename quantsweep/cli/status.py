"""`quantsweep status SWEEP [--json]`: counts by state and by failure, from files and at most one call to Slurm."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import pyarrow.compute as pc

from quantsweep import records, slurm
from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.errors import ResultsError
from quantsweep.launching.lock import lock_holder
from quantsweep.launching.submissions import FlyingTask, flying_tasks, in_flight_trials
from quantsweep.messages import status_text
from quantsweep.paths import SweepFolder
from quantsweep.plan import read_asked, remaining_tasks


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
    """The facts: everything that was ever asked of this sweep, by state, failures by fingerprint, time used."""
    asked = read_asked(folder.plan)
    if not asked:
        raise ResultsError(f"{folder.path} has no plan yet: nothing was launched")
    done = records.read_done(folder.path)
    left = {p.trial.trial_id for p in asked if remaining_tasks(p, done).tasks}
    flying = flying_tasks(folder)
    running = in_flight_trials(folder, (t for t in flying if t.state is not slurm.State.PENDING)) & left
    waiting = (in_flight_trials(folder, (t for t in flying if t.state is slurm.State.PENDING)) & left) - running
    failed = _failed(folder, left - running - waiting)
    used = _worker_seconds(folder)
    num_done = sum((p.trial.trial_id, t.task_key) in done for p in asked for t in p.tasks)
    return {
        "sweep": folder.name,
        "trials": len(asked),
        "done": len(asked) - len(left),
        "running": len(running),
        "launch": lock_holder(folder.plan / "launch.lock"),
        "waiting": len(waiting),
        "failed": len(failed),
        "to_launch": len(left - running - waiting),
        "evaluations": sum(len(p.tasks) for p in asked),
        "evaluations_done": num_done,
        "failures": _by_fingerprint(failed),
        "jobs": _by_state(flying),
        "worker_hours": used / 3600,
        "evaluations_per_hour": num_done / used * 3600 if used else 0.0,
    }


def _failed(folder: SweepFolder, trial_ids: set[str]) -> list[dict[str, Any]]:
    """Latest attempts that failed, of trials that are neither done nor in flight."""
    columns = ["trial_id", "status", "failure_class", "failure_message", "failure_fingerprint", "finished_at", "attempt"]
    rows = records.latest(records.read_table(folder.path, "trials", columns), ("trial_id",)).to_pylist()
    return [row for row in rows if row["status"] == "failed" and row["trial_id"] in trial_ids]


def _by_fingerprint(failed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts = Counter(row["failure_fingerprint"] for row in failed)
    first = {row["failure_fingerprint"]: row for row in reversed(failed)}
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


def _by_state(flying: list[FlyingTask]) -> dict[str, int]:
    return dict(Counter(task.state.word for task in flying))


def _worker_seconds(folder: SweepFolder) -> float:
    columns = ["load_seconds", "quantize_seconds", "evaluate_seconds", "write_seconds", "restore_seconds"]
    rows = records.read_table(folder.path, "trials", columns)
    return float(sum(pc.sum(rows.column(name)).as_py() or 0.0 for name in columns))
