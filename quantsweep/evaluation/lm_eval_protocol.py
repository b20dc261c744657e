"""`protocol: lm_eval`: lm-eval's own encoding and scoring, for numbers that equal those of others to the last digit.

Its faults are part of it: few-shot prompts that hold their own answer, a second start token where the tokenizer puts one
already, and a softmax in the compute dtype.  One is not: HFLM ties the output head to the embeddings when it is made, and a
loaded model has nothing more to tie (`wrap_model`), so that the weights that are scored are those that were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from quantsweep.errors import EvaluationError
from quantsweep.evaluation.tokens import Span
from quantsweep.models.loading import LoadedModel
from quantsweep.tasks.progress import OnProgress
from quantsweep.tasks.quiet import quiet

NAME = "lm_eval"


class LmEvalModel(HFLM):  # type: ignore[misc]
    """An HFLM over a loaded model that also tells which spans it scores.

    Raises EvaluationError for a tokenizer without BOS and EOS.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        tokenizer = loaded.tokenizer
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise EvaluationError(
                f"the tokenizer of model {loaded.spec.name} has neither a BOS nor an EOS token, without which lm-eval encodes nothing; "
                "leave protocol out"
            )
        with quiet():
            super().__init__(pretrained=loaded.model, tokenizer=tokenizer, max_length=loaded.max_length, batch_size=1)
        self._context: int = loaded.max_length
        self._recorded: list[Span] | None = None

    def spans(self, instance: Instance, window: int | None) -> list[Span]:
        """What one request is scored on; `window`: tokens of a rolling window (None: the model's context)."""
        self._recorded = []
        self._ask([instance], window)
        recorded, self._recorded = self._recorded, None
        return recorded

    def answers(self, instances: Sequence[Instance], window: int | None, batch_size: int, on_progress: OnProgress) -> list[Any]:
        """lm-eval's answers: (log-likelihood, greedy) of each request, the log-likelihood alone of a rolling one."""
        self.batch_size_per_gpu = batch_size
        sign = self.model.register_forward_hook(lambda *_: on_progress())
        try:
            return self._ask(instances, window)
        finally:
            sign.remove()

    def _ask(self, instances: Sequence[Instance], window: int | None) -> list[Any]:
        self._max_length = window or self._context
        return list(getattr(self, instances[0].request_type)(instances, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._recorded is None:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs))
        self._recorded += [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)
