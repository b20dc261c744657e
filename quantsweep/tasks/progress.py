"""Signs of life: whoever waits for an evaluation can tell a slow one from one that hangs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from quantsweep.signs import OnProgress as OnProgress

T = TypeVar("T")

# Documents are rendered, tokenized and judged in about a millisecond each.
_DOCUMENTS_A_SIGN = 100


def silent() -> None:
    """The OnProgress of those who do not wait."""


def reporting(documents: Iterable[T], on_progress: OnProgress) -> Iterator[T]:
    """The same documents, with a sign of life after every hundredth."""
    for number, document in enumerate(documents, start=1):
        yield document
        if number % _DOCUMENTS_A_SIGN == 0:
            on_progress()
