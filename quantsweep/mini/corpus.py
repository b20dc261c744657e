"""The corpus of the miniature family: sources, cleaning, splits, and the proof that splits are apart.

From `corpus/<source>.txt.xz` to three lists of sections:

    read -> clean -> cut into units -> assign units to train | calibration | evaluation -> drop overlap

*Unit* is the grain of holding out: a whole chapter (Austen, Melville), scene (Shakespeare), speech
(State of the Union), or a run of neighbouring paragraphs, verses or entries where the source marks
nothing larger (inaugural addresses, Bible, dictionaries). Lines are never sampled one by one: a held-out
line between two training lines would be half known.

*Overlap*: presidents quote themselves and gospels quote each other, so units alone do not keep the
splits apart. Every held-out passage (a paragraph, or a few sentences of a long one) that shares a run
of 13 words with the training text is removed from the held-out side, as GPT-3 (arXiv:2005.14165,
appendix C) cleaned its benchmarks; words are lower-cased and stripped of punctuation first. The
calibration text is cleaned against the evaluation text in the same way. What remains has no common
13-gram by construction; the share of common 8-grams, which are mostly formulas ("of the senate and of
the house of representatives"), is reported in the card.

Everything is a function of the committed files and `SPLIT_SEED`.
"""

from __future__ import annotations

import hashlib
import lzma
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from quantsweep.mini import ROOT
from quantsweep.texts.ngrams import OVERLAP_WORDS, word_ngrams, words_of

CORPUS_DIR = ROOT / "corpus"
SPLIT_SEED = 20240229

