"""Examples of the three tasks, made from the evaluation split.

    cloze         a passage of two to six sentences; guess its last word (the form of LAMBADA, arXiv:1606.06031)
    continuation  two or more sentences; which of four sentences comes next (the form of HellaSwag,
                  arXiv:1905.07830)
    ppl           documents of 200 to 400 tokens; total log-likelihood

LAMBADA's passages were chosen by people who could guess the word; here nobody was asked. A rule stands
in: the word is a lower-case content word of at least three letters that ends a sentence, and of all such passages
those whose last word stands earlier in the passage are taken first, up to half of the examples,
because such a word can be guessed from the passage alone. The share is written in the card.

The three wrong endings of a continuation are the true endings of other items: same source, another
section, near in length in characters; how many of them are shorter is drawn evenly from 0 … 3. So the source
gives nothing away and the length little: `card.py` measures how often the true ending has each rank in length.

No sentence is used twice within a task, wrong endings aside. Between tasks the same text is used again.

The order is stratified by source: shuffled with a fixed seed, then merged so that among the first N examples,
for every N, each source has its share of all examples to within one (`stratified`).
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

from quantsweep.mini.corpus import Section, sentences

ITEM_SEED = 7
NUM_CLOZE = 2_400
NUM_CONTINUATION = 2_400
NUM_DOCUMENTS = 400
MIN_PASSAGE_WORDS = 12
MAX_PASSAGE_TOKENS = 120
NEAREST = 12  # endings on either side in length from which wrong ones are drawn
MIN_DOCUMENT_TOKENS, MAX_DOCUMENT_TOKENS = 200, 400
# Sources of continuous prose; glosses and dictionary entries have no sentence that follows from another.
PROSE = ("sotu", "kjv_bible", "jane_austen", "moby_dick", "jargon_file", "nltk_inaugural", "devils_dictionary")

CountTokens = Callable[[str], int]


class ClozeItem(TypedDict):
    """One passage; the task splits off the last word. `repeated`: the word stands earlier as well."""

    text: str
    repeated: bool
    source: str


class ContinuationItem(TypedDict):
    """`query` is followed by `choices[label]`."""

    query: str
    choices: list[str]
    label: int
    source: str


class Document(TypedDict):
    """A run of held-out text."""

    text: str
    source: str


Item = TypeVar("Item", ClozeItem, ContinuationItem, Document)


def stratified(items: Sequence[Item]) -> list[Item]:
    """The same items, sources in turn: next comes the source that is furthest behind its share.

    Within a source the order stays. For the bundled data every prefix then holds each source's share to
    within one example; a test counts.
    """
    waiting: dict[str, list[Item]] = {}
    for item in items:
        waiting.setdefault(item["source"], []).append(item)
    taken: Counter[str] = Counter()
    order: list[Item] = []
    for position in range(1, len(items) + 1):
        behind = {source: len(group) * position - taken[source] * len(items) for source, group in waiting.items()}
        source = max(sorted(waiting), key=behind.__getitem__)
        order.append(waiting[source][taken[source]])
        taken[source] += 1
    return order


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Consecutive sentences of one section, each with the white space before it; no gap between them."""

    source: str
    section: int
    sentences: tuple[str, ...]


# Words that grammar supplies: guessing one of them shows no grasp of the passage.
FUNCTION_WORDS = frozenset(
    """
    about above after again against all also alone although always among and another any are aught away
    because been before being below best between both but can cannot could did does doing done down each
    either else enough even ever every few for forever forth from had has hast hath have having hence her
    here hereafter herein hers herself him himself his hitherto how however indeed instead into its itself
    less let likewise little many may mine more most much must myself naught neither never nevertheless nor
    not nothing now off often once one only other others otherwise ought our ours ourselves out over own
    quite rather same shall shalt she should since some something soon still such than that the thee their
    theirs them themselves then thence there thereby therefore therein thereof thereon thereto these they
    thine thing things this those thou though through thus thy thyself together too toward towards under
    unless until unto upon very was way well were what whatever when whence where whereby wherein which
    while whither who whole whom whose why will wilt with within without would yet you your yours yourself
    yourselves anything everything somewhat anywhere everywhere nowhere elsewhere already almost perhaps two
    three four five six seven eight nine ten also said
    """.split()  # noqa: SIM905 - a block of words is read and extended more easily than a list
)


