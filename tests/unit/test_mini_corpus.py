"""The bundled texts: split as stated, apart from the training text, cleaned of what is not prose."""

from __future__ import annotations

import numpy as np
import pytest

from quantsweep.mini import CALIBRATION_TEXT, EVALUATION_TEXT
from quantsweep.mini.corpus import (
    OVERLAP_WORDS,
    SOURCES,
    Section,
    assign,
    contained,
    distinct,
    drop_overlap,
    ngrams,
    passages,
    sentences,
    split_raw,
    word_ngrams,
)
from quantsweep.mini.prepare import SECTION_BREAK

WORDS = " ".join(f"w{i}" for i in range(100))


def test_held_out_texts_share_no_13_words_with_the_training_text_or_each_other() -> None:
    training = ngrams(split_raw()["train"], OVERLAP_WORDS)
    assert len(training) > 5_000_000
    seen = training
    for path in (EVALUATION_TEXT, CALIBRATION_TEXT):
        text = path.read_text(encoding="utf-8")
        found = [word_ngrams(p, OVERLAP_WORDS) for section in text.split(SECTION_BREAK) for p in passages(section)]
        held_out = distinct(found)
        assert len(held_out) > 30_000
        assert contained(held_out, seen).sum() == 0, f"{path.name} repeats 13 words of a split before it"
        seen = distinct([seen, held_out])


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_the_split_fills_its_budgets_and_depends_on_the_seed_alone(source) -> None:
    units = ["x" * 2_000] * 400
    splits = assign(source, units)
    assert splits == assign(source, units)
    for split, budget in (("evaluation", source.evaluation_bytes), ("calibration", source.calibration_bytes)):
        assert budget - 2_000 < splits.count(split) * 2_000 <= budget


def test_word_ngrams_ignore_case_and_punctuation() -> None:
    assert np.array_equal(word_ngrams("In the BEGINNING, God", 3), word_ngrams("in the beginning god", 3))
    assert len(word_ngrams("one two", 3)) == 0


def test_drop_overlap_cuts_where_text_was_removed() -> None:
    training = Section(source="a", text=WORDS)
    before, after = "Alpha beta gamma delta. " * 20, "Epsilon zeta eta theta. " * 20
    held_out = Section(source="b", text=f"{before.strip()}\n\n{WORDS}\n\n{after.strip()}")
    kept = drop_overlap([held_out], ngrams([training], OVERLAP_WORDS))
    assert [s.text for s in kept] == [before.strip(), after.strip()]


def test_twelve_common_words_are_not_an_overlap() -> None:
    common = " ".join(WORDS.split()[:12])
    held_out = Section(source="b", text="So it began with these words and went on. " * 8 + common)
    assert drop_overlap([held_out], ngrams([Section(source="a", text=WORDS)], OVERLAP_WORDS)) == [held_out]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        pytest.param("He came. She went.", ["He came.", "She went."], id="plain"),
        pytest.param("Mr. Darcy came. Mrs. Bennet went.", ["Mr. Darcy came.", "Mrs. Bennet went."], id="titles"),
        pytest.param('"Go!" he said. "No."', ['"Go!" he said.', '"No."'], id="quotes"),
        pytest.param("The U. S. Senate met. It rose.", ["The U. S. Senate met.", "It rose."], id="initials"),
    ],
)
def test_sentences(paragraph: str, expected: list[str]) -> None:
    assert sentences(paragraph) == expected
    assert " ".join(sentences(paragraph)) == paragraph


def test_bundled_texts_hold_no_packaging() -> None:
    for path in (EVALUATION_TEXT, CALIBRATION_TEXT):
        text = path.read_text(encoding="utf-8")
        for artefact in ("00-database", "\ufffd", "<|endoftext|>", "Dramatis Personae", "-->", "─"):
            assert artefact not in text
