"""A task's requests as tokens, made once and scored as often as a model has trials.

lm-eval renders each document into requests and HFLM turns their text into tokens: context and
continuation for `loglikelihood`, windows of at most the model's context length for
`loglikelihood_rolling`.  Neither depends on the weights.  Here both are done by lm-eval's own code, and
only the last step, the forward pass, is left out: `_Recorder` is an HFLM that remembers what it is
asked to score.

    span = (context tokens, continuation tokens), scored as log p(continuation | context)
    a loglikelihood request is one span, a rolling request one span a window
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from quantsweep.errors import EvaluationError
from quantsweep.evaluation.progress import OnProgress, reporting, silent
from quantsweep.evaluation.quiet import quiet
from quantsweep.models.loading import LoadedModel
from quantsweep.specs import TaskSpec

Span = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What a task asks of a model.

    documents: requests (lm-eval's Instances) of each document, in order.
    spans: what is to be scored; request k owns the spans `first_span[k]` to `first_span[k + 1]`, where
    requests are counted through all documents.
    hash: of the rendered text and the gold answers; the same for every model.
    """

    documents: tuple[tuple[Instance, ...], ...]
    spans: tuple[Span, ...]
    first_span: tuple[int, ...]
    hash: str

    @property
    def instances(self) -> list[Instance]:
        """All requests, in the order that `first_span` counts."""
        return [instance for document in self.documents for instance in document]


class Encoder:
    """Tokenizes requests exactly as HFLM does, for one loaded model."""

    def __init__(self, loaded: LoadedModel, on_progress: OnProgress = silent) -> None:
        self._on_progress = on_progress
        with quiet():
            self._recorder = _Recorder(loaded)

    def encode(self, task: Task, spec: TaskSpec) -> Requests:
        """Render and tokenize the requests of `task`.

        Raises EvaluationError when lm-eval cannot render them (more few-shot examples than there are), or
        when an answer has no tokens.
        """
        try:
            with quiet(self._on_progress):
                task.build_all_requests(limit=spec.limit)
        except ValueError as error:
            shots = task.get_config("num_fewshot")
            raise EvaluationError(f"task {spec.name}: lm-eval cannot render its requests (num_fewshot={shots}): {error}") from error
        documents = _by_document(task.instances)
        spans: list[Span] = []
        first_span = [0]
        for document in reporting(documents, self._on_progress):
            for instance in document:
                spans += self._recorder.record(instance)
                first_span.append(len(spans))
        self._recorder.forget()
        return Requests(documents=documents, spans=tuple(spans), first_span=tuple(first_span), hash=_hash(task, documents))


class _Recorder(HFLM):  # type: ignore[misc]
    """An HFLM that remembers the spans it is asked to score, and scores none."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=loaded.max_length, batch_size=1)
        self._spans: list[Span] = []
        self._tokens_of: dict[tuple[str, bool | None], list[int]] = {}

    def record(self, instance: Instance) -> list[Span]:
        """The spans of one request."""
        self._spans = []
        # A rolling text of no tokens has no windows, hence no spans: its log-likelihood is the empty sum.
        getattr(self, instance.request_type)([instance], disable_tqdm=True)
        for _, continuation in self._spans:
            if not 1 <= len(continuation) <= self.max_length:
                raise EvaluationError(
                    f"task {instance.task_name}, document {instance.doc_id}: an answer of {len(continuation)} tokens cannot be scored "
                    f"(the model's context has {self.max_length})"
                )
        return self._spans

    def forget(self) -> None:
        """Drop the remembered encodings: a task's texts are not asked for twice."""
        self._tokens_of.clear()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: object) -> list[int]:
        """As HFLM's; a context that several choices share is encoded once."""
        key = (string, add_special_tokens)
        if key not in self._tokens_of:
            self._tokens_of[key] = super().tok_encode(string, add_special_tokens=add_special_tokens, **options)
        return self._tokens_of[key]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_options: object) -> list[tuple[float, bool]]:
        self._spans += [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)


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
