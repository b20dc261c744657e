"""Log-likelihoods of spans, with no more arithmetic than they need.

    log p(continuation | context) = Σ_t log softmax(logits_{t-1})[token_t]      t over the continuation

HFLM computes logits and log-softmax for every position of every (padded) sequence and picks the few it
needs.  Here, in the same precision, the output head sees only the positions before scored tokens: a
forward hook selects those rows of its input.  For a cloze task, where one word in a hundred is
scored, that spares most of the work of a small model.  Models whose head is not a plain module, or
where the selection does not give the same logits (checked when the scorer is made), compute all
positions.

Also as HFLM: texts too long lose their beginning; sequences are padded on the right and no
attention mask is given (causal attention never looks at what comes later); equal inputs are computed
once.  Softmax is in float32 whatever the compute dtype (HFLM's `softmax_dtype="float32"`: in float16 a
document's sum would be known to one unit in two thousand), sums over tokens in float64.

Shapes: B sequences, T tokens, N selected positions, M scored tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantsweep.evaluation.tokens import Span
from quantsweep.numerics.tokens import tokens_are
from quantsweep.tasks.progress import OnProgress, silent

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Logits that are turned into float32 log-probabilities at once: 64 MB; on a CPU small enough for its cache.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
_DEFAULT_CHUNK = 2**24


@dataclass(frozen=True)
class _Row:
    """One input sequence and what is scored on it: (index of the span, its continuation)."""

    tokens: tuple[int, ...]
    scored: list[tuple[int, list[int]]]

    @property
    def num_positions(self) -> int:
        """Positions, counted from the end, whose logits some span needs."""
        return max(len(continuation) for _, continuation in self.scored)


@dataclass(frozen=True)
class Batch:
    """Some rows as tensors.

    input_BT: tokens, padded on the right with 0.  is_token_BT: what is no padding, which ranges of activations must not see.
    positions_N: rows of the flattened (B·T) hidden states that
    the head sees.  source_M: for each scored token the index into N; ascending.  target_M: the token.
    span_M: the span that it belongs to.
    """

    input_BT: Tensor
    is_token_BT: Tensor
    positions_N: Tensor
    source_M: Tensor
    target_M: Tensor
    span_M: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """All rows of a task, longest first, so that a batch holds rows of like length and lack of memory shows at once."""

    rows: tuple[_Row, ...]
    num_spans: int
    num_truncated: int

    @classmethod
    def of(cls, spans: Sequence[Span], max_length: int) -> Plan:
        """Spans with equal inputs (choices of one token each, say) share a row."""
        scored: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        num_truncated = 0
        for index, (context, continuation) in enumerate(spans):
            whole = context + continuation
            num_truncated += len(whole) > max_length + 1
            scored.setdefault(tuple(whole[-(max_length + 1) :][:-1]), []).append((index, continuation))
        rows = sorted((_Row(tokens, spans_of) for tokens, spans_of in scored.items()), key=lambda row: (-len(row.tokens), row.tokens))
        return cls(tuple(rows), len(spans), num_truncated)

    @property
    def num_input_tokens(self) -> int:
        """Tokens that go through the model, padding not counted."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def num_scored_tokens(self) -> int:
        """Tokens whose probability is asked for."""
        return sum(len(continuation) for row in self.rows for _, continuation in row.scored)

    def batches(self, batch_size: int) -> list[Batch]:
        """The rows in batches of at most `batch_size` sequences."""
        return [_batch(self.rows[start : start + batch_size]) for start in range(0, len(self.rows), batch_size)]


def _batch(rows: Sequence[_Row]) -> Batch:
    width = len(rows[0].tokens)
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    positions: list[int] = []
    scored: list[tuple[int, int, int]] = []  # source, target, span
    for index, row in enumerate(rows):
        inputs[index, : len(row.tokens)] = torch.tensor(row.tokens)
        end = index * width + len(row.tokens)
        positions += range(end - row.num_positions, end)
        for span, continuation in row.scored:
            first = len(positions) - len(continuation)
            scored += [(first + offset, token, span) for offset, token in enumerate(continuation)]
    source, target, span_of = np.array(sorted(scored), dtype=np.int64).T.copy()
    is_token = torch.arange(width) < torch.tensor([[len(row.tokens)] for row in rows])
    return Batch(inputs, is_token, torch.tensor(positions), torch.from_numpy(source), torch.from_numpy(target), span_of)


def halving(attempt: Callable[[int], T], batch_size: int) -> tuple[T, int]:
    """`attempt(batch_size)`, with half as many sequences after each lack of GPU memory, and the batch size that was possible.

    Raises torch.OutOfMemoryError when even one sequence does not fit.
    """
    while True:
        try:
            return attempt(batch_size), batch_size
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        # Out here the failed attempt's tensors are gone.
        torch.cuda.empty_cache()
        batch_size //= 2
        logger.warning("out of GPU memory: going on with batches of %d sequences", batch_size)


