"""What one evaluation (one trial on one task) comes to: values, their uncertainty, and what they were measured on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricValue:
    """One metric of one evaluation.

    name: lm-eval's name (`acc`, `acc_norm`, `perplexity`, `bits_per_byte`, …).
    value: as lm-eval aggregates it; NaN and inf are values too.
    stderr: standard error over the examples (see `statistics.py`); NaN where no formula applies.
    """

    name: str
    value: float
    stderr: float
    higher_is_better: bool
    is_primary: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Outcomes by example, in the order of the task's documents; what paired tests need.

    correct, correct_norm: whether `acc` and `acc_norm` count the example as right; None where the task has no such metric,
    and for an example whose log-likelihoods cannot be compared (NaN).
    loglikelihood: natural logarithm of the probability of the gold answer (the best one, if several
    are right), of the whole document for a rolling task, or of a window's targets; rounded to float32.
    num_bytes: UTF-8 bytes of the document, for rolling tasks.
    """

    correct: list[bool | None] | None
    correct_norm: list[bool | None] | None
    loglikelihood: list[float]
    num_bytes: list[int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """The outcome of one evaluation.

    num_samples: documents.  requests_hash: hash of the rendered requests and their gold answers; two
    evaluations can be paired when theirs are equal.  data_revision: "sha256:…" of local data files,
    "hub:<commit>", or None when it cannot be known.  task_version: as the loaded task states it.
    window: tokens of one window of a rolling task or a perplexity; None for other tasks.
    num_tokens: tokens that were scored; num_input_tokens: tokens that went through the model.
    num_truncated: texts that were longer than the model's context and lost their beginning.
    num_nonfinite: requests whose log-likelihood is NaN or infinite; where one that an accuracy
    compares is NaN, that accuracy is NaN (lm-eval would take the first NaN for the best answer).
    batch_size: sequences a batch, after any halving for lack of memory.
    seconds: time of scoring and aggregation; without loading and tokenizing, which all trials of a model share.
    """

    metrics: tuple[MetricValue, ...]
    num_samples: int
    samples: Samples
    requests_hash: str
    data_revision: str | None
    lm_eval_version: str | None
    task_version: str
    window: int | None
    num_tokens: int
    num_input_tokens: int
    num_truncated: int
    num_nonfinite: int
    batch_size: int
    seconds: float

    @property
    def primary(self) -> MetricValue:
        """The headline metric of the task."""
        return next(metric for metric in self.metrics if metric.is_primary)
