"""The tokens that calibrated steps of a trial look at: N sequences of T tokens, cut out of a text by a named rule.

    joined_crops      all documents joined by blank lines; crops at random places     GPTQ's loaders of WikiText-2 and PTB
    document_crops    a random document that is long enough; a random crop of it      GPTQ's loader of C4
    concatenated      short documents one behind the other, cut into blocks           AWQ's loader of the Pile: fewer blocks than samples

What planning knows of it (content of the text, rule, samples, length, seed, version; the tokenizer's files by the model's content) is in
the trial's identity; the tokens' own hash is found here and recorded.

Tokens are kept in the user's cache, by what they are made from: text, rule and tokenizer.  The trials and workers of a node make them
once; two at a time make the same file, and whichever comes last replaces it whole.  A cache that is lost or damaged is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import tokenizers
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantsweep.errors import TextError
from quantsweep.signs import OnProgress
from quantsweep.storage.files import write_atomic
from quantsweep.texts.cuts import Encode, Tokens, blocks_of_documents, crops_of_documents, crops_of_stream, join
from quantsweep.texts.documents import read_documents
from quantsweep.trial.identity import cache_dir
from quantsweep.trial.specs import CalibrationSpec, content_hash

PARAGRAPHS = "\n\n"

_Rule = Callable[[pa.ChunkedArray, Encode, CalibrationSpec], Tokens]
RULES: Mapping[str, _Rule] = {
    "joined_crops": lambda documents, encode, spec: crops_of_stream(
        join(documents, PARAGRAPHS, encode), spec.num_samples, spec.sequence_length, spec.seed
    ),
    "document_crops": lambda documents, encode, spec: crops_of_documents(
        documents, encode, spec.num_samples, spec.sequence_length, spec.seed
    ),
    "concatenated": lambda documents, encode, spec: blocks_of_documents(
        documents, encode, spec.num_samples, spec.sequence_length, spec.seed
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationTokens:
    """tokens_NT: int64, on the host.  hash: 32 hexadecimal digits over their number, length and values."""

    tokens_NT: Tensor
    hash: str


def load_tokens(
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    num_embeddings: int,
    on_progress: OnProgress = lambda: None,
) -> CalibrationTokens:
    """The calibration tokens of a trial for one tokenizer.

    max_length, num_embeddings: the model's context, and how many tokens it knows.  on_progress: called while the text is tokenized.
    Raises TextError where the text cannot be had or is too short, or where the model cannot read the tokens.
    """
    if problem := spec.problem_of_context(max_length):
        raise TextError(problem)
    tokens_NT = _cached(spec, tokenizer, on_progress)
    if (largest := int(tokens_NT.max())) >= num_embeddings:
        raise TextError(
            f"calibration {spec.name}: the tokenizer gives token {largest}, and the model's embedding has {num_embeddings}: "
            "they do not belong together"
        )
    return CalibrationTokens(torch.from_numpy(tokens_NT), _hash(tokens_NT))


def _cached(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, on_progress: OnProgress) -> Tokens:
    file = _cache_file(spec, tokenizer)
    if file is not None and (known := _read(file)) is not None:
        return known
    tokens_NT = _make(spec, tokenizer, on_progress)
    if file is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written to is no reason to fail
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, lambda stream: np.savez(stream, tokens_NT=tokens_NT, hash=_hash(tokens_NT)), durable=False)
    return tokens_NT


def _make(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, on_progress: OnProgress) -> Tokens:
    def encode(text: str) -> list[int]:
        on_progress()
        return list(tokenizer(text, verbose=False).input_ids)

    documents = read_documents(spec)
    on_progress()
    try:
        return RULES[spec.rule](documents, encode, spec)
    except TextError as error:
        raise TextError(f"calibration {spec.name} ({spec.text_source}): {error}") from error


def _cache_file(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Where the tokens are kept; None where text or tokenizer cannot be told by their content."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if spec.content is None or backend is None:
        return None
    of_tokenizer = hashlib.sha256(f"{type(tokenizer).__name__} {tokenizers.__version__} {backend.to_str()}".encode()).hexdigest()
    return cache_dir() / "tokens" / f"{content_hash([spec.identity(), of_tokenizer], 32)}.npz"


def _read(file: Path) -> Tokens | None:
    """Tokens as they were kept; None for a file that is not there, or is not whole."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            tokens_NT: Tokens = kept["tokens_NT"]
            return tokens_NT if str(kept["hash"]) == _hash(tokens_NT) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _hash(tokens_NT: Tokens) -> str:
    digest = hashlib.sha256(f"{tokens_NT.shape} ".encode())
    digest.update(np.ascontiguousarray(tokens_NT, dtype="<i8").tobytes())
    return digest.hexdigest()[:32]
