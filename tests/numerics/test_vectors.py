"""Numbers from outside: published code tables, worked vectors, relative errors on normal weights, bits per weight."""

from __future__ import annotations

import pytest
import torch
from make_spec import make_spec

from quantsweep.data_types._base import fake_quantize, quantize_weight
from quantsweep.data_types.dynamic import dynamic_levels
from quantsweep.data_types.fp import positive_levels
from quantsweep.data_types.nf import normal_levels
from quantsweep.numerics.blocks import Blocks
from quantsweep.numerics.error import weight_error
from quantsweep.trial.registry import DATA_TYPES

W = torch.tensor([[-0.9, -0.2, 0.05, 0.4, 1.1, 0, 0.72, -0.33]])

AFFINE = [
    ("gptq", False, 3, 0.285714, 3, [-0.857143, -0.285714, 0, 0.285714, 1.14286, 0, 0.857143, -0.285714]),
    ("gptq", False, 4, 0.133333, 7, [-0.933333, -0.266667, 0, 0.4, 1.06667, 0, 0.666667, -0.266667]),
    ("gptq", True, 3, 0.314286, 4, [-0.942857, -0.314286, 0, 0.314286, 0.942857, 0, 0.628571, -0.314286]),
    ("gptq", True, 4, 0.146667, 8, [-0.88, -0.146667, 0, 0.44, 1.02667, 0, 0.733333, -0.293333]),
    ("awq", False, 3, 0.285714, 3, [-0.857143, -0.285714, 0, 0.285714, 1.14286, 0, 0.857143, -0.285714]),
    ("awq", False, 4, 0.133333, 7, [-0.933333, -0.266667, 0, 0.4, 1.06667, 0, 0.666667, -0.266667]),
    ("absmax_full", True, 3, 0.366667, 4, [-0.733333, -0.366667, 0, 0.366667, 1.1, 0, 0.733333, -0.366667]),
    ("absmax_full", True, 4, 0.157143, 8, [-0.942857, -0.157143, 0, 0.471429, 1.1, 0, 0.785714, -0.314286]),
    ("awq", True, 4, 0.157143, 8, [-0.942857, -0.157143, 0, 0.471429, 1.1, 0, 0.785714, -0.314286]),
    ("deepspeed", True, 3, 0.275, 4, [-0.825, -0.275, 0, 0.275, 0.825, 0, 0.825, -0.275]),
    ("deepspeed", True, 4, 0.1375, 8, [-0.9625, -0.1375, 0, 0.4125, 0.9625, 0, 0.6875, -0.275]),
]


@pytest.mark.parametrize(("convention", "symmetric", "k", "scale", "zero", "expected"), AFFINE)
def test_integer_vectors(convention: str, symmetric: bool, k: int, scale: float, zero: int, expected: list[float]) -> None:
    """Each convention on one row of eight weights, computed by hand (symmetric zero points are written as codes here)."""
    spec = make_spec("int", k, 8, symmetric=symmetric, scale_dtype="float32", convention=convention)
    data_type = DATA_TYPES["int"]
    qparams = data_type.choose_qparams(Blocks.of(W, 8, "flat"), spec)
    assert float(qparams.scale_N1) == pytest.approx(scale, abs=1e-6)
    assert float(qparams.zero_N1) == zero
    assert fake_quantize(data_type, W, spec)[0].tolist() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(
    ("data_type", "k", "expected"),
    [
        ("fp", 4, [-0.733333, -0.183333, 0.00572917, 0.366667, 1.1, 0, 0.733333, -0.366667]),
        ("dynamic", 4, [-0.97625, -0.23375, 0.03575, 0.48125, 1.1, 0, 0.72875, -0.23375]),
        ("int", 3, [-0.733333, -0.366667, 0, 0.366667, 1.1, 0, 0.733333, -0.366667]),
        ("nf", 4, [-0.765812, -0.203251, 0.0875383, 0.371707, 1.1, 0, 0.795252, -0.312886]),
    ],
)
def test_codebook_vectors(data_type: str, k: int, expected: list[float]) -> None:
    """The same row in the codebook formats."""
    spec = make_spec(data_type, k, 8, scale_dtype="float32")
    assert fake_quantize(DATA_TYPES[data_type], W, spec)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_mxfp4_vector() -> None:
    """The same row: the scale is 0.25, exactly."""
    spec = make_spec("mxfp", 4, 8, scale_dtype="e8m0")
    quantized = quantize_weight(DATA_TYPES["mxfp"], W, spec)
    assert quantized.qparams.scale_N1.tolist() == [[0.25]]
    assert quantized.codes_NB.tolist() == [[0b1110, 0b1010, 0, 0b0011, 0b0110, 0, 0b0101, 0b1011]]
    assert fake_quantize(DATA_TYPES["mxfp"], W, spec).tolist() == [[-1, -0.25, 0, 0.375, 1, 0, 0.75, -0.375]]


