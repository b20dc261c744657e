"""Which positions of the batch at hand are tokens of a text, and which are padding.

    with tokens_are(is_token_BT):
        model(input_BT)

What is made of a whole sequence (the range of all its activations) must not look at padding, and must not look
at other sequences: a text alone and in company then gets the same numbers.  A layer's input does not tell; who calls the model does.
A position that is no token must not be read by one: texts are padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from quantsweep.errors import QuantizationError


class _Batch:
    """The batch at hand; one a process, as there is one model."""

    is_token_BT: Tensor | None = None


@contextmanager
def tokens_are(is_token_BT: Tensor) -> Iterator[None]:
    """While the block lasts, the model is given a batch of which these positions are tokens; bool, at least one a row."""
    before, _Batch.is_token_BT = _Batch.is_token_BT, is_token_BT
    try:
        yield
    finally:
        _Batch.is_token_BT = before


def by_sequence(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B, T, I), or (B·T, I) as some models have them, as (B, T, I); with them (B, T, 1), true where there is a token.

    Raises QuantizationError where nobody said which are tokens, or of another batch.
    """
    is_token_BT = _Batch.is_token_BT
    if is_token_BT is None:
        raise QuantizationError(
            "activations are quantized by ranges of whole sequences, and whoever runs the model here does not say which positions are "
            "padding (lm-eval's own protocol does not); leave `protocol` out, or use activation=per_token"
        )
    if values.shape[:-1] not in (is_token_BT.shape, (is_token_BT.numel(),)):
        of = f"{is_token_BT.shape[0]} sequences of {is_token_BT.shape[1]} tokens"
        raise QuantizationError(f"activations of shape {tuple(values.shape)} are not those of {of}")
    return values.view(*is_token_BT.shape, values.shape[-1]), is_token_BT.to(values.device)[..., None]
