"""What every data type must do; parametrised over the registry, so a new one is tested by being there."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from component_cases import combinations, component, data_type_named, describe, scale_dtypes, spec_of, stems

from quantsweep.data_types._base import DataType, fake_quantize, quantize_weight
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.error import weight_error
from quantsweep.trial.constraints import reason_to_skip
from quantsweep.trial.declared import CAPABILITIES
from quantsweep.trial.registry import DATA_TYPES
from quantsweep.trial.specs import QuantizationSpec

STEPS = {"rounding": component("rounding", "round_to_nearest")["capabilities"]}
WEIGHT = torch.randn(48, 80, generator=torch.Generator().manual_seed(0)) * 0.02
NAMES = sorted(stems("data_type"))
every_data_type = pytest.mark.parametrize("name", NAMES)


def claimed(name: str) -> list[QuantizationSpec]:
    """All combinations that the yaml says can be run."""
    yaml = component("data_type", name)
    return [spec for spec in combinations(yaml) if reason_to_skip(spec, yaml["capabilities"], STEPS) is None]


def claimed_cases() -> list[Any]:
    """(name, spec) of everything that is claimed, with readable ids."""
    return [pytest.param(name, spec, id=f"{name} {describe(spec)}") for name in NAMES for spec in claimed(name)]


def refusal_of(data_type: DataType, spec: QuantizationSpec) -> str | None:
    """What the code says against `spec`, if anything."""
    try:
        data_type.check_spec(spec)
    except ConfigurationError as error:
        return str(error)
    return None


def module_of(name: str) -> str:
    """The module behind a yaml."""
    return type(data_type_named(name)).__module__.rpartition(".")[2]


def test_every_yaml_has_a_module_and_every_module_a_yaml() -> None:
    """One file and one yaml each; codebooks share a module."""
    assert {module_of(name) for name in NAMES} == set(DATA_TYPES.names())
    assert {name for name in NAMES if module_of(name) != name} == {"af4"}


@every_data_type
def test_yaml_is_complete(name: str) -> None:
    """Name, version, options with allowed defaults, capabilities of the agreed form, a comment that says what it is."""
    yaml = component("data_type", name)
    capabilities = yaml["capabilities"]
    assert yaml["name"] == name
    assert isinstance(yaml["version"], int)
    assert set(yaml) == {"name", "version", "options", "capabilities"}
    assert set(capabilities) - {"rules", "defaults_by_bit_width"} == {*CAPABILITIES["data_type"], "options"}
    assert capabilities["block_axis"] in capabilities["block_axes"]
    assert capabilities["scale_dtype"] in capabilities["scale_dtypes"]
    assert refusal_of(data_type_named(name), spec_of(yaml, capabilities["bit_widths"][0], block_size=capabilities["block_size"])) is None
    assert set(yaml["options"]) == set(capabilities["options"])
    assert all(allowed is None or yaml["options"][key] in allowed for key, allowed in capabilities["options"].items())
    assert all(set(rule) == {"when", "need", "because"} for rule in capabilities.get("rules", ()))


@every_data_type
def test_defaults_by_bit_width_are_what_null_means(name: str) -> None:
    """Planning writes such defaults out; the code must mean the same by null."""
    yaml = component("data_type", name)
    for option, by_width in yaml["capabilities"].get("defaults_by_bit_width", {}).items():
        assert set(by_width) == set(yaml["capabilities"]["bit_widths"])
        for bit_width, value in by_width.items():
            implicit = fake_quantize(data_type_named(name), WEIGHT, spec_of(yaml, bit_width, **{option: None}))
            assert torch.equal(implicit, fake_quantize(data_type_named(name), WEIGHT, spec_of(yaml, bit_width, **{option: value})))


@every_data_type
def test_module_is_documented(name: str) -> None:
    """The module opens with a lesson that names its source."""
    lesson = sys.modules[type(data_type_named(name)).__module__].__doc__ or ""
    assert len(lesson.splitlines()) > 5
    assert "arXiv" in lesson or "specification" in lesson.lower()


@every_data_type
def test_code_refuses_what_the_yaml_does_not_claim(name: str) -> None:
    """And accepts all the rest: planning and code draw the same line."""
    yaml, data_type = component("data_type", name), data_type_named(name)
    for spec in (*combinations(yaml), *scale_dtypes(yaml)):
        reason = reason_to_skip(spec, yaml["capabilities"], STEPS)
        refusal = refusal_of(data_type, spec)
        assert (refusal is None) == (reason is None), f"{describe(spec)} {spec.scale_dtype}: planning {reason!r}, code {refusal!r}"


@pytest.mark.parametrize(("name", "spec"), claimed_cases())
def test_claimed_combination(name: str, spec: QuantizationSpec) -> None:
    """Shape, type, determinism, bounds of codes, zeros, stored bits; the input is left alone."""
    data_type: DataType = data_type_named(name)
    weight = WEIGHT.clone()
    quantized = quantize_weight(data_type, weight, spec)
    found = fake_quantize(data_type, weight, spec)
    assert torch.equal(weight, WEIGHT)
    assert found.shape == WEIGHT.shape
    assert found.dtype == torch.float32
    assert torch.equal(found, fake_quantize(data_type, weight, spec))
    assert quantized.codes_NB.dtype == torch.uint8
    assert int(quantized.codes_NB.max()) < 2 ** (spec.bit_width or 0)
    assert quantized.stored_bits >= (spec.bit_width or 0) * WEIGHT.numel()
    assert weight_error(WEIGHT, found).relative < 0.6
    assert torch.equal(fake_quantize(data_type, torch.zeros_like(WEIGHT), spec), torch.zeros_like(WEIGHT))


@every_data_type
def test_zero_among_others_decodes_to_zero(name: str) -> None:
    """Pruned weights stay pruned, in the default form."""
    weight = WEIGHT.clone()
    weight[:, ::3] = 0
    yaml = component("data_type", name)
    for bit_width in yaml["capabilities"]["bit_widths"]:
        assert not fake_quantize(data_type_named(name), weight, spec_of(yaml, bit_width))[:, ::3].any()


@every_data_type
def test_more_bits_less_error(name: str) -> None:
    """With default options, on enough normal weights for the finest tables to be used evenly.

    MX at 8 bits is left out: E4M3 has the mantissa of E2M3, the 6-bit element, and more of it saturates with `floor`.
    """
    yaml = component("data_type", name)
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    bit_widths = [k for k in yaml["capabilities"]["bit_widths"] if (name, k) != ("mxfp", 8)]
    specs = [spec_of(yaml, k, block_size=64) for k in bit_widths]
    errors = [weight_error(weight, fake_quantize(data_type_named(name), weight, spec)).relative for spec in specs]
    assert errors == sorted(errors, reverse=True)


@every_data_type
@pytest.mark.parametrize("block_axis", ["flat", "input"])
def test_blocks_do_not_see_each_other(name: str, block_axis: str) -> None:
    """Exchanging the two halves of the rows exchanges the result."""
    yaml = component("data_type", name)
    if block_axis not in yaml["capabilities"]["block_axes"]:
        return
    spec = spec_of(yaml, yaml["capabilities"]["bit_widths"][-1], block_axis=block_axis)
    data_type = data_type_named(name)
    found, exchanged = fake_quantize(data_type, WEIGHT, spec), fake_quantize(data_type, WEIGHT.roll(24, dims=0), spec)
    assert torch.equal(exchanged, found.roll(24, dims=0))