def test_published_levels() -> None:
    """Level tables as printed: arXiv:2212.09720, section 2, and its appendix."""
    assert positive_levels(3, 2, "appendix") == (0, 0.25, 0.5, 1)
    assert positive_levels(4, 3, "appendix") == (0, *(2.0**-i for i in range(6, 0, -1)), 1)
    assert positive_levels(4, 2, "appendix") == pytest.approx((0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1))
    assert positive_levels(4, 2, "body")[1] == pytest.approx(0.0208333, abs=1e-7)
    assert positive_levels(4, 2, "ieee") == pytest.approx([v / 6 for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
    assert dynamic_levels(3) == pytest.approx((-0.775, -0.325, -0.055, 0, 0.055, 0.325, 0.775, 1))
    positive = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)
    assert dynamic_levels(4) == pytest.approx((*(-v for v in reversed(positive)), 0, *positive, 1))
    assert dynamic_levels(5)[0] == pytest.approx(-0.94375)
    assert dynamic_levels(8)[0] == pytest.approx(-0.99297, abs=1e-5)
    assert min(v for v in dynamic_levels(8) if v > 0) == pytest.approx(5.5e-7)
    assert normal_levels(2) == pytest.approx((-1, 0, 0.337915, 1), abs=1e-6)
    assert normal_levels(3) == pytest.approx((-1, -0.478629, -0.217142, 0, 0.16093, 0.337915, 0.562617, 1), abs=1e-6)
    for k in range(2, 9):
        assert len(set(normal_levels(k))) == 2**k


def test_one_exponent_bit_of_ieee_is_integer() -> None:
    """E1 with gradual underflow is equally spaced: the same levels as int."""
    for k in range(3, 9):
        largest = 2 ** (k - 1) - 1
        assert positive_levels(k, 1, "ieee") == pytest.approx([i / largest for i in range(largest + 1)])


NORMAL = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))  # 2^18 samples

RELATIVE_ERROR = [
    ("int", 3, {}, 0.06257, 0.10964),
    ("int", 4, {}, 0.01155, 0.02027),
    ("int", 5, {}, 0.00251, 0.00440),
    ("fp", 3, {}, 0.05115, 0.07168),
    ("fp", 4, {"exponent_bits": 3}, 0.03553, 0.03811),
    ("fp", 4, {}, 0.01487, None),
    ("fp", 4, {"subnormal": "ieee"}, 0.01116, None),
    ("fp", 5, {}, 0.00996, 0.01058),
    ("dynamic", 3, {}, 0.06270, 0.08765),
    ("dynamic", 4, {}, 0.01938, 0.02870),
    ("dynamic", 5, {}, 0.00533, 0.00820),
    ("quantile", 3, {}, 0.04936, 0.07297),
    ("quantile", 4, {}, 0.00947, 0.01216),
    ("quantile", 5, {}, 0.00257, 0.00269),
    ("nf", 3, {}, 0.04071, 0.05286),
    ("nf", 4, {}, 0.00843, 0.01081),
    ("nf", 5, {}, 0.00197, 0.00252),
]


@pytest.mark.parametrize(("data_type", "k", "options", "at_64", "at_1024"), RELATIVE_ERROR)
def test_relative_error_on_normal_weights(data_type: str, k: int, options: dict[str, object], at_64: float, at_1024: float | None) -> None:
    """Against independent float64 computations; seeds differ by 0.7 % at block 64 and 1.2 % at 1024."""
    for block_size, expected in ((64, at_64), (1024, at_1024)):
        if expected is not None:
            found = fake_quantize(DATA_TYPES[data_type], NORMAL, make_spec(data_type, k, block_size, **options))
            assert weight_error(NORMAL, found).relative == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize(
    ("data_type", "block_size", "scale_dtype", "options", "expected"),
    [
        ("mxfp", 32, "e8m0", {"scale_mode": "floor"}, 0.01324),
        ("mxfp", 32, "e8m0", {"scale_mode": "rceil"}, 0.01329),
        ("nvfp4", 16, "e4m3", {}, 0.00907),
    ],
)
def test_relative_error_of_4bit_floats(
    data_type: str, block_size: int, scale_dtype: str, options: dict[str, object], expected: float
) -> None:
    """Their own blocks along the input."""
    spec = make_spec(data_type, 4, block_size, block_axis="input", scale_dtype=scale_dtype, **options)
    assert weight_error(NORMAL, fake_quantize(DATA_TYPES[data_type], NORMAL, spec)).relative == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("k", [3, 4, 5, 8])
