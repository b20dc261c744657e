"""GPU-hours as a limit: what was used, what is left, and what one job may use of it.

    used      = Σ over all jobs that ever were: GPUs × seconds, by their workers' records or by Slurm, whichever says more
    left      = budget − used − what jobs in flight may still use
    allotment = what a new job may use: FACTOR × its prediction + START_SECONDS, at most what is left

A worker looks at its job's allotment before each trial and ends when it is used up, so all workers
together pass the budget by at most one trial each, without talking to each other.  What a job does not
use is handed out again by the next round of submitting.  Workers without a GPU use nothing of it.
A job occupies its GPUs from its first setup line on; its workers' records begin later, and one that hung before is in none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantsweep.storage.workers import WorkerRecord

FACTOR = 3.0
"""A prediction may be wrong by this much before a job is cut short."""
START_SECONDS = 300.0
"""For imports and loading the model."""


def used(records: Iterable[WorkerRecord], spent: Mapping[str, float] | None = None) -> float:
    """GPU-seconds of all workers and jobs.  spent: job → what Slurm says of one that has ended."""
    by_job = _by_job(records)
    return sum(by_job.values()) + sum(max(0.0, seconds - by_job.get(job, 0.0)) for job, seconds in (spent or {}).items())


def remaining(
    gpu_hours: float, records: Iterable[WorkerRecord], reserved: Mapping[str, float], spent: Mapping[str, float] | None = None
) -> float:
    """GPU-seconds that may still be handed out.  reserved: job → the allotment of a job in flight.  spent: as for `used`."""
    everything = list(records)
    by_job = _by_job(everything)
    still = sum(max(0.0, granted - by_job.get(job, 0.0)) for job, granted in reserved.items())
    return gpu_hours * 3600 - used(everything, spent) - still


def _by_job(records: Iterable[WorkerRecord]) -> dict[str | None, float]:
    found: dict[str | None, float] = {}
    for record in records:
        found[record.job] = found.get(record.job, 0.0) + record.gpus * record.seconds
    return found


def allotment(predicted_gpu_seconds: float) -> float:
    """GPU-seconds that a job of that prediction asks for."""
    return FACTOR * predicted_gpu_seconds + START_SECONDS
