"""One range for each block of neighbouring channels of a token, taken while the model runs.

    block_size 32, mxfp      OCP microscaling activations      16, nvfp4      with one more scale, of the sequence
    block_size 128, int      groups of a token                 (DeepSeek-like fp8: 128 too)

A short last block is a block.  NVFP4's second scale is that of a sequence, without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantsweep.activations._base import Inputs, Quantizer, Step, check
from quantsweep.numerics.tokens import by_sequence
from quantsweep.trial.specs import ActivationSpec


class _Module(Quantizer):
    def __init__(self, spec: ActivationSpec, block_size: int) -> None:
        super().__init__(spec)
        self._block_size = block_size

    def quantized(self, values: Tensor) -> Tensor:
        blocks = self._cut(values)
        largest = _largest_of_sequences(values)[..., None] if self.grid.needs_sequence else None
        quantized: Tensor = self.grid(blocks, *self.extremes(blocks), largest)
        return quantized.flatten(-2)[..., : values.shape[-1]]

    def _cut(self, values: Tensor) -> Tensor:
        """(…, I) → (…, N, B); a short block is filled with its last value, which no range sees."""
        if missing := -values.shape[-1] % self._block_size:
            values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], dim=-1)
        return values.reshape(*values.shape[:-1], -1, self._block_size)


def _largest_of_sequences(values: Tensor) -> Tensor:
    """The largest magnitude of the sequence of each token: (…, 1)."""
    values_BTI, is_token_BT1 = by_sequence(values)
    largest_B11 = (values_BTI.abs() * is_token_BT1).amax(dim=(1, 2), keepdim=True)
    return largest_B11.expand(*values_BTI.shape[:2], 1).reshape(*values.shape[:-1], 1)


class PerBlock(Step):
    """See the module."""

    def check(self, spec: ActivationSpec) -> None:
        """Raise ConfigurationError for what it cannot do."""
        check(spec, self.sites, has_blocks=True)

    def module(self, spec: ActivationSpec, inputs: Inputs | None) -> nn.Module:
        """Inputs of the calibration are not looked at."""
        self.check(spec)
        assert spec.block_size is not None
        return _Module(spec, spec.block_size)


ACTIVATION = PerBlock()
