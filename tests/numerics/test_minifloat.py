"""Small floating-point numbers: every value of every format, torch's float8 casts, and the laws of the formats built on them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_spec import make_spec

from quantsweep.data_types._base import fake_quantize, quantize_weight
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, MiniFloat, encode, exponent_of, nearest, power_of_two
from quantsweep.trial.registry import DATA_TYPES
from quantsweep.trial.specs import BlockSize, QuantizationSpec

ELEMENTS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3, "e5m2": E5M2}
TORCH = [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]
MX = [(4, 2), (6, 2), (6, 3), (8, 4), (8, 5)]
MODES = ["floor", "rceil", "ceil", "even"]
BLOCKINGS: list[tuple[BlockSize, str]] = [(16, "flat"), (32, "input"), ("tensor", "flat"), (7, "input"), (None, "input")]
every_element = pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
seeds = st.integers(0, 2**31)


def mxfp(k: int, exponent_bits: int | None, mode: str, block_size: BlockSize = 32, axis: str = "input") -> QuantizationSpec:
    return make_spec("mxfp", k, block_size, block_axis=axis, scale_dtype="e8m0", exponent_bits=exponent_bits, scale_mode=mode)


ALL: list[QuantizationSpec] = [
    *(mxfp(k, exponent_bits, mode) for k, exponent_bits in MX for mode in MODES),
    make_spec("nvfp4", 4, 16, block_axis="input", scale_dtype="e4m3"),
    *(make_spec("fp8", 8, 64, scale_dtype=dtype, format=name) for name in ("e4m3", "e5m2") for dtype in ("float16", "float32")),
]


def name_of(spec: QuantizationSpec) -> str:
    return f"{spec.data_type}{spec.bit_width}-{spec.scale_dtype}-{'-'.join(str(value) for _, value in spec.data_type_options)}"


every_format = pytest.mark.parametrize("spec", ALL, ids=name_of)


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantized(weight: torch.Tensor, spec: QuantizationSpec) -> torch.Tensor:
    return fake_quantize(DATA_TYPES[str(spec.data_type)], weight, spec)


def codes(weight: torch.Tensor, spec: QuantizationSpec) -> torch.Tensor:
    return quantize_weight(DATA_TYPES[str(spec.data_type)], weight, spec).codes_NB


# Numbers ------------------------------------------------------------------------------------------------------------------


def test_all_numbers_of_the_small_formats() -> None:
    """E2M1 in full; E2M3 and E3M2 by their regular parts."""
    assert E2M1.values()[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert E2M1.values()[8:] == (0, -0.5, -1, -1.5, -2, -3, -4, -6)
    assert E2M3.values()[:32] == (
        *(i / 8 for i in range(16)),
        *(2 + i / 4 for i in range(8)),
        *(4 + i / 2 for i in range(8)),
    )
    positive = E3M2.values()[:32]
    assert positive[:8] == tuple(i / 16 for i in range(8))
    assert all(positive[i + 4] == 2 * positive[i] for i in range(4, 28))
    assert positive[28:] == (16, 20, 24, 28)


@pytest.mark.parametrize(
    ("element", "largest", "smallest_normal", "step", "emax", "numbers"),
    [
        (E2M1, 6, 1, 0.5, 2, 15),
        (E2M3, 7.5, 1, 0.125, 2, 63),
        (E3M2, 28, 0.25, 0.0625, 4, 63),
        (E4M3, 448, 2**-6, 2**-9, 8, 253),
        (E5M2, 57344, 2**-14, 2**-16, 15, 247),
    ],
    ids=ELEMENTS,
)
def test_extremes(element: MiniFloat, largest: float, smallest_normal: float, step: float, emax: int, numbers: int) -> None:
    """As the specification prints them; +0 and -0 are one number."""
    finite = [value for value in element.values() if not math.isnan(value)]
    assert (max(finite), min(finite), element.largest) == (largest, -largest, largest)
    assert min(value for value in finite if value > 0) == step
    assert element.values()[1 << element.mantissa_bits] == smallest_normal
    assert element.largest_exponent == emax
    assert len(set(finite)) == numbers


@pytest.mark.parametrize(("element", "dtype"), TORCH)
def test_values_are_torchs(element: MiniFloat, dtype: torch.dtype) -> None:
    """All 256 patterns; what is infinite or NaN there has no number here."""
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    ours = torch.tensor(element.values())
    assert torch.equal(ours.isnan(), ~theirs.isfinite())
    assert torch.equal(ours[theirs.isfinite()], theirs[theirs.isfinite()])


@pytest.mark.parametrize(("element", "dtype"), TORCH)
def test_codes_are_torchs_casts(element: MiniFloat, dtype: torch.dtype) -> None:
    """Bit for bit: random numbers of all magnitudes, all numbers, all mid-points and their neighbours, zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(100_000, generator=generator) * 2.0 ** torch.randint(-30, 20, (100_000,), generator=generator)
    exact = torch.tensor([value for value in element.values() if not math.isnan(value)]).sort().values
    middle = (exact[1:] + exact[:-1]) / 2
    around = [middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))]
    values = torch.cat([spread, exact, *around, torch.tensor([0.0, -0.0, 1e-45, -1e-45])]).clamp(-element.largest, element.largest)
    assert torch.equal(encode(values[None], torch.ones(1, 1), element), values[None].to(dtype).view(torch.uint8))


