"""Perplexity as papers on quantization measure it: one long stream of tokens, in windows that know nothing of each other.

    joined_paragraphs    all documents joined by blank lines, tokenized once         GPTQ's WikiText-2 (test) and "old" PTB (validation)
    joined_spaces        all documents joined by spaces                              its PTB "new" (test)
    first_1100           the first 1,100 documents joined by spaces, 256 windows     its C4 "new"
    crops_256            256 random crops of documents, seed 0                       its "old" C4

    ppl = exp( Σ_windows T · mean(cross-entropy of the T−1 targets) / (n · T) )      n windows of T tokens, what is left at the end dropped

A window's first token is given and never scored, so a window has T−1 targets; its mean counts T times in the sum and in what the sum is
divided by, which is the plain mean of the windows' means.  The tokenizer puts its start token where it does by itself: once before the
stream (before each document for crops), and no window gets another.  T is 2,048, or the model's whole context where that is shorter.
Source: IST-DASLab/gptq, datautils.py, opt.py.  Different here: the softmax is in float32 whatever the compute dtype.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quantsweep.errors import EvaluationError, TextError
from quantsweep.evaluation.results import MetricValue, Samples, TaskResult
from quantsweep.evaluation.scoring import Batch, Plan, Scorer, halving
from quantsweep.evaluation.statistics import standard_error
from quantsweep.models.loading import LoadedModel
from quantsweep.tasks.progress import OnProgress
from quantsweep.texts.cuts import Encode, Tokens, crops_of_documents, join, windows
from quantsweep.texts.documents import data_revision, read_documents
from quantsweep.trial.specs import TaskSpec

Floats = npt.NDArray[np.float64]

WINDOW = 2048
MOST_WINDOWS = 256
"""Windows of the protocols that C4 is measured under."""
FIRST_DOCUMENTS = 1100
CROP_SEED = 0

_BATCH_TOKENS = {"cpu": 2_048}
_BATCH_TOKENS_GPU = 16_384
"""Tokens a batch where the user gives no batch size: logits of each are computed."""

PROTOCOLS: Mapping[str, Callable[[pa.ChunkedArray, Encode, int], Tokens]] = {
    "joined_paragraphs": lambda documents, encode, window: windows(join(documents, "\n\n", encode), window),
    "joined_spaces": lambda documents, encode, window: windows(join(documents, " ", encode), window),
    "first_1100": lambda documents, encode, window: windows(
        join(documents.slice(0, FIRST_DOCUMENTS), " ", encode)[: MOST_WINDOWS * window], window
    ),
    "crops_256": lambda documents, encode, window: crops_of_documents(documents, encode, MOST_WINDOWS, window, CROP_SEED),
}
"""From documents to N × T windows."""


@dataclass(eq=False, slots=True)
class Perplexity:
    """A text in windows (windows_NT: tokens), made once for a model and measured after each of its trials.

    batch_size: sequences a batch; halved, and kept so, where memory runs out.
    """

    spec: TaskSpec
    windows_NT: Tokens
    plan: Plan
    revision: str
    batch_size: int
    _batches: list[Batch] = field(default_factory=list)

    @classmethod
    def of(cls, spec: TaskSpec, loaded: LoadedModel, batch_size: int | None, on_progress: OnProgress) -> Perplexity:
        """Read and tokenize the text of a task.

        Raises EvaluationError where it cannot be had, has no window's worth of tokens, or the model cannot read them.
        """
        window = _window(spec, loaded)

        def encode(text: str) -> list[int]:
            on_progress()
            return list(loaded.tokenizer(text, verbose=False).input_ids)

        try:
            found = PROTOCOLS[str(spec.protocol)](read_documents(spec), encode, window)
        except TextError as error:
            raise TextError(f"task {spec.name}: {error}") from error
        if not len(found):
            raise TextError(f"task {spec.name}: {spec.text_source} has fewer tokens than one window of {window:,}; give more text")
        windows_NT = found[: spec.limit]
        if (largest := int(windows_NT.max())) >= loaded.num_embeddings:
            raise EvaluationError(
                f"task {spec.name}: the tokenizer of model {loaded.spec.name} gives token {largest}, and its embedding has "
                f"{loaded.num_embeddings}: they do not belong together"
            )
        spans = [([tokens[0]], tokens[1:]) for tokens in windows_NT.tolist()]
        usual = max(1, _BATCH_TOKENS.get(loaded.model.device.type, _BATCH_TOKENS_GPU) // window)
        return cls(spec, windows_NT, Plan.of(spans, window), data_revision(spec), batch_size or usual)

    def texts(self, loaded: LoadedModel) -> list[str]:
        """The text of each window."""
        return list(loaded.tokenizer.batch_decode(self.windows_NT))

    def evaluate(self, scorer: Scorer) -> TaskResult:
        """Measure the model with the weights that it has now."""
        started = time.perf_counter()

        def attempt(batch_size: int) -> Floats:
            if batch_size != self.batch_size or not self._batches:
                self.batch_size, self._batches = batch_size, self.plan.batches(batch_size)
            return scorer.score(self._batches, self.plan.num_spans, with_greedy=False)[0]

        loglikelihoods, _ = halving(attempt, self.batch_size)
        num_windows, window = self.windows_NT.shape
        return TaskResult(
            metrics=metrics_of(loglikelihoods / (window - 1), self.spec.primary_metric),
            num_samples=num_windows,
            samples=Samples(correct=None, correct_norm=None, loglikelihood=loglikelihoods.tolist(), num_bytes=None),
            requests_hash=hashlib.sha256(f"{self.windows_NT.shape}".encode() + self.windows_NT.astype("<i8").tobytes()).hexdigest()[:32],
            data_revision=self.revision,
            lm_eval_version=None,
            task_version=self.spec.version,
            window=window,
            num_tokens=self.plan.num_scored_tokens,
            num_input_tokens=self.plan.num_input_tokens,
            num_truncated=0,
            num_nonfinite=int((~np.isfinite(loglikelihoods)).sum()),
            batch_size=self.batch_size,
            seconds=time.perf_counter() - started,
        )


def metrics_of(mean_N: Floats, primary: str) -> tuple[MetricValue, ...]:
    """Perplexity, and cross-entropy in nats a target, of the windows' mean log-likelihoods; their errors take windows for independent.

    >>> [metric.value for metric in metrics_of(np.log([0.5, 0.125]), "perplexity")]
    [4.0, 1.3862943611198906]
    """
    with np.errstate(all="ignore"):  # NaN and infinity are results, not accidents
        cross_entropy = -float(mean_N.mean())
        perplexity = float(np.exp(cross_entropy))
    found = (("perplexity", perplexity, "perplexity"), ("cross_entropy", cross_entropy, "mean"))
    return tuple(
        MetricValue(
            name=name,
            value=value,
            stderr=standard_error(aggregation, mean_N.tolist(), value),
            higher_is_better=False,
            is_primary=name == primary,
        )
        for name, value, aggregation in found
    )


def _window(spec: TaskSpec, loaded: LoadedModel) -> int:
    context = loaded.max_length
    if spec.window is not None and spec.window > context:
        raise EvaluationError(
            f"task {spec.name}: windows of {spec.window} tokens were asked for, and the context of {loaded.spec.name} has {context}"
        )
    return spec.window or min(WINDOW, context)
