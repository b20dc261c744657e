"""How a text becomes sequences of tokens: the loaders of published studies, as named functions.

    join                 all documents with a separator between them, tokenized once      one stream
    crops_of_stream      random places of a stream                                        GPTQ's loaders of WikiText-2 and PTB
    crops_of_documents   a random document that is long enough, a random place in it      GPTQ's loader of C4
    blocks_of_documents  short documents in random order, one behind the other, cut       AWQ's loader of the Pile

Random numbers are those that the published code draws (Python's `random`; NumPy's PCG64 for AWQ, through `datasets.shuffle`), so that
equal tokens and seeds give equal sequences: IST-DASLab/gptq datautils.py; mit-han-lab/llm-awq awq/utils/calib_data.py.
A document is tokenized as the tokenizer does it by itself: start tokens that it puts before a text stand before it once.

Shapes: L tokens of a stream, N sequences, T tokens of one.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quantsweep.errors import TextError

Encode = Callable[[str], list[int]]
"""Tokens of one document; called once a document, and a sign of life at each call."""
Tokens = npt.NDArray[np.int64]

AWQ_LONGEST = 512
"""Tokens of the longest document that AWQ's loader takes, whatever the length of its blocks."""


def join(documents: pa.ChunkedArray, separator: str, encode: Encode) -> Tokens:
    """All documents as one stream of L tokens."""
    return np.array(encode(separator.join(documents.to_pylist())), dtype=np.int64)


def crops_of_stream(stream_L: Tokens, num_samples: int, length: int, seed: int) -> Tokens:
    """N × T: crops at random places; raises TextError where the stream has no more than `length` tokens."""
    if len(stream_L) <= length:
        raise TextError(f"the text has {len(stream_L):,} tokens, too few for crops of {length:,}; give more text, or shorter sequences")
    draw = random.Random(seed)
    starts = [draw.randint(0, len(stream_L) - length - 1) for _ in range(num_samples)]
    return np.stack([stream_L[start : start + length] for start in starts])


def crops_of_documents(documents: pa.ChunkedArray, encode: Encode, num_samples: int, length: int, seed: int) -> Tokens:
    """N × T: crops of random documents of more than `length` tokens; raises TextError where there is none.

    A document of exactly `length` tokens is passed over (the published code fails on it).
    """
    draw = random.Random(seed)
    too_short: set[int] = set()
    crops: list[list[int]] = []
    while len(crops) < num_samples:
        place = draw.randint(0, len(documents) - 1)
        if place in too_short:
            continue
        tokens = encode(documents[place].as_py())
        if len(tokens) > length:
            start = draw.randint(0, len(tokens) - length - 1)
            crops.append(tokens[start : start + length])
            continue
        too_short.add(place)
        if len(too_short) == len(documents):
            raise TextError(
                f"none of the text's {len(documents):,} documents has more than {length:,} tokens, which crops of documents need; "
                "give longer documents, or shorter sequences, or rule joined_crops"
            )
    return np.array(crops, dtype=np.int64)


def blocks_of_documents(documents: pa.ChunkedArray, encode: Encode, num_samples: int, length: int, seed: int) -> Tokens:
    """N × T: `num_samples` documents of at most AWQ_LONGEST tokens, joined without a separator and cut; N is smaller than `num_samples`.

    Raises TextError where they do not fill one block.
    """
    taken: list[list[int]] = []
    for place in np.random.default_rng(seed).permutation(len(documents)):
        tokens = encode(documents[int(place)].as_py().strip())
        if 0 < len(tokens) <= AWQ_LONGEST:
            taken.append(tokens)
        if len(taken) == num_samples:
            break
    stream_L = np.array([token for tokens in taken for token in tokens], dtype=np.int64)
    blocks_NT = windows(stream_L, length)
    if not len(blocks_NT):
        raise TextError(
            f"{len(taken):,} documents of at most {AWQ_LONGEST} tokens have {len(stream_L):,} tokens together, too few for one block of "
            f"{length:,}; give more text, more samples, or shorter sequences"
        )
    return blocks_NT


def windows(stream_L: Tokens, length: int) -> Tokens:
    """N × T: the stream in windows that do not overlap; what is left at its end is dropped."""
    whole = len(stream_L) // length
    return stream_L[: whole * length].reshape(whole, length)
