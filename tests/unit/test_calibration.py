"""Calibration tokens: the published loaders' cuts, texts of every kind, the cache, what is refused; and what texts share."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantsweep.calibration import data
from quantsweep.calibration.data import load_tokens
from quantsweep.errors import ConfigurationError, TextError
from quantsweep.mini import CALIBRATION_TEXT, EVALUATION_TEXT, model_path
from quantsweep.texts.documents import read_documents
from quantsweep.texts.ngrams import shared_windows
from quantsweep.trial.identity import text_content
from quantsweep.trial.specs import CalibrationSpec

SECTIONS = [section for section in CALIBRATION_TEXT.read_text().split("\n\n\n") if section]
DOCUMENTS = [document for section in SECTIONS for document in section.split("\n\n")][::5]
CONF = Path(__file__).resolve().parents[2] / "conf" / "calibration"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantsweep" / "tokens"


def make_tokenizer(*, begins: bool) -> PreTrainedTokenizerBase:
    """The bundled models' own; begins: it puts a start token before each text, as OPT's and Llama's do."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("mini-neox-0.3m"))
    if begins:
        token = (tokenizer.eos_token, tokenizer.eos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token[0]} $A", special_tokens=[token])
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "begins"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return make_tokenizer(begins=request.param)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "text.jsonl", DOCUMENTS)


def write(file: Path, documents: list[Any], column: str = "text") -> Path:
    file.write_text("".join(json.dumps({"id": n, column: document}) + "\n" for n, document in enumerate(documents)))
    return file


def spec_of(path: Path | str, **changes: Any) -> CalibrationSpec:
    values = {"name": "c", "path": str(path), "num_samples": 12, "sequence_length": 64, "seed": 3, "content": text_content(str(path))}
    return CalibrationSpec(**{**values, **changes})


