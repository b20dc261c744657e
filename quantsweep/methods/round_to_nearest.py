"""Round to nearest: every weight becomes the nearest level of its block, with no look at data.

The "zero-shot" quantization of the k-bit inference scaling laws (Dettmers & Zettlemoyer,
arXiv:2212.09720, section 2), and the RTN baseline of the calibrated methods (GPTQ, arXiv:2210.17323,
section 4).  Deterministic; layers are independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantsweep.data_types._base import DataType, dequantize_weight, quantize_weight
from quantsweep.errors import QuantizationError
from quantsweep.methods._base import Layer, LayerRecord, read_finite, write_and_record
from quantsweep.registry import data_type_of
from quantsweep.specs import QuantizationSpec


class RoundToNearest:
    """Nearest level, layer by layer."""

    def quantize(
        self, layers: Mapping[str, Layer], spec: QuantizationSpec, *, calibration: object | None = None, seed: int | None = None
    ) -> tuple[LayerRecord, ...]:
        """Quantize each layer with the data type of `spec`; calibration and seed are not looked at."""
        data_type: DataType = data_type_of(spec)
        data_type.check_spec(spec)
        return tuple(_quantize_layer(name, layer, data_type, spec) for name, layer in layers.items())


def _quantize_layer(name: str, layer: Layer, data_type: DataType, spec: QuantizationSpec) -> LayerRecord:
    weight_OI = read_finite(name, layer)
    try:
        quantized = quantize_weight(data_type, weight_OI, spec)
    except QuantizationError as error:
        raise QuantizationError(f"layer {name}: {error}") from error
    quantized_OI = dequantize_weight(data_type, quantized, layer.dtype)
    return write_and_record(name, layer, weight_OI, quantized_OI, bits=quantized.stored_bits)


METHOD = RoundToNearest()
