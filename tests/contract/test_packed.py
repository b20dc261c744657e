"""The bytes of every format and method are what the count says, and give back the very weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from component_cases import combinations, component, describe, stems

from quantsweep.data_types._base import Quantized, dequantize_weight, quantize_weight
from quantsweep.data_types._packed import PackedWeight, pack, unpack
from quantsweep.errors import ConfigurationError
from quantsweep.trial import registry
from quantsweep.trial.registry import ROUNDINGS, data_type_of
from quantsweep.trial.specs import QuantizationSpec
from tests.contract.rounding_cases import Remembering, round_layers
from tests.contract.test_roundings import chain, spec_for

BLOCKS = [(32, None), (7, None), (None, "input"), ("tensor", "flat")]


def possible(name: str) -> list[QuantizationSpec]:
    """Every combination of a data type's yaml that its code can do."""
    return [spec for spec in combinations(component("data_type", name)) if can_do(spec)]


def can_do(spec: QuantizationSpec) -> bool:
    try:
        data_type_of(spec).check_spec(spec)
    except ConfigurationError:
        return False
    return True


CASES = [pytest.param(spec, id=f"{spec.data_type} {describe(spec)}") for name in sorted(stems("data_type")) for spec in possible(name)]


@pytest.mark.parametrize("spec", CASES)
def test_bytes_agree_with_the_count_and_give_the_weight_back(spec: QuantizationSpec) -> None:
    """Blocks that fit, short ones, whole channels, the whole tensor; a block of zeros among them."""
    weight = torch.randn(33, 40, generator=torch.Generator().manual_seed(5))
    weight[2] = 0
    data_type = data_type_of(spec)
    for block_size, axis in BLOCKS:
        blocked = replace(spec, block_size=block_size, block_axis=axis or spec.block_axis)
        quantized = quantize_weight(data_type, weight, blocked)
        packed = pack(quantized, str(spec.scale_dtype))
        assert torch.equal(dequantize_weight(data_type, unpack(packed)), dequantize_weight(data_type, quantized))
        assert unpacked_is_the_same(unpack(packed), quantized)
        assert fits(packed, quantized.stored_bits)


def unpacked_is_the_same(one: Quantized, other: Quantized) -> bool:
    same = all(
        a is b is None or torch.equal(a, b)
        for name in ("scale_N1", "zero_N1", "levels_L", "tensor_scale")
        for a, b in [(getattr(one.qparams, name), getattr(other.qparams, name))]
    )
    return same and torch.equal(one.codes_NB, other.codes_NB) and one.stored_bits == other.stored_bits


def fits(packed: PackedWeight, bits: int, extra_bytes: int = 0) -> bool:
    """Measured bytes against counted bits: the codes and the zero points each end in a byte that may not be full."""
    return bits <= 8 * (packed.num_bytes + extra_bytes) < bits + 16


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in ROUNDINGS.names()
        if (can := component("rounding", name)["capabilities"])["needs_data_type"] and not can["needs_calibration"]
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_rounding_computes_with_what_its_bytes_give(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the model is decoded from the packed bytes and the rounding's extras, nothing else; the record counts them."""
    rounding, spec = Remembering(ROUNDINGS[name]), spec_for(name)
    monkeypatch.setattr(registry, "ROUNDINGS", {name: rounding})
    layers, _ = chain(0.02, dtype)
    for record in round_layers(layers, spec):
        stored = rounding.stored[record.layer]
        packed = pack(stored.blocks, str(spec.scale_dtype))
        again = replace(stored, quantized=unpack(packed))
        written = layers[record.layer].written
        assert written is not None
        assert torch.equal(rounding.decode(again, spec, dtype), written)
        extra = sum(array.numel() * array.element_size() for array in stored.extras.values())
        assert fits(packed, int(record.bits), extra)


def test_bits_a_weight_of_a_large_layer_are_the_papers() -> None:
    """k + 16/B for a block-wise format with fixed levels (arXiv:2212.09720): measured on the bytes."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(6))
    for bits, block in ((3, 64), (4, 64), (4, 1024), (8, 256)):
        spec = replace(next(s for s in possible("int") if s.bit_width == bits and s.symmetric), block_size=block, block_axis="flat")
        packed = pack(quantize_weight(data_type_of(spec), weight, spec), "float16")
        assert 8 * packed.num_bytes / weight.numel() == bits + 16 / block
