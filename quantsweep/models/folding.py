"""Exact rewritings: scale the inputs of linear layers and divide what feeds them; the model's function stays.

    y = W x = (W · diag(s)) · (x / s)         one s > 0 for each input channel

The division is folded into whatever makes x, so that nothing is added to the model.  Three kinds of pairs can carry it:

    kind      what is divided by s                     what is multiplied by s
    "norm"    a norm's gain and bias                   all that reads it: layers, both halves of a parallel block, experts, their router
    "value"   rows and biases of V                     attention output; query heads that share a value head share its scales
    "up"      rows and biases of the first MLP layer   second MLP layer, each expert's; through a gate's product or ReLU

A positive factor passes where the map between is homogeneous: attention is linear in V, a gated MLP in `up`, ReLU(c·x) = c·ReLU(x).
GELU and its like let none pass.  A norm whose output is also the residual (OPT-350m) has a reader that cannot be scaled.
`obstacle` says so in words.  What reads a norm is told by the anatomy, not by what is quantized: a layer left at 16 bit reads too.

Factors are applied in float64 and rounded once, to the dtype of the weight: a power of two rounds nothing (but float16 numbers
that become subnormal), others at most half a unit in the last place of each weight.

Sources: SmoothQuant (arXiv:2211.10438) folds into norms, AWQ (arXiv:2306.00978) into all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantsweep.errors import QuantizationError
from quantsweep.models.anatomy import anatomy_of, predecessors
from quantsweep.models.blocks import decoder_blocks, quantizable_linears

Kind = Literal["norm", "value", "up"]
Write = Callable[[str, Tensor], None]
"""(name of a parameter, its new value as the model stores it): `Session.write`."""

PASSES_FACTORS = (None, "relu")
"""Activations between up and down that a positive factor passes; None is a gate's product."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pair:
    """Something that feeds layers, and all that read it.

    block: number of the decoder block.  source: name of the norm, or of the layer (of one expert: `….gate_up_proj.3`).
    readers: names of the layers and routers whose input columns the scales multiply.
    unit_of_column: for each input column of a reader what makes it: a channel of the norm, or a row of the layer; (I,) int64, on the host.
    """

    kind: Kind
    block: int
    source: str
    readers: tuple[str, ...]
    unit_of_column: Tensor

    def shared(self, scale_I: Tensor) -> Tensor:
        """For columns that one unit feeds (query heads that share a value head) the mean of their scales; (I,) float64."""
        scale_I = scale_I.double()
        unit_I = self.unit_of_column.to(scale_I.device)
        sums_U = scale_I.new_zeros(int(unit_I.max()) + 1).index_add_(0, unit_I, scale_I)
        return (sums_U / torch.bincount(unit_I))[unit_I]


def obstacle(model: PreTrainedModel, kind: Kind) -> str | None:
    """Why scales cannot be moved over pairs of this kind in `model`, in words; None where they can."""
    anatomy = anatomy_of(model)
    if kind == "norm":
        block = decoder_blocks(model)[1][0]
        without_gain = (norm for norm, _ in anatomy.norms if getattr(block.get_submodule(norm), "weight", None) is None)
        return anatomy.keeps_norm or next((f"the norm {norm} has no gain" for norm in without_gain), None)
    if kind == "up" and anatomy.activation not in PASSES_FACTORS:
        return f"{anatomy.activation} stands between {anatomy.up} and {anatomy.down}; factors pass through ReLU or a gate's product alone"
    return None


def pairs(model: PreTrainedModel, kind: Kind) -> tuple[Pair, ...]:
    """All pairs of one kind, in the order of the model.

    Raises QuantizationError where there is an `obstacle`, and ModelError for an architecture that is not described.
    """
    if (reason := obstacle(model, kind)) is not None:
        raise QuantizationError(f"scales of inputs cannot be moved ({kind}) in this {model.config.model_type} model: {reason}")
    return tuple(_norm_pairs(model) if kind == "norm" else _layer_pairs(model, kind))


def _norm_pairs(model: PreTrainedModel) -> Iterator[Pair]:
    prefix, blocks = decoder_blocks(model)
    layers = quantizable_linears(model)
    for number, block in enumerate(blocks):
        for norm, parts in anatomy_of(model).norms:
            names = [f"{prefix}.{number}.{part}" for part in parts]
            yield Pair(
                kind="norm",
                block=number,
                source=f"{prefix}.{number}.{norm}",
                readers=tuple(reader for name in names for reader in _all_of(name, layers) or [name]),  # (a router is no layer)
                unit_of_column=torch.arange(len(block.get_submodule(norm).get_parameter("weight"))),
            )