class Scorer:
    """Scores batches on one model; the model's weights may change between calls.

    on_progress: called after each batch.  `scored` is the share of the batches at hand that are done.
    """

    def __init__(self, model: PreTrainedModel, on_progress: OnProgress = silent) -> None:
        self._model = model
        self._on_progress = on_progress
        self.scored = 0.0
        self._device = model.device
        self._chunk_elements = _CHUNK_ELEMENTS.get(model.device.type, _DEFAULT_CHUNK)
        head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head = head if head is not None and self._selects_correctly(head) else None

    def score(
        self, batches: Sequence[Batch], num_spans: int, *, with_greedy: bool = True
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Log-likelihood of each span, and whether greedy decoding would produce it.

        Returns two arrays of `num_spans`.  NaN and infinite log-likelihoods are passed on.  with_greedy:
        False spares the search for the most probable token (as long as the softmax itself); all are False then.
        """
        self.scored = 0.0
        with torch.inference_mode():
            # One transfer at the end: a transfer a batch would make the host wait for the device each time.
            tokens = []
            for number, batch in enumerate(batches, start=1):
                tokens.append(self._score_tokens(batch, with_greedy))
                self.scored = number / len(batches)
                self._on_progress()
            logprobs = torch.cat([logprob_M for logprob_M, _ in tokens]).cpu().numpy().astype(np.float64)
            is_greedy = torch.cat([greedy_M for _, greedy_M in tokens]).cpu().numpy()
        span_of = np.concatenate([batch.span_M for batch in batches])
        misses = np.bincount(span_of, weights=~is_greedy, minlength=num_spans)
        sums: npt.NDArray[np.float64] = np.bincount(span_of, weights=logprobs, minlength=num_spans).astype(np.float64)
        return sums, misses == 0

    def _score_tokens(self, batch: Batch, with_greedy: bool) -> tuple[Tensor, Tensor]:
        """Log-probability of each scored token, and whether it is the most probable one; both of length M, on the device."""
        logits_NV = self._logits(batch)
        source_M, target_M = batch.source_M.to(self._device), batch.target_M.to(self._device)
        step = max(1, self._chunk_elements // logits_NV.shape[1])
        logprobs, greedy = [], []
        for start in range(0, logits_NV.shape[0], step):
            # `source_M` ascends, so the tokens that look at this chunk of positions lie together.
            low, high = np.searchsorted(batch.source_M.numpy(), [start, start + step])
            logprob_NV = torch.log_softmax(logits_NV[start : start + step], dim=-1, dtype=torch.float32)
            rows_M, targets_M = source_M[low:high] - start, target_M[low:high]
            logprobs.append(logprob_NV[rows_M, targets_M])
            greedy.append(logprob_NV.argmax(dim=-1)[rows_M] == targets_M if with_greedy else torch.zeros_like(targets_M, dtype=torch.bool))
        return torch.cat(logprobs), torch.cat(greedy)

    def _logits(self, batch: Batch) -> Tensor:
        """Logits at the selected positions, N × V."""
        positions_N = batch.positions_N.to(self._device)
        inputs, is_token_BT = batch.input_BT.to(self._device), batch.is_token_BT.to(self._device)
        with tokens_are(is_token_BT):
            if self._head is None:
                return self._forward(inputs).flatten(0, 1)[positions_N]
            with _selecting(self._head, positions_N):
                return self._forward(inputs)[0]

    def _forward(self, input_BT: Tensor) -> Tensor:
        logits: Tensor = self._model(input_BT, use_cache=False).logits
        return logits

    @torch.inference_mode()
    def _selects_correctly(self, head: nn.Module) -> bool:
        """Whether selecting before the head gives the logits that selecting after it gives.

        A model without one finite logit cannot tell: False, all positions are always right.
        """
        input_BT = torch.arange(10, device=self._device).reshape(2, 5)
        positions_N = torch.tensor([1, 4, 8], device=self._device)
        expected = self._forward(input_BT).flatten(0, 1)[positions_N]
        with _selecting(head, positions_N):
            selected = self._forward(input_BT)
        finite = expected[expected.isfinite()]
        if selected.shape != (1, *expected.shape) or not finite.numel():
            return False
        # 16-bit products of other shapes are summed in another order: a few units in the last place.
        tolerance = 16 * torch.finfo(expected.dtype).eps * float(finite.abs().max())
        return torch.allclose(selected[0], expected, rtol=0, atol=tolerance, equal_nan=True)


@contextlib.contextmanager
def _selecting(head: nn.Module, positions_N: Tensor) -> Iterator[None]:
    """Let `head` see, as one sequence, only the given rows of its flattened input (B × T × hidden)."""

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTH, *rest = args
        # A model that is spread over GPUs has its head on another one than its embeddings.
        return (hidden_BTH.flatten(0, 1)[positions_N.to(hidden_BTH.device)].unsqueeze(0), *rest)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
