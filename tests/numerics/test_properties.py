"""Laws that hold for every weight, checked by Hypothesis on all formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_spec import make_spec

from quantsweep.data_types._base import fake_quantize, quantize_weight
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.numerics.blocks import BlockLayout, Blocks, tiles
from quantsweep.trial.registry import DATA_TYPES
from quantsweep.trial.specs import BlockSize

SYMMETRIC_GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("int", {}),
    ("int", {"convention": "absmax_full"}),
    ("fp", {}),
    ("fp", {"subnormal": "ieee", "exponent_bits": 1}),
    ("nf", {}),
]
ALL: list[tuple[str, dict[str, Any]]] = [
    *SYMMETRIC_GRIDS,
    ("int", {"convention": "gptq"}),
    ("int", {"convention": "gptq", "symmetric": False}),
    ("int", {"convention": "awq", "symmetric": False}),
    ("int", {"convention": "deepspeed"}),
    ("int", {"convention": "deepspeed", "symmetric": False}),
    ("dynamic", {}),
    ("quantile", {}),
]
BLOCKINGS: list[tuple[BlockSize, str]] = [(16, "flat"), (100, "flat"), ("tensor", "flat"), (16, "input"), (7, "input"), (None, "input")]
every_format = pytest.mark.parametrize(("data_type", "options"), ALL)
seeds = st.integers(0, 2**31)


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Reproducible normal weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# Blocks -----------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 12), st.integers(1, 40), st.one_of(st.integers(2, 100), st.just("tensor"), st.none()), st.sampled_from(["flat", "input"])
)
def test_split_and_join(rows: int, columns: int, block_size: BlockSize, axis: str) -> None:
    """join(split(W)) is W; every block holds neighbours; padding repeats the block's own last element."""
    axis = "input" if block_size is None else axis
    weight = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    blocks = Blocks.of(weight, block_size, axis)
    layout = blocks.layout
    assert torch.equal(layout.join(blocks.values_NB), weight)
    assert torch.equal(blocks.elements(), weight.flatten())
    assert blocks.values_NB.shape == (layout.num_blocks, layout.width)
    steps = blocks.values_NB.diff(dim=1)
    assert bool(((steps == 1) | (steps == 0)).all())
    assert int((steps == 0).sum()) == layout.num_runs * layout.padding


def test_splitting_without_short_blocks_copies_nothing() -> None:
    """The blocks of a divisible weight are a view of it."""
    weight = torch.zeros(4, 32)
    for block_size, axis in ((16, "flat"), (16, "input"), ("tensor", "flat"), (None, "input")):
        assert Blocks.of(weight, block_size, axis).values_NB.data_ptr() == weight.data_ptr()  # type: ignore[arg-type]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 50))
def test_tiles_cover_once(rows: int, columns: int, limit: int) -> None:
    """Tiles are a partition, and each is small."""
    seen = torch.zeros(rows, columns)
    for tile in tiles(rows, columns, limit):
        seen[tile] += 1
        assert seen[tile].numel() <= max(limit, 1)
    assert bool((seen == 1).all())


def test_impossible_layouts_are_refused() -> None:
    """No elements; one scale an output channel of a flattened tensor."""
    with pytest.raises(QuantizationError, match="no elements"):
        BlockLayout(out_features=0, in_features=4, block_size=2, block_axis="flat")
    with pytest.raises(QuantizationError, match="block_axis=input"):
        BlockLayout(out_features=4, in_features=4, block_size=None, block_axis="flat")


# Formats ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_type", "options"), SYMMETRIC_GRIDS)
@settings(max_examples=30, deadline=None)
@given(seed=seeds, k=st.integers(3, 8), blocking=st.sampled_from(BLOCKINGS))
def test_idempotence(data_type: str, options: dict[str, Any], seed: int, k: int, blocking: tuple[BlockSize, str]) -> None:
    """Quantizing twice changes nothing, to the last bit, where the grid contains both extremes."""
    spec = make_spec(data_type, k, blocking[0], block_axis=blocking[1], **options)
    once = fake_quantize(DATA_TYPES[data_type], normal(6, 50, seed), spec)
    assert torch.equal(fake_quantize(DATA_TYPES[data_type], once, spec), once)


@every_format
@settings(max_examples=15, deadline=None)
@given(seed=seeds, exponent=st.integers(-5, 8), k=st.integers(3, 8))
def test_powers_of_two_pass_through(data_type: str, options: dict[str, Any], seed: int, exponent: int, k: int) -> None:
    """Q(2^n W) = 2^n Q(W) exactly, as long as scales are normal numbers of their type."""
    spec = make_spec(data_type, k, 16, **options)
    weight = normal(8, 40, seed)
    scaled = fake_quantize(DATA_TYPES[data_type], weight * 2.0**exponent, spec)
    assert torch.equal(scaled, fake_quantize(DATA_TYPES[data_type], weight, spec) * 2.0**exponent)