def _layer_pairs(model: PreTrainedModel, kind: Kind) -> Iterator[Pair]:
    prefix, blocks = decoder_blocks(model)
    anatomy, sources = anatomy_of(model), predecessors(model)
    end = anatomy.attention_output if kind == "value" else anatomy.down
    for number in range(len(blocks)):
        for name in _all_of(f"{prefix}.{number}.{end}", sources):
            source = sources[name]
            yield Pair(kind=kind, block=number, source=source.layer, readers=(name,), unit_of_column=source.unit_of_column)


def _all_of(name: str, layers: Iterable[str]) -> list[str]:
    """The layer of this name, or those of all experts, whose names end in a number."""
    return [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]


def columns_of_readers(model: PreTrainedModel, pair: Pair) -> tuple[Tensor, ...]:
    """The weights (O, I) of all readers, as the model has them now; views."""
    return tuple(_matrix(model, reader, model.get_parameter) for reader in pair.readers)


def fold(model: PreTrainedModel, pair: Pair, scale_I: Tensor, write: Write) -> None:
    """Multiply the input columns of all readers by the scales, and divide what feeds them; all is written, or nothing.

    scale_I: positive, one for each input column.  Where one unit feeds several columns theirs must be equal (`Pair.shared`).
    Raises QuantizationError for other scales, and where a weight would leave the range of its dtype.
    """
    scale_I = _checked(pair, scale_I)
    changed = rescaled(model, pair, source_I=1 / scale_I, readers_I=scale_I)
    for name, value in changed.items():
        if not value.isfinite().all():
            raise QuantizationError(f"{name}: scales up to {float(scale_I.max()):.6g} leave the range of {value.dtype}; use smaller ones")
    for name, value in changed.items():
        write(name, value)


def _checked(pair: Pair, scale_I: Tensor) -> Tensor:
    columns = len(pair.unit_of_column)
    if scale_I.shape != (columns,):
        raise QuantizationError(f"{pair.source}: {tuple(scale_I.shape)} scales do not fit the {columns} columns of {pair.readers[0]}")
    scale_I = scale_I.double()
    if not bool((scale_I.isfinite() & (scale_I > 0)).all()):
        raise QuantizationError(f"{pair.source}: scales must be positive and finite, got {float(scale_I.min()):.6g}")
    unit_I = pair.unit_of_column.to(scale_I.device)
    of_unit_U = scale_I.new_zeros(int(unit_I.max()) + 1).scatter_(0, unit_I, scale_I)
    if not torch.equal(of_unit_U[unit_I], scale_I):
        raise QuantizationError(
            f"{pair.source}: query heads that share a value head read the same units, so that their columns of {pair.readers[0]} "
            "cannot have different scales; give them one (their mean, say)"
        )
    return scale_I


@torch.no_grad()
def rescaled(model: PreTrainedModel, pair: Pair, *, source_I: Tensor, readers_I: Tensor) -> dict[str, Tensor]:
    """The parameters of a pair times factors, by name, as the model stores them; nothing is written.

    source_I, readers_I: (I,) float64, for what makes each column and for the column itself.
    """
    changed: dict[str, Tensor] = {}

    def copy(name: str) -> Tensor:
        return changed.setdefault(name, model.get_parameter(name).clone())

    for reader in pair.readers:
        matrix_OI = _matrix(model, reader, copy)
        matrix_OI.copy_(matrix_OI.double() * readers_I.to(matrix_OI.device))
    if pair.kind == "norm":
        for name, _ in model.get_submodule(pair.source).named_parameters():
            vector = copy(f"{pair.source}.{name}")
            vector.copy_(vector.double() * source_I.to(vector.device))
        return changed
    for rows_UX in _with_units(model, pair.source, copy):
        unit_I = pair.unit_of_column.to(rows_UX.device)
        factor_I = source_I.to(rows_UX.device).view(-1, *[1] * (rows_UX.ndim - 1))
        rows_UX[unit_I] = (rows_UX[unit_I].double() * factor_I).to(rows_UX.dtype)
    return changed


def _with_units(model: PreTrainedModel, layer: str, copy: Callable[[str], Tensor]) -> Iterator[Tensor]:
    """What has one row a unit of a layer: its weight, out × in, and its bias if there is one."""
    yield _matrix(model, layer, copy)
    if not _is_slice(layer) and model.get_submodule(layer).bias is not None:
        yield copy(f"{layer}.bias")


def _matrix(model: PreTrainedModel, layer: str, copy: Callable[[str], Tensor]) -> Tensor:
    """The weight of a layer, of one expert or of a router, out × in: a view of the copy of its parameter."""
    if _is_slice(layer):
        parameter, _, expert = layer.rpartition(".")
        return copy(parameter)[int(expert)]
    weight = copy(f"{layer}.weight")
    return weight.T if isinstance(model.get_submodule(layer), Conv1D) else weight


def _is_slice(layer: str) -> bool:
    """True for an expert that is a part of a parameter of all experts."""
    return layer.rpartition(".")[2].isdigit()