@every_element
def test_numbers_round_trip_and_ties_go_to_even(element: MiniFloat) -> None:
    """Every pattern encodes to itself; half-way between two neighbours the even pattern wins, on both sides of 0."""
    positive = torch.tensor(element.values()[: element.largest_code + 1])
    for sign in (1, -1):
        expected = torch.arange(element.largest_code + 1) + (0 if sign > 0 else 1 << (element.bits - 1))
        assert torch.equal(encode(sign * positive[None], torch.ones(1, 1), element).long(), expected[None])
        ties = encode(sign * ((positive[1:] + positive[:-1]) / 2)[None], torch.ones(1, 1), element)
        assert not bool((ties & 1).any())
        assert bool(((ties.long() - expected[:-1]).abs() <= 1).all())


@every_element
def test_the_nearest_number_is_found(element: MiniFloat) -> None:
    """Against comparing with all of them, far outside too; nothing becomes NaN."""
    values = torch.cat([normal(1, 3000, 0) * element.largest / 2, torch.tensor([[1e30, -1e30, 3e38]])], dim=1)
    numbers = torch.tensor([value for value in element.values() if not math.isnan(value)]).double()
    best = (values.double()[0, :, None].clamp(-element.largest, element.largest) - numbers).abs().min(dim=1).values
    found = nearest(values, element).double()[0]
    assert torch.equal((values.double()[0].clamp(-element.largest, element.largest) - found).abs(), best)


def test_powers_of_two_are_exact() -> None:
    """All of E8M0, and their exponents."""
    exponents = torch.arange(-127, 128, dtype=torch.int32)
    assert power_of_two(exponents).double().tolist() == [2.0**n for n in range(-127, 128)]
    normal_ones = exponents[1:]
    assert torch.equal(exponent_of(power_of_two(normal_ones)), normal_ones)
    assert torch.equal(exponent_of(-1.999 * power_of_two(normal_ones[:-1])), normal_ones[:-1])


# Formats ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_fp8_is_scaled_torch(name: str, scale_dtype: str) -> None:
    """Codes and values with torch's own float8 cast, over rows of very different magnitudes."""
    element, dtype = TORCH[name == "e5m2"]
    weight = normal(16, 64, 3) * 2.0 ** torch.arange(-4.0, 12.0)[:, None]
    spec = make_spec("fp8", 8, 64, scale_dtype=scale_dtype, format=name)
    scale = (weight.abs().amax(dim=1, keepdim=True) / element.largest).to(getattr(torch, scale_dtype)).float()
    expected = (weight / scale).clamp(-element.largest, element.largest).to(dtype)
    assert torch.equal(codes(weight, spec), expected.view(torch.uint8))
    assert torch.equal(quantized(weight, spec), expected.float() * scale)


@every_format
@settings(max_examples=15, deadline=None)
@given(seed=seeds, blocking=st.sampled_from(BLOCKINGS))
def test_quantizing_twice_changes_nothing(spec: QuantizationSpec, seed: int, blocking: tuple[BlockSize, str]) -> None:
    """MX to the last bit, although its scale may become half of what it was; others up to the last bit of a float32 scale."""
    spec = make_spec_like(spec, *blocking)
    once = quantized(normal(6, 50, seed), spec)
    twice = quantized(once, spec)
    assert torch.equal(twice, once) if spec.data_type == "mxfp" else torch.allclose(twice, once, rtol=1e-6, atol=0)


@every_format
@settings(max_examples=10, deadline=None)
@given(seed=seeds, exponent=st.integers(-5, 8))
def test_powers_of_two_leave_codes_alone(spec: QuantizationSpec, seed: int, exponent: int) -> None:
    """Q(2^n W) = 2^n Q(W), with the same codes (fp8 as long as its float16 scales are normal numbers)."""
    weight = normal(8, 40, seed) * (2.0**12 if spec.scale_dtype == "float16" else 1)
    assert torch.equal(codes(weight * 2.0**exponent, spec), codes(weight, spec))
    assert torch.equal(quantized(weight * 2.0**exponent, spec), quantized(weight, spec) * 2.0**exponent)


@every_format
@pytest.mark.parametrize(("block_size", "axis"), BLOCKINGS)
def test_zero_weights_stay_zero(spec: QuantizationSpec, block_size: BlockSize, axis: str) -> None:
    """All zeros, of both signs, and one row of zeros among others."""
    spec = make_spec_like(spec, block_size, axis)
    for zero in (0.0, -0.0):
        assert not quantized(torch.full((8, 50), zero), spec).any()
    mixed = normal(8, 50, 0)
    mixed[3] = 0
    assert not quantized(mixed, spec)[3].any()