@every_format
@pytest.mark.parametrize(("block_size", "axis"), BLOCKINGS)
def test_zero_weights_stay_zero(data_type: str, options: dict[str, Any], block_size: BlockSize, axis: str) -> None:
    """All zeros, and one row of zeros among others."""
    spec = make_spec(data_type, 4, block_size, block_axis=axis, **options)
    zeros = torch.zeros(8, 50)
    assert torch.equal(fake_quantize(DATA_TYPES[data_type], zeros, spec), zeros)
    mixed = normal(8, 50, 0)
    mixed[3] = 0
    assert not fake_quantize(DATA_TYPES[data_type], mixed, spec)[3].any() or options.get("symmetric") is False


@pytest.mark.parametrize(("data_type", "options"), [case for case in ALL if case[0] != "quantile"])
@settings(max_examples=15, deadline=None)
@given(seed=seeds, length=st.integers(1, 15))
def test_a_short_block_is_quantized_as_if_alone(data_type: str, options: dict[str, Any], seed: int, length: int) -> None:
    """Padding does not show: the short block at the end equals the same weights quantized by themselves."""
    weight = normal(1, 32 + length, seed)
    whole = fake_quantize(DATA_TYPES[data_type], weight, make_spec(data_type, 4, 16, **options))
    alone = fake_quantize(DATA_TYPES[data_type], weight[:, 32:], make_spec(data_type, 4, "tensor", **options))
    assert torch.equal(whole[:, 32:], alone)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, k=st.integers(2, 8), offset=st.sampled_from([0.0, 0.5, 3.0, -3.0]))
def test_integer_errors_are_below_half_a_step(seed: int, k: int, offset: float) -> None:
    """|ŵ - w| <= s/2 for asymmetric gptq, which covers 0 and both extremes; one step at the ends, where z is rounded."""
    weight = normal(4, 64, seed) + offset
    spec = make_spec("int", k, 16, symmetric=False, scale_dtype="float32", convention="gptq")
    data_type = DATA_TYPES["int"]
    quantized = quantize_weight(data_type, weight, spec)
    steps = (fake_quantize(data_type, weight, spec) - weight).reshape(-1, 16).abs() / quantized.qparams.scale_N1
    assert float(steps.max()) <= 1.0001
    assert float((steps > 0.5001).float().mean()) < 0.2


@pytest.mark.parametrize("value", [1e-4, 0.37, -2.0, 4e-6])
def test_constant_blocks(value: float) -> None:
    """DeepSpeed's asymmetric form divides by zero there; ours returns the constant, as every symmetric grid does."""
    weight = torch.full((2, 32), value)
    for options in ({"symmetric": False, "convention": "deepspeed"}, {}, {"convention": "absmax_full"}):
        found = fake_quantize(DATA_TYPES["int"], weight, make_spec("int", 4, 16, **options))
        half_a_step = 2.0**-25 * 7  # of float16's smallest numbers, 7 of which are the largest level
        assert found.flatten().tolist() == pytest.approx([value] * 64, rel=1e-3, abs=half_a_step)


def test_scales_that_do_not_fit_are_refused() -> None:
    """A weight of 1e5 has no float16 scale; the message gives the remedy, which works."""
    weight = torch.tensor([[1e5, 1.0]])
    with pytest.raises(QuantizationError, match="scale_dtype=bfloat16"):
        quantize_weight(DATA_TYPES["int"], weight, make_spec("int", 4, 2))
    assert float(fake_quantize(DATA_TYPES["int"], weight, make_spec("int", 4, 2, scale_dtype="bfloat16")).max()) == pytest.approx(
        1e5, rel=4e-3
    )


@pytest.mark.parametrize(("data_type", "options"), ALL)
def test_tiny_weights_do_not_blow_up(data_type: str, options: dict[str, Any]) -> None:
    """Below float16's smallest number the scale is that number; weights come back no larger than they can."""
    weight = normal(8, 40, 1) * 1e-12
    found = fake_quantize(DATA_TYPES[data_type], weight, make_spec(data_type, 4, 16, **options))
    assert bool(found.isfinite().all())
    assert float(found.abs().max()) <= 2.0**-24


def test_quantile_needs_enough_weights() -> None:
    """Below 256 there is nothing to take 256 quantiles of."""
    with pytest.raises(QuantizationError, match="at least 256"):
        quantize_weight(DATA_TYPES["quantile"], torch.ones(5, 51), make_spec("quantile", 4, 16))


def test_unknown_options_are_refused() -> None:
    """A misspelt option, a value that does not exist."""
    for options in ({"exponents": 2}, {"subnormal": "IEEE"}, {"exponent_bits": 4}):
        with pytest.raises(ConfigurationError, match="data_type 'fp'"):
            quantize_weight(DATA_TYPES["fp"], torch.ones(4, 4), make_spec("fp", 4, 4, **options))


def test_gptq_symmetric_halves_blocks_without_negative_values() -> None:
    """A peculiarity of the reference that is kept: the top code is half of the block's maximum."""
    spec = make_spec("int", 4, 4, convention="gptq", scale_dtype="float32")
    found = fake_quantize(DATA_TYPES["int"], torch.tensor([[0.0, 0.5, 1.0, 1.5]]), spec)
    assert found[0].tolist() == pytest.approx([0, 0.5, 0.7, 0.7])
