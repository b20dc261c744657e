"""Evaluate a bundled model with lm-eval on the three tasks, in full, on CPU in fp32.

Standard errors come from the samples, not from lm-eval's bootstrap:

    accuracy       sqrt(p (1 - p) / (n - 1))
    bits per byte  a ratio of sums over documents, B = sum(b_i) / sum(n_i); by the delta method
                   sqrt(sum((b_i - B n_i)^2) * N / (N - 1)) / sum(n_i)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantsweep.mini import TASK_NAMES, TASKS_DIR, model_path


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean with its standard error over `n` examples."""

    value: float
    standard_error: float
    n: int


Samples = Mapping[str, Sequence[Mapping[str, Any]]]


def accuracy(correct: npt.NDArray[np.float64]) -> Estimate:
    """Mean of zeros and ones of shape (n,)."""
    p, n = float(correct.mean()), len(correct)
    return Estimate(value=p, standard_error=math.sqrt(p * (1 - p) / (n - 1)), n=n)


def ratio(numerators: npt.NDArray[np.float64], denominators: npt.NDArray[np.float64]) -> Estimate:
    """sum(numerators) / sum(denominators) of two arrays of shape (n,), with its delta-method error."""
    n, total = len(numerators), denominators.sum()
    value = numerators.sum() / total
    residuals = numerators - value * denominators
    error = math.sqrt((residuals**2).sum() * n / (n - 1)) / total
    return Estimate(value=float(value), standard_error=float(error), n=n)


def summarise(samples: Samples) -> dict[str, Estimate]:
    """The card's metrics of one model from lm-eval's samples."""
    cloze, continuation, ppl = (samples[name] for name in TASK_NAMES)
    log_likelihoods = np.array([s["bits_per_byte"][0] for s in ppl], dtype=np.float64)
    num_bytes = np.array([s["bits_per_byte"][1] for s in ppl], dtype=np.float64)
    repeated = [float(s["acc"]) for s in cloze if s["doc"]["repeated"]]
    fresh = [float(s["acc"]) for s in cloze if not s["doc"]["repeated"]]
    return {
        "bits_per_byte": ratio(-log_likelihoods / math.log(2), num_bytes),
        "cloze_acc": accuracy(np.array([float(s["acc"]) for s in cloze])),
        "cloze_acc_repeated": accuracy(np.array(repeated)),
        "cloze_acc_fresh": accuracy(np.array(fresh)),
        "continuation_acc": accuracy(np.array([float(s["acc"]) for s in continuation])),
        "continuation_acc_norm": accuracy(np.array([float(s["acc_norm"]) for s in continuation])),
    }


def run_lm_eval(name: str, limit: int | None = None, batch_size: int = 32) -> Samples:
    """lm-eval's samples of a bundled model on all three tasks; `limit` examples each, or all."""
    import lm_eval  # seconds to import, and only this function needs it
    from lm_eval.tasks import TaskManager

    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_path(name)), "dtype": "float32"},
        tasks=list(TASK_NAMES),
        task_manager=TaskManager(include_path=str(TASKS_DIR), include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        device="cpu",
        batch_size=batch_size,
        log_samples=True,
    )
    samples: Samples = result["samples"]
    return samples
