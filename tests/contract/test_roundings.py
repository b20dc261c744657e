"""What every rounding must do; parametrised over the registry, so a new one is tested by being there."""

from __future__ import annotations

import math
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from component_cases import component, spec_of, stems
from rounding_cases import FakeLayer, Remembering, Source, round_layers
from torch import Tensor

from quantsweep.data_types._base import fake_quantize, quantize_weight
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.numerics.error import weight_error
from quantsweep.pipeline.interface import Layer, LayerContext, LayerRecord, Rounding, Stored
from quantsweep.trial import registry
from quantsweep.trial.registry import DATA_TYPES, ROUNDINGS
from quantsweep.trial.specs import QuantizationSpec, StepSpec, options_tuple

NAMES = ROUNDINGS.names()
every_rounding = pytest.mark.parametrize("name", NAMES)
data_free = pytest.mark.parametrize("name", [n for n in NAMES if not component("rounding", n)["capabilities"]["needs_calibration"]])
BASELINE = QuantizationSpec(rounding=StepSpec("none", 1))
BITS = 4
"""Of a code, in the spec that the contract is checked with."""


def two_layers(dtype: torch.dtype = torch.float32) -> dict[str, FakeLayer]:
    """Two layers of different shapes, one that blocks of 32 do not divide."""
    generator = torch.Generator().manual_seed(0)
    return {
        "up": FakeLayer(torch.randn(48, 80, generator=generator), dtype),
        "down": FakeLayer(torch.randn(17, 33, generator=generator), dtype),
    }


def spec_for(name: str, bit_width: int = 4) -> QuantizationSpec:
    """A spec that this rounding can do: the baseline, the rounding alone, or with int."""
    if name == BASELINE.method:
        return BASELINE
    allowed = component("rounding", name)["capabilities"]["data_types"]
    options = options_tuple(component("rounding", name)["options"])
    if not component("rounding", name)["capabilities"]["needs_data_type"]:
        return QuantizationSpec(rounding=StepSpec(name, 1, options))
    return replace(
        spec_of(component("data_type", "int" if allowed is None else allowed[0]), bit_width), rounding=StepSpec(name, 1, options)
    )


def test_yamls_and_modules_are_the_same() -> None:
    """One file and one yaml each."""
    assert stems("rounding") == set(NAMES)


@every_rounding
def test_yaml_is_complete(name: str) -> None:
    """Name, version, options, and the four capabilities that planning asks for."""
    yaml = component("rounding", name)
    assert yaml["name"] == name
    assert isinstance(yaml["version"], int)
    assert set(yaml) == {"name", "version", "options", "capabilities"}
    capabilities = yaml["capabilities"]
    assert set(capabilities) - {"ranges", "bounds", "options", "needs", "excludes"} == {
        "needs_data_type",
        "needs_calibration",
        "uses_seed",
        "data_types",
    }
    assert set(capabilities.get("ranges", {})) <= set(yaml["options"])


@every_rounding
def test_module_is_documented(name: str) -> None:
    """A module says what it does."""
    ROUNDINGS[name]
    assert sys.modules[f"quantsweep.rounding.{name}"].__doc__


