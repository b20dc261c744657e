"""GPTQ against the reference of `gptq_reference.py`, the published code's own numbers, and what must hold of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_reference import correlated_inputs, gptq, gptq_levels, hessian_of, ldlq, mse_levels
from make_spec import make_spec

from quantsweep.clipping.mse import shrunk_limits
from quantsweep.data_types._base import DataType, QParams, fake_quantize
from quantsweep.errors import QuantizationError
from quantsweep.numerics.blocks import Blocks
from quantsweep.rounding._columns import ChooseQParams
from quantsweep.rounding._feedback import Feedback, FeedbackOptions, decode_in_order, quantize_with_feedback
from quantsweep.rounding._inverse import inverse_factor, with_dead_columns_alive
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "weight_steps.json").read_text())


def chooser(spec: QuantizationSpec, *, mse: bool = False) -> ChooseQParams:
    data_type: DataType = data_type_of(spec)

    def choose(blocks: Blocks, columns_J: torch.Tensor | None) -> QParams:
        if mse:
            low, high = shrunk_limits(blocks.values_NB, spec, data_type)
            blocks = Blocks(values_NB=blocks.values_NB.clamp(low, high), layout=blocks.layout)
        return data_type.choose_qparams(blocks, spec)

    return choose


def run(weight: Any, hessian: Any, spec: QuantizationSpec, *, mse: bool = False, **options: Any) -> tuple[np.ndarray, Feedback]:
    """The decoded weight in float64, and what the loop made; in float64 unless `dtype` says otherwise."""
    options = {"dtype": torch.float64, "refit": "eager", **options}
    weight, hessian = torch.as_tensor(weight, dtype=torch.float32), torch.as_tensor(hessian)
    feedback = quantize_with_feedback(weight, hessian, spec, FeedbackOptions(**options), data_type_of(spec), chooser(spec, mse=mse))
    decoded = decode_in_order(data_type_of(spec), feedback.quantized, feedback.order_I, torch.float32)
    return decoded.double().numpy(), feedback


def case(seed: int, rows: int = 8, columns: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Hessian of inputs of which column 7 is dead."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(rows, columns)).astype(np.float32).astype(np.float64)
    inputs = correlated_inputs(generator, 3 * columns, columns)
    inputs[:, 7] = 0
    return weight, hessian_of(inputs)


def gptq_spec(bits: int = 3, group: Any = None, *, symmetric: bool = False, **more: Any) -> QuantizationSpec:
    more = {"scale_dtype": "float32", "convention": "gptq", **more}
    return make_spec("int", bits, group, block_axis="input", symmetric=symmetric, **more)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("reference", "ours"),
    [
        ({}, {}),
        ({"order": True}, {"activation_order": True}),
        ({"group": 16}, {}),
        ({"group": 20}, {}),
        ({"group": 16, "stale": 32}, {"refit": "stale", "update_columns": 32}),
        ({"group": 16, "order": True}, {"activation_order": True}),
        ({"group": 16, "order": True, "static": True}, {"activation_order": True, "static_groups": True}),
        ({"group": 20, "static": True}, {"static_groups": True}),
        ({"group": 16, "order": True, "fit": lambda *a, **k: mse_levels(*a, **k)[0]}, {"activation_order": True, "mse": True}),
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_equals_the_derivation(reference: dict[str, Any], ours: dict[str, Any], symmetric: bool) -> None:
    """To float32's rounding of values; a single other code would be a ten thousand times that, and move all columns after it."""
    weight, hessian = case(seed=11)
    expected = gptq(weight, hessian, 3, symmetric=symmetric, **reference)
    decoded, _ = run(weight, hessian, gptq_spec(group=reference.get("group"), symmetric=symmetric), **{"update_columns": 24, **ours})
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


