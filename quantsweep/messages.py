"""What is said to people: the plan, the end of a run, a submission, a trial's rows, a sweep's state.

Pure functions from facts to text, so that the wording is in one place and can be tested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from quantsweep import records
from quantsweep.plan import Plan, skipped_summary

if TYPE_CHECKING:
    from quantsweep.launching.cluster import SubmitSummary
    from quantsweep.launching.local import LocalSummary
    from quantsweep.specs import Shard

MAX_REASONS = 5


def plan_text(plan: Plan, *, title: str, folder: Path) -> str:
    """The plan as `quantsweep plan` and every launch print it."""
    counts = plan.counts()
    merged = f"{counts['duplicates']:,} duplicates merged, {counts['skipped']:,} skipped"
    left = f"in flight {counts['in_flight']:,}   to run {counts['to_run']:,} ({counts['evaluations_to_run']:,} evaluations)"
    lines = [
        title,
        f"  results     {folder}",
        f"  trials      {counts['trials']:>9,}   = {counts['evaluations']:,} evaluations ({merged})",
        f"  done        {counts['done']:>9,}   {left}",
    ]
    reasons = skipped_summary(plan.expansion)
    lines += [f"  skipped     {reason}" for reason in reasons[:MAX_REASONS]]
    if len(reasons) > MAX_REASONS:
        lines.append(f"  skipped     … and {len(reasons) - MAX_REASONS} more reasons")
    if plan.shards:
        lines.append(f"  shards      {counts['shards']:>9,}   {_classes(plan.shards)}")
        lines.append(f"  predicted   {plan.predicted_hours():>9,.2f}   worker-hours (arithmetic on model sizes, not a measurement)")
    if plan.unpinned:
        lines.append(f"  not pinned  {', '.join(plan.unpinned)}: submitting needs model.revision=<40 hexadecimal digits> or a folder")
    if counts["to_run"] == 0:
        lines.append("  nothing left to run" if counts["in_flight"] == 0 else "  nothing to submit: the rest is in flight")
    return "\n".join(lines)


def _classes(shards: Iterable[Shard]) -> str:
    counts = Counter(shard.resources.name for shard in shards)
    return " · ".join(f"{name} × {count}" for name, count in counts.items())


def submitted_text(summary: SubmitSummary, *, sweep: str) -> str:
    """After a submission to Slurm."""
    known = summary.limits
    numbers = ", ".join(map(str, summary.array_job_ids))
    text = f"submitted {summary.shards} shards in {len(summary.array_job_ids)} arrays ({numbers}). You can log out."
    text += f"   status: quantsweep status {sweep}"
    submit = known.max_submit_jobs or "none known"
    limits = f"MaxArraySize {known.max_array_size}, MaxJobCount {known.max_job_count}, MaxSubmitJobs {submit}"
    if summary.refusal is not None:
        text += f"\n  then Slurm said no: {summary.refusal}"
    if summary.waiting:
        text += f"\n  {summary.waiting} shards wait for room in the queue ({limits}): the same command submits them later"
    return text


def local_text(summary: LocalSummary, *, sweep: str, folder: Path) -> str:
    """After a run on this machine."""
    rate = summary.evaluations / summary.seconds if summary.seconds else 0.0
    text = f"{summary.done} trials done, {summary.failed} failed, {summary.evaluations} evaluations in {summary.seconds:.0f} s"
    text += f" ({rate:.1f} a second).   results: {folder}"
    if summary.interrupted:
        text += "\n  interrupted; every finished task is kept. The same command goes on from here"
    if summary.failed:
        text += f"\n  why they failed: quantsweep status {sweep}; the same command tries them again"
    return text


def results_text(folder: Path, trial_ids: list[str]) -> str:
    """The rows of some trials as a table; what failed is said below it."""
    metrics = records.latest(_of(records.read_table(folder, "metrics"), trial_ids), ("trial_id", "task_key", "metric"))
    rows = metrics.select(["model", "task", "metric", "value", "stderr", "num_samples", "bits_per_weight"]).to_pylist()
    failed = [
        r
        for r in records.latest(_of(records.read_table(folder, "trials"), trial_ids), ("trial_id",)).to_pylist()
        if r["status"] == "failed"
    ]
    lines = table(
        ("model", "task", "metric", "value", "± stderr", "n", "bits a weight"),
        [
            (
                r["model"],
                r["task"],
                r["metric"],
                _number(r["value"]),
                _number(r["stderr"]),
                str(r["num_samples"]),
                f"{r['bits_per_weight']:.3f}",
            )
            for r in rows
        ],
    )
    lines += [f"failed: {r['label']}: {r['failure_class']}: {r['failure_message']}" for r in failed]
    return "\n".join(lines)


def _of(rows: Any, trial_ids: list[str]) -> Any:
    import pyarrow as pa

    return rows.filter(pc.is_in(rows.column("trial_id"), value_set=pa.array(trial_ids, pa.string())))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a plain text table; columns after the first three are numbers and stand to the right."""
    everything = [header, *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in everything
    ]


def status_text(status: Mapping[str, Any]) -> str:
    """The state of a sweep, from the facts that `quantsweep status --json` prints."""
    counts = "   ".join(f"{key.replace('_', ' ')} {status[key]:,}" for key in ("done", "running", "waiting", "failed", "to_launch"))
    lines = [
        f"{status['sweep']}",
        f"  trials      {status['trials']:>9,}   {counts}",
        f"  evaluations {status['evaluations']:>9,}   done {status['evaluations_done']:,}",
    ]
    if status["launch"]:
        lines.append(f"  launch      {status['launch']} is at work on it")
    for failure in status["failures"]:
        lines.append(f"  failed      {failure['count']:>9,}   {failure['class']} [{failure['fingerprint']}]: {failure['message']}")
        lines.append(f"                          quantsweep logs {failure['trial_id']} --sweep {status['sweep']}")
    if status["evaluations_done"]:
        used = f"{status['worker_hours']:.2f} worker-hours used"
        lines.append(f"  rate        {status['evaluations_per_hour']:>9,.0f}   evaluations an hour of worker time;   {used}")
    if status["to_launch"] and not status["launch"]:
        lines.append("  the launch command, typed again, runs what is missing or failed")
    return "\n".join(lines)
