"""Scores one loaded model on tasks, trial after trial, while its weights change in between.

    evaluator = Evaluator(loaded)
    for trial in shard:                    # quantize `loaded` …
        result = evaluator.evaluate(task)
        loaded.restore()

What does not depend on the weights is made once for each task and kept: the task's data, its rendered
requests, their tokens, and the batches.  In float32 the numbers are those of `lm_eval.simple_evaluate` on the same
model, task and limit: documents, prompts, filters, `process_results` and aggregation are lm-eval's
own.  Different are the standard errors (closed forms, see `statistics.py`; lm-eval would bootstrap), what lm-eval does
wrong (`tokens.py`, `fewshot.py`; an accuracy of NaN), and the forward pass (see `scoring.py`): in 16 bit the softmax
is taken in float32.  `protocol: lm_eval` gives lm-eval's very numbers.

Running out of GPU memory halves the batch and scores the task again, down to a batch of one; the smaller
batch stays for the trials that follow, and is recorded.  In float32 that changes nothing but the last digits; in 16 bit
products of other shapes are summed in another order, and perplexities move by about 0.1 %.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from quantsweep.errors import EvaluationError
from quantsweep.evaluation.lm_eval_protocol import LmEvalModel
from quantsweep.evaluation.perplexity import Perplexity
from quantsweep.evaluation.requests import ROLLING, Encoder, Requests
from quantsweep.evaluation.results import MetricValue, Samples, TaskResult
from quantsweep.evaluation.scoring import Batch, Plan, Scorer, halving
from quantsweep.evaluation.statistics import Items, aggregate, standard_error
from quantsweep.models.loading import LoadedModel
from quantsweep.tasks.definition import load_task, own_definition, pinned_data
from quantsweep.tasks.mistakes import said_in_words
from quantsweep.tasks.progress import OnProgress, reporting, silent
from quantsweep.tasks.templates import compiled_once
from quantsweep.trial.specs import PERPLEXITY, TaskSpec

logger = logging.getLogger(__name__)

# Sequences a batch where the user gives none.  On a CPU larger ones are slower: their activations leave the cache
# (the bundled models, one core: 4 and 8 are the fastest, 32 takes 10 to 20 % longer).  On a GPU short sequences need
# many of them to fill it (410M parameters, 75 tokens: 64 take 25 % longer than 128); where memory ends, the batch is halved.
_DEFAULT_BATCH = {"cpu": 8}
_DEFAULT_BATCH_GPU = 128

# The aggregates that have a standard error, by lm-eval's function.
_AGGREGATIONS: dict[Callable[[Items], Any], str] = {
    lm_eval_metrics.mean: "mean",
    lm_eval_metrics.perplexity: "perplexity",
    lm_eval_metrics.weighted_perplexity: "weighted_perplexity",
    lm_eval_metrics.bits_per_byte: "bits_per_byte",
}
_LIKELIHOODS = set(_AGGREGATIONS) - {lm_eval_metrics.mean}
"""Aggregates of log-likelihoods themselves."""
_BITS_PER_BYTE = "bits_per_byte"
Answer = tuple[float, bool]
"""Log-likelihood of a request, and whether greedy decoding would give it."""


@dataclass
class _Prepared:
    """A task with everything that its trials share."""

    task: Task
    requests: Requests
    plan: Plan
    golds: list[tuple[int, ...]]
    data_revision: str | None
    batch_size: int
    lm_eval_model: LmEvalModel | None = None
    batches: list[Batch] = field(default_factory=list)

    def set_batch_size(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.batches = self.plan.batches(batch_size)


class Evaluator:
    """Evaluates one loaded model; lives as long as the model.

    batch_size: sequences a batch (None: 8 on a CPU, 128 on a GPU).
    task_path: a folder of the user's own lm-eval YAMLs, searched before the built-in ones.
    as_planned: only for tasks that were planned as that folder's (`TaskSpec.own_content`).
    on_progress: called after each scored batch, each step of a task's preparation, and every hundred documents
    within the steps that take a while; not while a task's data are downloaded.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_size: int | None = None,
        task_path: Path | None = None,
        as_planned: bool = False,
        data_revisions: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise EvaluationError(f"batch_size must be at least 1, or null for the default; got {batch_size}")
        self._loaded = loaded
        self._asked_batch_size = batch_size
        self._batch_size = batch_size or _DEFAULT_BATCH.get(loaded.model.device.type, _DEFAULT_BATCH_GPU)
        self._task_path = task_path
        self._as_planned = as_planned
        self._data_revisions = dict(data_revisions or {})
        self._on_progress = on_progress or silent
        self._encoder = Encoder(loaded, self._on_progress)
        self._scorer = Scorer(loaded.model, self._on_progress)
        self._lm_eval_model: LmEvalModel | None = None
        self._prepared: dict[str, _Prepared] = {}
        self._perplexities: dict[str, Perplexity] = {}

    @property
    def scored(self) -> float:
        """The share of the task at hand whose batches are scored, 0 to 1."""
        return self._scorer.scored

    def prepare(self, spec: TaskSpec) -> None:
        """Load and tokenize a task now instead of at its first evaluation; does nothing the second time.

        Raises EvaluationError when the task cannot be had or is not what `spec` says.
        """
        if spec.kind == PERPLEXITY:
            if spec.task_key not in self._perplexities:
                self._perplexities[spec.task_key] = Perplexity.of(spec, self._loaded, self._asked_batch_size, self._on_progress)
        elif spec.task_key not in self._prepared:
            with compiled_once():
                self._prepared[spec.task_key] = self._prepare(spec)

    def evaluate(self, spec: TaskSpec) -> TaskResult:
        """Score the model, with the weights it has now, on one task.

        NaN and infinite log-likelihoods are results; an accuracy is NaN where what it compares is.

        Raises EvaluationError as `prepare` does, and torch.OutOfMemoryError when even one sequence does not fit.
        """
        self.prepare(spec)
        if spec.kind == PERPLEXITY:
            return self._perplexities[spec.task_key].evaluate(self._scorer)
        prepared = self._prepared[spec.task_key]
        started = time.perf_counter()
        answers = self._score(prepared)
        with (
            self._said_in_words(spec, "its answers cannot be judged"),
            compiled_once(),
            np.errstate(all="ignore"),
        ):  # NaN and inf are results, not accidents
            items = _collect(prepared, answers, self._on_progress)
            undecided = _undecided(prepared, answers)
            metrics = _metrics(prepared.task, items, spec, is_decided=not any(undecided))
            samples = _samples(prepared, answers, items, undecided)
        num_nonfinite = sum(not math.isfinite(loglikelihood) for loglikelihood, _ in answers)
        if any(undecided):
            logger.warning(
                "task %s: %d of %d log-likelihoods are not finite, so that %d of %d examples have no outcome and there is no accuracy; "
                "the model overflows in %s, or its weights are broken (another model.dtype may help)",
                spec.name, num_nonfinite, len(answers), sum(undecided), len(undecided), self._loaded.spec.dtype,
            )  # fmt: skip
        return TaskResult(
            metrics=metrics,
            num_samples=len(prepared.requests.documents),
            samples=samples,
            requests_hash=prepared.requests.hash,
            data_revision=prepared.data_revision,
            lm_eval_version=lm_eval.__version__,
            task_version=str(prepared.task.VERSION),
            window=prepared.requests.window,
            num_tokens=prepared.plan.num_scored_tokens,
            num_input_tokens=prepared.plan.num_input_tokens,
            num_truncated=prepared.plan.num_truncated,
            num_nonfinite=num_nonfinite,
            batch_size=prepared.batch_size,
            seconds=time.perf_counter() - started,
        )

    def texts(self, spec: TaskSpec) -> list[str]:
        """What of a task is scored, as text: a document's requests one behind the other, or the windows of a perplexity."""
        self.prepare(spec)
        if spec.kind == PERPLEXITY:
            return self._perplexities[spec.task_key].texts(self._loaded)
        documents = self._prepared[spec.task_key].requests.documents
        return [" ".join(text for instance in document for text in map(str, instance.args)) for document in documents]

    def _prepare(self, spec: TaskSpec) -> _Prepared:
        task = load_task(spec, self._task_path, as_planned=self._as_planned)
        revision = pinned_data(task, spec, self._data_revisions.get(spec.name))
        self._on_progress()
        lm_eval_model = None if spec.protocol is None else self._lm_eval()
        with self._said_in_words(spec, "its requests cannot be rendered"):
            requests = self._encoder.encode(task, spec, lm_eval_model)
        self._on_progress()
        plan = Plan.of(requests.spans, self._loaded.max_length)
        if plan.num_truncated:
            logger.warning(
                "task %s: %d of %d texts are longer than the %d tokens of %s and lose their beginning",
                spec.name, plan.num_truncated, plan.num_spans, self._loaded.max_length, self._loaded.spec.name,
            )  # fmt: skip
        golds = [_gold(task, document[0].doc) for document in requests.documents]
        prepared = _Prepared(task, requests, plan, golds, revision, self._batch_size, lm_eval_model)
        prepared.set_batch_size(self._batch_size)
        self._on_progress()
        return prepared

    def _said_in_words(self, spec: TaskSpec, what: str) -> contextlib.AbstractContextManager[None]:
        return said_in_words(spec, lambda: own_definition(spec, self._task_path), what)

    def _lm_eval(self) -> LmEvalModel:
        """lm-eval's own model over the loaded one, made once and only where its protocol is asked for."""
        if self._lm_eval_model is None:
            self._lm_eval_model = LmEvalModel(self._loaded)
        return self._lm_eval_model

    def _score(self, prepared: _Prepared) -> list[Answer]:
        """Log-likelihood and greediness of each request, in the order of `prepared.requests.instances`."""

        def attempt(batch_size: int) -> list[Answer]:
            if batch_size != prepared.batch_size:
                prepared.set_batch_size(batch_size)
            return self._score_once(prepared)

        return halving(attempt, prepared.batch_size)[0]

    def _score_once(self, prepared: _Prepared) -> list[Answer]:
        is_rolling = prepared.task.OUTPUT_TYPE == ROLLING
        requests = prepared.requests
        if prepared.lm_eval_model is not None:
            found = prepared.lm_eval_model.answers(requests.instances, requests.window, prepared.batch_size, self._on_progress)
            return [(float(answer), False) for answer in found] if is_rolling else found
        loglikelihoods, is_greedy = self._scorer.score(prepared.batches, prepared.plan.num_spans, with_greedy=not is_rolling)
        return [
            (float(loglikelihoods[first:last].sum()), bool(is_greedy[first:last].all()))
            for first, last in itertools.pairwise(requests.first_span)
        ]  # fmt: skip


