"""What of its models a plan would quantize, and which of their architectures nobody has looked at.

A model's layers are found by structure (`quantsweep.models.blocks`), which is right for architectures that were looked at
and a guess for others: `quantsweep plan` lists them, and an unseen architecture is said at planning and in every row.
The list comes from a process of its own, since planning imports no torch, and is remembered in the user's cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantsweep.checkpoints import headers
from quantsweep.checkpoints.left_out import guesses_next_tokens
from quantsweep.checkpoints.pins import Pins, model_folder
from quantsweep.errors import ModelError
from quantsweep.storage.files import write_text
from quantsweep.trial.identity import CONFIG, cache_dir, resolve_path
from quantsweep.trial.specs import CalibrationSpec, ModelSpec, content_hash

_SECONDS = 300
_FINDER = Path(__file__).parents[1] / "models" / "blocks.py"


def folders(models: Iterable[ModelSpec], pins: Pins) -> dict[ModelSpec, Path]:
    """Where the config.json of each model lies; models of which none is here (not fetched, GGUF files) are left out."""
    found = {model: _folder(model, pins) for model in models}
    return {model: folder for model, folder in found.items() if folder is not None and (folder / CONFIG).is_file()}


def _folder(model: ModelSpec, pins: Pins) -> Path | None:
    if model.unavailable is not None or model.gguf_file is not None:
        return None
    if model.path is not None:
        return resolve_path(model.path)
    pin = pins.of_model(model)
    return None if pin is None else model_folder(str(model.hub_id), pin)


def unseen(places: Mapping[ModelSpec, Path]) -> tuple[str, ...]:
    """A sentence for each architecture that nobody has looked at."""
    names: dict[str, list[str]] = {}
    for model, folder in places.items():
        names.setdefault(headers.architecture(headers.read_config(folder)), []).append(model.name)
    return tuple(
        f"{kind} ({', '.join(dict.fromkeys(models))}): nobody has looked at which layers of this architecture are to be quantized; "
        "`quantsweep plan` lists them, the rest stays at 16 bit"
        for kind, models in sorted(names.items())
        if kind not in headers.KNOWN_ARCHITECTURES
    )


def problem_of_model(model: ModelSpec, calibration: CalibrationSpec | None, anatomical: Sequence[str]) -> str | None:
    """Why a model in a local folder cannot be quantized in this way; models of the hub and GGUF files are left to loading.

    anatomical: steps that must know what reads what in a block.
    """
    if model.path is None or model.gguf_file is not None:
        return None
    config = _local_config(model.path)
    length, kind = headers.max_length(config), headers.architecture(config)
    if calibration is not None and length is not None and (problem := calibration.problem_of_context(length)):
        return f"model {model.name}: {problem}"
    if anatomical and kind not in headers.KNOWN_ARCHITECTURES:
        return (
            f"{' and '.join(anatomical)} must know what reads what in a decoder block, and those of {kind} models ({model.name}) are not "
            f"described; described are {', '.join(headers.KNOWN_ARCHITECTURES)}"
        )
    return None


@cache
def _local_config(path: str) -> dict[str, Any]:
    return headers.read_config(resolve_path(path))


def left_out(places: Mapping[ModelSpec, Path]) -> tuple[str, ...]:
    """A sentence for each model whose checkpoint has layers that are none of the model that is scored."""
    found = {model.name: sorted(_left_out(folder)) for model, folder in places.items()}
    said = [
        f"{model}: {len(names)} tensors of its checkpoint ({names[0]}, …) guess tokens beyond the next"
        for model, names in found.items()
        if names
    ]
    unread = {model.name: _unread_parts(folder) for model, folder in places.items()}
    said += [
        f"{model}: {headers.WEIGHTS} is read, as transformers does, and not the files of its index ({parts[0]}, …)"
        for model, parts in unread.items()
        if parts
    ]
    return tuple(said)


def _unread_parts(folder: Path) -> list[str]:
    try:
        return headers.unread_parts(folder)
    except (ModelError, OSError):
        return []


def _left_out(folder: Path) -> set[str]:
    try:
        return guesses_next_tokens(headers.read_tensors(folder), headers.read_config(folder))
    except (ModelError, OSError):  # not all here: refused where that is asked
        return set()


def listed(places: Mapping[ModelSpec, Path]) -> dict[str, str]:
    """The layers that would be quantized by name of the model, in one line, or why that is not known."""
    lines: dict[str, str] = {}
    unknown: dict[ModelSpec, Path] = {}
    for model, place in places.items():
        known = _remembered(model, place)
        if known is None:
            unknown[model] = place
        else:
            lines[model.name] = known
    for (model, place), line in zip(unknown.items(), _ask(unknown), strict=True):
        lines[model.name] = line
        with contextlib.suppress(OSError):  # a cache that cannot be written to is no reason to fail
            _file(model, place).parent.mkdir(parents=True, exist_ok=True)
            write_text(_file(model, place), line)
    return {model.name: lines[model.name] for model in places}


def refuse_none(places: Mapping[ModelSpec, Path]) -> None:
    """Raise ModelError for models whose `unquantized` leaves nothing to quantize, or names layers that are not there."""
    asked = {model: place for model, place in places.items() if model.unquantized}
    for name, line in listed(asked).items():
        if line.startswith("none: "):
            raise ModelError(f"model {name} with unquantized={list(next(m.unquantized for m in asked if m.name == name))}: {line[6:]}")


def _remembered(model: ModelSpec, place: Path) -> str | None:
    try:
        return _file(model, place).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _file(model: ModelSpec, place: Path) -> Path:
    asked = [
        (place / CONFIG).read_text(encoding="utf-8"),
        list(model.unquantized),
        version("transformers"),
        _FINDER.read_text(encoding="utf-8"),
    ]
    return cache_dir() / "layers" / content_hash(asked)


def _ask(places: Mapping[ModelSpec, Path]) -> list[str]:
    if not places:
        return []
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps([[str(place), list(model.unquantized)] for model, place in places.items()]))
        argv = [sys.executable, "-P", "-m", "quantsweep.models.listing", str(asked), str(answered)]
        try:
            subprocess.run(
                argv, capture_output=True, text=True, timeout=_SECONDS, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            )
            answers = json.loads(answered.read_text())
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise ModelError(f"the layers of these models cannot be listed: {said[-1] if said else type(error).__name__}") from error
    return [_line(answer) for answer in answers]


def _line(answer: Mapping[str, Any]) -> str:
    """`gpt_neox.layers.*: attention.query_key_value, attention.dense × 4`."""
    if "refused" in answer:
        return f"none: {answer['refused']}"
    counts: dict[str, int] = answer["layers"]
    if not counts:
        return "none: its `unquantized` patterns leave no layer to quantize"
    prefix = next(iter(counts)).partition(".*.")[0] + ".*"  # all of them are in the list of the decoder blocks
    by_count: dict[int, list[str]] = {}
    for name, count in counts.items():
        by_count.setdefault(count, []).append(name.removeprefix(f"{prefix}."))
    groups = ", ".join(f"{', '.join(names)} × {count}" for count, names in by_count.items())
    return f"{prefix}: {groups}"