@pytest.mark.parametrize("golden", GOLDEN["gptq"], ids=lambda g: f"{g['seed']}-{g['bits']}bit")
def test_equals_the_published_code(golden: dict[str, Any]) -> None:
    """Every code, in float64; the float32 loop differs in none to a few in a thousand, and its output error in less than .1 %."""
    generator = np.random.default_rng(golden["seed"])
    weight = generator.normal(size=(8, 64)).astype(np.float32).astype(np.float64)
    inputs = correlated_inputs(generator, 256, 64)
    inputs[:, 5] = 0
    spec = gptq_spec(golden["bits"], golden["group"], symmetric=golden["symmetric"])
    keys = ("activation_order", "static_groups", "mse")
    options = {"refit": "stale", "update_columns": 32, **{key: golden[key] for key in keys}}
    decoded, feedback = run(weight, 2 * inputs.T @ inputs, spec, **options)
    codes = feedback.quantized.layout.join(feedback.quantized.codes_NB).numpy()
    if golden["activation_order"] and feedback.order_I is None:
        codes = codes[:, np.argsort(-np.where(np.arange(64) == 5, 1, np.diag(2 * inputs.T @ inputs)), kind="stable")]
    assert ["".join(format(code, "x") for code in row) for row in codes] == golden["codes"]
    assert (((weight - decoded) @ inputs.T) ** 2).sum() == pytest.approx(golden["output_error"], rel=1e-5)
    single, _ = run(weight, 2 * inputs.T @ inputs, spec, **options, dtype=torch.float32)
    assert (((weight - single) @ inputs.T) ** 2).sum() == pytest.approx(golden["output_error"], rel=1e-3)


def test_is_ldlq() -> None:
    """QuIP's linear feedback, from another decomposition of the same Hessian."""
    weight, hessian = case(seed=2)
    hessian[7, 7] = 1
    weight[:, 7] = 0
    expected = ldlq(weight, hessian, gptq_levels(weight, 3, symmetric=False))
    np.testing.assert_allclose(run(weight, hessian, gptq_spec())[0], expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"activation_order": True}, {"refit": "stale"}, {"static_groups": True}], ids=str)
