"""What two texts share, by runs of words: 13 in a row are no accident (Brown et al. 2020, arXiv:2005.14165, appendix C).

Words are runs of letters and digits in lower case; runs of words are compared by 64-bit hashes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

OVERLAP_WORDS = 13
"""Words in a row that two texts share only if one was copied from the other, or both from a third."""
_WORD = re.compile(r"[a-z0-9]+")


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def word_ngrams(text: str, n: int) -> npt.NDArray[np.uint64]:
    """64-bit hashes of all runs of `n` words of a text: shape (words - n + 1,), or empty."""
    words = words_of(text)
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    hashed = {word: _word_hash(word) for word in set(words)}
    ids = np.fromiter(map(hashed.__getitem__, words), dtype=np.uint64, count=len(words))
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        hashes *= np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplication loses nothing; wraps at 2**64
        hashes += ids[offset : offset + count]
    return hashes


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def shared_windows(windows: Sequence[str], documents: Iterable[str], n: int = OVERLAP_WORDS) -> float:
    """The share (0 to 1) of windows that have `n` words in a row with some document; NaN where there are no windows.

    >>> shared_windows(["a b c d", "e f g h"], ["x b c d"], n=3)
    0.5
    """
    of_window = [word_ngrams(window, n) for window in windows]
    known = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *of_window]))
    is_shared = np.zeros(len(known), dtype=bool)
    for document in documents:
        is_shared |= np.isin(known, word_ngrams(document, n))
    shared = known[is_shared]
    return float(np.mean([np.isin(hashes, shared).any() for hashes in of_window])) if of_window else float("nan")
