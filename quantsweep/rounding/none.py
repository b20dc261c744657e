"""No rounding: weights stay as they are, so that no layer is ever given to it."""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.errors import QuantizationError
from quantsweep.pipeline.interface import InputNeeds, Layer, LayerContext, Stored
from quantsweep.trial.specs import QuantizationSpec


class Unrounded:
    """Leaves every layer as it is."""

    def check(self, spec: QuantizationSpec) -> None:
        """There is nothing that it could not do."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """It looks at no text."""
        return None

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """Raises QuantizationError: what is not rounded has no codes."""
        raise QuantizationError("without rounding a weight has no codes")

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """Raises QuantizationError, as `encode` does."""
        raise QuantizationError("without rounding a weight has no codes")


ROUNDING = Unrounded()