def _collect(prepared: _Prepared, answers: Sequence[Answer], on_progress: OnProgress) -> dict[str, list[Any]]:
    """What lm-eval collects for each metric, one item a document, after filters and `process_results`.

    The first filter of a task gives the plain metric names; a further one, `metric,filter`.
    """
    task, requests = prepared.task, prepared.requests
    for instance, answer in zip(requests.instances, answers, strict=True):
        response = answer[0] if instance.request_type == ROLLING else answer
        instance.resps = [response] * (instance.repeats or 1)
        instance.filtered_resps = {}
    task.apply_filters()
    items: dict[str, list[Any]] = defaultdict(list)
    for number, filter_name in enumerate(requests.documents[0][0].filtered_resps):
        for document in reporting(requests.documents, on_progress):
            values = task.process_results(document[0].doc, [instance.filtered_resps[filter_name] for instance in document])
            for metric, value in values.items():
                items[metric if number == 0 else f"{metric},{filter_name}"].append(value)
    return items


def _undecided(prepared: _Prepared, answers: Sequence[Answer]) -> list[bool]:
    """Which documents have no outcome: NaN among what is compared (lm-eval takes the first NaN for the best), or nothing but -inf."""
    undecided, first = [], 0
    for document in prepared.requests.documents:
        loglikelihoods = [answers[number][0] for number in range(first, first + len(document))]
        first += len(document)
        is_broken = any(math.isnan(value) or value == math.inf for value in loglikelihoods)
        undecided.append(is_broken or (len(loglikelihoods) > 1 and max(loglikelihoods) == -math.inf))
    return undecided


