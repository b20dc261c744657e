"""The unquantized baseline: writes nothing, records nothing."""

from __future__ import annotations

from collections.abc import Mapping

from quantsweep.methods._base import Layer, LayerRecord
from quantsweep.trial.specs import QuantizationSpec


class Unquantized:
    """Leaves every layer as it was loaded."""

    def quantize(
        self, layers: Mapping[str, Layer], spec: QuantizationSpec, *, calibration: object | None = None, seed: int | None = None
    ) -> tuple[LayerRecord, ...]:
        """No layer is quantized: ()."""
        return ()


METHOD = Unquantized()
