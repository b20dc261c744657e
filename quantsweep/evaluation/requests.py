"""A task's requests as tokens, made once and scored as often as a model has trials.

lm-eval renders each document into requests; `tokens.py` turns their text into tokens: context and continuation for
`loglikelihood`, windows of at most the model's context length (or the task's own `window`) for `loglikelihood_rolling`.
Neither depends on the weights.

    span = (context tokens, continuation tokens), scored as log p(continuation | context)
    a loglikelihood request is one span, a rolling request one span a window
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from quantsweep.errors import EvaluationError
from quantsweep.evaluation.lm_eval_protocol import LmEvalModel
from quantsweep.evaluation.tokens import Span, Tokens
from quantsweep.models.loading import LoadedModel
from quantsweep.tasks.documents import lm_eval_seeds, read_afresh
from quantsweep.tasks.progress import OnProgress, reporting, silent
from quantsweep.tasks.quiet import quiet
from quantsweep.trial.specs import TaskSpec

ROLLING = "loglikelihood_rolling"


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What a task asks of a model.

    documents: requests (lm-eval's Instances) of each document, in order.
    spans: what is to be scored; request k owns the spans `first_span[k]` to `first_span[k + 1]`, where
    requests are counted through all documents.
    window: the length of the windows of a rolling task, in tokens; None for other tasks.
    hash: of the rendered text and the gold answers; the same for every model.
    """

    documents: tuple[tuple[Instance, ...], ...]
    spans: tuple[Span, ...]
    first_span: tuple[int, ...]
    window: int | None
    hash: str

    @property
    def instances(self) -> list[Instance]:
        """All requests, in the order that `first_span` counts."""
        return [instance for document in self.documents for instance in document]


class Encoder:
    """Renders and tokenizes requests for one loaded model."""

    def __init__(self, loaded: LoadedModel, on_progress: OnProgress = silent) -> None:
        self._loaded = loaded
        self._on_progress = on_progress
        self._tokens: Tokens | None = None

    def encode(self, task: Task, spec: TaskSpec, lm_eval_model: LmEvalModel | None = None) -> Requests:
        """Render and tokenize the requests of `task`; where a model of lm-eval is given, as that does it.

        Raises EvaluationError when lm-eval cannot render them (more few-shot examples than there are), when an
        answer has no tokens, or when the window is not one of this task and model.
        """
        afresh = contextlib.nullcontext() if spec.own_content is None else read_afresh()
        try:
            with quiet(self._on_progress), lm_eval_seeds(), afresh:  # a task may make its documents again
                task.build_all_requests(limit=spec.limit)
        except ValueError as error:
            shots = task.get_config("num_fewshot")
            raise EvaluationError(f"task {spec.name}: lm-eval cannot render its requests (num_fewshot={shots}): {error}") from error
        window = self._window(task, spec)
        documents = _by_document(task.instances)
        spans: list[Span] = []
        first_span = [0]
        for document in reporting(documents, self._on_progress):
            for instance in document:
                found = self._spans(instance, window) if lm_eval_model is None else lm_eval_model.spans(instance, window)
                self._check(instance, found)
                spans += found
                first_span.append(len(spans))
        if self._tokens is not None:
            self._tokens.forget()  # a task's texts are not asked for twice
        return Requests(documents=documents, spans=tuple(spans), first_span=tuple(first_span), window=window, hash=_hash(task, documents))

    def _window(self, task: Task, spec: TaskSpec) -> int | None:
        """The window of a rolling task; raises EvaluationError where one was asked for that cannot be had."""
        context, model = self._loaded.max_length, self._loaded.spec.name
        if spec.window is None:
            return context if task.OUTPUT_TYPE == ROLLING else None
        if task.OUTPUT_TYPE != ROLLING:
            raise EvaluationError(f"task {spec.name}: window={spec.window} was asked for, and only rolling tasks are cut into windows")
        if spec.window > context:
            raise EvaluationError(
                f"task {spec.name}: windows of {spec.window} tokens were asked for, and the context of {model} has {context}"
            )
        return spec.window

    def _spans(self, instance: Instance, window: int | None) -> list[Span]:
        """A rolling text of no tokens has no windows, hence no spans: its log-likelihood is the empty sum."""
        if self._tokens is None:
            self._tokens = Tokens(self._loaded.tokenizer, self._loaded.spec.name)
        try:
            if window is not None:
                (text,) = instance.args
                return list(self._tokens.windows(text, window))
            context, continuation = instance.args
            return [self._tokens.pair(context, continuation)]
        except EvaluationError as error:
            raise EvaluationError(f"task {instance.task_name}, document {instance.doc_id}: {error}") from error

    def _check(self, instance: Instance, spans: Sequence[Span]) -> None:
        for context, continuation in spans:
            if (token := max((*context, *continuation), default=0)) >= self._loaded.num_embeddings:
                raise EvaluationError(
                    f"task {instance.task_name}, document {instance.doc_id}: the tokenizer of model {self._loaded.spec.name} gives token "
                    f"{token}, and its embedding has {self._loaded.num_embeddings}: they do not belong together"
                )
            if not 1 <= len(continuation) <= self._loaded.max_length:
                raise EvaluationError(
                    f"task {instance.task_name}, document {instance.doc_id}: an answer of {len(continuation)} tokens cannot be scored "
                    f"(the model's context has {self._loaded.max_length})"
                )


def _by_document(instances: Sequence[Instance]) -> tuple[tuple[Instance, ...], ...]:
    """Requests of each document in the order that `process_results` expects (lm-eval sorts them by idx)."""
    documents: dict[int, list[Instance]] = {}
    for instance in instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    return tuple(tuple(sorted(requests, key=lambda request: request.idx)) for requests in documents.values())


def _hash(task: Task, documents: tuple[tuple[Instance, ...], ...]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        rendered = [[instance.request_type, *instance.args] for instance in document]
        digest.update(json.dumps([rendered, task.doc_to_target(document[0].doc)], default=repr).encode())
    return digest.hexdigest()[:32]
