"""Which tokens a text becomes, and where a text begins.

A tokenizer may put start tokens before each text (Llama's and OPT's do, GPT-NeoX's does not), and some put an end token
behind it.  Neither is part of the text, so neither is ever scored:

    choices    (context, continuation)   what the tokenizer puts before a text stands once, before the context
                                         (a context that is cut on the left to fit the model loses it, as in lm-eval)
    rolling    (start, document)         each document has one start: the tokenizer's own, else its BOS or EOS token;
                                         a later window begins with the token before it

lm-eval's own encoding (`lm_eval_protocol.py`) puts a start before what the tokenizer began with one already, scores
p(BOS | BOS) with each document, and loses a token of each answer where the tokenizer appends an end token.
"""

from __future__ import annotations

from collections.abc import Iterator

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from quantsweep.errors import EvaluationError

Span = tuple[list[int], list[int]]
"""(context tokens, continuation tokens), scored as log p(continuation | context)."""

_PROBE = "a"


class Tokens:
    """The tokens of texts for one tokenizer; `model` is its model's name, for messages.

    Encodings are remembered until `forget`: several choices share a context.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._plain_of: dict[str, list[int]] = {}
        self._prefix = self._tokens_before_a_text()

    def forget(self) -> None:
        """Drop the remembered encodings."""
        self._plain_of.clear()

    def pair(self, context: str, continuation: str) -> Span:
        """The span of a continuation after a context; spaces between them belong to the continuation, as in lm-eval.

        Raises EvaluationError for an empty context where the tokenizer has no token to begin with.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return [*self._start("an answer without a context")], self._without_start(self._plain(continuation))
        whole, before = self._encode(stripped + continuation), self._encode(stripped)
        return before, whole[len(before) :]

    def windows(self, text: str, length: int) -> Iterator[Span]:
        """A document in windows of at most `length` input tokens; each token is scored once, none twice.

        The first window begins with the start tokens, a later one with what stands before it.  A text without tokens has no window.
        Raises EvaluationError where the tokenizer has no token to begin with.
        """
        start = self._start("a rolling task")
        tokens = self._without_start(self._plain(text))
        pairs = get_rolling_token_windows(tokens, start[-1], max_seq_len=length - len(start) + 1, context_len=1)
        for number, (context, continuation) in enumerate(map(make_disjoint_window, pairs)):
            yield ([*start] if number == 0 else context), continuation

    def _start(self, what: str) -> tuple[int, ...]:
        """The tokens that a text of its own begins with."""
        if self._prefix:
            return self._prefix
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return (int(token),)
        raise EvaluationError(
            f"the tokenizer of model {self._model} has neither a BOS nor an EOS token, and {what} needs one to begin with: "
            "name it in its tokenizer_config.json (bos_token), or leave this task out for this model"
        )

    def _without_start(self, tokens: list[int]) -> list[int]:
        """A text that begins with its start token in writing has it once."""
        start = self._start("a text")
        return tokens[len(start) :] if tuple(tokens[: len(start)]) == start else tokens

    def _encode(self, text: str) -> list[int]:
        tokens = self._plain(text)
        begun = not self._prefix or tuple(tokens[: len(self._prefix)]) == self._prefix
        return tokens if begun else [*self._prefix, *tokens]

    def _plain(self, text: str) -> list[int]:
        if text not in self._plain_of:
            self._plain_of[text] = list(self._tokenizer.encode(text, add_special_tokens=False))
        return self._plain_of[text]

    def _tokens_before_a_text(self) -> tuple[int, ...]:
        plain = list(self._tokenizer.encode(_PROBE, add_special_tokens=False))
        whole = list(self._tokenizer.encode(_PROBE))
        place = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), None)
        if place is None:
            raise EvaluationError(
                f"the tokenizer of model {self._model} turns {_PROBE!r} into {plain}, and with its special tokens into {whole}: "
                "where a text begins cannot be told"
            )
        return tuple(whole[:place])