def stretches(sections: Sequence[Section]) -> list[Stretch]:
    """The continuous prose of the sections; headings and Shakespeare's verse are left out.

    A section of Austen, Melville, a speech or the Bible is one stretch, its paragraphs one after the
    other; in a dictionary each paragraph stands for itself.
    """
    found: list[Stretch] = []
    for number, section in enumerate(sections):
        if section.source not in PROSE:
            continue
        dictionary = section.source in ("jargon_file", "devils_dictionary")
        for block in section.text.split("\n\n") if dictionary else [section.text]:
            body = re.sub(r"^(CHAPTER|Chapter) [^\n]*\n+", "", block)
            parts = tuple(sentences_with_glue(body))
            if len(parts) >= 2:
                found.append(Stretch(source=section.source, section=number, sentences=parts))
    return found


def sentences_with_glue(text: str) -> Iterator[str]:
    """Sentences, each with the white space before it; joined they give the text back."""
    for line in re.findall(r"\n*[^\n]+", text):
        for number, sentence in enumerate(sentences(line)):
            yield sentence if number == 0 else " " + sentence


# ---------------------------------------------------------------------------------------------------- cloze

_CLAUSE_END = re.compile(r"(?<= )(?P<word>[a-z]{3,})(?=[.!?;:](\s|\W*$))")


def guessable_ends(sentence: str) -> list[re.Match[str]]:
    """Where a passage may end in `sentence`: content words before a stop, a colon or a semicolon."""
    return [m for m in _CLAUSE_END.finditer(sentence) if m["word"] not in FUNCTION_WORDS]