def _metrics(task: Task, items: dict[str, list[Any]], spec: TaskSpec, *, is_decided: bool) -> tuple[MetricValue, ...]:
    aggregations, directions = dict(task.aggregation()), dict(task.higher_is_better())
    if task.OUTPUT_TYPE == ROLLING and _BITS_PER_BYTE not in items and "byte_perplexity" in items:
        # The same log-likelihoods and bytes on the scale that does not explode.
        items = {**items, _BITS_PER_BYTE: items["byte_perplexity"]}
        aggregations[_BITS_PER_BYTE], directions[_BITS_PER_BYTE] = lm_eval_metrics.bits_per_byte, False
    if spec.primary_metric not in items:
        raise EvaluationError(f"task {spec.name}: no document has the primary metric {spec.primary_metric}; they have {', '.join(items)}")
    found = tuple(
        _metric(name, values, aggregations[_base(name)], directions[_base(name)], spec.primary_metric)
        for name, values in items.items()
        if _base(name) in directions  # by-products that the task does not declare as metrics have no direction
    )  # fmt: skip
    if is_decided:
        return found
    # A likelihood of NaN is a result; an accuracy of what could not be compared would be a number that means nothing.
    return tuple(
        metric if aggregations[_base(metric.name)] in _LIKELIHOODS else replace(metric, value=math.nan, stderr=math.nan)
        for metric in found
    )  # fmt: skip