def tokens_of(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> torch.Tensor:
    return load_tokens(spec, tokenizer, **{"max_length": 256, "num_embeddings": 2048, **changes}).tokens_NT


class TestRules:
    """Each against the published loader, written out once more with the libraries that it uses."""

    def test_joined_crops_are_those_of_gptqs_loader_of_wikitext(self, tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
        whole = tokenizer("\n\n".join(DOCUMENTS), return_tensors="pt").input_ids
        random.seed(3)
        expected = []
        for _ in range(12):
            start = random.randint(0, whole.shape[1] - 64 - 1)
            expected.append(whole[:, start : start + 64])
        found = tokens_of(spec_of(text), tokenizer)
        assert found.dtype == torch.int64
        assert torch.equal(found, torch.cat(expected))

    def test_document_crops_are_those_of_gptqs_loader_of_c4(self, tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
        random.seed(3)
        expected = []
        for _ in range(12):
            while True:
                tokens = tokenizer(DOCUMENTS[random.randint(0, len(DOCUMENTS) - 1)], return_tensors="pt").input_ids
                if tokens.shape[1] > 64:
                    break
            start = random.randint(0, tokens.shape[1] - 64 - 1)
            expected.append(tokens[:, start : start + 64])
        assert torch.equal(tokens_of(spec_of(text, rule="document_crops"), tokenizer), torch.cat(expected))

    def test_concatenated_blocks_are_those_of_awqs_loader_of_the_pile(self, tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
        samples = []
        for row in datasets.Dataset.from_dict({"text": DOCUMENTS}).shuffle(seed=42):
            encoded = tokenizer.encode(row["text"].strip())
            if len(encoded) > 512 or not encoded:
                continue
            samples.append(torch.tensor(encoded))
            if len(samples) == 40:
                break
        whole = torch.cat(samples)
        expected = torch.stack([whole[start : start + 128] for start in range(0, len(whole) - 127, 128)])
        found = tokens_of(spec_of(text, rule="concatenated", num_samples=40, sequence_length=128, seed=42), tokenizer)
        assert len(found) < 40
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("rule", list(data.RULES))
    def test_seed_samples_and_length_are_looked_at(self, tokenizer: PreTrainedTokenizerBase, text: Path, rule: Any) -> None:
        spec = spec_of(text, rule=rule)
        hashes = {
            load_tokens(each, tokenizer, max_length=256, num_embeddings=2048).hash
            for each in (spec, *(dataclasses.replace(spec, **c) for c in ({"seed": 4}, {"num_samples": 6}, {"sequence_length": 32})))
        }
        assert len(hashes) == 4


def test_the_bundled_text_serves_the_bundled_models(tokenizer: PreTrainedTokenizerBase) -> None:
    config = yaml.safe_load((CONF / "mini.yaml").read_text())
    found = tokens_of(CalibrationSpec(**config), tokenizer)
    assert found.shape == (128, 256)
    assert shared_windows(tokenizer.batch_decode(found), [EVALUATION_TEXT.read_text()]) == 0.0


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_text_that_ships_names_its_place_and_a_rule_that_exists(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    if path.stem not in ("none", "local"):
        assert CalibrationSpec(**config).rule in data.RULES


class TestFiles:
    def test_every_kind_of_file_holds_the_same_documents(self, tmp_path: Path) -> None:
        documents = ["Ein Übel.\n", "", 'two "lines"\nof it', "…"]
        plain = write(tmp_path / "a.jsonl", documents)
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
        with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
            stream.write(plain.read_bytes())
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": documents}), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet"):
            assert read_documents(spec_of(tmp_path / name)).to_pylist() == documents
        (tmp_path / "a.txt").write_text(documents[2])
        assert read_documents(spec_of(tmp_path / "a.txt")).to_pylist() == [documents[2]]

    def test_a_column_has_a_name(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.jsonl", ["one"], column="sentence")
        assert read_documents(spec_of(file, column="sentence")).to_pylist() == ["one"]
        with pytest.raises(TextError, match=r"has no column text; it has id, sentence: give calibration\.column="):
            read_documents(spec_of(file))

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.jsonl", b"", "is empty"),
            ("a.jsonl", b'{"text": ""}\n', r"holds no text \(column text\)"),
            ("a.jsonl", b"no json\n", "cannot be read: JSON parse error"),
            ("a.jsonl", b'{"text": 3}\n', "cannot be read: JSON parse error"),
            ("a.json.gz", b"no gzip", "cannot be read"),
            ("a.parquet", b"no parquet", "cannot be read"),
            ("a.txt", b"\xff\xfe", "cannot be read: 'utf-8' codec"),
            ("a.csv", b"text\nx\n", r"give a \.txt, \.jsonl, \.json, \.parquet file"),
        ],
    )
    def test_what_is_no_text_is_refused_in_words(self, tmp_path: Path, name: str, content: bytes, said: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=said):
            read_documents(spec_of(tmp_path / name, content=None))

    def test_a_text_that_changed_after_planning_is_refused(self, tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
        spec = spec_of(text)
        write(text, DOCUMENTS[1:])
        with pytest.raises(TextError, match="is not the one that was planned"):
            tokens_of(spec, tokenizer)

    def test_what_was_never_fetched_is_not_fetched_by_a_worker(self, tokenizer: PreTrainedTokenizerBase) -> None:
        spec = CalibrationSpec(name="c", hub_id="a/b", files="*.parquet", num_samples=1, sequence_length=8)
        with pytest.raises(TextError, match=r"no commit is pinned for it\. Run `quantsweep prewarm`"):
            tokens_of(spec, tokenizer)
        with pytest.raises(TextError, match=r"a/b@cccccccccccc/\*\.parquet is not in the hub's cache"):
            tokens_of(dataclasses.replace(spec, revision="c" * 40), tokenizer)


class TestRefused:
    def test_too_little_text(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        file = write(tmp_path / "a.jsonl", ["A few words.", "And more of them."])
        for rule, said in (
            ("joined_crops", r"calibration c \(.*a\.jsonl\): the text has \d+ tokens, too few for crops of 64"),
            ("document_crops", "none of the text's 2 documents has more than 64 tokens"),
            ("concatenated", "2 documents of at most 512 tokens have .* too few for one block of 64"),
        ):
            with pytest.raises(TextError, match=said):
                tokens_of(spec_of(file, rule=rule), tokenizer)

    def test_sequences_longer_than_the_models_context(self, tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
        with pytest.raises(TextError, match=r"sequences of 257 tokens were asked for.*has 256; give calibration\.sequence_length=256"):
            tokens_of(spec_of(text, sequence_length=257), tokenizer)

    def test_tokens_that_the_model_does_not_know(self, tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
        with pytest.raises(TextError, match="the model's embedding has 9: they do not belong together"):
            tokens_of(spec_of(text), tokenizer, num_embeddings=9)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"path": None}, r"give a text, calibration\.path=FILE"),
            ({"rule": "crops"}, r"calibration\.rule 'crops' is not one of joined_crops, document_crops, concatenated"),
            ({"num_samples": 0}, r"calibration\.num_samples must be at least 1"),
            ({"seed": -1}, r"calibration\.seed"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_runs(self, text: Path, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigurationError, match=said):
            dataclasses.replace(spec_of(text), **changes)


class TestCache:
    def test_tokens_are_made_once_and_known_by_their_content(
        self, tokenizer: PreTrainedTokenizerBase, text: Path, cache: Path, tmp_path: Path
    ) -> None:
        first = tokens_of(spec_of(text), tokenizer)
        (kept,) = cache.iterdir()
        moved = spec_of(shutil.move(text, tmp_path / "moved.jsonl"))
        (tmp_path / "moved.jsonl").unlink()  # what is in the cache needs no text
        assert torch.equal(tokens_of(moved, tokenizer), first)
        kept.write_bytes(kept.read_bytes()[:-30])
        with pytest.raises(TextError, match="cannot be looked at"):
            tokens_of(moved, tokenizer)

    def test_a_damaged_file_is_made_again(self, tokenizer: PreTrainedTokenizerBase, text: Path, cache: Path) -> None:
        first = tokens_of(spec_of(text), tokenizer)
        (kept,) = cache.iterdir()
        np.savez(kept, tokens_NT=np.zeros((12, 64), np.int64), hash="0" * 32)
        assert torch.equal(tokens_of(spec_of(text), tokenizer), first)

    def test_other_tokenizers_have_other_tokens(self, text: Path, cache: Path) -> None:
        for begins in (False, True):
            tokens_of(spec_of(text), make_tokenizer(begins=begins))
        assert len(list(cache.iterdir())) == 2

    def test_several_at_once(self, tokenizer: PreTrainedTokenizerBase, text: Path, cache: Path) -> None:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: tokens_of(spec_of(text), tokenizer), range(8)))
        assert all(torch.equal(each, found[0]) for each in found)
        assert [file.suffix for file in cache.iterdir()] == [".npz"]

    def test_a_cache_that_cannot_be_written_to_is_no_reason_to_fail(
        self, tokenizer: PreTrainedTokenizerBase, text: Path, cache: Path
    ) -> None:
        cache.parent.parent.parent.mkdir(exist_ok=True)
        cache.parent.parent.write_text("a file where the folder would be")
        assert tokens_of(spec_of(text), tokenizer).shape == (12, 64)


class TestIdentity:
    def test_the_content_counts_and_not_the_place(self, text: Path, tmp_path: Path) -> None:
        spec = spec_of(text)
        moved = dataclasses.replace(spec, path="/elsewhere.jsonl", name="other")
        assert moved.identity() == spec.identity()
        for change in ({"content": "sha256:1"}, {"column": "x"}, {"rule": "concatenated"}, {"version": 2}, {"seed": 0}, {"num_samples": 1}):
            assert dataclasses.replace(spec, **change).identity() != spec.identity()


class TestOverlap:
    WINDOWS = tuple(" ".join(f"w{window}x{word}" for word in range(40)) for window in range(4))

    def test_a_planted_run_of_thirteen_words_is_found(self) -> None:
        planted = "before it " + " ".join(self.WINDOWS[2].upper().split()[5:18]) + " behind it"
        assert shared_windows(self.WINDOWS, ["nothing of it", planted]) == 0.25
        assert shared_windows(self.WINDOWS, [planted, self.WINDOWS[0], planted]) == 0.5

    def test_twelve_words_are_not_enough(self) -> None:
        assert shared_windows(self.WINDOWS, [" ".join(self.WINDOWS[2].split()[5:17])]) == 0.0

    def test_nothing_shares_nothing(self) -> None:
        assert shared_windows(self.WINDOWS, []) == 0.0
        assert shared_windows(["few words", ""], ["few words"]) == 0.0
        assert np.isnan(shared_windows([], ["x"]))

    def test_it_is_the_share_that_plain_sets_of_runs_give(self) -> None:
        generator = random.Random(0)
        texts = [" ".join(generator.choice("abc") for _ in range(60)) for _ in range(20)]
        windows, documents = texts[:10], texts[10:]

        def runs(text: str) -> set[tuple[str, ...]]:
            words = text.split()
            return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}

        known = set().union(*map(runs, documents))
        expected = np.mean([bool(runs(window) & known) for window in windows])
        assert shared_windows(windows, documents, n=5) == expected
