"""GGUF files as ordinary safetensors folders, converted once and kept in the user's cache.

A GGUF file holds weights that are quantized already; transformers gives their dequantized values,
slowly (tens of seconds for 135M parameters).  The conversion is done once for each file content:

    <cache>/gguf/<hash of the file>-<version of the conversion>/   config.json, model.safetensors (float32), tokenizer files

float32, because dequantized values (16-bit scale × 4-bit code + 16-bit minimum) need more bits than
16-bit floats have.  Such weights lie on a coarse grid: another quantizer on the same grid finds them
nearly lossless, so they are no ground for a claim about 4-bit formats in general.

transformers carries over a part of what a GGUF file says, and drops the rest without a word (Llama 3's RoPE scaling, the
experts of a Mixtral).  So what the file says and the conversion has no place for is looked for, and the file refused.

The folder appears in one step (written beside, then renamed), so that any number of processes may
ask for it at once: the first to finish wins, the others use its folder.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from quantsweep.checkpoints.content import CONTENT_FILE
from quantsweep.checkpoints.progress import no_progress_bars
from quantsweep.errors import ModelError
from quantsweep.trial.identity import cache_dir, gguf_path, local_content

_CONVERSION = 3
"""Raised when the same file is converted otherwise, or is refused now."""
_TURNED = "rope.dimension_count"
"""Units of each head that RoPE turns; transformers takes it for the size of a head, or for nothing."""


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
    # Declared to return the model alone; with `output_loading_info` it returns a pair.
    from_pretrained: Callable[..., tuple[PreTrainedModel, Mapping[str, Any]]] = AutoModelForCausalLM.from_pretrained  # type: ignore[assignment]
    try:
        said = _read(file)
        if lost := _lost(said):
            raise ModelError(_incomplete(file, lost))
        dequantized, info = from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError, RuntimeError) as error:  # the last: tensors that do not fit what was made of the metadata
        raise _unreadable(file, error) from error
    if turned := _turned_otherwise(said, dequantized):
        raise ModelError(_incomplete(file, turned))
    if keys := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ModelError(_incomplete(file, sorted(map(str, keys))))
    # The loaded model carries marks of its quantized origin and refuses to be saved; a plain one takes its weights over.
    if hasattr(dequantized.config, "quantization_config"):
        del dequantized.config.quantization_config
    plain = AutoModelForCausalLM.from_config(dequantized.config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    try:
        plain.load_state_dict(dequantized.state_dict())
    except RuntimeError as error:  # versions of transformers differ in where they find that sizes do not fit
        raise _unreadable(file, error) from error
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / CONTENT_FILE).write_text(local_content(folder))


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file} cannot be read as a GGUF model: {error}; use the checkpoint in safetensors")


@dataclass(frozen=True)
class _Said:
    """What a file says of its architecture: its name, the values under it, and tables of RoPE that are not all ones."""

    kind: str
    values: Mapping[str, Any]
    tables: tuple[str, ...]


def _read(file: Path) -> _Said:
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    said = {name: field.contents() for name, field in reader.fields.items()}
    kind = str(said.get("general.architecture"))
    own = {name.removeprefix(f"{kind}."): value for name, value in said.items() if name.startswith(f"{kind}.")}
    tables = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_")}
    return _Said(kind, own, tuple(name for name, table in tables.items() if not bool((table == 1).all())))


def _lost(said: _Said) -> list[str]:
    """What the file says of the architecture, and tensors that it has, for which the conversion has no place."""
    mapping: dict[str, Any] = GGUF_CONFIG_MAPPING  # not declared more closely
    known = mapping.get(said.kind, {})
    # Names that the table maps to nothing are known to it, and carried nowhere.
    carried = {key for key, place in known.items() if place is not None} - {_TURNED}
    later = {_TURNED} if known.get(_TURNED) is None else set()  # held against the model itself
    others = {key: value for key, value in said.values.items() if key not in carried | later}
    return [f"{said.kind}.{key}={value}" for key, value in others.items() if not _says_nothing(key, value, said.values)] + [*said.tables]


def _turned_otherwise(said: _Said, model: PreTrainedModel) -> list[str]:
    """What the file says of how many units of each head RoPE turns, if the model that was made of it turns another number."""
    turned = {2 * table.numel() for name, table in model.named_buffers() if name.endswith("inv_freq")}
    wanted = said.values.get(_TURNED)
    return [f"{said.kind}.{_TURNED}={wanted}"] if wanted is not None and turned and turned != {wanted} else []


def _says_nothing(key: str, value: Any, own: Mapping[str, Any]) -> bool:
    """True for what says what the configuration has by default, and for what no forward pass depends on."""
    if key == _TURNED and value == own.get("attention.key_length"):  # the whole of each head
        return True
    if key in ("attention.key_length", "attention.value_length", _TURNED):
        return bool(value * own["attention.head_count"] == own["embedding_length"])
    if key == "attention.sliding_window":
        return bool(value >= own["context_length"])
    defaults = {"vocab_size": value, "rope.scaling.type": "none", "rope.scaling.factor": 1, "rope.scale_linear": 1, "expert_count": 0}
    return key in defaults and bool(value == defaults[key])


def _incomplete(file: Path, lost: list[str]) -> str:
    shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
    return f"{file}: the installed transformers would drop what this GGUF file says ({shown}); use the checkpoint in safetensors"


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was quicker, with the same content
            raise