@pytest.mark.parametrize(
    ("data_type", "bits", "more"),
    [
        *[("int", 3, {"convention": convention}) for convention in ("kbit", "gptq", "awq", "absmax_full", "deepspeed")],
        *[("int", 2, {"convention": convention, "symmetric": False}) for convention in ("gptq", "awq", "deepspeed")],
        ("fp", 4, {}),
        ("nf", 3, {}),
        ("dynamic", 4, {}),
        ("codebook", 2, {"levels": (-1.0, 0.0, 0.3, 1.0)}),
        ("fp8", 8, {"scale_dtype": "float32"}),
        ("mxfp", 4, {"scale_dtype": "e8m0"}),
    ],
)
def test_without_correlation_it_is_round_to_nearest(data_type: str, bits: int, more: dict[str, Any], options: dict[str, Any]) -> None:
    """H = c·I: nothing to make up for.  Exactly, in every format, with short last groups."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for group in (None, 16):
        spec = make_spec(data_type, bits, group, block_axis="input", **more)
        decoded, feedback = run(weight, 3.0 * torch.eye(40), spec, dtype=torch.float32, update_columns=12, **options)
        assert np.array_equal(decoded, fake_quantize(data_type_of(spec), weight, spec).double().numpy())
        per_block = feedback.quantized.qparams.scale_bits + feedback.quantized.qparams.zero_bits
        assert feedback.quantized.stored_bits == bits * 240 + per_block * (6 if group is None else 18)


@pytest.mark.parametrize("group", [None, "tensor", 16, 32])
def test_lazy_updates_change_nothing(group: Any) -> None:
    weight, hessian = case(seed=3)
    first, *others = (run(weight, hessian, gptq_spec(group=group), update_columns=n)[0] for n in (1, 16, 32, 96, 128))
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)


def test_one_group_of_all_columns_is_one_scale_a_row() -> None:
    weight, hessian = case(seed=4)
    whole, row = run(weight, hessian, gptq_spec(group=96)), run(weight, hessian, gptq_spec(group=None))
    assert np.array_equal(whole[0], row[0])
    assert torch.equal(whole[1].quantized.codes_NB, row[1].quantized.codes_NB)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("data_type", "more"), [("int", {"convention": "gptq", "symmetric": False}), ("nf", {}), ("fp", {}), ("int", {})])
def test_beats_round_to_nearest_on_the_mean(data_type: str, more: dict[str, Any], bits: int) -> None:
    """Output error on the inputs, mean of five seeds."""
    ratios = []
    for seed in range(5):
        weight, hessian = case(seed)
        spec = make_spec(data_type, bits, 32, block_axis="input", **more)
        plain = fake_quantize(data_type_of(spec), torch.as_tensor(weight, dtype=torch.float32), spec).double().numpy()
        errors = [np.trace((weight - q) @ hessian @ (weight - q).T) for q in (run(weight, hessian, spec)[0], plain)]
        ratios.append(errors[0] / errors[1])
    assert np.mean(ratios) < 0.7


def test_order_is_stored_only_where_groups_follow_it() -> None:
    """Dynamic groups of ordered columns: their columns share few levels, and 16 bits a column say where they belong."""
    weight, hessian = case(seed=5)
    _, plain = run(weight, hessian, gptq_spec(group=16))
    _, static = run(weight, hessian, gptq_spec(group=16), activation_order=True, static_groups=True)
    decoded, ordered = run(weight, hessian, gptq_spec(group=16), activation_order=True)
    assert plain.order_I is None
    assert static.order_I is None
    assert ordered.order_I is not None
    assert ordered.order_I.dtype == torch.uint16
    order = ordered.order_I.numpy().astype(int)
    assert sorted(order) == list(range(96))
    for group in range(6):
        assert all(len(set(row)) <= 8 for row in decoded[:, order[16 * group : 16 * group + 16]].round(6).tolist())


def test_damping_is_raised_from_a_fresh_copy_and_recorded() -> None:
    """A Hessian that .01 does not make positive definite: the factor is that of .1, bit for bit."""
    hessian = torch.eye(8, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.05
    raised, direct = inverse_factor(hessian, 0.01), inverse_factor(hessian, 0.1)
    assert (raised.damping, raised.raises, direct.raises) == (pytest.approx(0.1), 1, 0)
    assert torch.equal(raised.upper_II, inverse_factor(hessian, raised.damping).upper_II)
    hessian[2, 3] = hessian[3, 2] = torch.nan
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        inverse_factor(hessian, 0.01)
    with pytest.raises(QuantizationError, match="not positive definite"):
        inverse_factor(torch.eye(4).sub(2 * torch.ones(4, 4)).fill_diagonal_(1e-9), 0.01)


def test_factor_is_that_of_the_remaining_inverse() -> None:
    """Row j of U is the first row of chol(inv(H[j:, j:])), for ill-conditioned H too; float32 input is factored in float64."""
    hessian = case(seed=6, columns=24)[1]
    hessian[7, 7] = 1
    upper = inverse_factor(torch.as_tensor(hessian), 1e-6).upper_II.numpy()
    damped = hessian + 1e-6 * np.diag(hessian).mean() * np.eye(24)
    for j in (0, 5, 23):
        np.testing.assert_allclose(upper[j, j:], np.linalg.cholesky(np.linalg.inv(damped[j:, j:])).T[0], rtol=1e-6, atol=1e-9)
    assert inverse_factor(torch.as_tensor(hessian, dtype=torch.float32), 0.01).upper_II.dtype == torch.float64


def test_dead_columns_become_zero_and_are_counted() -> None:
    weight, hessian = case(seed=7)
    before = hessian.copy()
    decoded, feedback = run(weight, hessian, gptq_spec())
    assert not decoded[:, 7].any()
    assert feedback.num_dead == 1
    assert np.array_equal(hessian, before)
    assert with_dead_columns_alive(torch.as_tensor(hessian))[7, 7] == 1


@pytest.mark.parametrize(("data_type", "more"), [("quantile", {}), ("nvfp4", {"scale_dtype": "e4m3"})])
def test_formats_of_the_whole_tensor_need_fixed_groups(data_type: str, more: dict[str, Any]) -> None:
    weight, hessian = case(seed=8, rows=24)
    spec = make_spec(data_type, 4, 16, block_axis="input", **more)
    with pytest.raises(QuantizationError, match="static_groups=true"):
        run(weight, hessian, spec)
    decoded, _ = run(weight, hessian, spec, static_groups=True)
    plain = fake_quantize(data_type_of(spec), torch.as_tensor(weight, dtype=torch.float32), spec).double().numpy()
    errors = [np.trace((weight - q) @ hessian @ (weight - q).T) for q in (decoded, plain)]
    assert errors[0] < errors[1]
