"""One quantizable linear layer of a loaded model: read the original weight, write another, put the original back.

    read()     the ORIGINAL weight, float32, out×in, on the model's device, whatever was written since
    write(W)   W cast to the compute dtype into the model, in place
    restore()  the original bits again, and a checksum that proves it (`checksums.py`)

Shapes: O output channels, I input channels.  All weights that cross this interface are `weight_OI`;
GPT-2's `Conv1D` stores I×O and is transposed here and nowhere else.  An expert's weight is a slice of
one parameter that holds all experts; it is written and restored through a view of it.

The original stays on the host (see `originals.py`), so that the device holds one model and at most
one layer more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quantsweep.errors import ModelError, QuantizationError
from quantsweep.models.anatomy import Source
from quantsweep.models.checksums import checksum

Sources = Callable[[], Mapping[str, Source]]
"""Where the inputs of layers come from, by name of the layer."""


class LinearLayer:
    """A linear layer inside a decoder block.

    name: its dotted name in the model.  module: the layer itself, for hooks; for an expert (`expert` is
    its number, else None) the module of all experts, whose inputs are not this layer's alone.
    original: the original weight as the module stores it, on the host, in a dtype that casts to the
    compute dtype without loss of bits (checked when the model was loaded); in parts, one above the
    other, where the file has it so.
    sources: asked for `inputs_from` only when that is looked at (`quantsweep.models.anatomy.predecessors`).
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        original: Tensor | tuple[Tensor, ...],
        *,
        transposed: bool,
        parameter: str = "weight",
        expert: int | None = None,
        sources: Sources = dict,
    ) -> None:
        weight = getattr(module, parameter)
        if not isinstance(weight, nn.Parameter):
            raise ModelError(
                f"layer {name} has no {parameter} parameter but a {type(weight).__name__}; is it quantized or adapted already?"
            )
        self.name = name
        self.module = module
        self.expert = expert
        self._sources = sources
        self._parameter = weight
        self._transposed = transposed
        self._original = original if isinstance(original, tuple) else (original,)
        self.out_features, self.in_features = self._weight.shape[::-1] if transposed else self._weight.shape
        self.is_written = False
        self._checksum = checksum(self._weight)

    def __repr__(self) -> str:
        return f"LinearLayer({self.name}, {self.out_features}×{self.in_features})"

    @property
    def parameter(self) -> nn.Parameter:
        """What holds the weight in the model: the layer's own, or that of all experts."""
        return self._parameter

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self._parameter.dtype

    @property
    def inputs_from(self) -> Source | None:
        """The earlier layer whose output units its input columns are; None where no single layer makes them.

        Raises ModelError for an architecture whose blocks are not described.
        """
        return self._sources().get(self.name)

    def read(self) -> Tensor:
        """The original weight: float32, out_features × in_features, on the model's device; a copy.

        Raises ModelError when it is not what was loaded.
        """
        # What nothing was written over is the original, and is there already: a pass over memory less than fetching it.
        bits = self._original_bits() if self.is_written else self._weight
        weight = bits.to(torch.float32, copy=True)
        if self.is_written or bits.device.type == "cpu":  # what may be a view of a file, which others can write over
            self._check_loaded(weight.to(self.dtype))  # of the copy: what is given away was checked, whatever the file says by now
        return weight.T.contiguous() if self._transposed else weight

    def read_written(self) -> Tensor:
        """What the model computes with now: (O, I) in the compute dtype, a copy."""
        return self.as_out_in(self._weight.detach().clone())

    def as_out_in(self, stored: Tensor) -> Tensor:
        """The part of a value of `parameter` that is this layer's weight, (O, I)."""
        weight = stored if self.expert is None or stored.ndim == self._weight.ndim else stored[self.expert]
        return weight.T.contiguous() if self._transposed else weight

    def write(self, weight_OI: Tensor) -> None:
        """Let the model compute with `weight_OI` (out_features × in_features), cast to the compute dtype.

        Raises QuantizationError when the shape is another one.  NaN and Inf are written as they are.
        """
        if weight_OI.shape != (self.out_features, self.in_features):
            shape = (self.out_features, self.in_features)
            raise QuantizationError(f"layer {self.name}: a weight of shape {tuple(weight_OI.shape)} does not fit {shape} (out × in)")
        with torch.no_grad():
            self._weight.copy_(weight_OI.T if self._transposed else weight_OI)
        self.is_written = True

    def restore(self) -> None:
        """Put the original bits back; raises ModelError when they are not what was loaded."""
        with torch.no_grad():
            for rows, part in zip(torch.split(self._weight, [len(part) for part in self._original]), self._original, strict=True):
                rows.copy_(part)
        self._check_loaded(self._weight)
        self.is_written = False

    def _check_loaded(self, bits: Tensor) -> None:
        if checksum(bits) != self._checksum:
            raise ModelError(
                f"layer {self.name}: the original weight is not the one that was loaded; "
                "its file was changed while the model was in use, or memory is faulty. Start this worker again"
            )

    @property
    def _weight(self) -> Tensor:
        """What the model computes with, as stored: the parameter, or a view of one expert's part."""
        return self._parameter if self.expert is None else self._parameter[self.expert]

    def _original_bits(self) -> Tensor:
        parts = [part.to(device=self.device).to(self.dtype) for part in self._original]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