Split = Literal["train", "calibration", "evaluation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file of the corpus, where it is from, and how much of it is held out.

    `evaluation_bytes` and `calibration_bytes` are budgets in UTF-8 bytes before overlap is dropped.
    """

    name: str
    title: str
    origin: str
    licence: str
    unit: str
    clean: Callable[[str], str]
    cut: Callable[[str], list[str]]
    evaluation_bytes: int
    calibration_bytes: int

    @property
    def path(self) -> Path:
        """The compressed file."""
        return CORPUS_DIR / f"{self.name}.txt.xz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A unit of one source after cleaning; the text holds no end-of-text token."""

    source: str
    text: str


# ---------------------------------------------------------------------------------------------- cleaning

_TYPOGRAPHY = str.maketrans({
    "‘": "'", "’": "'", "´": "'", "“": '"', "”": '"', "—": "--", "–": "-",
    "‑": "-", "•": "-", "\t": " ", "\r": "",
})  # fmt: skip


def plain(text: str) -> str:
    """Typographic quotes and dashes to ASCII, runs of blanks to one.

    Some sources have `’`, some `'`. One form keeps a small vocabulary from holding every
    contraction twice.
    """
    text = text.translate(_TYPOGRAPHY)
    text = re.sub(r" +", " ", text)
    return re.sub(r" *\n *", "\n", text).strip()


def clean_prose(text: str) -> str:
    """Austen and Melville: `_italics_` lose their underscores, THE END and title lines go."""
    text = re.sub(r"_([^_\n]+)_", r"\1", plain(text))
    title = re.compile(r"(THE END|FINIS|\(\d{4}\)|[Bb]y|(By )?Jane Austen( \(\d{4}\))?|[A-Z ]{4,40})")
    return "\n\n".join(p for p in text.split("\n\n") if not title.fullmatch(p) or p.startswith("CHAPTER"))


def clean_bible(text: str) -> str:
    """One verse a line; a few verse numbers were left in the text and mark a verse of their own."""
    return re.sub(r" *\b\d{1,3}:\d{1,3} *", "\n", plain(text)).strip()


def clean_inaugural(text: str) -> str:
    """Mend what a lost Big5 encoding left in the later addresses: `\\ufffdX` was a dash."""
    text = re.sub(r"\ufffdX", "--", text)
    text = re.sub(r" ?\ufffdK", "...", text)
    text = re.sub(r"\ufffd\ufffds\b", "'s", text)
    return plain(text.replace("\ufffd\ufffd", '"').replace("\ufffd", ""))


def clean_shakespeare(text: str) -> str:
    """Drop the lists of persons before each ACT I; one line break a verse, two before a speaker."""
    text = re.sub(r"(?:^|\n\n)-->\n\n.*?(?=\n\nACT I\n)", "", plain(text), flags=re.DOTALL)
    lines = [line for line in text.split("\n\n") if line and line != "-->"]
    speaker = re.compile(r"[A-Z][A-Z .'-]{2,}|(SCENE|ACT) .*")
    return "".join(("\n\n" if speaker.fullmatch(line) else "\n") + line for line in lines).strip()


def clean_dictionary(text: str) -> str:
    """Jargon File and Devil's Dictionary: no dict-server header or index, no boxes, no link braces."""
    paragraphs = plain(text).split("\n\n")
    start = next(i for i, p in enumerate(paragraphs) if p.startswith(("PREFACE", "/dev/null")))
    kept = [p for p in paragraphs[start:-1] if not re.search(r"[─│┌├└□]|\d{40}", p)]
    return re.sub(r"[{}]|(?<!\w)_|_(?!\w)", "", "\n\n".join(kept))


# ----------------------------------------------------------------------------------------- cutting in units


def cut_before(pattern: str) -> Callable[[str], list[str]]:
    """A cutter that starts a unit at each paragraph that matches `pattern`."""
    boundary = re.compile(rf"\n\n(?={pattern})")

    def cut(text: str) -> list[str]:
        return [unit.strip() for unit in boundary.split(text) if unit.strip()]

    return cut


def cut_runs(separator: str, length: int) -> Callable[[str], list[str]]:
    """A cutter that joins neighbouring pieces into runs of at least `length` characters."""

    def cut(text: str) -> list[str]:
        runs: list[list[str]] = [[]]
        size = 0
        for piece in text.split(separator):
            runs[-1].append(piece)
            size += len(piece)
            if size >= length:
                runs.append([])
                size = 0
        return [separator.join(run) for run in runs if run]

    return cut


_PUBLIC_DOMAIN = "public domain"

SOURCES: tuple[Source, ...] = (
    Source(
        name="sotu", title="State of the Union addresses, 1790-2021",
        origin="speeches of the presidents of the United States", unit="speech",
        licence=f"{_PUBLIC_DOMAIN} (works of the United States government, 17 USC 105)",
        clean=plain, cut=cut_before(""), evaluation_bytes=420_000, calibration_bytes=110_000,
    ),
    Source(
        name="wordnet_glosses", title="WordNet 3.0, lemmas with their glosses and examples",
        origin="Princeton University, https://wordnet.princeton.edu", unit="run of 8,000 characters",
        licence="WordNet 3.0 licence (permissive; notice in LICENSES.md)",
        clean=plain, cut=cut_runs("\n", 8_000), evaluation_bytes=150_000, calibration_bytes=60_000,
    ),
    Source(
        name="kjv_bible", title="The Bible, King James version (1611)",
        origin="electronic text in the public domain", unit="run of verses, 12,000 characters",
        licence=_PUBLIC_DOMAIN, clean=clean_bible, cut=cut_runs("\n", 12_000),
        evaluation_bytes=240_000, calibration_bytes=50_000,
    ),
    Source(
        name="jane_austen", title="Jane Austen, six novels (1811-1818)",
        origin="electronic text in the public domain", unit="chapter", licence=_PUBLIC_DOMAIN,
        clean=clean_prose, cut=cut_before(r"(?:CHAPTER|Chapter) \w+\n"),
        evaluation_bytes=420_000, calibration_bytes=60_000,
    ),
    Source(
        name="moby_dick", title="Herman Melville, Moby-Dick (1851)",
        origin="electronic text in the public domain", unit="chapter", licence=_PUBLIC_DOMAIN,
        clean=clean_prose, cut=cut_before(r"CHAPTER \d+"),
        evaluation_bytes=90_000, calibration_bytes=20_000,
    ),
    Source(
        name="nltk_shakespeare", title="William Shakespeare, eight plays",
        origin="Jon Bosak's edition of the Moby Lexical Tools text, as in NLTK's data",
        licence=_PUBLIC_DOMAIN, unit="scene",
        clean=clean_shakespeare, cut=cut_before(r"(?:ACT|SCENE) [IVX]+"),
        evaluation_bytes=50_000, calibration_bytes=15_000,
    ),
    Source(
        name="jargon_file", title="The Jargon File 4.4.7 (2003)",
        origin="http://catb.org/~esr/jargon", licence=f"{_PUBLIC_DOMAIN} (so dedicated in its text)",
        unit="run of entries, 6,000 characters",
        clean=clean_dictionary, cut=cut_runs("\n\n", 6_000),
        evaluation_bytes=90_000, calibration_bytes=20_000,
    ),
    Source(
        name="nltk_inaugural", title="Inaugural addresses, 1789-2021",
        origin="speeches of the presidents of the United States, as in NLTK's data",
        licence=f"{_PUBLIC_DOMAIN} (works of the United States government, 17 USC 105)",
        unit="run of paragraphs, 8,000 characters",
        clean=clean_inaugural, cut=cut_runs("\n\n", 8_000),
        evaluation_bytes=50_000, calibration_bytes=15_000,
    ),
    Source(
        name="devils_dictionary", title="Ambrose Bierce, The Devil's Dictionary (1911)",
        origin="The Internet Wiretap edition (1993)", licence=_PUBLIC_DOMAIN,
        unit="run of entries, 6,000 characters",
        clean=clean_dictionary, cut=cut_runs("\n\n", 6_000),
        evaluation_bytes=25_000, calibration_bytes=8_000,
    ),
)  # fmt: skip


def read_units(source: Source) -> list[str]:
    """The cleaned units of one source, in the order of the file."""
    return source.cut(source.clean(lzma.decompress(source.path.read_bytes()).decode("utf-8", "replace")))


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, as the card records it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------ splitting


def assign(source: Source, units: Sequence[str]) -> list[Split]:
    """A split for each unit of a source: draw units until the budgets are full, the rest trains.

    A unit larger than a third of the budget is never drawn, so that no single speech (the longest has
    217,000 characters) becomes the whole of its source's held-out text.
    """
    order = list(range(len(units)))
    random.Random(f"{SPLIT_SEED}/{source.name}").shuffle(order)
    splits: list[Split] = ["train"] * len(units)
    budgets: list[tuple[Split, int]] = [
        ("evaluation", source.evaluation_bytes),
        ("calibration", source.calibration_bytes),
    ]
    for split, budget in budgets:
        room = budget
        for index in order:
            size = len(units[index].encode())
            if splits[index] == "train" and size <= min(room, max(budget // 3, 14_000)):
                splits[index] = split
                room -= size
    return splits


def split_raw() -> dict[Split, list[Section]]:
    """All sections by split, before overlap is dropped."""
    sections: dict[Split, list[Section]] = {"train": [], "calibration": [], "evaluation": []}
    for source in SOURCES:
        units = read_units(source)
        for unit, split in zip(units, assign(source, units), strict=True):
            sections[split].append(Section(source=source.name, text=unit))
    return sections


def split_corpus() -> dict[Split, list[Section]]:
    """All sections by split; no held-out passage shares a 13-gram with a split before it.

    The order is train, evaluation, calibration: evaluation is cleaned against train, calibration
    against both.
    """
    raw = split_raw()
    seen = ngrams(raw["train"], OVERLAP_WORDS)
    evaluation = drop_overlap(raw["evaluation"], seen)
    seen = distinct([seen, ngrams(evaluation, OVERLAP_WORDS)])
    return {
        "train": raw["train"],
        "evaluation": evaluation,
        "calibration": drop_overlap(raw["calibration"], seen),
    }


# -------------------------------------------------------------------------------------------------- overlap

_ABBREVIATIONS = r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bNo\.)(?<!\b[A-Z]\.)(?<!Messrs\.)"
_SENTENCE = re.compile(rf"(?<=[.!?]){_ABBREVIATIONS} (?=[\"'(]?[A-Z])|(?<=[.!?][\"')]) (?=[\"'(]?[A-Z])")


def sentences(paragraph: str) -> list[str]:
    """Sentences of one paragraph; joined by one blank they give the paragraph back."""
    return _SENTENCE.split(paragraph)


def ngrams(sections: Iterable[Section], n: int) -> npt.NDArray[np.uint64]:
    """Sorted distinct n-gram hashes of the sections joined in order.

    Joining adds a few n-grams across borders that no reader would see; for a test of absence that errs
    on the safe side.
    """
    return distinct([word_ngrams(" ".join(section.text for section in sections), n)])


def distinct(hashes: Sequence[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    """The distinct values of several arrays, sorted.

    `np.unique` gives the same; its hash table takes ten times as long on millions of hashes.
    """
    ordered = np.sort(np.concatenate(hashes))
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


def contained(needles: npt.NDArray[np.uint64], sorted_hay: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which needles occur in the sorted array: shape of `needles`."""
    if len(sorted_hay) == 0:
        return np.zeros(len(needles), dtype=np.bool_)
    places = np.minimum(np.searchsorted(sorted_hay, needles), len(sorted_hay) - 1)
    return np.asarray(sorted_hay[places] == needles, dtype=np.bool_)


def overlap_share(sections: Iterable[Section], sorted_hay: npt.NDArray[np.uint64], n: int) -> float:
    """Share of the distinct n-grams inside passages of `sections` that occur in `sorted_hay`."""
    needles = [word_ngrams(p, n) for section in sections for p in passages(section.text)]
    return float(contained(distinct(needles), sorted_hay).mean())


def passages(text: str) -> list[str]:
    """Cut a section in the pieces that overlap is judged by.

    A paragraph is a passage; one of more than 1,200 characters is cut at sentence ends. Verses and
    glosses that are separated by single line breaks are passages of one line each.
    """
    pieces: list[str] = []
    for line in re.split(r"\n+", text):
        run: list[str] = []
        for sentence in sentences(line):
            run.append(sentence)
            if sum(map(len, run)) >= 1_200:
                pieces.append(" ".join(run))
                run = []
        if run:
            pieces.append(" ".join(run))
    return [piece for piece in pieces if piece]


def drop_overlap(sections: Sequence[Section], sorted_hay: npt.NDArray[np.uint64]) -> list[Section]:
    """The sections without the parts that share a 13-gram with `sorted_hay`.

    The offending words are blanked out with the passages that hold them, and a section is *cut* there:
    text on both sides of a gap is never joined into something that nobody wrote.
    """
    kept: list[Section] = []
    for section in sections:
        kept.extend(
            Section(source=section.source, text=part)
            for part in _clean_parts(section.text, sorted_hay)
            if len(part) >= 200  # a shorter remnant makes neither a document nor an item
        )
    return kept


def _clean_parts(text: str, sorted_hay: npt.NDArray[np.uint64]) -> list[str]:
    pieces, glue = _pieces_with_glue(text)
    spans = [words_of(piece) for piece in pieces]
    owner = np.repeat(np.arange(len(pieces)), [len(words) for words in spans])
    # Over the whole section, so that a common run across a border of passages is found as well.
    hit = contained(word_ngrams(" ".join(" ".join(words) for words in spans), OVERLAP_WORDS), sorted_hay)
    dirty = np.zeros(len(pieces), dtype=np.bool_)
    for start in np.flatnonzero(hit):
        dirty[owner[start] : owner[start + OVERLAP_WORDS - 1] + 1] = True
    parts = [""]
    for piece, before, bad in zip(pieces, glue, dirty, strict=True):
        if bad:
            parts.append("")
        else:
            parts[-1] += (before if parts[-1] else "") + piece
    return [part for part in parts if part]


def _pieces_with_glue(text: str) -> tuple[list[str], list[str]]:
    """Passages and the white space that stood before each."""
    pieces: list[str] = []
    glue: list[str] = []
    position = 0
    for piece in passages(text):
        start = text.index(piece, position)
        glue.append(text[position:start])
        pieces.append(piece)
        position = start + len(piece)
    return pieces, glue
