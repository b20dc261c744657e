"""From each quantizable layer back to the earlier layer whose output units its input columns come from.

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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantsweep.models.anatomy import Anatomy, anatomy_of
from quantsweep.models.blocks import Place, decoder_blocks, quantizable_linears


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
