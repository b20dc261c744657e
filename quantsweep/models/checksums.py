"""Checksums of tensors, as quick as memory, and the structure of modules: proof that a model is what it was.

The bits are read as 64-bit words and laid out in rows of 1024; the sums of all rows and of all columns, in
wrap-around arithmetic, are hashed.  Every change of a single word alters one row and one column.  Only reductions
are needed, so a checksum is as quick as memory on a CPU (8 GB/s a core) and on a GPU, where the weights need not be
fetched: the sums of all tensors of one device leave it together.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

_WORD_BYTES = 8
_ROW_WORDS = 1024
_RESIZED_IN_FORWARD = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies follow the length of the input: those tables are no weights."""


def checksum(tensor: Tensor) -> str:
    """A hash of the bits of `tensor` (any shape and dtype, taken in row-major order), the same on every device.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    return checksums([tensor])[0]


def checksums(tensors: Sequence[Tensor]) -> list[str]:
    """The checksum of each of several tensors; one transfer a device."""
    digests = [""] * len(tensors)
    places: dict[torch.device, list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        places[tensor.device].append(number)
    for numbers in places.values():
        sums = [_sums(tensors[number]) for number in numbers]
        fetched = torch.split(torch.cat(sums).cpu(), [len(part) for part in sums])
        for number, part in zip(numbers, fetched, strict=True):
            digests[number] = hashlib.sha256(part.numpy().tobytes()).hexdigest()
    return digests


def state_checksums(model: nn.Module) -> dict[str, str]:
    """The checksum of each parameter and buffer of a model by name; shared ones appear under each of their names.

    Tables that the forward pass itself recomputes are left out.
    """
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    named = {name: tensor for name, tensor in named.items() if not _is_recomputed(model, name)}
    distinct = {id(tensor): tensor for tensor in named.values()}
    hashed = dict(zip(distinct, checksums(list(distinct.values())), strict=True))
    return {name: hashed[id(tensor)] for name, tensor in named.items()}


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose checksums differ, or that only one of the two has."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


Structure = tuple[Hashable, ...]
"""What a module is beside its numbers: itself, its parameters, its hooks, its own `forward`, its mode."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def structure_of(module: nn.Module, name: str = "") -> dict[str, Structure]:
    """The structure of a module and of all within it, by dotted name (`name` is its own): equal while nothing is replaced or hung on."""
    return {inner_name: structure_of_module(inner) for inner_name, inner in module.named_modules(prefix=name, remove_duplicate=False)}


def structure_of_module(module: nn.Module) -> Structure:
    """That of one module alone."""
    parameters = tuple((name, id(parameter)) for name, parameter in module._parameters.items())
    hooks = tuple(tuple(getattr(module, kind)) for kind in _HOOKS)  # each hook has a number that no other one gets
    return id(module), parameters, tuple(module._buffers), hooks, id(module.__dict__.get("forward")), module.training


def _sums(tensor: Tensor) -> Tensor:
    """Sums of columns and of rows, then the words that fill no row (padded with zeros): int64, one-dimensional."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if bits.storage_offset() % _WORD_BYTES:
        bits = bits.clone()  # a slice that begins in the middle of a word
    in_rows = bits.numel() - bits.numel() % (_WORD_BYTES * _ROW_WORDS)
    rows = bits[:in_rows].view(torch.int64).view(-1, _ROW_WORDS)
    rest = nn.functional.pad(bits[in_rows:], (0, -bits.numel() % _WORD_BYTES))
    return torch.cat([rows.sum(dim=0), rows.sum(dim=1), rest.view(torch.int64)])


def _is_recomputed(model: nn.Module, name: str) -> bool:
    if not name.endswith("inv_freq"):
        return False
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    return any(f"'{kind}'" in str(getattr(config, "rope_parameters", None)) for kind in _RESIZED_IN_FORWARD)
