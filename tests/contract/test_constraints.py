"""Reasons read as sentences, and capabilities are the only thing they are made from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from component_cases import component, spec_of

from quantsweep.trial.constraints import reason_to_skip
from quantsweep.trial.specs import QuantizationSpec, StepSpec

INT, FP, MXFP, AF4 = (component("data_type", name) for name in ("int", "fp", "mxfp", "af4"))
STEP = component("rounding", "round_to_nearest")["capabilities"]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of(INT, 4), None),
        (spec_of(INT, 1), "data_type 'int' supports bit_width 2–8; got 1. Nearest: bit_width=2"),
        (spec_of(INT, 9), "data_type 'int' supports bit_width 2–8; got 9. Nearest: bit_width=8"),
        (spec_of(FP, 4, symmetric=False), "data_type 'fp' supports symmetric true; got false."),
        (spec_of(FP, 4, subnormal="IEEE"), "data_type 'fp' supports subnormal appendix, body or ieee; got IEEE."),
        (
            spec_of(INT, 4, symmetric=False),
            "data_type 'int' with symmetric=false supports convention gptq, awq or deepspeed; got kbit: "
            "the other conventions have no zero point",
        ),
        (
            spec_of(FP, 4, exponent_bits=4),
            "data_type 'fp' with bit_width=4 supports exponent_bits null, 1, 2 or 3; got 4: sign and exponent must fit into the bits",
        ),
        (
            spec_of(FP, 3, subnormal="ieee"),
            "data_type 'fp' with bit_width=3, exponent_bits=null supports subnormal appendix; got ieee: "
            "without mantissa bits there are no subnormal numbers",
        ),
        (spec_of(MXFP, 4, scale_dtype="float16"), "data_type 'mxfp' supports scale_dtype e8m0; got float16."),
        (spec_of(INT, 4, scale_dtype="e4m3"), "data_type 'int' supports scale_dtype float16, bfloat16 or float32; got e4m3."),
        (spec_of(AF4, 3), "data_type 'af4': its 16 levels are codes of 4 bits; got bit_width=3"),
        (
            spec_of(MXFP, 6, exponent_bits=4),
            "data_type 'mxfp' with bit_width=6 supports exponent_bits null, 2 or 3; got 4: the 6-bit elements are E2M3 and E3M2",
        ),
        (QuantizationSpec(rounding=StepSpec("none", 1)), None),
    ],
)
def test_reasons(spec: QuantizationSpec, reason: str | None) -> None:
    """The thing, the value, the choices, the nearest one."""
    capabilities = component("data_type", spec.data_type or "int")["capabilities"]
    assert reason_to_skip(spec, capabilities, {"rounding": STEP}) == reason


def test_methods_name_their_data_types() -> None:
    """A method that works with some data types only."""
    reason = reason_to_skip(spec_of(INT, 4), INT["capabilities"], {"rounding": {**STEP, "data_types": ["fp", "nf"]}})
    assert reason == "rounding 'round_to_nearest' works with data_type fp or nf; got int"


def test_an_option_without_a_list_is_left_to_the_code() -> None:
    """options: {x: null} allows any value."""
    capabilities = {**INT["capabilities"], "options": {"convention": None}, "rules": []}
    assert reason_to_skip(spec_of(INT, 4, convention="mine"), capabilities, {"rounding": STEP}) is None


@pytest.mark.parametrize("value", [0, 1, -0.5, "much", None, True])
def test_methods_bound_their_options(value: object) -> None:
    """ranges: both ends excluded, numbers only."""
    spec = replace(spec_of(INT, 4), rounding=StepSpec("round_to_nearest", 1, (("fraction", value),)))
    reason = reason_to_skip(spec, INT["capabilities"], {"rounding": {**STEP, "ranges": {"fraction": [0, 1]}}})
    assert reason is not None
    assert reason.startswith("rounding 'round_to_nearest' needs rounding.options.fraction above 0 and below 1; got")
    fine = replace(spec, rounding=StepSpec("round_to_nearest", 1, (("fraction", 0.5),)))
    assert reason_to_skip(fine, INT["capabilities"], {"rounding": {**STEP, "ranges": {"fraction": [0, 1]}}}) is None
