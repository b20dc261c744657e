"""Where a decoder-only language model keeps the linear layers that quantization is about.

    model ── embeddings, positions
          ── decoder blocks  (a ModuleList: gpt_neox.layers, model.decoder.layers, transformer.h, …)
          │     └─ attention and MLP projections      <- these, and only these
          ── final norm, output head

All published comparisons keep embeddings, norms and the output head at 16 bit; so do we.  Nothing
outside the blocks is touched: OPT-350m's `project_in` and `project_out` lie between embeddings and
blocks and stay at 16 bit too.

Blocks are found by structure, not by name: the longest ModuleList of one class that is not inside
another ModuleList (which would be a block's own list of experts).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from quantsweep.errors import ModelError

# Weight layouts: nn.Linear stores out×in, GPT-2's Conv1D stores in×out.
_LINEAR = (nn.Linear, Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """True when the module stores its weight as in×out."""
    return isinstance(module, Conv1D)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks; raises ModelError when there is none."""
    candidates = [(name, blocks) for name, blocks in _outer_module_lists(model, "") if _are_blocks(blocks)]
    if not candidates:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks with linear layers: no decoder-only transformer")
    return max(candidates, key=lambda item: len(item[1]))


def quantizable_linears(model: nn.Module, unquantized: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """Linear layers inside the decoder blocks by dotted name, in the order of the model.

    unquantized: name patterns (fnmatch, on the full name) of layers to leave out.
    Raises ModelError for a pattern that matches nothing, and for weights in the blocks that are linear
    maps in another guise (fused experts) unless a pattern of `unquantized` names them.
    """
    prefix, blocks = decoder_blocks(model)
    linears = {f"{prefix}.{name}": module for name, module in blocks.named_modules() if isinstance(module, _LINEAR)}
    others = [f"{prefix}.{name}" for name, parameter in blocks.named_parameters() if parameter.ndim > 2]
    _check_patterns(unquantized, [*linears, *others])
    if fused := [name for name in others if not _matches(name, unquantized)]:
        raise ModelError(
            f"{type(model).__name__}: {len(fused)} weights in the decoder blocks have more than two dimensions ({fused[0]}, …) "
            "and cannot be quantized; to study the model with them at 16 bit, name them in its `unquantized`"
        )
    return {name: module for name, module in linears.items() if not _matches(name, unquantized)}


def _outer_module_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        full_name = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield full_name, child
        else:
            yield from _outer_module_lists(child, f"{full_name}.")


def _are_blocks(modules: nn.ModuleList) -> bool:
    classes = {type(module) for module in modules}
    return len(classes) == 1 and any(isinstance(inner, _LINEAR) for inner in modules[0].modules())


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ModelError(f"unquantized pattern {pattern!r} matches no linear layer; the layers are named like {', '.join(names[:8])}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
