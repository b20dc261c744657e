"""The parts of prewarm that touch weights and data, each in a process of its own.

    python -m quantsweep.operations.prewarm_child task REQUEST ANSWER        load a task through lm-eval, which fetches its data
    python -m quantsweep.operations.prewarm_child convert REQUEST ANSWER     pickled weights → safetensors

Of their own, because they import torch and lm-eval (seconds, gigabytes), and because a checkpoint
that is not what it says may take down nothing but this process.  REQUEST and ANSWER are JSON files.

A pickle is a program.  It is read with `torch.load(weights_only=True)`, which builds tensors and refuses
everything else, once; what is loaded ever after are the safetensors files, whose bits are compared
with the originals' here.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quantsweep.checkpoints.content import CONTENT_FILE
from quantsweep.errors import ModelError, QuantsweepError
from quantsweep.storage.files import write_text
from quantsweep.trial.identity import local_content
from quantsweep.trial.specs import TaskSpec

BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


def main(argv: list[str]) -> int:
    """Do one job; an error of the user's is an answer too, so that the parent can say it in its own words."""
    job, request, answer = argv
    run = {"task": fetch_task, "convert": convert_request}[job]
    try:
        result = run(json.loads(Path(request).read_text()))
    except QuantsweepError as error:
        result = {"error": str(error)}
    write_text(Path(answer), json.dumps(result))
    return 0


# --- tasks -------------------------------------------------------------------------------------------------------------------


def fetch_task(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load one task as a worker does; what its data are and where in the cache of `datasets` they lie."""
    import datasets  # seconds that a conversion need not pay

    from quantsweep.tasks.definition import data_revision, load_task

    task = load_task(TaskSpec(**request["task"]), Path(request["task_path"]) if request["task_path"] else None)
    root = Path(datasets.config.HF_DATASETS_CACHE)
    files = [Path(entry["filename"]) for split in dict(task.dataset or {}).values() for entry in split.cache_files]
    return {
        "dataset": str(task.get_config("dataset_path") or ""),
        "config": task.get_config("dataset_name"),
        "revision": data_revision(task),
        "cached": sorted({file.parent.relative_to(root).as_posix() for file in files if file.is_relative_to(root)}),
    }


# --- conversion --------------------------------------------------------------------------------------------------------------


def convert_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """Convert one checkpoint; the size and SHA-256 of each file of the new folder."""
    convert(Path(request["source"]), Path(request["target"]), request["companions"])
    files = sorted(Path(request["target"]).iterdir())
    return {"files": {file.name: {"size": file.stat().st_size, "sha256": _sha256_of(file)} for file in files}}


def convert(source: Path, target: Path, companions: list[str]) -> None:
    """Make the folder `target` of a checkpoint with pickled weights: safetensors, and copies of `companions` (config, tokenizer).

    The folder appears in one step.  Raises ModelError for anything but tensors, and for weights that the model ties
    together and that differ.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        shards = _shards(source)
        _write_weights(source, shards, folder, dropped=_redundant(source, shards))
        for name in companions:
            shutil.copyfile(source / name, folder / name)
        (folder / CONTENT_FILE).write_text(local_content(folder))
        folder.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)  # half of an earlier one
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shards(source: Path) -> list[str]:
    if not (source / BIN_INDEX).is_file():
        return [BIN]
    return sorted(set(json.loads((source / BIN_INDEX).read_text())["weight_map"].values()))


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(f"{file.name} is not a plain file of weights, and nothing else in it is loaded: {_first_line(error)}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ModelError(f"{file.name} holds something that is no tensor; only plain weights are converted")
    return dict(content)


def _redundant(source: Path, shards: list[str]) -> set[str]:
    """Names of weights that the model ties to another one that is there too, once they are found equal."""
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    prefix = f"{model.base_model_prefix}."
    ties = {name.removeprefix(prefix): other.removeprefix(prefix) for name, other in model.all_tied_weights_keys.items()}
    wanted = set(ties) | set(ties.values())
    found: dict[str, tuple[str, str]] = {}
    for shard in shards:
        for name, tensor in _read(source / shard).items():
            short = name.removeprefix(prefix)
            if short in wanted:
                found[short] = (name, hashlib.sha256(_bits(tensor).numpy().data).hexdigest())
    dropped = set()
    for name, other in ties.items():
        if name in found and other in found:
            if found[name][1] != found[other][1]:
                raise ModelError(
                    f"the model ties {name} to {other}, and the checkpoint has different numbers for them: "
                    "one of the two would be lost, so it is not converted"
                )
            dropped.add(found[name][0])
    return dropped


def _write_weights(source: Path, shards: list[str], folder: Path, *, dropped: set[str]) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: value for key, value in _read(source / shard).items() if key not in dropped}
        # A copy of each: safetensors refuses tensors that share memory.
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})
        _check_equal(tensors, load_file(folder / name), shard)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def _check_equal(original: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor], shard: str) -> None:
    if original.keys() != written.keys() or not all(torch.equal(_bits(original[key]), _bits(written[key])) for key in original):
        raise ModelError(f"what was written of {shard} is not what was read (a failing disk?); it was thrown away")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
