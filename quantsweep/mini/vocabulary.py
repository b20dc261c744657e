"""The tokenizer of the family: byte-level BPE with 2,048 entries, one for all seven models.

    256 bytes + 1,791 merges learned on the training split + <|endoftext|>

Byte-level means that every text has a tokenization and that decoding gives it back to the byte, so bits
per byte can be compared between models. 2,048 entries are few on purpose: in a model 64 wide, an
embedding of GPT-2's size would be 90 % of the parameters, and quantization of the decoder blocks would
hardly show.

`<|endoftext|>` (id 0) is bos, eos, unk and pad at once, as in GPT-NeoX.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 2_048
CONTEXT_LENGTH = 256
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# No model_max_length: whoever tokenizes a long text to cut it in windows would be warned for nothing. The
# context length stands in each model's config.json.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "add_prefix_space": False,
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from training text; deterministic for the same texts in the same order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote, without transformers."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
