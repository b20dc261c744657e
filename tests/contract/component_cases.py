"""What the yamls in conf/ claim about data types and methods, as lists of cases for the contract tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import LEVELS, SCALE_DTYPES, QuantizationSpec, StepSpec, options_tuple

CONF = Path(__file__).parents[2] / "conf"
Component = Mapping[str, Any]


def component(kind: str, name: str) -> Component:
    """The yaml of one component: `component("data_type", "int")`."""
    return yaml.safe_load((CONF / kind / f"{name}.yaml").read_text())


def stems(kind: str) -> set[str]:
    """Names of all yamls of a kind."""
    return {path.stem for path in (CONF / kind).glob("*.yaml")}


def spec_of(data_type: Component, bit_width: int, **changes: Any) -> QuantizationSpec:
    """A spec with the defaults of the yaml; `changes` are fields of the spec, or options."""
    capabilities = data_type["capabilities"]
    options = {key: changes.pop(key, value) for key, value in data_type["options"].items()}
    fields = {
        "rounding": StepSpec("round_to_nearest", 1),
        "data_type": data_type["name"],
        "data_type_version": data_type["version"],
        "data_type_options": options_tuple(options),
        "bit_width": bit_width,
        "block_size": 32,
        "block_axis": capabilities["block_axis"],
        "symmetric": capabilities["symmetric"][0],
        "scale_dtype": capabilities["scale_dtype"],
    }
    return QuantizationSpec(**{**fields, **changes})


def combinations(data_type: Component) -> Iterator[QuantizationSpec]:
    """All combinations of bit width, symmetry, axis and options, with values beside the declared ones: claimed or not."""
    capabilities = data_type["capabilities"]
    options = {key: [*(values or [data_type["options"][key]]), "nonsense"] for key, values in (capabilities["options"] or {}).items()}
    for values in itertools.product(range(1, 11), [True, False], ["flat", "input"], *options.values()):
        bit_width, symmetric, block_axis, *chosen = values
        yield spec_of(data_type, bit_width, symmetric=symmetric, block_axis=block_axis, **dict(zip(options, chosen, strict=True)))


def scale_dtypes(data_type: Component) -> Iterator[QuantizationSpec]:
    """The default form with each storage type of scales, claimed or not."""
    for dtype in SCALE_DTYPES:
        yield spec_of(data_type, data_type["capabilities"]["bit_widths"][0], scale_dtype=dtype)


def data_type_named(name: str) -> Any:
    """The code behind a yaml: the module of its name, or that of codebooks."""
    yaml = component("data_type", name)
    return data_type_of(spec_of(yaml, yaml["capabilities"]["bit_widths"][0]))


def describe(spec: QuantizationSpec) -> str:
    """A readable name of a case: `4 bit flat symmetric convention=gptq`."""
    options = "".join(f" {key}={value}" for key, value in spec.data_type_options if key != LEVELS)
    return f"{spec.bit_width} bit {spec.block_axis} {'symmetric' if spec.symmetric else 'asymmetric'}{options}"
