"""What the parts of a decoder block are called, architecture by architecture, and which of them read which.

    hidden ─ norm ─ Q, K, V ─ attention ─ output ─(+)─ norm ─ up (and gate) ─ activation ─ down ─(+)─ hidden

All blocks of the studies are this, but each in its own words: Q, K and V apart or fused in one of three
orders, gate and up apart or fused, both norms one (parallel blocks), the MLP once or once an expert.
Finding layers needs none of it (`blocks.py`); what reaches from one layer to the next does
(`predecessors`, `folding.py`, `planting.py`).  An architecture that is not described here is refused there, by name.

Rows of a fused QKV weight (h heads of d units; g query heads share one of k = h/g key and value heads):

    "apart"    V is a layer of its own: k × d rows                                     LLaMA, OPT, GLM, …
    "grouped"  k groups of (g query heads, one key head, one value head), d rows each  GPT-NeoX, BLOOM (g = 1), Falcon
    "thirds"   all of Q, then all of K, then all of V                                  GPT-2

From each quantizable layer back to the earlier layer whose output units its input columns come from (`predecessors`).
Outlier-dependent ("proxy") quantization (Dettmers & Zettlemoyer, arXiv:2212.09720) looks at
one layer to choose columns of the next.  The pairs, and which unit becomes which column:

    V               → attention output   attention mixes tokens, never units: column c is a unit of V's rows; where
                                         several query heads share a value head, its units feed several columns
    attention out   → first MLP layers   over the residual and a norm: unit j mostly makes channel j
    first MLP       → second MLP         unit by unit: through an activation, or times a gate (the unit is up's)
    second MLP      → next block's QKV   over the residual and a norm, as above

The first block's QKV has no such layer.  Blocks that compute attention and MLP side by side (GPT-NeoX,
Falcon-7b and -40b) are paired in the same way, by channels of the residual: there the MLP does not read
what attention of its own block puts out, so that this pair is looser than elsewhere.

Experts: attention output → each expert's first layer; an expert's first → its second.  What leaves the
experts is a sum of several, weighed token by token, which no single layer stands for: the next QKV
has no predecessor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from quantsweep.errors import ModelError
from quantsweep.models.blocks import DOWN, GATE_UP, Place, decoder_blocks, quantizable_linears


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Names inside one decoder block; those of experts' layers lack the number at their end.

    attention_inputs: layers that read the attention's input; value: the one of them that holds V.
    up: the layer whose output units, times a gate or through an activation, `down` reads; they are the lower
    half of its rows if `up_is_half`.  mlp_inputs: `up` and, where it is apart, the gate.
    activation: the function between `up` and `down`, by transformers' name; None where a gate multiplies.
    router: what weighs the experts; None without experts.
    norms: each norm that feeds layers, with all layers (and router) that read it.
    keeps_norm: why norms cannot be changed together with their readers, if something else reads them too.
    """

    attention_inputs: tuple[str, ...]
    value: str
    value_order: Literal["apart", "grouped", "thirds"]
    num_heads: int
    num_value_heads: int
    attention_output: str
    mlp_inputs: tuple[str, ...]
    up: str
    up_is_half: bool = False
    down: str
    activation: str | None = None
    router: str | None = None
    norms: tuple[tuple[str, tuple[str, ...]], ...]
    keeps_norm: str | None = None

    def value_units(self, head_size: int) -> Tensor:
        """For each input column of `attention_output` the row of `value` that it is a mix of, over tokens; int64."""
        group = self.num_heads // self.num_value_heads
        heads = torch.arange(self.num_value_heads)
        starts = {"apart": heads, "grouped": heads * (group + 2) + group + 1, "thirds": 2 * self.num_heads + heads}
        rows = starts[self.value_order][:, None] * head_size + torch.arange(head_size)
        return rows.repeat_interleave(group, dim=0).flatten()


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The names inside the decoder blocks of `model`; raises ModelError for an architecture that is not described."""
    kind = str(model.config.model_type)
    if kind not in _DESCRIPTIONS:
        raise ModelError(
            f"the decoder blocks of {kind} models are not described in quantsweep/models/anatomy.py, which is needed to know "
            f"what reads what; described are {', '.join(sorted(_DESCRIPTIONS))}"
        )
    return _DESCRIPTIONS[kind](model.config, decoder_blocks(model)[1][0])


def _opt(config: PretrainedConfig, _block: nn.Module) -> Anatomy:
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    post = "its norms come after the residual sums (as OPT-350m's), so that the next residual carries their outputs too"
    return Anatomy(
        attention_inputs=inputs,
        value="self_attn.v_proj",
        value_order="apart",
        num_heads=config.num_attention_heads,
        num_value_heads=config.num_attention_heads,
        attention_output="self_attn.out_proj",
        mlp_inputs=("fc1",),
        up="fc1",
        down="fc2",
        activation=config.activation_function,
        norms=(("self_attn_layer_norm", inputs), ("final_layer_norm", ("fc1",))),
        keeps_norm=None if config.do_layer_norm_before else post,
    )


def _gpt2(config: PretrainedConfig, _block: nn.Module) -> Anatomy:
    return Anatomy(
        attention_inputs=("attn.c_attn",),
        value="attn.c_attn",
        value_order="thirds",
        num_heads=config.num_attention_heads,
        num_value_heads=config.num_attention_heads,
        attention_output="attn.c_proj",
        mlp_inputs=("mlp.c_fc",),
        up="mlp.c_fc",
        down="mlp.c_proj",
        activation=config.activation_function,
        norms=(("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
    )


def _gpt_neox(config: PretrainedConfig, block: nn.Module) -> Anatomy:
    return _fused("attention", config, block, config.num_attention_heads, config.hidden_act)


def _bloom(config: PretrainedConfig, block: nn.Module) -> Anatomy:
    post = "apply_residual_connection_post_layernorm is set, so that the residual carries the norms' outputs too"
    keeps_norm = post if config.apply_residual_connection_post_layernorm else None
    return _fused("self_attention", config, block, config.num_attention_heads, "gelu", keeps_norm)


def _falcon(config: PretrainedConfig, block: nn.Module) -> Anatomy:
    alone = 1 if config.multi_query else config.num_attention_heads
    value_heads = config.num_kv_heads if config.new_decoder_architecture else alone
    return _fused("self_attention", config, block, value_heads, config.activation)


def _fused(
    attention: str, config: PretrainedConfig, block: nn.Module, num_value_heads: int, activation: str, keeps_norm: str | None = None
) -> Anatomy:
    """GPT-NeoX, BLOOM and Falcon: the same MLP, QKV fused in groups, and norms that tell how parallel the block is."""
    qkv, up = f"{attention}.query_key_value", "mlp.dense_h_to_4h"
    if hasattr(block, "ln_attn"):  # Falcon-40b: parallel, with two norms
        norms: tuple[tuple[str, tuple[str, ...]], ...] = (("ln_attn", (qkv,)), ("ln_mlp", (up,)))
    elif hasattr(block, "post_attention_layernorm"):
        norms = (("input_layernorm", (qkv,)), ("post_attention_layernorm", (up,)))
    else:  # Falcon-7b: parallel, with one norm
        norms = (("input_layernorm", (qkv, up)),)
    return Anatomy(
        attention_inputs=(qkv,),
        value=qkv,
        value_order="grouped",
        num_heads=config.num_attention_heads,
        num_value_heads=num_value_heads,
        attention_output=f"{attention}.dense",
        mlp_inputs=(up,),
        up=up,
        down="mlp.dense_4h_to_h",
        activation=activation,
        norms=norms,
        keeps_norm=keeps_norm,
    )


def _llama(config: PretrainedConfig, _block: nn.Module) -> Anatomy:
    return _gated(config, ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")


def _glm(config: PretrainedConfig, _block: nn.Module) -> Anatomy:
    return _gated(config, (f"mlp.{GATE_UP}",), f"mlp.{DOWN}")


def _mixtral(config: PretrainedConfig, _block: nn.Module) -> Anatomy:
    return _gated(config, (f"mlp.experts.{GATE_UP}",), f"mlp.experts.{DOWN}", router="mlp.gate")


def _gated(config: PretrainedConfig, mlp_inputs: tuple[str, ...], down: str, router: str | None = None) -> Anatomy:
    """LLaMA and what followed it; norms that only the residual reads (GLM-4's) or heads (Qwen3's) are none of ours."""
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    readers = mlp_inputs if router is None else (*mlp_inputs, router)
    return Anatomy(
        attention_inputs=inputs,
        value="self_attn.v_proj",
        value_order="apart",
        num_heads=config.num_attention_heads,
        num_value_heads=config.num_key_value_heads,
        attention_output="self_attn.o_proj",
        mlp_inputs=mlp_inputs,
        up=mlp_inputs[-1],
        up_is_half=len(mlp_inputs) == 1,
        down=down,
        router=router,
        norms=(("input_layernorm", inputs), ("post_attention_layernorm", readers)),
    )


_DESCRIPTIONS: dict[str, Callable[[PretrainedConfig, nn.Module], Anatomy]] = {
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "llama": _llama,
    "mistral": _llama,
    "qwen3": _llama,
    "glm": _glm,
    "glm4": _glm,
    "mixtral": _mixtral,
}
"""By `model_type` of the configuration."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Where the inputs of a layer come from.

    layer: name of the earlier layer.  unit_of_column: for each input column of the later layer the row of the earlier
    one's weight (out × in) that it comes from; int64, on the host.
    """

    layer: str
    unit_of_column: Tensor


def predecessors(model: PreTrainedModel) -> Mapping[str, Source]:
    """The source of each quantizable layer by name, in the order of the model; a layer without one is not there.

    All layers are looked at, also those that a model's `unquantized` leaves out.
    Raises ModelError for an architecture that is not described (`anatomy.py`).
    """
    prefix, blocks = decoder_blocks(model)
    anatomy = anatomy_of(model)
    shapes = {name: _shape(place) for name, place in quantizable_linears(model).items()}
    found: dict[str, Source] = {}
    for number in range(len(blocks)):
        last = f"{prefix}.{number - 1}.{anatomy.down}" if number else None
        found |= dict(_of_block(anatomy, f"{prefix}.{number}.", last, shapes))
    return MappingProxyType({name: found[name] for name in shapes if name in found})


def _of_block(anatomy: Anatomy, block: str, last: str | None, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Source]]:
    """The pairs that end in one block; `last` is the second MLP layer of the block before."""
    if last is not None and last in shapes:
        for name in anatomy.attention_inputs:
            yield block + name, _unit_by_unit(last, shapes)
    attention = block + anatomy.attention_output
    head_size = shapes[attention][1] // anatomy.num_heads
    yield attention, Source(layer=block + anatomy.value, unit_of_column=anatomy.value_units(head_size))
    for suffix in _experts(block + anatomy.down, shapes):
        for name in anatomy.mlp_inputs:
            yield f"{block}{name}{suffix}", _unit_by_unit(attention, shapes)
        up, down = f"{block}{anatomy.up}{suffix}", f"{block}{anatomy.down}{suffix}"
        inner = shapes[down][1]
        yield down, Source(layer=up, unit_of_column=torch.arange(inner) + (inner if anatomy.up_is_half else 0))


def _unit_by_unit(layer: str, shapes: Mapping[str, tuple[int, int]]) -> Source:
    return Source(layer=layer, unit_of_column=torch.arange(shapes[layer][0]))


def _experts(down: str, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What the names of the MLP's layers end in: nothing, or the number of each expert."""
    return [""] if down in shapes else [name.removeprefix(down) for name in shapes if name.startswith(f"{down}.")]


def _shape(place: Place) -> tuple[int, int]:
    """Out, in."""
    rows, columns = place.module.get_parameter(place.parameter).shape[-2:]
    return (columns, rows) if place.transposed else (rows, columns)