@pytest.mark.parametrize(("block_size", "overhead"), [(64, 0.25), (128, 0.125), (256, 0.0625), (512, 0.03125), (1024, 0.015625)])
def test_bits_per_weight(k: int, block_size: int, overhead: float) -> None:
    """k + 16 / B, as the k-bit paper counts."""
    assert quantize_weight(DATA_TYPES["int"], NORMAL, make_spec("int", k, block_size)).stored_bits / NORMAL.numel() == k + overhead


def test_bits_of_zero_points_and_codebooks() -> None:
    """Zero points count k bits where they are clipped to codes and 16 otherwise; a tensor's own codebook counts 2^k · 16."""
    weight, blocks = NORMAL[:4, :128], 8
    for convention, zero_bits in (("gptq", 4), ("awq", 4), ("deepspeed", 16)):
        spec = make_spec("int", 4, 64, symmetric=False, convention=convention)
        assert quantize_weight(DATA_TYPES["int"], weight, spec).stored_bits == 512 * 4 + blocks * (16 + zero_bits)
    assert quantize_weight(DATA_TYPES["quantile"], weight, make_spec("quantile", 4, 64)).stored_bits == 512 * 4 + blocks * 16 + 16 * 16
    assert quantize_weight(DATA_TYPES["fp"], weight, make_spec("fp", 4, 64, scale_dtype="float32")).stored_bits == 512 * 4 + blocks * 32


def test_bits_of_floats_with_scales_of_their_own() -> None:
    """MX: 8 bits a block; NVFP4: 8 a block and 32 a tensor; FP8: those of the scales' type."""
    weight = NORMAL[:4, :128]
    for k in (4, 6, 8):
        assert quantize_weight(DATA_TYPES["mxfp"], weight, make_spec("mxfp", k, 32, scale_dtype="e8m0")).stored_bits == 512 * (k + 0.25)
    assert quantize_weight(DATA_TYPES["nvfp4"], weight, make_spec("nvfp4", 4, 16, scale_dtype="e4m3")).stored_bits == 512 * 4.5 + 32
    for dtype, bits in (("float16", 16), ("float32", 32)):
        assert quantize_weight(DATA_TYPES["fp8"], weight, make_spec("fp8", 8, 64, scale_dtype=dtype)).stored_bits == 512 * 8 + 8 * bits


def test_short_blocks_store_whole_scales() -> None:
    """3 rows of 70: 4 flat blocks of 64, and 2 blocks a row along the input."""
    weight = NORMAL[:3, :70]
    assert quantize_weight(DATA_TYPES["int"], weight, make_spec("int", 4, 64)).stored_bits == 210 * 4 + 4 * 16
    assert quantize_weight(DATA_TYPES["int"], weight, make_spec("int", 4, 64, block_axis="input")).stored_bits == 210 * 4 + 6 * 16


def test_int8_error_reaches_but_does_not_pass_half_a_step() -> None:
    """absmax / 254, the closed form for 8 bits (the scale here is exact in float32)."""
    found = fake_quantize(DATA_TYPES["int"], NORMAL, make_spec("int", 8, "tensor", scale_dtype="float32"))
    ratio = float((found - NORMAL).abs().max()) / (float(NORMAL.abs().max()) / 254)
    assert 0.99 < ratio <= 1.0001


def test_dynamic_loses_the_negative_extreme() -> None:
    """There is no -1: a block whose extreme is negative keeps 77.5 % of it at 3 bits and 99.3 % at 8."""
    weight = torch.tensor([[-1.0, 0.5]])
    for k, kept in ((3, 0.775), (4, 0.8875), (5, 0.94375), (8, 0.99297)):
        assert float(fake_quantize(DATA_TYPES["dynamic"], weight, make_spec("dynamic", k, 2))[0, 0]) == pytest.approx(-kept, abs=1e-5)
