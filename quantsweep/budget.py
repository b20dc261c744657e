"""GPU-hours as a limit: what was used, what is left, and what one job may use of it.

    used      = Σ over all workers that ever were: GPUs × seconds since they began      (their records)
    left      = budget − used − what jobs in flight may still use
    allotment = what a new job may use: FACTOR × its prediction + START_SECONDS, at most what is left

A worker looks at its job's allotment before each trial and ends when it is used up, so all workers
together pass the budget by at most one trial each, without talking to each other.  What a job does not
use is handed out again by the next round of submitting.  Workers without a GPU use nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantsweep.workers import WorkerRecord

FACTOR = 3.0
"""A prediction may be wrong by this much before a job is cut short."""
START_SECONDS = 300.0
"""For imports and loading the model."""


def used(records: Iterable[WorkerRecord]) -> float:
    """GPU-seconds of all workers."""
    return sum(record.gpus * record.seconds for record in records)


def remaining(gpu_hours: float, records: Iterable[WorkerRecord], reserved: Mapping[str, float]) -> float:
    """GPU-seconds that may still be handed out.  reserved: job → the allotment of a job in flight."""
    everything = list(records)
    by_job: dict[str, float] = {}
    for record in everything:
        if record.job in reserved:
            by_job[str(record.job)] = by_job.get(str(record.job), 0.0) + record.gpus * record.seconds
    still = sum(max(0.0, granted - by_job.get(job, 0.0)) for job, granted in reserved.items())
    return gpu_hours * 3600 - used(everything) - still


def allotment(predicted_gpu_seconds: float) -> float:
    """GPU-seconds that a job of that prediction asks for."""
    return FACTOR * predicted_gpu_seconds + START_SECONDS
