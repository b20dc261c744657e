"""Two implementations must agree: the package (torch, float32, tables) and numpy (float64, exhaustive search)."""

from __future__ import annotations

import numpy as np
import numpy_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_spec import make_spec

from quantsweep.data_types._base import fake_quantize
from quantsweep.data_types.dynamic import dynamic_levels
from quantsweep.numerics.scales import round_scale
from quantsweep.trial.registry import DATA_TYPES
from quantsweep.trial.specs import BlockSize, QuantizationSpec

BLOCKINGS = st.sampled_from([(4, "flat"), (64, "flat"), ("tensor", "flat"), (5, "input"), (32, "input"), (None, "input")])
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))


def random_weight(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Normal weights with heavier tails, of a magnitude that varies from row to row by 2^±8, some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) ** 3 * 2.0 ** torch.randint(-8, 9, (shape[0], 1), generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, weight)


def assert_agree(weight: torch.Tensor, spec: QuantizationSpec, expected: reference.Array) -> None:
    """Equal up to float32 rounding, but for elements so near a mid-point that both neighbours are as good."""
    original = weight.double().numpy()
    found = fake_quantize(DATA_TYPES[str(spec.data_type)], weight, spec).double().numpy()
    tolerance = (
        1e-5 * np.abs(original).max(axis=1, keepdims=True).max()
        if spec.block_axis == "flat"
        else 1e-5 * np.abs(original).max(axis=1, keepdims=True)
    )
    equal = np.abs(found - expected) <= tolerance
    tie = np.abs(np.abs(found - original) - np.abs(expected - original)) <= tolerance
    assert (equal | tie).all()


@settings(max_examples=60, deadline=None)
@given(SHAPES, BLOCKINGS, st.integers(2, 8), st.sampled_from(["float16", "float32"]), st.integers(0, 2**31))
def test_int_kbit(shape: tuple[int, int], blocking: tuple[BlockSize, str], k: int, dtype: str, seed: int) -> None:
    """2^k - 1 equally spaced levels."""
    weight, (block_size, axis) = random_weight(shape, seed), blocking
    expected = reference.codebook(weight.double().numpy(), reference.int_levels(k), block_size, axis, dtype)
    assert_agree(weight, make_spec("int", k, block_size, block_axis=axis, scale_dtype=dtype), expected)


