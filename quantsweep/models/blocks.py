"""Where a decoder-only language model keeps the linear layers that quantization is about.

    model ── embeddings, positions
          ── decoder blocks  (a ModuleList: gpt_neox.layers, model.decoder.layers, transformer.h, …)
          │     └─ attention and MLP projections      <- these, and only these
          ── final norm, output head

All published comparisons keep embeddings, norms and the output head at 16 bit; so do we.  Nothing
outside the blocks is touched: OPT-350m's `project_in` and `project_out` lie between embeddings and
blocks and stay at 16 bit too.

Blocks are found by structure, not by name: in the model's decoder (of a model that also sees or hears: its language
model), the ModuleList that is not inside another ModuleList (which would be a block's own list of experts).  Where there
are several (a tower that sees or hears lies in the decoder too), it is the one with as many blocks as the configuration
of the text part says, which read vectors of its hidden size.

Experts (Mixtral, arXiv:2401.04088) come in two forms: modules of their own, whose linears are found
like all others, or all of a block in two 3-D parameters, of which each slice is a layer:

    gate_up_proj  E × 2I × H     …experts.gate_up_proj.3   2I×H: gate in the upper half of the rows, up in the lower
    down_proj     E × H × I      …experts.down_proj.3      H×I

What weighs experts stays at 16 bit: a linear map beside `experts` (a router, a gate of shared experts), all of a module
beside them that is called a router or a gate or ends in as many outputs as there are experts, and whatever is called a router.
So does what chooses the tokens that attention looks at (`indexer`, DeepSeek-V3.2).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
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
    name, blocks = candidates[0] if len(candidates) == 1 else _of_text(model, candidates)
    if len(kinds := sorted({type(block).__name__ for block in blocks})) > 1:
        raise ModelError(f"{type(model).__name__}: the blocks of {name} are of several kinds ({', '.join(kinds)}): no plain transformer")
    return name, blocks


def _of_text(model: nn.Module, candidates: list[tuple[str, nn.ModuleList]]) -> tuple[str, nn.ModuleList]:
    """The one of several lists that decodes text, by what the configuration says of it; without one, the longest."""
    text = _text_config(model)
    depth = max(len(blocks) for _, blocks in candidates) if text is None else text.num_hidden_layers
    fitting = [
        (name, blocks) for name, blocks in candidates if len(blocks) == depth and (text is None or _reads(blocks[0], text.hidden_size))
    ]
    if len(fitting) != 1:
        lists = ", ".join(f"{name} with {len(blocks)} blocks" for name, blocks in candidates)
        wanted = f"{depth} blocks" if text is None else f"{depth} blocks of hidden size {text.hidden_size}"
        raise ModelError(
            f"{type(model).__name__} has several lists ({lists}): which of them decodes text is not known "
            f"({len(fitting)} of them have {wanted}). Give a checkpoint of its language model alone"
        )
    return fitting[0]


def _text_config(model: nn.Module) -> PretrainedConfig | None:
    """What the configuration says of the part that decodes text; None for a module without one."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        text: PretrainedConfig = model.config.get_text_config(decoder=True)
    except ValueError as error:
        raise ModelError(f"{type(model).__name__}: {error}") from error
    return text if all(isinstance(getattr(text, key, None), int) for key in ("num_hidden_layers", "hidden_size")) else None


def _reads(block: nn.Module, hidden_size: int) -> bool:
    """True if a linear layer of a block takes vectors of this size."""
    layers = [module for module in block.modules() if isinstance(module, _LINEAR)]
    return any(layer.get_parameter("weight").shape[0 if isinstance(layer, Conv1D) else 1] == hidden_size for layer in layers)


def _decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """What decodes text, with the beginning of its names; the model itself unless it says more (`get_decoder` of transformers)."""
    decoder: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model  # type: ignore[no-untyped-call]
    names = [name for name, module in model.named_modules() if module is decoder]
    return (f"{names[0]}." if names and names[0] else "", decoder) if names else ("", model)


def quantizable_linears(model: nn.Module, unquantized: tuple[str, ...] = ()) -> dict[str, Place]:
    """Linear layers inside the decoder blocks by dotted name, in the order of the model.

    unquantized: name patterns (fnmatch, on the full name) of layers to leave out.
    Raises ModelError for a pattern that matches nothing, and for weights in the blocks that are linear
    maps in another guise (of more than two dimensions, of all experts in one matrix) unless a pattern of `unquantized` names them.
    """
    prefix, blocks = decoder_blocks(model)
    places = {f"{prefix}.{name}": place for name, place in _places(blocks)}
    known = {id(place.module.get_parameter(place.parameter)) for place in places.values()}
    text = _text_config(model)
    hidden_size: int | None = None if text is None else text.hidden_size
    others = [
        f"{prefix}.{name}"
        for name, weight in blocks.named_parameters()
        if id(weight) not in known and _is_map(name, weight, blocks, hidden_size)
    ]
    _check_patterns(unquantized, [*places, *others])
    if unknown := [name for name in others if not _matches(name, unquantized)]:
        raise ModelError(
            f"{type(model).__name__}: {len(unknown)} weights in the decoder blocks are linear maps in another form ({unknown[0]}, …) "
            "and cannot be quantized; to study the model with them at 16 bit, name them in its `unquantized`"
        )
    return {name: place for name, place in places.items() if not _matches(name, unquantized)}


def _is_map(name: str, weight: nn.Parameter, blocks: nn.ModuleList, hidden_size: int | None) -> bool:
    """True for a parameter that multiplies vectors as a linear layer does, though it is none.

    Of two dimensions: where experts lie in one matrix (DBRX), or where neither side is smaller than the hidden size.
    """
    if weight.ndim != 2 or name.endswith("bias"):
        return weight.ndim > 2
    module = blocks.get_submodule(name.rpartition(".")[0])
    if isinstance(module, (*_LINEAR, nn.Embedding)):
        return False
    return "experts" in name.split(".") or (hidden_size is not None and min(weight.shape) >= hidden_size)


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
    """True for what weighs experts or tokens; the experts themselves and an MLP that is shared by all tokens are none."""
    parts = name.split(".")
    if "router" in parts or "indexer" in parts:
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
