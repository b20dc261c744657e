"""The original weights of a loaded model, kept on the host without a second copy where that is possible.

A safetensors file is mapped into memory: its tensors are views of the page cache, which the system
shares between processes and gives up under pressure.  A parameter's original is the tensor in the
file that casts to the very bits the parameter has; this is verified once, when the model is loaded.
Where the file has no such tensor (weights that were converted on load, files in another layout), a
clone in host memory takes its place: the same bits, more memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class FileTensors(Mapping[str, Tensor]):
    """The tensors of all safetensors files of a folder, by name; memory-mapped, read when looked at."""

    def __init__(self, folder: Path | None) -> None:
        files = [] if folder is None else sorted(folder.glob("*.safetensors"))
        handles = [safe_open(file, framework="pt", device="cpu") for file in files]
        self._handle_of = {name: handle for handle in handles for name in handle.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._handle_of[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._handle_of)

    def __len__(self) -> int:
        return len(self._handle_of)


def original_of(parameter_name: str, parameter: Tensor, files: FileTensors, base_prefix: str) -> Tensor:
    """A host tensor that casts to the bits of `parameter` (same shape): a view of its file, or a clone.

    base_prefix: what the model puts before the names of its base model, e.g. "transformer"; files
    saved from the base model alone lack it, files of some other tools have one more.
    """
    for name in _names_in_file(parameter_name, base_prefix):
        if name in files and _is_original(candidate := files[name], parameter):
            return candidate
    return parameter.detach().to(device="cpu", copy=True)


def _names_in_file(parameter_name: str, base_prefix: str) -> tuple[str, ...]:
    prefix = f"{base_prefix}."
    return (parameter_name, parameter_name.removeprefix(prefix), prefix + parameter_name)


def _is_original(candidate: Tensor, parameter: Tensor) -> bool:
    if candidate.shape != parameter.shape or not candidate.is_floating_point():
        return False
    # Compared where the parameter lies: for a GPU that is quicker than fetching the parameter.
    return torch.equal(candidate.to(parameter.device).to(parameter.dtype), parameter)