@settings(max_examples=120, deadline=None)
@given(
    SHAPES,
    BLOCKINGS,
    st.integers(2, 8),
    st.sampled_from(["gptq", "awq", "absmax_full", "deepspeed"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_int_conventions(
    shape: tuple[int, int], blocking: tuple[BlockSize, str], k: int, convention: str, symmetric: bool, seed: int
) -> None:
    """The other conventions, symmetric and not."""
    symmetric = symmetric or convention == "absmax_full"
    weight, (block_size, axis) = random_weight(shape, seed), blocking
    flat = weight.double().numpy().ravel()
    expected = np.zeros_like(flat)
    for block in reference.block_slices(shape, block_size, axis):
        expected[block] = reference.affine(flat[block], convention, k, symmetric)
    spec = make_spec("int", k, block_size, block_axis=axis, symmetric=symmetric, convention=convention)
    assert_agree(weight, spec, expected.reshape(shape))


@settings(max_examples=60, deadline=None)
@given(SHAPES, BLOCKINGS, st.integers(3, 8), st.data(), st.sampled_from(["appendix", "body", "ieee"]), st.integers(0, 2**31))
def test_fp(shape: tuple[int, int], blocking: tuple[BlockSize, str], k: int, data: st.DataObject, subnormal: str, seed: int) -> None:
    """Every split into exponent and mantissa."""
    exponent_bits = data.draw(st.integers(1, k - 1))
    subnormal = "appendix" if exponent_bits == k - 1 else subnormal
    weight, (block_size, axis) = random_weight(shape, seed), blocking
    levels = reference.float_levels(exponent_bits, k - 1 - exponent_bits, subnormal)
    expected = reference.codebook(weight.double().numpy(), levels, block_size, axis)
    assert_agree(weight, make_spec("fp", k, block_size, block_axis=axis, exponent_bits=exponent_bits, subnormal=subnormal), expected)


@settings(max_examples=40, deadline=None)
@given(SHAPES, BLOCKINGS, st.integers(2, 8), st.integers(0, 2**31))
def test_dynamic(shape: tuple[int, int], blocking: tuple[BlockSize, str], k: int, seed: int) -> None:
    """Encoding only: the levels are compared with bitsandbytes' elsewhere."""
    weight, (block_size, axis) = random_weight(shape, seed), blocking
    expected = reference.codebook(weight.double().numpy(), np.array(dynamic_levels(k)), block_size, axis)
    assert_agree(weight, make_spec("dynamic", k, block_size, block_axis=axis), expected)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(4, 9), st.integers(64, 100)), BLOCKINGS, st.integers(2, 8), st.integers(0, 2**31))
def test_quantile(shape: tuple[int, int], blocking: tuple[BlockSize, str], k: int, seed: int) -> None:
    """The levels follow the whole tensor, whatever the blocks are."""
    weight, (block_size, axis) = random_weight(shape, seed), blocking
    original = weight.double().numpy()
    expected = reference.codebook(original, reference.quantile_levels(original, k), block_size, axis)
    # A level that lies between two float16 numbers may be rounded either way: half a unit of float16 is allowed for.
    found = fake_quantize(DATA_TYPES["quantile"], weight, make_spec("quantile", k, block_size, block_axis=axis)).double().numpy()
    tolerance = 2.0**-11 * np.abs(original).max()
    assert (np.abs(np.abs(found - original) - np.abs(expected - original)) <= tolerance).all()


MX_ELEMENTS = {(4, 2): (2, 1, 6), (6, 2): (2, 3, 7.5), (6, 3): (3, 2, 28), (8, 4): (4, 3, 448), (8, 5): (5, 2, 57344)}
"""(bit width, exponent bits) -> exponent bits, mantissa bits and largest number of the element, as the specification prints them."""


@settings(max_examples=120, deadline=None)
@given(SHAPES, BLOCKINGS, st.sampled_from(sorted(MX_ELEMENTS)), st.sampled_from(["floor", "rceil", "ceil", "even"]), st.integers(0, 2**31))
def test_mxfp(shape: tuple[int, int], blocking: tuple[BlockSize, str], element: tuple[int, int], mode: str, seed: int) -> None:
    """To the last bit: scales are powers of two, so nothing is rounded but the elements.  16-bit weights make ties frequent."""
    weight, (block_size, axis) = random_weight(shape, seed).bfloat16().float(), blocking
    k, exponent_bits = element
    numbers = reference.element_values(*MX_ELEMENTS[element])
    expected = reference.mx(weight.double().numpy(), numbers, block_size, axis, mode)
    spec = make_spec("mxfp", k, block_size, block_axis=axis, scale_dtype="e8m0", exponent_bits=exponent_bits, scale_mode=mode)
    assert (fake_quantize(DATA_TYPES["mxfp"], weight, spec).double().numpy() == expected).all()


@settings(max_examples=60, deadline=None)
@given(SHAPES, BLOCKINGS, st.integers(0, 2**31))
def test_nvfp4(shape: tuple[int, int], blocking: tuple[BlockSize, str], seed: int) -> None:
    """Two levels of scales, over magnitudes that vary by 2^16 within a tensor."""
    weight, (block_size, axis) = random_weight(shape, seed), blocking
    expected = reference.nvfp4(weight.double().numpy(), block_size, axis)
    assert_agree(weight, make_spec("nvfp4", 4, block_size, block_axis=axis, scale_dtype="e4m3"), expected)


@given(st.lists(st.floats(0, 65000, width=32), min_size=1, max_size=20))
def test_float16_scales(scales: list[float]) -> None:
    """torch and numpy round alike, subnormal numbers included; what would become 0 is 2^-24."""
    found = round_scale(torch.tensor(scales).reshape(-1, 1), "float16").flatten().tolist()
    assert found == [reference.stored(scale, "float16") for scale in scales]


def test_float16_scale_corners() -> None:
    """Zero stays zero; the smallest positive number is kept; the largest still fits."""
    scales = torch.tensor([[0.0], [1e-30], [2.0**-25], [2.0**-24], [65504.0], [65519.0]])
    assert round_scale(scales, "float16").flatten().tolist() == [0, 2.0**-24, 2.0**-24, 2.0**-24, 65504, 65504]
    assert round_scale(scales, "bfloat16").flatten().tolist()[0] == 0
    assert float(round_scale(torch.tensor([[1e-45]]), "float32")) == pytest.approx(1.1754944e-38)
