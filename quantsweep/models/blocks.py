"""Where a decoder-only language model keeps the linear layers that quantization is about.

    model ── embeddings, positions
          ── decoder blocks  (a ModuleList: gpt_neox.layers, model.decoder.layers, transformer.h, …)
          │     └─ attention and MLP projections      <- these, and only these
          ── final norm, output head

All published comparisons keep embeddings, norms and the output head at 16 bit; so do we.  Nothing
outside the blocks is touched: OPT-350m's `project_in` and `project_out` lie between embeddings and
blocks and stay at 16 bit too.

Blocks are found by structure, not by name: in the model's decoder (of a model that also sees or hears: its language
model), the longest ModuleList that is not inside another ModuleList (which would be a block's own list of experts).

Experts (Mixtral, arXiv:2401.04088) come in two forms: modules of their own, whose linears are found
like all others, or all of a block in two 3-D parameters, of which each slice is a layer:

    gate_up_proj  E × 2I × H     …experts.gate_up_proj.3   2I×H: gate in the upper half of the rows, up in the lower
    down_proj     E × H × I      …experts.down_proj.3      H×I

What weighs experts stays at 16 bit: a linear map beside `experts` (a router, a gate of shared experts), all of a module
beside them that is called a router or a gate or ends in as many outputs as there are experts, and whatever is called a router.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantsweep.errors import ModelError

# Weight layouts: nn.Linear stores out×in, GPT-2's Conv1D stores in×out.
_LINEAR = (nn.Linear, Conv1D)


GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The 3-D parameters in which all experts of a block are stored."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where the weight of a linear layer is stored: a parameter of a module, or one expert's slice of it.

    transposed: stored as in×out.
    """

    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks; raises ModelError when there is none, or no telling which they are."""
    prefix, decoder = _decoder(model)
    candidates = [item for item in _outer_module_lists(decoder, prefix) if _has_linears(item[1])]
    if not candidates:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks with linear layers: no decoder-only transformer")
    name, blocks = max(candidates, key=lambda item: len(item[1]))
    rivals = [other for other, modules in candidates if len(modules) == len(blocks)]
    if len(rivals) > 1:
        raise ModelError(
            f"{type(model).__name__} has several lists of {len(blocks)} blocks ({', '.join(rivals)}): which decode is not known"
        )
    if len(kinds := sorted({type(block).__name__ for block in blocks})) > 1:
        raise ModelError(f"{type(model).__name__}: the blocks of {name} are of several kinds ({', '.join(kinds)}): no plain transformer")
    return name, blocks


def _decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """What decodes text, with the beginning of its names; the model itself unless it says more (`get_decoder` of transformers)."""
    decoder: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model  # type: ignore[no-untyped-call]
    names = [name for name, module in model.named_modules() if module is decoder]
    return (f"{names[0]}." if names and names[0] else "", decoder) if names else ("", model)


def quantizable_linears(model: nn.Module, unquantized: tuple[str, ...] = ()) -> dict[str, Place]:
    """Linear layers inside the decoder blocks by dotted name, in the order of the model.

    unquantized: name patterns (fnmatch, on the full name) of layers to leave out.
    Raises ModelError for a pattern that matches nothing, and for weights in the blocks that are linear
    maps in another guise (of more than two dimensions) unless a pattern of `unquantized` names them.
    """
    prefix, blocks = decoder_blocks(model)
    places = {f"{prefix}.{name}": place for name, place in _places(blocks)}
    known = {id(place.module.get_parameter(place.parameter)) for place in places.values()}
    others = [f"{prefix}.{name}" for name, weight in blocks.named_parameters() if weight.ndim > 2 and id(weight) not in known]
    _check_patterns(unquantized, [*places, *others])
    if unknown := [name for name in others if not _matches(name, unquantized)]:
        raise ModelError(
            f"{type(model).__name__}: {len(unknown)} weights in the decoder blocks have more than two dimensions ({unknown[0]}, …) "
            "and cannot be quantized; to study the model with them at 16 bit, name them in its `unquantized`"
        )
    return {name: place for name, place in places.items() if not _matches(name, unquantized)}


def _places(blocks: nn.ModuleList) -> Iterator[tuple[str, Place]]:
    for name, module in blocks.named_modules():
        if isinstance(module, _LINEAR):
            if not _is_router(name, blocks):
                yield name, Place(module=module, transposed=isinstance(module, Conv1D))
        elif _has_fused_experts(module):
            for parameter in (GATE_UP, DOWN):
                for expert in range(len(module.get_parameter(parameter))):
                    yield f"{name}.{parameter}.{expert}", Place(module=module, parameter=parameter, expert=expert)


def _is_router(name: str, blocks: nn.ModuleList) -> bool:
    """True for what weighs experts; the experts themselves and an MLP that is shared by all tokens are none."""
    parts = name.split(".")
    if "router" in parts:
        return True
    for depth in range(1, len(parts)):
        parent, beside = blocks.get_submodule(".".join(parts[:depth])), parts[depth]
        if not hasattr(parent, "experts") or beside == "experts":
            continue
        if depth == len(parts) - 1 or "gate" in beside.split("_") or "router" in beside.split("_"):
            return True
        layer = blocks.get_submodule(name)
        if layer.get_parameter("weight").shape[1 if isinstance(layer, Conv1D) else 0] == _num_experts(parent.experts):
            return True
    return False


def _num_experts(experts: object) -> int | None:
    """How many they are: modules of a list, or slices of a parameter."""
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    if isinstance(experts, nn.Module):
        return next((len(parameter) for parameter in experts.parameters() if parameter.ndim == 3), None)
    return len(experts) if isinstance(experts, nn.Parameter) else None


def _has_fused_experts(module: nn.Module) -> bool:
    """True for two 3-D parameters of E × 2I × H and E × H × I; stored in×out, no two sizes would fit so."""
    parameters = [getattr(module, name, None) for name in (GATE_UP, DOWN)]
    if not all(isinstance(parameter, nn.Parameter) and parameter.ndim == 3 for parameter in parameters):
        return False
    (experts, gate_up, hidden), down = (parameter.shape for parameter in parameters if parameter is not None)
    return (experts, hidden, gate_up) == (down[0], down[1], 2 * down[2])


def _outer_module_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        full_name = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield full_name, child
        else:
            yield from _outer_module_lists(child, f"{full_name}.")


def _has_linears(modules: nn.ModuleList) -> bool:
    return any(isinstance(inner, _LINEAR) for inner in modules.modules())


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ModelError(f"unquantized pattern {pattern!r} matches no linear layer; the layers are named like {', '.join(names[:8])}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
