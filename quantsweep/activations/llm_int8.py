"""LLM.int8(): columns with outliers stay as they are, the rest is quantized token by token.

    O   = { i : |x_ti| ≥ threshold for some token t }
    x̂   = x on O, elsewhere the nearest of s_t · integers, s_t = max of those |x_ti| < threshold / 127
    y   = x̂_rest · Ŵ_restᵀ + x_O · W̃_Oᵀ          Ŵ: 8 bits, one scale an output channel (`rounding`)

W̃ is Ŵ with `outlier_weights: int8`, which is what bitsandbytes multiplies outliers with when it serves a model; with
`fp16`, the paper's mixed decomposition, the weight before rounding.  Which columns are outliers is known only
when the model runs, so that `fp16` keeps the whole weight: 16 bits a weight, and the 8-bit codes can be made from it.

bitsandbytes looks for outliers in all rows of a call, strangers' tokens and padding among them.  Here O is that of each
sequence, of its tokens alone: what a call with one request gives.  A threshold of 0 stands for none, as there: plain vector-wise.

Source: Dettmers et al., arXiv:2208.07339; threshold 6.0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantsweep.activations._base import Inputs, Quantizer, Step, check
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.tokens import by_sequence
from quantsweep.trial.specs import ActivationSpec

OUTLIER_WEIGHTS = ("int8", "fp16")


class OutlierQuantizer(Quantizer):
    """Inputs (…, I) as they are multiplied: outliers among quantized values."""

    threshold: Tensor

    def __init__(self, spec: ActivationSpec, threshold: float) -> None:
        super().__init__(spec)
        self.register_buffer("threshold", torch.tensor(threshold or torch.inf))

    def quantized(self, values: Tensor) -> Tensor:
        """Outliers are untouched."""
        rest, outliers = self.parts(values)
        return rest + outliers

    def parts(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The quantized rest, zero where there are outliers, and the outliers, zero where there are none; float32."""
        values_BTI, is_token_BT1 = by_sequence(values)
        is_large = values_BTI.abs() >= self.threshold
        is_outlier_B1I = (is_large & is_token_BT1).any(dim=1, keepdim=True)
        extremes = self.extremes(values_BTI.masked_fill(is_large, 0))
        quantized: Tensor = self.grid(values_BTI.masked_fill(is_outlier_B1I, 0), *extremes)
        return quantized.view_as(values), values_BTI.masked_fill(~is_outlier_B1I, 0).view_as(values)


class MixedLinear(nn.Module):
    """A linear layer whose outlier columns are multiplied by the weight before rounding.

    linear: the layer, with its rounded weight.  original_OI: the weight before, in the compute dtype.
    """

    original_OI: Tensor

    def __init__(self, quantizer: OutlierQuantizer, linear: nn.Module, original_OI: Tensor) -> None:
        super().__init__()
        self.quantizer, self.linear = quantizer.to(original_OI.device), linear
        self.register_buffer("original_OI", original_OI)

    def forward(self, values: Tensor) -> Tensor:
        """Outputs (…, O), in the dtype of the inputs."""
        rest, outliers = (part.to(values.dtype) for part in self.quantizer.parts(values.float()))
        output: Tensor = self.linear(rest)
        return output + nn.functional.linear(outliers, self.original_OI)


class LlmInt8(Step):
    """See the module."""

    def check(self, spec: ActivationSpec) -> None:
        """Raise ConfigurationError for what it cannot do."""
        check(spec, self.sites)
        if spec.data_type != "int" or not spec.symmetric or spec.clip_percentile is not None:
            raise ConfigurationError("activation=llm_int8 is symmetric int without clip_percentile; for others use activation=per_token")
        threshold, weights = spec.step.option("threshold"), spec.step.option("outlier_weights")
        if not isinstance(threshold, float) or threshold < 0:
            raise ConfigurationError(f"activation.options.threshold must be a number of at least 0 (0: no outliers), got {threshold!r}")
        if weights not in OUTLIER_WEIGHTS:
            raise ConfigurationError(f"activation.options.outlier_weights={weights!r} is not one of {', '.join(OUTLIER_WEIGHTS)}")

    def module(self, spec: ActivationSpec, inputs: Inputs | None) -> nn.Module:
        """Inputs of the calibration are not looked at."""
        self.check(spec)
        return _quantizer(spec)

    def keeps_weights(self, spec: ActivationSpec) -> bool:
        """With `outlier_weights: fp16`."""
        return spec.step.option("outlier_weights") == "fp16"

    def linear(self, spec: ActivationSpec, linear: nn.Module, original_OI: Tensor) -> nn.Module:
        """A layer with both weights."""
        self.check(spec)
        return MixedLinear(_quantizer(spec), linear, original_OI)


def _quantizer(spec: ActivationSpec) -> OutlierQuantizer:
    return OutlierQuantizer(spec, float(str(spec.step.option("threshold"))))


ACTIVATION = LlmInt8()