@data_free
def test_every_layer_is_written_and_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with its shape; the same again gives the same; originals are left alone."""
    if name == BASELINE.method:
        layers = two_layers()
        assert round_layers(layers, BASELINE) == ()
        assert all(layer.written is None for layer in layers.values())
    else:
        check_contract(ROUNDINGS[name], spec_for(name), monkeypatch)


def check_contract(rounding: Rounding, spec: QuantizationSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every rounding that is not the baseline owes: fails with an AssertionError that says what is broken."""
    remembering = Remembering(rounding)
    monkeypatch.setattr(registry, "ROUNDINGS", {spec.rounding.name: remembering})
    layers, again, untouched = two_layers(), two_layers(), two_layers()
    records = round_layers(layers, spec)
    for record in records:  # after all layers were encoded: what is decoded comes from what is stored, and from nothing else
        decoded = rounding.decode(remembering.stored[record.layer], spec, torch.float32)
        assert torch.equal(decoded, layers[record.layer].written), "what is stored decodes to something else"
    assert timeless(records) == timeless(round_layers(again, spec)), "the same again gives something else"
    assert all(torch.equal(layers[key].original, untouched[key].original) for key in layers), "an original was changed"
    shapes = [("up", 48, 80), ("down", 17, 33)]
    assert [(r.layer, r.out_features, r.in_features) for r in records] == shapes, "each layer has one record, in order, with its shape"
    for record in records:
        layer = layers[record.layer]
        assert torch.equal(layer.written, again[record.layer].written), "the same again writes something else"
        error = weight_error(layer.original, layer.written)
        assert (record.relative_error, record.max_abs_error) == (error.relative, error.max_abs), "the errors are not those of the weight"
        assert error.relative < 1, "zeros in place of the weights would be nearer to them"
        assert record.bits == sum(bits for _, bits in record.bits_by_part), "the parts are not the whole"
        assert record.bits >= least_bits(layer.written, spec), "the stored bits are fewer than the codes"


def timeless(records: tuple[LayerRecord, ...]) -> list[LayerRecord]:
    """Without what no two runs have in common."""
    return [replace(record, seconds=None) for record in records]


def least_bits(weight: Tensor, spec: QuantizationSpec) -> int:
    """Codes of `bit_width`; of a rounding without a data type one bit a weight and something that says what it stands for."""
    return BITS * weight.numel() if spec.data_type is not None else weight.numel() + 1


