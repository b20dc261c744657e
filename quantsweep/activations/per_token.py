"""One range for each token, taken while the model runs (dynamic).

    s_t = max_i |x_ti| / (2^(k-1) - 1)        symmetric integers

A token does not depend on others, nor on its company.  Within attention each head of a token has a range of its own.
SmoothQuant O1 (arXiv:2211.10438), ZeroQuant (arXiv:2206.01861).
"""

from __future__ import annotations

from torch import Tensor, nn

from quantsweep.activations._base import OF_ATTENTION, SITES, Inputs, Quantizer, Step
from quantsweep.trial.specs import ActivationSpec


class _Module(Quantizer):
    def quantized(self, values: Tensor) -> Tensor:
        return self.grid(values, *self.extremes(values))  # type: ignore[no-any-return]


class PerToken(Step):
    """See the module."""

    sites = (*SITES, *OF_ATTENTION)

    def module(self, spec: ActivationSpec, inputs: Inputs | None) -> nn.Module:
        """Inputs of the calibration are not looked at."""
        self.check(spec)
        return _Module(spec)


ACTIVATION = PerToken()
