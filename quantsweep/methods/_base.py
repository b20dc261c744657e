"""What every quantization method does: look at layers, write quantized weights, and record what it cost.

    quantize(layers, spec) -> one LayerRecord a quantized layer

Layers come one at a time: at most one layer's weight and its quantized copy are alive beside the model.
Errors are measured on what the model computes with, after the cast to the compute dtype; for 8-bit
formats and a bfloat16 model that cast is a sizeable part of the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quantsweep.data_types._base import DataType, Quantized
from quantsweep.errors import QuantizationError
from quantsweep.numerics.error import weight_error
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec

KEPT, KEPT_INDEX = "kept", "kept_index"
"""Names in `Stored.extras` of columns that stay at 16 bit, and of their indices."""


class InputSource(Protocol):
    """Which units of which earlier layer make a layer's inputs."""

    @property
    def layer(self) -> str:
        """Name of the earlier layer."""

    @property
    def unit_of_column(self) -> Tensor:
        """For each input column of the later layer the row of the earlier weight that makes it: (I,) int64."""


class Layer(Protocol):
    """One linear layer, whatever way its module stores the weight."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: what `write` casts to."""

    @property
    def inputs_from(self) -> InputSource | None:
        """Where its inputs come from; None in the first block, and where no single layer makes them."""

    def read(self) -> Tensor:
        """The original weight (out_features × in_features), float32, on the model's device."""

    def write(self, weight_OI: Tensor) -> None:
        """Let the model compute with this weight, cast to the compute dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """What quantization did to one layer.

    bits: stored bits of the whole weight, overhead counted.
    relative_error: ‖W - Ŵ‖² / ‖W‖².  max_abs_error: max |W - Ŵ|.  Ŵ in the compute dtype.
    num_kept_columns: input columns that stayed at 16 bit.
    """

    layer: str
    out_features: int
    in_features: int
    bits: float
    relative_error: float
    max_abs_error: float
    num_kept_columns: int = 0


class Method(Protocol):
    """A way to choose quantized weights."""

    def quantize(
        self, layers: Mapping[str, Layer], spec: QuantizationSpec, *, calibration: object | None = None, seed: int | None = None
    ) -> tuple[LayerRecord, ...]:
        """Quantize all layers in place, in their order.  Raises QuantizationError naming the layer."""


def read_finite(name: str, layer: Layer) -> Tensor:
    """The weight (O, I) of a layer; raises QuantizationError when it holds NaN or infinity, or is no matrix."""
    weight = layer.read()
    if weight.ndim != 2 or weight.numel() == 0:
        raise QuantizationError(f"layer {name}: a weight of shape {tuple(weight.shape)} is not a matrix with elements")
    if not all(math.isfinite(extreme) for extreme in (float(weight.amin()), float(weight.amax()))):
        count = int(weight.isfinite().logical_not().sum())
        raise QuantizationError(f"layer {name}: {count} of {weight.numel()} weights are NaN or infinite; is the checkpoint whole?")
    return weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What a file of one weight would hold: quantized blocks, and by name what the method keeps beside them, as it is stored.

    `quantsweep.data_types._packed` makes bytes of the blocks.
    """

    quantized: Quantized
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """All of it."""
        return self.quantized.stored_bits + 8 * sum(array.numel() * array.element_size() for array in self.extras.values())

    @property
    def num_kept_columns(self) -> int:
        """Input columns that stayed at 16 bit."""
        return self.extras[KEPT_INDEX].numel() if KEPT_INDEX in self.extras else 0


Encode = Callable[[str, Tensor, torch.dtype], Stored]
"""(layer name, weight (O, I) float32, compute dtype) -> what is stored of it."""
Decode = Callable[[Stored, torch.dtype], Tensor]
"""(what is stored, compute dtype) -> the weight (O, I) that the layer computes with."""


def encode_each(layers: Mapping[str, Layer], encode: Encode, decode: Decode) -> tuple[LayerRecord, ...]:
    """Quantize layers one after the other; what cannot be encoded is refused with the layer's name."""
    return tuple(_encode_layer(name, layer, encode, decode) for name, layer in layers.items())


def _encode_layer(name: str, layer: Layer, encode: Encode, decode: Decode) -> LayerRecord:
    weight_OI = read_finite(name, layer)
    try:
        stored = encode(name, weight_OI, layer.dtype)
    except QuantizationError as error:
        raise QuantizationError(f"layer {name}: {error}") from error
    return write_and_record(name, layer, weight_OI, stored, decode(stored, layer.dtype))


def checked_data_type(spec: QuantizationSpec) -> DataType:
    """The data type of `spec`; raises ConfigurationError where there is none, or where it cannot do what `spec` asks."""
    data_type: DataType = data_type_of(spec)
    data_type.check_spec(spec)
    return data_type


def write_and_record(name: str, layer: Layer, weight_OI: Tensor, stored: Stored, used_OI: Tensor) -> LayerRecord:
    """Write a quantized weight, in the compute dtype, and measure it against the original, both (O, I)."""
    error = weight_error(weight_OI, used_OI)
    if not math.isfinite(error.relative):
        raise QuantizationError(f"layer {name}: its quantized weight does not fit {layer.dtype}; use model.dtype=bfloat16 or float32")
    layer.write(used_OI)
    out_features, in_features = weight_OI.shape
    return LayerRecord(
        layer=name,
        out_features=out_features,
        in_features=in_features,
        bits=stored.bits,
        num_kept_columns=stored.num_kept_columns,
        relative_error=error.relative,
        max_abs_error=error.max_abs,
    )