class Nonsense:
    """A rounding that breaks one promise: the contract must say so."""

    def __init__(self, broken: str) -> None:
        self.broken = broken
        self._calls = 0
        self._last = torch.empty(0)

    def check(self, spec: QuantizationSpec) -> None:
        """Anything goes."""

    def needs(self, spec: QuantizationSpec) -> None:
        """Nothing."""

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """Signs and one scale, in bytes, but for what is broken."""
        self._calls += 1
        self._last = weight_OI.clone()
        scale = weight_OI.abs().mean()
        match self.broken:
            case "stores nothing":
                return Stored()
            case "draws without a seed":
                scale = scale + self._calls / 100
            case "changes the original":
                weight_OI += 1
        return Stored(extras={"signs": weight_OI.sign().to(torch.int8), "scale": scale})

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """From what is stored, but for what is broken."""
        match self.broken:
            case "stores nothing" | "decodes from memory":
                return self._last
            case "writes zeros":
                return torch.zeros_like(self._last)
        return (stored.extras["signs"] * stored.extras["scale"]).to(dtype)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("stores nothing", "decodes to something else"),
        ("decodes from memory", "decodes to something else"),
        ("writes zeros", "decodes to something else|zeros in place of the weights"),
        ("draws without a seed", "the same again gives something else"),
        ("changes the original", "an original was changed"),
    ],
)
def test_nonsense_fails_the_contract(broken: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a rounding claims to need no data type."""
    with pytest.raises((AssertionError, RuntimeError), match=said):
        check_contract(Nonsense(broken), QuantizationSpec(rounding=StepSpec("nonsense", 1)), monkeypatch)


def test_a_rounding_without_a_data_type_may_keep_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one, with nothing broken."""
    check_contract(Nonsense("nothing"), QuantizationSpec(rounding=StepSpec("own", 1)), monkeypatch)


@data_free
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_numbers_are_refused(name: str, bad: float) -> None:
    """The message names the layer and counts; nothing of that layer is written."""
    if spec_for(name).is_baseline:
        return
    layers = two_layers()
    layers["down"].original[3, 4] = bad
    with pytest.raises(QuantizationError, match="layer down: 1 of 561 weights are NaN or infinite"):
        round_layers(layers, spec_for(name))
    assert layers["down"].written is None


def test_errors_are_those_of_the_compute_dtype() -> None:
    """At 8 bits with small blocks, the cast to bfloat16 is most of the error, and it is counted."""
    spec = spec_for("round_to_nearest", 8)
    (exact, _), (cast, _) = (round_layers(two_layers(dtype), spec) for dtype in (torch.float32, torch.bfloat16))
    assert cast.relative_error > 1.05 * exact.relative_error
    assert cast.bits == exact.bits


def test_round_to_nearest_is_the_data_type_alone() -> None:
    """Weight and bits are those of the data type."""
    layers = two_layers()
    for data_type in ("int", "fp", "quantile", "dynamic"):
        spec = spec_of(component("data_type", data_type), 4)
        for record in round_layers(layers, spec):
            layer = layers[record.layer]
            assert layer.written is not None
            assert torch.equal(layer.written, fake_quantize(DATA_TYPES[data_type], layer.original, spec))
            assert record.bits == quantize_weight(DATA_TYPES[data_type], layer.original, spec).stored_bits


def test_round_to_nearest_names_the_layer_of_an_error() -> None:
    """A scale beyond float16, too few weights for quantiles, something that is no matrix, a result that overflows."""
    with pytest.raises(QuantizationError, match="layer big: a block needs a scale of 100000, beyond the largest float16"):
        round_layers({"big": FakeLayer(torch.full((2, 2), 1e5))}, spec_for("round_to_nearest"))
    with pytest.raises(QuantizationError, match="layer small: data_type 'quantile' needs at least 256 weights, got 4"):
        round_layers({"small": FakeLayer(torch.ones(2, 2))}, spec_of(component("data_type", "quantile"), 4))
    with pytest.raises(QuantizationError, match="layer bias: a weight of shape"):
        round_layers({"bias": FakeLayer(torch.ones(2))}, spec_for("round_to_nearest"))
    spec = spec_of(component("data_type", "int"), 4, scale_dtype="float32")
    with pytest.raises(QuantizationError, match=r"layer wide: .* does not fit torch\.float16"):
        round_layers({"wide": FakeLayer(torch.full((2, 2), 1e5), torch.float16)}, spec)


def test_round_to_nearest_refuses_before_anything_is_written() -> None:
    """An impossible spec, or no data type at all, touches no layer."""
    layers = two_layers()
    for spec in (spec_of(component("data_type", "fp"), 4, exponent_bits=4), QuantizationSpec(rounding=StepSpec("round_to_nearest", 1))):
        with pytest.raises(ConfigurationError):
            round_layers(layers, spec)
    assert all(layer.written is None for layer in layers.values())


def test_records_are_frozen() -> None:
    """A record is a fact."""
    (record, _) = round_layers(two_layers(), spec_for("round_to_nearest"))
    with pytest.raises(FrozenInstanceError):
        record.bits = 0


# --- centering --------------------------------------------------------------------------------------------------------------


def shifted(offset: float) -> Tensor:
    """Blocks of 32 (the last one short) that are far from centered."""
    return torch.randn(17, 33, generator=torch.Generator().manual_seed(1)) + offset


def test_centering_follows_a_shift_and_counts_the_means() -> None:
    """By hand, block by block: Ŵ = mean + Q(W - mean), the mean rounded to float16, one more 16-bit number a block."""
    spec, layer = spec_for("centering"), FakeLayer(shifted(100.0))
    (record,) = round_layers({"one": layer}, spec)
    assert layer.written is not None
    flat, got = layer.original.reshape(-1), layer.written.reshape(-1)
    for start in range(0, flat.numel(), 32):
        block = flat[start : start + 32]
        mean = block.double().mean().float().half().float()
        want = fake_quantize(DATA_TYPES["int"], (block - mean).reshape(1, -1), spec).reshape(-1) + mean
        assert torch.equal(got[start : start + 32], want)
    assert record.bits == quantize_weight(DATA_TYPES["int"], layer.original, spec).stored_bits + 16 * math.ceil(17 * 33 / 32)
    plain = weight_error(layer.original, fake_quantize(DATA_TYPES["int"], layer.original, spec))
    assert record.relative_error < plain.relative / 100, "100 ± 1 needs levels around 100"


def test_centering_of_centered_blocks_is_round_to_nearest() -> None:
    """Blocks that are symmetric to the bit have mean 0."""
    half = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    layers = {name: FakeLayer(torch.cat([half, -half], dim=1)) for name in ("centering", "round_to_nearest")}
    for name, layer in layers.items():
        round_layers({name: layer}, spec_for(name))
    assert torch.equal(*(layer.written for layer in layers.values()))


# --- outlier-dependent ------------------------------------------------------------------------------------------------------


def chain(fraction: float, dtype: torch.dtype = torch.float32) -> tuple[dict[str, FakeLayer], QuantizationSpec]:
    """`first` makes the inputs of `second`, in another order; its unit 7 varies most, then 2."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(50, 40, generator=generator)
    first[7] *= 30
    first[2] *= 20
    layers = {"first": FakeLayer(first, dtype), "second": FakeLayer(torch.randn(24, 50, generator=generator), dtype)}
    layers["second"].inputs_from = Source("first", torch.arange(50).flip(0))
    return layers, replace(spec_for("outlier_dependent"), rounding=StepSpec("outlier_dependent", 1, (("fraction", fraction),)))


def test_columns_of_the_units_that_vary_most_stay_at_16_bit() -> None:
    """Through the order of the units; the rest is quantized as a weight without those columns, and the bits are all counted."""
    layers, spec = chain(fraction=0.04)
    first, second = round_layers(layers, spec)
    kept = torch.zeros(50, dtype=torch.bool)
    kept[[49 - 7, 49 - 2]] = True
    layer = layers["second"]
    assert layer.written is not None
    assert torch.equal(layer.written[:, kept], layer.original[:, kept].half().float())
    rest = layer.original[:, ~kept].contiguous()
    assert torch.equal(layer.written[:, ~kept], fake_quantize(DATA_TYPES["int"], rest, spec))
    assert second.bits == quantize_weight(DATA_TYPES["int"], rest, spec).stored_bits + 2 * (24 * 16 + 16)
    assert (first.num_kept_columns, second.num_kept_columns) == (0, 2)
    assert torch.equal(layers["first"].written, fake_quantize(DATA_TYPES["int"], layers["first"].original, spec))


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.02, 1), (0.1, 5), (0.97, 48)])
def test_how_many_columns_stay(fraction: float, count: int) -> None:
    """The nearest number to fraction · I, one at least."""
    layers, spec = chain(fraction)
    assert round_layers(layers, spec)[1].num_kept_columns == count


def test_a_kept_column_sets_no_scale() -> None:
    """However large it is: the other columns are what they are without it."""
    layers, spec = chain(0.02)
    larger, _ = chain(0.02)
    larger["second"].original[:, 49 - 7] *= 1000
    for each in (layers, larger):
        round_layers(each, spec)
    others = [column for column in range(50) if column != 49 - 7]
    assert torch.equal(layers["second"].written[:, others], larger["second"].written[:, others])


def test_outlier_dependent_refuses_what_it_cannot_do() -> None:
    """No column left to quantize, a source that is not quantized, a kept weight beyond float16, a fraction that is none."""
    layers, spec = chain(0.999)
    with pytest.raises(QuantizationError, match="layer second: all 50 input columns would stay at 16 bit"):
        round_layers(layers, spec)
    layers, spec = chain(0.02)
    with pytest.raises(QuantizationError, match="layer second: its inputs come from first, which is not quantized"):
        round_layers({"second": layers["second"]}, spec)
    layers["second"].original[0, 49 - 7] = 1e6
    with pytest.raises(QuantizationError, match=r"layer second: a weight of 1e\+06 in a kept column is beyond float16"):
        round_layers(layers, spec)
    for fraction in (0.0, 1.0, None, "most"):
        with pytest.raises(ConfigurationError, match="between 0 and 1"):
            round_layers(layers, replace(spec, rounding=StepSpec("outlier_dependent", 1, (("fraction", fraction),))))