def _metric(name: str, items: Items, aggregation: Callable[[Items], Any], higher_is_better: bool, primary: str) -> MetricValue:
    value = aggregate(aggregation, items)
    return MetricValue(
        name=name,
        value=value,
        stderr=standard_error(_AGGREGATIONS.get(aggregation, ""), items, value),
        higher_is_better=higher_is_better,
        is_primary=name == primary,
    )


def _base(metric: str) -> str:
    return metric.partition(",")[0]


def _samples(prepared: _Prepared, answers: Sequence[Answer], items: dict[str, list[Any]], undecided: Sequence[bool]) -> Samples:
    return Samples(
        correct=_outcomes(items.get("acc"), undecided),
        correct_norm=_outcomes(items.get("acc_norm"), undecided),
        loglikelihood=_gold_loglikelihoods(prepared, answers),
        num_bytes=_num_bytes(prepared.task, prepared.requests, items),
    )


def _outcomes(items: Items | None, undecided: Sequence[bool]) -> list[bool | None] | None:
    return None if items is None else [None if no_outcome else bool(item) for item, no_outcome in zip(items, undecided, strict=True)]


def _gold_loglikelihoods(prepared: _Prepared, answers: Sequence[Answer]) -> list[float]:
    loglikelihoods, first = [], 0
    for document, golds in zip(prepared.requests.documents, prepared.golds, strict=True):
        best = max((answers[first + gold][0] for gold in golds), default=math.nan)
        loglikelihoods.append(float(np.float32(best)))
        first += len(document)
    return loglikelihoods


def _gold(task: Task, document: object) -> tuple[int, ...]:
    """Which of a document's requests hold its gold answer; empty when the document names none of its choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return (0,)
    choices = task.doc_to_choice(document)
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    indices = [choices.index(g) if g in choices else -1 for g in _listed(gold) if isinstance(g, str)]
    indices += [g for g in _listed(gold) if not isinstance(g, str)]
    return tuple(index for index in indices if 0 <= index < len(choices))


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _num_bytes(task: Task, requests: Requests, items: dict[str, list[Any]]) -> list[int] | None:
    """Bytes of each document, as the task itself counts them for its bits per byte."""
    if task.OUTPUT_TYPE != ROLLING:
        return None
    for name in (_BITS_PER_BYTE, "byte_perplexity"):
        if name in items:
            return [int(num_bytes) for _, num_bytes in items[name]]
    return [len(_text(document[0]).encode()) for document in requests.documents]


def _text(instance: Instance) -> str:
    return str(instance.args[0])
