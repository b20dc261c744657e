"""Small models and tasks with one thing wrong or unusual, made from the bundled ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from quantsweep.mini import model_path

START = "<|endoftext|>"
LLAMA = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


def mini_copy(folder: Path) -> Path:
    """A copy of mini-neox-0.3m."""
    shutil.copytree(model_path("mini-neox-0.3m"), folder)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key away."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def special_tokens(model: Path, template: str) -> Path:
    """Have a model's tokenizer put special tokens around each text, as Llama's does: "<|endoftext|> $A"."""
    file = str(model / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[(START, 0)])
    tokenizer.save(file)
    return model


def without_special_tokens(model: Path) -> Path:
    """Take BOS and EOS away from a model's tokenizer."""
    edit_json(model / "tokenizer_config.json", bos_token=None, eos_token=None, unk_token=None, pad_token=None)
    return model


def overflowing(folder: Path) -> Path:
    """A Llama whose weights float16 can hold, and whose last activations it cannot."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama(folder), dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 6e4
        model.model.norm.weight[3:] = 6e4
    model.save_pretrained(folder)
    return folder


def llama(folder: Path, **changes: Any) -> Path:
    """A Llama of random weights (always the same) with the bundled tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(std=0.05)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path("mini-neox-0.3m") / name, folder)
    return folder
