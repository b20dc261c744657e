"""What a model must beat: a trigram model, the most frequent word, chance.

The trigram is interpolated Kneser-Ney over the same BPE tokens and the same training stream, with one
absolute discount an order, D = n1 / (n1 + 2 n2) (Chen and Goodman, TR-10-98, section 2.7):

    P(c | a b) = max(C(abc) - D3, 0) / C(ab.)          + D3 N+(ab.) / C(ab.)          P(c | b)
    P(c | b)   = max(N+(.bc) - D2, 0) / N+(.b.)        + D2 N+(b.) / N+(.b.)          P(c)
    P(c)       = max(N+(.c) - D1, 0) / N+(..)          + D1 N+(.) / N+(..)            / V

where N+ counts distinct types. Three tokens span about ten characters, so this is a stronger baseline
than a trigram over characters.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantsweep.mini import MODEL_NAMES, MODELS_DIR, TASKS_DIR
from quantsweep.mini.evaluate import Estimate, accuracy, ratio
from quantsweep.mini.vocabulary import END_OF_TEXT_ID, VOCABULARY_SIZE, load_tokenizer

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    """One order of the model: n-gram keys with their counts, and sums over each context."""

    keys: Ids  # sorted; context * V + token
    counts: Floats
    contexts: Ids  # sorted
    totals: Floats  # counts summed over a context
    types: Floats  # distinct continuations of a context
    discount: float

    @classmethod
    def of(cls, keys: Ids, counts: Floats) -> _Order:
        contexts, start = np.unique(keys // VOCABULARY_SIZE, return_index=True)
        ones, twos = float((counts == 1).sum()), float((counts == 2).sum())
        return cls(
            keys=keys,
            counts=counts,
            contexts=contexts,
            totals=np.add.reduceat(counts, start),
            types=np.diff(np.append(start, len(keys))).astype(np.float64),
            discount=ones / (ones + 2 * twos),
        )

    def probability(self, context: Ids, token: Ids, lower: Floats) -> Floats:
        """P(token | context), given the lower order's probability of each token; shapes (n,)."""
        place, seen = _find(self.contexts, context)
        total = np.where(seen, self.totals[place], 1.0)
        key_place, key_seen = _find(self.keys, context * VOCABULARY_SIZE + token)
        count = np.where(key_seen, self.counts[key_place], 0.0)
        kept = np.maximum(count - self.discount, 0.0) / total
        backed_off = self.discount * self.types[place] / total * lower
        return np.where(seen, kept + backed_off, lower)


def _find(sorted_keys: Ids, wanted: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
    place = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return place, sorted_keys[place] == wanted


class Trigram:
    """Interpolated Kneser-Ney over token ids."""

    def __init__(self, stream: Ids) -> None:
        """Count the n-grams of a stream of token ids (tokens,)."""
        size = VOCABULARY_SIZE
        keys3, counts3 = np.unique((stream[:-2] * size + stream[1:-1]) * size + stream[2:], return_counts=True)
        # Lower orders count in how many contexts an n-gram occurs, not how often.
        keys2, counts2 = np.unique(keys3 % size**2, return_counts=True)
        keys1, counts1 = np.unique(keys2 % size, return_counts=True)
        self.trigrams = _Order.of(keys3, counts3.astype(np.float64))
        self.bigrams = _Order.of(keys2, counts2.astype(np.float64))
        self.unigrams = _Order.of(keys1, counts1.astype(np.float64))

    def log2_probability(self, ids: Ids) -> float:
        """Log-probability in bits of a document (n,), which an end-of-text token precedes."""
        padded = np.concatenate([[END_OF_TEXT_ID, END_OF_TEXT_ID], ids])
        a, b, c = padded[:-2], padded[1:-1], padded[2:]
        unigram = self.unigrams.probability(np.zeros_like(c), c, np.full(len(c), 1 / VOCABULARY_SIZE))
        bigram = self.bigrams.probability(b, c, unigram)
        return float(np.log2(self.trigrams.probability(a * VOCABULARY_SIZE + b, c, bigram)).sum())


def task_texts(name: str) -> list[str]:
    """The `text` of each example of a task's data file."""
    with (TASKS_DIR / "data" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [str(json.loads(line)["text"]) for line in lines]


def trigram_bits_per_byte(stream: npt.NDArray[np.uint16], documents: Sequence[str]) -> Estimate:
    """Bits per byte of the trigram that was counted on `stream` (tokens,), over the documents."""
    model = Trigram(stream.astype(np.int64))
    tokenizer = load_tokenizer(MODELS_DIR / MODEL_NAMES[0])
    bits = [-model.log2_probability(np.array(tokenizer.encode(d).ids, dtype=np.int64)) for d in documents]
    return ratio(np.array(bits), np.array([len(d.encode()) for d in documents], dtype=np.float64))


def most_frequent_word(passages: Sequence[str]) -> tuple[str, Estimate]:
    """The commonest last word *of the examples themselves*, and the accuracy of always saying it.

    No real guesser could know which word that is; it makes the baseline a little too strong.
    """
    words = [passage.split(" ")[-1] for passage in passages]
    best = Counter(words).most_common(1)[0][0]
    return best, accuracy(np.array([float(word == best) for word in words]))


def chance(num_choices: int, n: int) -> Estimate:
    """Accuracy of a uniform guess, with the standard error of n guesses."""
    p = 1 / num_choices
    return Estimate(value=p, standard_error=math.sqrt(p * (1 - p) / (n - 1)), n=n)
