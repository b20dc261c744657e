"""One quantizable linear layer of a loaded model: read the original weight, write another, put the original back.

    read()     the ORIGINAL weight, float32, out×in, on the model's device, whatever was written since
    write(W)   W cast to the compute dtype into the model, in place
    restore()  the original bits again, and a checksum that proves it

Shapes: O output channels, I input channels.  All weights that cross this interface are `weight_OI`;
GPT-2's `Conv1D` stores I×O and is transposed here and nowhere else.

The original stays on the host (see `originals.py`), so that the device holds one model and at most
one layer more.

Checksum.  Bits are read as integers x_0 … x_{n-1}; the checksum is the pair (Σ x_i, Σ (i+1)·x_i) in
64-bit wrap-around arithmetic (Fletcher's sums).  It notices every single change, any exchange of two
unequal values, and runs on the device where the weight lies: nothing is copied to be checked.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantsweep.errors import ModelError, QuantizationError

Checksum = tuple[int, int]

# Integers of the same width as the dtypes that weights can have, by bytes of one element.
_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22  # elements widened to 64 bit at a time: 32 MB


def checksum(tensor: Tensor) -> Checksum:
    """Fletcher's sums over the bits of `tensor` (any shape, taken in row-major order).

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_WIDTH[tensor.element_size()])
    plain, weighted = 0, 0
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        positions = torch.arange(start + 1, start + 1 + chunk.numel(), device=chunk.device)
        plain += int(chunk.sum())
        weighted += int((chunk * positions).sum())
    return plain % 2**64, weighted % 2**64


class LinearLayer:
    """A linear layer inside a decoder block.

    name: its dotted name in the model.  module: the layer itself, for hooks.
    original: the original weight as the module stores it, on the host, in a dtype that casts to the
    compute dtype without loss of bits (checked when the model was loaded).
    """

    def __init__(self, name: str, module: nn.Module, original: Tensor, *, transposed: bool) -> None:
        weight = module.weight
        if not isinstance(weight, nn.Parameter):
            raise ModelError(f"layer {name} has no weight parameter but a {type(weight).__name__}; is it quantized or adapted already?")
        self.name = name
        self.module = module
        self.out_features, self.in_features = weight.shape[::-1] if transposed else weight.shape
        self.is_written = False
        self._weight = weight
        self._transposed = transposed
        self._original = original
        self._checksum = checksum(weight)

    def __repr__(self) -> str:
        return f"LinearLayer({self.name}, {self.out_features}×{self.in_features})"

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self._weight.dtype

    def read(self) -> Tensor:
        """The original weight: float32, out_features × in_features, on the model's device; a copy."""
        weight = self._original_bits().to(torch.float32, copy=True)
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
            self._weight.copy_(self._original)
        if checksum(self._weight) != self._checksum:
            raise ModelError(
                f"layer {self.name}: the restored weight is not the one that was loaded; "
                "its file was changed while the model was in use, or memory is faulty. Start this worker again"
            )
        self.is_written = False

    def _original_bits(self) -> Tensor:
        return self._original.to(device=self.device).to(self.dtype)