def cloze_items(sections: Sequence[Section], count: CountTokens) -> list[ClozeItem]:
    """`NUM_CLOZE` passages, at most half of them with the last word repeated from earlier."""
    repeated: list[ClozeItem] = []
    fresh: list[ClozeItem] = []
    for stretch in stretches(sections):
        for item in _cloze_of(stretch, count):
            (repeated if item["repeated"] else fresh).append(item)
    rng = random.Random(ITEM_SEED)
    rng.shuffle(repeated)
    rng.shuffle(fresh)
    chosen = repeated[: NUM_CLOZE // 2]
    chosen += fresh[: NUM_CLOZE - len(chosen)]
    rng.shuffle(chosen)
    return stratified(chosen)


def _cloze_of(stretch: Stretch, count: CountTokens) -> Iterator[ClozeItem]:
    """Passages of one stretch that do not overlap; those with a repeated word take what they need first."""
    used = [False] * len(stretch.sentences)
    for want_repeated in (True, False):
        for end in range(1, len(stretch.sentences)):
            start = _passage_start(stretch, used, end, count)
            if start is None:
                continue
            for match in guessable_ends(stretch.sentences[end]):
                before = "".join(stretch.sentences[start:end]) + stretch.sentences[end][: match.start()]
                repeated = re.search(rf"\b{match['word']}\b", before.lower()) is not None
                if repeated == want_repeated and len(before.split()) >= MIN_PASSAGE_WORDS:
                    used[start : end + 1] = [True] * (end + 1 - start)
                    text = (before + match["word"]).strip()
                    yield ClozeItem(text=text, repeated=repeated, source=stretch.source)
                    break


def _passage_start(stretch: Stretch, used: Sequence[bool], end: int, count: CountTokens) -> int | None:
    """First sentence of the longest unused passage that ends with sentence `end`; None if under two."""
    start = end
    while start > 0 and end - start < 5 and not used[start - 1]:
        if count("".join(stretch.sentences[start - 1 : end + 1])) > MAX_PASSAGE_TOKENS:
            break
        start -= 1
    return start if start < end and not used[end] else None


# --------------------------------------------------------------------------------------------- continuation


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    source: str
    section: int
    query: str
    ending: str


def continuation_items(sections: Sequence[Section], count: CountTokens) -> list[ContinuationItem]:
    """`NUM_CONTINUATION` items of four endings each; the label is uniform over the four places."""
    pairs = [pair for stretch in stretches(sections) for pair in _pairs_of(stretch, count)]
    rng = random.Random(ITEM_SEED + 1)
    items = [item for pair in pairs if (item := _with_distractors(pair, pairs, rng)) is not None]
    rng.shuffle(items)
    return stratified(items[:NUM_CONTINUATION])


def _pairs_of(stretch: Stretch, count: CountTokens) -> Iterator[_Pair]:
    """Context of two to four sentences and the sentence after it, without reuse."""
    start = 0
    for end in range(2, len(stretch.sentences)):
        ending = stretch.sentences[end].strip()
        if end - start < 2 or not 6 <= len(ending.split()) <= 40:
            continue
        first = max(start, end - 4)
        while first < end - 2 and count("".join(stretch.sentences[first:end])) > MAX_PASSAGE_TOKENS:
            first += 1
        query = "".join(stretch.sentences[first:end]).strip()
        if count(query) <= MAX_PASSAGE_TOKENS and len(query.split()) >= MIN_PASSAGE_WORDS:
            yield _Pair(source=stretch.source, section=stretch.section, query=query, ending=ending)
            start = end + 1


def _with_distractors(pair: _Pair, pairs: Sequence[_Pair], rng: random.Random) -> ContinuationItem | None:
    """The item with three endings near in length; None at the ends of a source's range of lengths.

    Drawing the nearest on both sides alike would leave the true ending in the middle: the longest of four
    in one item of eight. So its rank in length is drawn first, and as many shorter and longer endings.
    """

    def length(ending: str) -> tuple[int, str]:
        return len(ending), ending

    others = {p.ending for p in pairs if p.source == pair.source and p.section != pair.section} - {pair.ending}
    ordered = sorted(others, key=length)
    place = bisect_left(ordered, length(pair.ending), key=length)
    shorter, longer = ordered[max(0, place - NEAREST) : place], ordered[place : place + NEAREST]
    num_shorter = rng.randrange(4)
    if len(shorter) < 3 or len(longer) < 3:
        return None
    wrong = rng.sample(shorter, num_shorter) + rng.sample(longer, 3 - num_shorter)
    rng.shuffle(wrong)
    label = rng.randrange(4)
    choices = [*wrong[:label], pair.ending, *wrong[label:]]
    return ContinuationItem(query=pair.query, choices=choices, label=label, source=pair.source)


# ------------------------------------------------------------------------------------------------ documents


def documents(sections: Sequence[Section], count: CountTokens) -> list[Document]:
    """`NUM_DOCUMENTS` documents of 200 to 400 tokens, from all sources in their shares of the split."""
    rng = random.Random(ITEM_SEED + 2)
    found = [doc for section in sections for doc in _documents_of(section, count, rng)]
    rng.shuffle(found)
    return stratified(found[:NUM_DOCUMENTS])


def _documents_of(section: Section, count: CountTokens, rng: random.Random) -> Iterator[Document]:
    text, goal = "", rng.randint(MIN_DOCUMENT_TOKENS, MAX_DOCUMENT_TOKENS - 40)
    for piece in sentences_with_glue(section.text):
        if text and count(text + piece) > MAX_DOCUMENT_TOKENS:
            text = ""  # a sentence too long to add: start anew, rather than cut inside a sentence
        text += piece
        if goal <= count(text.strip()) <= MAX_DOCUMENT_TOKENS:
            yield Document(text=text.strip(), source=section.source)
            text, goal = "", rng.randint(MIN_DOCUMENT_TOKENS, MAX_DOCUMENT_TOKENS - 40)
