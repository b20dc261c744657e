"""The bundled tasks load through lm-eval from any directory, and the card's numbers are theirs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from quantsweep.mini import ROOT, TASK_NAMES, TASKS_DIR
from quantsweep.mini.baselines import Trigram
from quantsweep.mini.card import REFERENCE_LIMIT, judge, ranks_in_length, render, saved_with
from quantsweep.mini.evaluate import accuracy, ratio, run_lm_eval, summarise
from quantsweep.mini.items import FUNCTION_WORDS, Document, stratified
from quantsweep.mini.vocabulary import VOCABULARY_SIZE

CARD = json.loads((ROOT / "card.json").read_text(encoding="utf-8"))


def rows(name: str) -> list[dict]:
    text = (TASKS_DIR / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def smallest() -> dict:
    """lm-eval's samples of the smallest model on the first examples of each task."""
    return run_lm_eval("mini-neox-0.3m", limit=REFERENCE_LIMIT)


def test_lm_eval_finds_the_tasks_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    assert set(TASK_NAMES) <= set(manager.all_tasks)
    loaded = manager.load(list(TASK_NAMES))["tasks"]
    for name, count in zip(TASK_NAMES, CARD["tasks"]["examples"].values(), strict=True):
        assert len(list(loaded[name].test_docs())) == count


def test_the_smallest_model_reproduces_the_card(smallest: dict) -> None:
    found = summarise(smallest)["bits_per_byte"].value
    # Sums of a few thousand fp32 log-probabilities; the order of additions differs between machines.
    assert found == pytest.approx(CARD["models"]["mini-neox-0.3m"][f"bits_per_byte_first_{REFERENCE_LIMIT}"], abs=2e-4)


def test_prompts_have_the_forms_of_lambada_and_hellaswag(smallest: dict) -> None:
    context, target = smallest["mini_cloze"][0]["arguments"][0]
    assert context + target == smallest["mini_cloze"][0]["doc"]["text"]
    assert target.startswith(" ")
    endings = [arguments[1] for arguments in smallest["mini_continuation"][0]["arguments"]]
    assert endings == [" " + choice for choice in smallest["mini_continuation"][0]["doc"]["choices"]]


def test_task_data_are_the_cards() -> None:
    for name, digest in CARD["tasks"]["sha256"].items():
        assert hashlib.sha256((TASKS_DIR / "data" / f"{name}.jsonl").read_bytes()).hexdigest() == digest


def test_cloze_words_are_content_words() -> None:
    found = rows("cloze")
    assert len(found) >= 2_000
    for row in found:
        before, _, word = row["text"].rpartition(" ")
        assert len(word) >= 3
        assert word.isalpha()
        assert word.islower()
        assert word not in FUNCTION_WORDS
        assert len(before.split()) >= 12
    assert 0.15 < np.mean([row["repeated"] for row in found]) < 0.6


def test_continuations_have_four_different_endings_and_no_favoured_place() -> None:
    found = rows("continuation")
    assert len(found) >= 2_000
    assert all(len(set(row["choices"])) == 4 for row in found)
    assert all(len(row["query"].split()) >= 12 for row in found)
    places = np.bincount([row["label"] for row in found], minlength=4) / len(found)
    assert places == pytest.approx([0.25] * 4, abs=0.03)
    by_length = [sorted(range(4), key=lambda i: (len(row["choices"][i]), row["choices"][i])).index(row["label"]) for row in found]
    ranks = np.bincount(by_length, minlength=4) / len(found)
    assert ranks == pytest.approx([0.25] * 4, abs=0.03), "length must not tell the true ending"
    split = ranks_in_length(found)
    assert split == CARD["tasks"]["continuation_ranks_in_characters"]
    words = ranks_in_length(found, lambda text: len(text.split()))
    assert words == CARD["tasks"]["continuation_ranks_in_words"]
    assert np.array(words) / len(found) == pytest.approx([0.25] * 4, abs=0.01)
    assert max(split) / len(found) == pytest.approx(CARD["tasks"]["continuation_second_shortest_acc"])
    assert max(split) / len(found) < 0.28


def test_ranks_in_length_split_ties() -> None:
    assert ranks_in_length([{"choices": ["a", "bb", "cc", "dddd"], "label": 2}]) == [0.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("name", ["cloze", "continuation", "ppl"])
def test_every_prefix_holds_each_source_in_its_share(name: str) -> None:
    found = [row["source"] for row in rows(name)]
    totals, counts = Counter(found), Counter()
    for length, source in enumerate(found, start=1):
        counts[source] += 1
        off = {s: counts[s] - total * length / len(found) for s, total in totals.items()}
        assert max(map(abs, off.values())) < 1, (length, off)


def test_stratified_keeps_the_items_and_the_order_within_a_source() -> None:
    items = [Document(text=str(i), source="a" if i < 6 else "b") for i in range(9)]
    found = stratified(items)
    assert [item["source"] for item in found] == list("abaabaaba")
    assert sorted(found, key=lambda item: item["text"]) == items
    assert [item["text"] for item in found if item["source"] == "a"] == list("012345")


def test_ppl_documents_need_more_than_one_window() -> None:
    assert len(rows("ppl")) >= 300
    assert CARD["tasks"]["ppl_longer_than_context"] >= 100


def test_every_gate_holds() -> None:
    assert CARD["gates"] == judge(CARD)
    assert [gate for gate, passed in CARD["gates"].items() if not passed] == []


def test_the_card_is_rendered_from_its_numbers() -> None:
    assert (ROOT / "CARD.md").read_text(encoding="utf-8") == render(CARD)


def test_the_card_names_the_version_that_saved_the_models() -> None:
    assert CARD["versions"]["saved_with_transformers"] == saved_with()


def test_accuracy_has_the_binomial_error() -> None:
    estimate = accuracy(np.array([1.0, 0.0, 0.0, 0.0]))
    assert estimate.value == 0.25
    assert estimate.standard_error == pytest.approx((0.25 * 0.75 / 3) ** 0.5)


def test_ratio_has_no_error_when_documents_agree() -> None:
    estimate = ratio(np.array([2.0, 4.0, 8.0]), np.array([1.0, 2.0, 4.0]))
    assert (estimate.value, estimate.standard_error, estimate.n) == (2.0, 0.0, 3)


def test_trigram_probabilities_sum_to_one_and_prefer_what_was_seen() -> None:
    stream = np.random.default_rng(0).zipf(1.5, size=5_000) % VOCABULARY_SIZE
    model = Trigram(np.concatenate([stream, [7, 8, 9] * 50]))
    every = np.arange(VOCABULARY_SIZE)
    unigram = model.unigrams.probability(np.zeros_like(every), every, np.full(len(every), 1 / VOCABULARY_SIZE))
    bigram = model.bigrams.probability(np.full_like(every, 8), every, unigram)
    trigram = model.trigrams.probability(np.full_like(every, 7 * VOCABULARY_SIZE + 8), every, bigram)
    assert [unigram.sum(), bigram.sum(), trigram.sum()] == pytest.approx([1.0, 1.0, 1.0])
    assert trigram.argmax() == 9