@every_format
@settings(max_examples=10, deadline=None)
@given(seed=seeds, length=st.integers(1, 15))
def test_a_short_block_is_quantized_as_if_alone(spec: QuantizationSpec, seed: int, length: int) -> None:
    """Padding does not show (NVFP4's second scale is the tensor's: there the largest weight stands in both)."""
    weight = normal(1, 32 + length, seed)
    weight[0, 0] = weight[0, 32] = 8.0
    whole = quantized(weight, make_spec_like(spec, 16, "flat"))
    assert torch.equal(whole[:, 32:], quantized(weight[:, 32:], make_spec_like(spec, "tensor", "flat")))


@every_format
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_errors_are_bounded(spec: QuantizationSpec, seed: int) -> None:
    """By a quarter of the block's maximum: what E2M1 loses of a number just below 8, and more than half of its widest step."""
    weight = normal(8, 64, seed)
    spec = make_spec_like(spec, 16, "input")
    error = (quantized(weight, spec) - weight).abs().reshape(-1, 16)
    assert bool((error <= 0.25 * weight.abs().reshape(-1, 16).amax(dim=1, keepdim=True)).all())


@pytest.mark.parametrize(("k", "exponent_bits"), MX)
@pytest.mark.parametrize("mode", ["rceil", "ceil"])
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_scales_that_are_rounded_up_saturate_nothing(k: int, exponent_bits: int, mode: str, seed: int) -> None:
    """The block's maximum over its scale is at most the largest number, up to the rounding of one division."""
    quantized = quantize_weight(DATA_TYPES["mxfp"], weight := normal(8, 64, seed), mxfp(k, exponent_bits, mode))
    element = quantized.qparams.element
    assert element is not None
    assert float((weight.abs().reshape(-1, 32) / quantized.qparams.scale_N1).max()) <= element.largest * (1 + 2**-23)


@pytest.mark.parametrize(
    ("mode", "largest", "scale"),
    [
        *(("floor", m, s) for m, s in ((4, 1), (6, 1), (7.99, 1), (8, 2), (3.99, 0.5))),
        *(("rceil", m, s) for m, s in ((4, 1), (6, 1), (6.001, 2), (3, 0.5), (3.001, 1))),
        *(("ceil", m, s) for m, s in ((4, 1), (4.001, 2), (8, 2), (6, 2))),
        *(("even", m, s) for m, s in ((4, 1), (6.99, 1), (7, 2), (8, 2), (3.49, 0.5), (3.5, 1))),
    ],
)
def test_mxfp4_scales(mode: str, largest: float, scale: float) -> None:
    """Where each mode changes over, by hand."""
    quantized = quantize_weight(DATA_TYPES["mxfp"], torch.tensor([[largest, -0.1]]), mxfp(4, None, mode, 2))
    assert float(quantized.qparams.scale_N1) == scale


def test_mx_scales_end_where_e8m0_ends() -> None:
    """2^-127 for a block of zeros and for weights that are smaller than E8M0 reaches; large weights have room."""
    weight = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [1e38, -1e37]])
    for mode in MODES:
        quantized = quantize_weight(DATA_TYPES["mxfp"], weight, mxfp(4, None, mode, 2))
        assert quantized.qparams.scale_N1.double().flatten().tolist()[:2] == [2.0**-127, 2.0**-127]
        assert bool(fake_quantize(DATA_TYPES["mxfp"], weight, mxfp(4, None, mode, 2)).isfinite().all())


def test_nvfp4_scales() -> None:
    """The block with the tensor's largest weight has 448; one 2^20 times smaller gets the least scale, and is lost."""
    weight = torch.cat([torch.full((1, 16), 3.0), torch.full((1, 16), 3.0 * 2**-10), torch.full((1, 16), 3.0 * 2**-20)])
    quantized = quantize_weight(DATA_TYPES["nvfp4"], weight, make_spec("nvfp4", 4, 16, block_axis="input", scale_dtype="e4m3"))
    qparams = quantized.qparams
    assert qparams.tensor_scale is not None
    assert float(qparams.tensor_scale) == pytest.approx(3 / 2688, rel=1e-7)
    assert qparams.scale_N1.flatten().tolist() == [448, 0.4375, 2.0**-6]
    assert quantized.codes_NB[:, 0].tolist() == [7, 7, 0]


def test_elements_that_do_not_exist_are_refused() -> None:
    """The message names the bits, what there is, and what was asked."""
    with pytest.raises(ConfigurationError, match="'mxfp' with 6 bits has elements of 2 or 3 exponent bits, got 4"):
        quantize_weight(DATA_TYPES["mxfp"], torch.ones(4, 4), mxfp(6, 4, "floor"))
    with pytest.raises(ConfigurationError, match="'mxfp' has no scale_dtype='float16'; choose from 'e8m0'"):
        quantize_weight(DATA_TYPES["mxfp"], torch.ones(4, 4), make_spec("mxfp", 4, 32))


def make_spec_like(spec: QuantizationSpec, block_size: BlockSize, axis: str) -> QuantizationSpec:
    """The same format in other blocks."""
    options: dict[str, Any] = dict(spec.data_type_options)
    return make_spec(str(spec.data_type), spec.bit_width or 0, block_size, block_axis=axis, scale_dtype=spec.scale_dtype or "", **options)
