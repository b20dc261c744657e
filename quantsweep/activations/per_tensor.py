"""One range for all activations of a sequence, taken while the model runs (dynamic).

    s_b = max_ti |x_bti| / (2^(k-1) - 1)      symmetric integers

Published code takes the range over the whole batch, so that a text's scores depend on its company.  Here it is that of
each sequence, without padding: what a model that serves one request at a time does.  SmoothQuant O2 (arXiv:2211.10438).
"""

from __future__ import annotations

from torch import Tensor, nn

from quantsweep.activations._base import Inputs, Quantizer, Step
from quantsweep.numerics.tokens import by_sequence
from quantsweep.trial.specs import ActivationSpec


class _Module(Quantizer):
    def quantized(self, values: Tensor) -> Tensor:
        values_BTI, is_token_BT1 = by_sequence(values)
        low_B1, high_B1 = self.extremes(values_BTI.flatten(1), is_token_BT1.expand_as(values_BTI).flatten(1))
        quantized: Tensor = self.grid(values_BTI, low_B1[..., None], high_B1[..., None])
        return quantized.view_as(values)


class PerTensor(Step):
    """See the module."""

    def module(self, spec: ActivationSpec, inputs: Inputs | None) -> nn.Module:
        """Inputs of the calibration are not looked at."""
        self.check(spec)
        return _Module(spec)


ACTIVATION = PerTensor()
