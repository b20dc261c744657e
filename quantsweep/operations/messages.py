"""What is said to people: the plan, the end of a run, a submission, a trial's rows, a sweep's state.

Pure functions from facts to text, so that the wording is in one place and can be tested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantsweep.planning.plan import Plan, skipped_summary
from quantsweep.words import about, count, rounded, time_unit

if TYPE_CHECKING:
    from quantsweep.crew.local import LocalSummary
    from quantsweep.launching.refill import SubmitSummary
    from quantsweep.trial.specs import Shard

MAX_REASONS = 5
MAX_MODELS = 6
MAX_VALUES = 12
UNKNOWN_WORDS = "(words not kept: launched by an older version)"
STATES = {
    "done": "done",
    "running": "in running jobs",
    "queued": "queued",
    "waiting": "waiting",
    "unknown": "unknown",
    "held": "held",
    "failed": "failed",
    "to_launch": "to launch",
}
"""States of trials, and how they are said: a job has many trials, and runs them one after another."""


def plan_text(plan: Plan, *, title: str, folder: Path, unseen: Iterable[str] = (), left_out: Iterable[str] = ()) -> str:
    """The plan as `quantsweep plan` and launches print it; `unseen`: what is to be said of architectures; `left_out`: of checkpoints."""
    counts = plan.counts()
    merged = f"{count(counts['duplicates'], 'duplicate')} merged, {counts['skipped']:,} skipped"
    left = f"in flight {counts['in_flight']:,}   to run {counts['to_run']:,} ({count(counts['evaluations_to_run'], 'evaluation')})"
    lines = [
        title,
        f"  results     {folder}",
        f"  trials      {counts['trials']:>9,}   = {count(counts['evaluations'], 'evaluation')} ({merged})",
        f"  done        {counts['done']:>9,}   {left}",
        *_what(plan),
    ]
    lines += [f"  changed     {change}" for change in plan.expansion.changes]
    reasons = skipped_summary(plan.expansion)
    lines += [f"  skipped     {reason}" for reason in reasons[:MAX_REASONS]]
    if len(reasons) > MAX_REASONS:
        lines.append(f"  skipped     … and {count(len(reasons) - MAX_REASONS, 'more reason')}")
    if plan.shards:
        lines.append(f"  shards      {counts['shards']:>9,}   {_where(plan)}")
        lines += _predicted(plan)
    if plan.unpinned:
        lines.append(
            f"  not pinned  {', '.join(plan.unpinned)}: run `quantsweep prewarm` with the same words, or give model.revision=… or a folder"
        )
    lines += [f"  unseen      {said}" for said in unseen]
    lines += [f"  left out    {said}" for said in left_out]
    if counts["to_run"] == 0:
        lines.append("  nothing left to run" if counts["in_flight"] == 0 else "  nothing to submit: the rest is in flight")
    return "\n".join(lines)


def _what(plan: Plan) -> list[str]:
    """The one trial in words, or the models of all of them."""
    trials = plan.expansion.trials
    if len(trials) == 1:
        return [f"  trial       {trials[0].trial.label}"]
    names = list(dict.fromkeys(planned.trial.model.name for planned in trials))
    more = f", … ({len(names)} in all)" if len(names) > MAX_MODELS else ""
    return [f"  models      {', '.join(names[:MAX_MODELS])}{more}"] if names else []


def _predicted(plan: Plan) -> list[str]:
    """How long it takes here; elsewhere the time of workers, or of GPUs where these are asked for; interval, basis and budget."""
    forecast = plan.forecast
    if forecast is None:
        return []
    bounds = (forecast.minutes, forecast.low, forecast.high)
    if plan.workers is not None:
        said, low, high = (about(minutes * 60 / min(plan.workers, len(plan.shards))) for minutes in bounds)
        text = f"about {said} ({low} to {high}; {forecast.basis})"
    else:
        is_gpu = plan.gpu_minutes > 0
        share = plan.gpu_minutes / sum(plan.minutes.values()) if is_gpu else 1.0  # GPUs of a worker, on the whole
        factor, unit = time_unit(forecast.minutes * share / 60)
        said, low, high = (rounded(minutes * share / 60 * factor) for minutes in bounds)
        text = f"{said:>9}   {'GPU' if is_gpu else 'worker'}-{unit} ({low} to {high}; {forecast.basis})"
    if plan.launch.gpu_hours is not None:
        text += f"   budget {plan.launch.gpu_hours:,.1f} GPU-hours"
    elif plan.gpu_minutes and plan.workers is None:
        text += "   budget none set"
    return [f"  predicted   {text}"]


def _where(plan: Plan) -> str:
    if plan.workers is None:
        return _classes(plan.shards)
    return f"on {count(min(plan.workers, len(plan.shards)), 'worker')} of this machine"


def _classes(shards: Iterable[Shard]) -> str:
    counts = Counter(shard.resources.name for shard in shards)
    return " · ".join(f"{name} × {number}" for name, number in counts.items())


def submitted_text(summary: SubmitSummary, *, sweep: str) -> str:
    """After a submission to Slurm."""
    numbers = ", ".join(map(str, summary.array_job_ids))
    lines = []
    if summary.shards:
        text = f"submitted {count(summary.shards, 'shard')} in {count(len(summary.array_job_ids), 'array')} ({numbers}). You can log out."
        lines.append(f"{text}   status: quantsweep status {sweep}")
    if summary.refusal is not None:
        lines.append(f"  Slurm said no: {summary.refusal}")
    lines += [f"  not submitted: {why}" for why in summary.refused]
    if summary.budget_spent:
        lines.append("  the budget has no room for the rest: raise budget.gpu_hours and launch again")
    elif summary.waiting:
        lines.append(
            f"  {count(summary.waiting, 'shard waits', 'shards wait')} for room in the queue ({_limits(summary)}): {_who_follows(summary)}"
        )
    if summary.excluded:
        lines.append(f"  not on {', '.join(summary.excluded)}: trial after trial failed there for the machine's fault")
    return "\n".join(lines) or "nothing to submit"


def _limits(summary: SubmitSummary) -> str:
    known = summary.limits
    if known is None:
        return "no limit is known"
    submit = known.max_submit_jobs or "none known"
    return f"MaxArraySize {known.max_array_size}, MaxJobCount {known.max_job_count}, MaxSubmitJobs {submit}"


def _who_follows(summary: SubmitSummary) -> str:
    if not summary.shards:
        return "the same command submits them later"
    if summary.collector is not None:
        return f"workers that end submit them, or the same command does (no collector: {summary.collector})"
    return "the running sweep submits them as room appears"


def local_text(summary: LocalSummary, *, sweep: str, folder: Path) -> str:
    """After a run on this machine."""
    rate = summary.evaluations / summary.seconds if summary.seconds else 0.0
    text = f"{count(summary.done, 'trial')} done, {summary.failed} failed, {count(summary.evaluations, 'evaluation')}"
    text += f" in {summary.seconds:.0f} s ({rate:.1f} a second).   results: {folder}"
    if summary.held:
        held = count(summary.held, "trial is", "trials are")
        text += f"\n  {held} held: many others failed in one place before (quantsweep status {sweep})"
    if summary.superseded:
        text += f"\n  {count(summary.superseded, 'trial was', 'trials were')} left alone: a newer launch or a rerun has them (superseded)"
    if summary.budget_spent:
        text += "\n  the budget is spent; raise budget.gpu_hours and launch again"
    if summary.interrupted:
        text += "\n  interrupted; every finished task is kept. The same command goes on from here"
    if summary.failed:
        text += f"\n  why they failed: quantsweep status {sweep}; the same command tries them again"
    return text


def status_text(status: Mapping[str, Any]) -> str:
    """The state of a sweep, from the facts that `quantsweep status --json` prints."""
    counts = "   ".join(f"{words} {status[key]:,}" for key, words in STATES.items() if status[key] or key == "done")
    lines = [
        f"{status['sweep']}",
        f"  trials      {status['trials']:>9,}   {counts}",
        f"  evaluations {status['evaluations']:>9,}   done {status['evaluations_done']:,}",
    ]
    if status["at_hand"]:
        lines.append(f"  at hand     {status['at_hand']:>9,}   being run at this moment")
    if status["launch"]:
        lines.append(f"  launch      {status['launch']} is at work on it")
    if status["slurm"]:
        lines.append(f"  Slurm       {status['slurm']}")
    if status["ended_jobs"]:
        words = " · ".join(f"{word} {number:,}" for word, number in status["ended_jobs"].items())
        lines.append(
            f"  ended jobs  {words}: a worker that ends, the collector or the next launch looks after them (their output: logs/slurm/)"
        )
    if status["retried"]:
        lines.append("  tried again " + " · ".join(f"{name} {number:,}" for name, number in status["retried"].items()))
    lines += [line for failure in status["failures"] for line in _failure_lines(failure, status["sweep"])]
    lines += [f"  held        {hold['words']}: {hold['because']}" for hold in status["holds"]]
    if status["excluded_nodes"]:
        lines.append(f"  not used    {', '.join(status['excluded_nodes'])}: trial after trial failed there for the machine's fault")
    if status["evaluations_done"]:
        lines.append(f"  used        {_used(status)}")
    if status["minutes_left"] is not None:
        rate = f" ({status['trials_per_hour']:,.0f} trials an hour lately)" if status["trials_per_hour"] else ""
        workers = count(status["workers"], "worker goes", "workers go")
        lines.append(f"  left        about {about(status['minutes_left'] * 60)}, if {workers} on{rate}")
    if status["unknown"]:
        lines.append("  unknown: Slurm knows nothing of their jobs, and their workers are silent; they are held for a while.")
        lines.append("           If you have looked and they are gone: launch again with assume_dead=true")
    if status["dropped"]:
        lines.append(f"  dropped     {status['dropped']:>9,}   asked for once, and no longer; a launch that asks again brings them back")
    if (status["to_launch"] or status["failed"] or status["held"]) and not status["launch"]:
        lines.append(f"  what is missing, failed or held runs with the launch command, or: quantsweep resume {status['sweep']}")
    return "\n".join(lines)


def sweeps_text(sweeps: Sequence[Mapping[str, Any]], results_dir: str) -> str:
    """One line a sweep, from the facts that `quantsweep list --json` prints."""
    if not sweeps:
        return f"no sweep in {results_dir} yet; launch one: python launch.py -m +sweeps=quickstart"
    rows = [
        (
            facts["sweep"],
            "unreadable" if facts["problem"] else f"{facts['done']:,}/{facts['trials']:,}",
            _when(facts["launched"]),
            facts["problem"] or facts["typed"] or UNKNOWN_WORDS,
        )
        for facts in sweeps
    ]
    header = ("sweep", "done", "launched", "last words")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(3)]
    return "\n".join("  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3])) for row in (header, *rows))


def show_text(facts: Mapping[str, Any]) -> str:
    """What a sweep asked, from the facts that `quantsweep show --json` prints."""
    lines = [f"{facts['sweep']}   {facts['folder']}"]
    for launch in facts["launches"]:
        lines.append(
            f"  {_when(launch['launched'])}   {launch['done']:,} of {count(launch['trials'], 'trial')} done   in {launch['folder'] or '?'}"
        )
        lines.append(f"    {launch['typed'] or UNKNOWN_WORDS}")
    width = max(map(len, facts["values"]), default=0)
    for column, values in facts["values"].items():
        if values:
            shown = ", ".join(map(str, values[:MAX_VALUES])) + (f", … ({len(values)} in all)" if len(values) > MAX_VALUES else "")
            lines.append(f"  {column:<{width}}  {shown}")
    lines.append(f"  the same again: quantsweep resume {facts['sweep']}")
    return "\n".join(lines)


def said_once(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for what failed, (reason, label) each: a reason that several share is said once, with how many, the most frequent first."""
    labels: dict[str, list[str]] = {}
    for reason, label in reasons:
        labels.setdefault(reason, []).append(label)
    by_count = sorted(labels.items(), key=lambda item: -len(item[1]))
    lines = [f"failed: {names[0]}{_and_others(len(names) - 1)}: {reason}" for reason, names in by_count[:MAX_REASONS]]
    if len(by_count) > MAX_REASONS:
        lines.append(f"failed: … and {count(sum(len(names) for _, names in by_count[MAX_REASONS:]), 'more', 'more')} for other reasons")
    return lines


def _and_others(number: int) -> str:
    return f" and {count(number, 'other')}" if number else ""


def _when(moment: str | None) -> str:
    """A moment in this machine's time, as one reads it."""
    return "never" if moment is None else f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M}"


def _failure_lines(failure: Mapping[str, Any], sweep: str) -> list[str]:
    return [
        f"  failed      {failure['count']:>9,}   {failure['class']} [{failure['fingerprint']}]: {failure['message']}",
        f"                          quantsweep logs {failure['trial_id']} --sweep {sweep}",
    ]


def _used(status: Mapping[str, Any]) -> str:
    used = _time(status["worker_hours"], "worker")
    if status["budget_gpu_hours"]:
        return f"{status['gpu_hours']:,.2f} of {status['budget_gpu_hours']:,.1f} GPU-hours   {used}"
    return f"{_time(status['gpu_hours'], 'GPU')}   {used}" if status["gpu_hours"] else used


def _time(hours: float, kind: str) -> str:
    factor, unit = time_unit(hours)
    return f"{hours * factor:,.2f} {kind}-{unit}"
