"""The bundled models load offline and are what the card says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantsweep.mini import MODEL_NAMES, MODELS_DIR, ROOT, model_path
from quantsweep.mini.vocabulary import CONTEXT_LENGTH, END_OF_TEXT_ID, VOCABULARY_SIZE

CARD = json.loads((ROOT / "card.json").read_text(encoding="utf-8"))
TEXT = 'Hello  world’s end.\n\n"Upon my word!" <|endoftext|>In the beginning ☃'


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_folder_holds_the_named_models_and_no_more() -> None:
    assert sorted(path.name for path in MODELS_DIR.iterdir()) == sorted(MODEL_NAMES)
    assert sum(path.stat().st_size for path in MODELS_DIR.rglob("*") if path.is_file()) <= 40 * 2**20


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'mini-neox-7b'.*mini-neox-0\.3m"):
        model_path("mini-neox-7b")


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_weights_are_fp16_safetensors_with_rows_in_multiples_of_64(name: str) -> None:
    files = {path.name for path in model_path(name).iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    with safe_open(model_path(name) / "model.safetensors", framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a mapping
            tensor = tensors.get_tensor(key)
            assert tensor.dtype == torch.float16
            assert torch.isfinite(tensor).all()
            if tensor.ndim == 2:
                assert tensor.shape[1] % 64 == 0, key


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_model_loads_offline_with_tied_embeddings(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.max_position_embeddings == CONTEXT_LENGTH
    assert model.config.vocab_size == VOCABULARY_SIZE
    assert sum(p.numel() for p in model.parameters()) == CARD["models"][name]["parameters"]["all"]
    logits = model(torch.zeros(1, CONTEXT_LENGTH, dtype=torch.int64)).logits
    assert logits.shape == (1, CONTEXT_LENGTH, VOCABULARY_SIZE)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_card_speaks_of_these_weights(name: str) -> None:
    digest = hashlib.sha256((model_path(name) / "model.safetensors").read_bytes()).hexdigest()
    assert digest == CARD["models"][name]["sha256"]


def test_all_models_have_one_tokenizer_and_it_loses_nothing() -> None:
    assert len({(model_path(name) / "tokenizer.json").read_bytes() for name in MODEL_NAMES}) == 1
    for name in MODEL_NAMES:
        tokenizer = AutoTokenizer.from_pretrained(model_path(name))
        assert len(tokenizer) == VOCABULARY_SIZE
        ids = tokenizer(TEXT).input_ids
        assert END_OF_TEXT_ID in ids
        assert ids[0] != END_OF_TEXT_ID, "no token is added before a text"
        assert tokenizer.decode(ids) == TEXT
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        assert ends == {END_OF_TEXT_ID}


def test_training_tokens_are_windows_of_every_place(tmp_path: Path) -> None:
    from quantsweep.mini.train import BATCH_WINDOWS, learning_rate, window_starts

    starts = window_starts(num_tokens=100_000, num_steps=12, seed=1)
    assert starts.shape == (12, BATCH_WINDOWS)
    assert (starts >= 0).all()
    assert (starts + CONTEXT_LENGTH < 100_000).all()
    first_epoch = starts.reshape(-1)[:390]
    assert len(set(first_epoch.tolist())) > 385, "an epoch visits a window once"
    assert learning_rate(1.0, 0, 10_000) < 0.01 < learning_rate(1.0, 300, 10_000)
    assert learning_rate(1.0, 10_000, 10_000) == pytest.approx(0.05)
