"""Against bitsandbytes (CPU): its code tables, and its blockwise quantization, which keeps float32 scales."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import yaml
from make_spec import make_spec

from quantsweep.data_types._base import fake_quantize
from quantsweep.data_types.dynamic import dynamic_levels
from quantsweep.data_types.fp import positive_levels
from quantsweep.data_types.nf import normal_levels
from quantsweep.storage.paths import product_root
from quantsweep.trial.registry import DATA_TYPES

WEIGHT = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.03


@pytest.fixture(scope="module")
def functional() -> ModuleType:
    """bitsandbytes.functional, where it is installed."""
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional


def as_set(table: torch.Tensor) -> list[float]:
    """Distinct entries, sorted: bitsandbytes pads its tables with zeros."""
    return sorted(set(table.tolist()))


def assert_same_but_for_ties(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for few elements near a mid-point (they multiply by a reciprocal), where ours is at least as near."""
    close = torch.isclose(found, expected, rtol=1e-5, atol=1e-8)
    no_farther = (found - WEIGHT).abs() <= (expected - WEIGHT).abs() + 1e-8
    assert bool((close | no_farther).all())
    assert float(close.float().mean()) > 0.998


@pytest.mark.parametrize("k", range(2, 9))
def test_dynamic_map(functional: ModuleType, k: int) -> None:
    """create_dynamic_map with k - 1 exponent bits."""
    table = functional.create_dynamic_map(signed=True, max_exponent_bits=k - 1, total_bits=k)
    assert list(dynamic_levels(k)) == pytest.approx(as_set(table), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("k", "exponent_bits"), [(k, e) for k in range(3, 9) for e in range(1, k)])
def test_body_is_create_fp8_map(functional: ModuleType, k: int, exponent_bits: int) -> None:
    """The bias of the body text is the one in bitsandbytes' float map."""
    table = functional.create_fp8_map(signed=True, exponent_bits=exponent_bits, precision_bits=k - 1 - exponent_bits, total_bits=k)
    expected = [level for level in as_set(table) if level >= 0]
    assert list(positive_levels(k, exponent_bits, "body")) == pytest.approx(expected, rel=1e-6)


def test_appendix_is_the_fp4_table(functional: ModuleType) -> None:
    """The hard-coded FP4 table is E2M1 with the bias of the appendix."""
    expected = [level for level in as_set(functional.get_4bit_type("fp4", device="cpu")) if level >= 0]
    assert list(positive_levels(4, 2, "appendix")) == pytest.approx(expected, rel=1e-4)


def test_nf4_table(functional: ModuleType) -> None:
    """The hard-coded NF4 table, and the function that makes it: bit for bit."""
    assert list(normal_levels(4)) == as_set(functional.get_4bit_type("nf4", device="cpu"))
    pytest.importorskip("scipy")
    assert list(normal_levels(4)) == as_set(functional.create_normal_map())


def test_af4_table(functional: ModuleType) -> None:
    """The yaml has the levels that bitsandbytes has."""
    levels = yaml.safe_load((product_root() / "conf" / "data_type" / "af4.yaml").read_text())["options"]["levels"]
    assert torch.tensor(levels).tolist() == as_set(functional.get_4bit_type("af4", device="cpu", blocksize=64))


@pytest.mark.parametrize("block_size", [64, 128, 1024])
@pytest.mark.parametrize(("quant_type", "data_type"), [("fp4", "fp"), ("nf4", "nf")])
def test_4bit_on_weights(functional: ModuleType, quant_type: str, data_type: str, block_size: int) -> None:
    """The codes and scales of quantize_4bit, decoded by hand (two codes a byte, the first in the upper half)."""
    packed, state = functional.quantize_4bit(WEIGHT, blocksize=block_size, quant_type=quant_type)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1)
    expected = (state.code[codes.long()].view(-1, block_size) * state.absmax[:, None]).view_as(WEIGHT)
    spec = make_spec(data_type, 4, block_size, scale_dtype="float32")
    assert_same_but_for_ties(fake_quantize(DATA_TYPES[data_type], WEIGHT, spec), expected)


@pytest.mark.parametrize("block_size", [64, 1024])
@pytest.mark.parametrize("data_type", ["dynamic", "int"])
def test_blockwise_8bit_on_weights(functional: ModuleType, data_type: str, block_size: int) -> None:
    """quantize_blockwise with the dynamic map, and with its linear map, which is our int."""
    code = functional.create_dynamic_map() if data_type == "dynamic" else functional.create_linear_map(signed=True, total_bits=8)
    quantized, state = functional.quantize_blockwise(WEIGHT, code=code, blocksize=block_size)
    expected = functional.dequantize_blockwise(quantized, state)
    assert_same_but_for_ties(
        fake_quantize(DATA_TYPES[data_type], WEIGHT, make_spec(data_type, 8, block_size, scale_dtype="float32")), expected
    )
