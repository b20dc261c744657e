"""The original weights of a loaded model, kept on the host without a second copy where that is possible.

A safetensors file is mapped into memory: its tensors are views of the page cache, which the system
shares between processes and gives up under pressure.  A parameter's original is the tensor in the
file that casts to the very bits the parameter has; this is verified once, when the model is loaded.
Where the file has no such tensor (weights that were converted on load, files in another layout), a
clone in host memory takes its place: the same bits, more memory.

An expert that the model keeps as a slice of a 3-D parameter stands in the file as a slice too, or as
matrices of its own: gate and up apart, which then are the two parts of one original.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_EXPERT_MATRICES = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
}
"""What files call the matrices of one expert: Mixtral's own names, and those of most others."""


class FileTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, by name; memory-mapped, read when looked at."""

    def __init__(self, files: Iterable[Path]) -> None:
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


def expert_original_of(parameter_name: str, expert: int, weight: Tensor, files: FileTensors, base_prefix: str) -> tuple[Tensor, ...]:
    """The same for the slice `weight` (out × in) of one expert: parts whose rows, one above the other, are its rows.

    parameter_name: that of the parameter of all experts (E × out × in).
    """
    for name in _names_in_file(parameter_name, base_prefix):
        if name in files and expert < len(fused := files[name]) and _is_original(candidate := fused[expert], weight):
            return (candidate,)
        for names in _matrices_in_file(name, expert):
            if all(part in files for part in names) and _are_parts(parts := tuple(files[part] for part in names), weight):
                return parts
    return (weight.detach().to(device="cpu", copy=True),)


def _matrices_in_file(parameter_name: str, expert: int) -> Iterator[tuple[str, ...]]:
    experts, _, kind = parameter_name.rpartition(".")
    for place in (experts, experts.replace(".mlp.", ".block_sparse_moe.")):
        for matrices in _EXPERT_MATRICES[kind]:
            yield tuple(f"{place}.{expert}.{matrix}.weight" for matrix in matrices)


def _are_parts(parts: tuple[Tensor, ...], weight: Tensor) -> bool:
    sizes = [len(part) for part in parts]
    return sum(sizes) == len(weight) and all(map(_is_original, parts, torch.split(weight, sizes)))


def _names_in_file(parameter_name: str, base_prefix: str) -> tuple[str, ...]:
    prefix = f"{base_prefix}."
    return (parameter_name, parameter_name.removeprefix(prefix), prefix + parameter_name)


def _is_original(candidate: Tensor, parameter: Tensor) -> bool:
    if candidate.shape != parameter.shape or not candidate.is_floating_point():
        return False
    # Compared where the parameter lies: for a GPU that is quicker than fetching the parameter.
    return torch.equal(candidate.to(parameter.device).to(parameter.dtype), parameter)
