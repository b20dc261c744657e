"""One range for all activations of a site, taken from the calibration text before the model runs (static).

    s = max over the calibration's tokens and channels of |x| / (2^(k-1) - 1)

What is larger when the model is scored saturates.  Ranges are those of the model after exact rewriting and before rounding.
SmoothQuant O3 (arXiv:2211.10438).
"""

from __future__ import annotations

from torch import Tensor, nn

from quantsweep.activations._base import Inputs, Quantizer, Step
from quantsweep.activations._ranges import Extremes
from quantsweep.errors import QuantizationError
from quantsweep.trial.specs import ActivationSpec


class StaticQuantizer(Quantizer):
    """Ranges that are fixed: () for a whole tensor, or (I,) each."""

    low: Tensor
    high: Tensor

    def __init__(self, spec: ActivationSpec, low: Tensor, high: Tensor) -> None:
        super().__init__(spec)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def quantized(self, values: Tensor) -> Tensor:
        """Saturates beyond the ranges."""
        return self.grid(values, self.low, self.high)  # type: ignore[no-any-return]


class PerTensorStatic(Step):
    """See the module."""

    needs_ranges = True
    sites = ("linear",)

    def module(self, spec: ActivationSpec, inputs: Inputs | None) -> nn.Module:
        """inputs: of the calibration; with `clip_percentile` its sample."""
        self.check(spec)
        seen = calibrated(inputs)
        if spec.clip_percentile is None:
            return StaticQuantizer(spec, seen.min_I.min(), seen.max_I.max())
        if not len(seen.sample_TI):
            raise QuantizationError("activation.clip_percentile of a static range needs a sample of inputs, and none was taken")
        clipped = Extremes(spec.clip_percentile, symmetric=spec.symmetric)(seen.sample_TI.flatten())
        return StaticQuantizer(spec, *(extreme.squeeze(-1) for extreme in clipped))


def calibrated(inputs: Inputs | None) -> Inputs:
    """The inputs, of at least one token; raises QuantizationError where there are none."""
    if inputs is None or not inputs.num_tokens:
        raise QuantizationError("static ranges need calibration inputs, and no token of the calibration text came here; use more text")
    return inputs


ACTIVATION = PerTensorStatic()
