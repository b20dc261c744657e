"""GGUF files as ordinary safetensors folders, converted once and kept in the user's cache.

A GGUF file holds weights that are quantized already; transformers gives their dequantized values,
slowly (tens of seconds for 135M parameters).  The conversion is done once for each file content:

    <cache>/gguf/<hash of the file>-<version of the conversion>/   config.json, model.safetensors (float32), tokenizer files

float32, because dequantized values (16-bit scale × 4-bit code + 16-bit minimum) need more bits than
16-bit floats have.  Such weights lie on a coarse grid: another quantizer on the same grid finds them
nearly lossless, so they are no ground for a claim about 4-bit formats in general.

The folder appears in one step (written beside, then renamed), so that any number of processes may
ask for it at once: the first to finish wins, the others use its folder.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantsweep.errors import ModelError
from quantsweep.identity import cache_dir, gguf_path, local_content
from quantsweep.models.content import CONTENT_FILE
from quantsweep.models.progress import no_progress_bars

_CONVERSION = 2
"""Raised when the same file is converted otherwise, or is refused now."""


def converted_folder(path: Path, gguf_file: str) -> Path:
    """The safetensors folder of a GGUF file, converted now if it never was.

    Raises ModelError when the file or the Python package `gguf` is not there, or cannot be read.
    """
    file = gguf_path(path, gguf_file)
    target = cache_dir() / "gguf" / f"{local_content(path, gguf_file).removeprefix('sha256:')[:16]}-{_CONVERSION}"
    if not target.is_dir():
        _convert(file, target)
    return target


def _convert(file: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file} is a GGUF file, and the Python package gguf is not installed; install it (`pip install gguf`)")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        with no_progress_bars():
            _write_safetensors(file, folder)
        _publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_safetensors(file: Path, folder: Path) -> None:
    try:
        dequantized = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as a GGUF model: {error}") from error
    # The loaded model carries marks of its quantized origin and refuses to be saved; a plain one takes its weights over.
    if hasattr(dequantized.config, "quantization_config"):
        del dequantized.config.quantization_config
    plain = AutoModelForCausalLM.from_config(dequantized.config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(dequantized.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / CONTENT_FILE).write_text(local_content(folder))


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was quicker, with the same content
            raise
