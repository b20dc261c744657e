"""AWQ's two searches against plain numpy and the published code's own choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_reference import correlated_inputs
from make_spec import make_spec
from numpy_reference import affine
from torch import Tensor

from quantsweep.clipping.awq_clip import evenly_spaced, output_limits
from quantsweep.data_types._base import fake_quantize
from quantsweep.data_types.int import DATA_TYPE
from quantsweep.numerics.blocks import Blocks
from quantsweep.transforms.awq_scale import candidates, search_scale
from quantsweep.trial.specs import QuantizationSpec

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "weight_steps.json").read_text())


def awq_spec(bits: int, group: int | None) -> QuantizationSpec:
    return make_spec("int", bits, group, block_axis="input", symmetric=False, scale_dtype="float32", convention="awq")


def groups_of(weight: np.ndarray, group: int) -> list[np.ndarray]:
    return [weight[:, j : j + group] for j in range(0, weight.shape[1], group)]


def numpy_clip(weight: np.ndarray, inputs: np.ndarray, bits: int, group: int) -> np.ndarray:
    """i of each row and group: float64, block by block."""
    steps = np.zeros((weight.shape[0], len(groups_of(weight, group))), dtype=int)
    for g, (part, x) in enumerate(zip(groups_of(weight, group), groups_of(inputs, group), strict=True)):
        for row, values in enumerate(part):
            errors = []
            for i in range(10):
                limit = (1 - i / 20) * np.abs(values).max()
                rounded = affine(np.clip(values, -limit, limit), "awq", bits, symmetric=False, dtype="float32")
                errors.append(float(((x @ (rounded - values)) ** 2).mean()))
            steps[row, g] = int(np.argmin(errors))
    return steps


def clip_steps(limits: tuple[Tensor, Tensor], blocks: Blocks) -> np.ndarray:
    low_N1, high_N1 = limits
    assert torch.equal(low_N1, -high_N1)
    share = high_N1 / blocks.values_NB.abs().amax(dim=1, keepdim=True)
    return ((1 - share) * 20).round().int().view(blocks.layout.out_features, -1).numpy()


@pytest.mark.parametrize("group", [16, 40, 20])
def test_clip_is_the_best_of_ten(group: int) -> None:
    """Short last blocks too: padding weighs nothing.

    One tail alone is long: where both ends are cut, -low / s lies exactly between two integers, and float32 decides.
    """
    generator = np.random.default_rng(0)
    weight = (np.abs(generator.standard_t(3, size=(6, 50))) - 0.2).astype(np.float32)
    inputs = correlated_inputs(generator, 60, 50).astype(np.float32)
    spec, blocks = awq_spec(3, group), Blocks.of(torch.tensor(weight), group, "input")
    found = clip_steps(output_limits(blocks, torch.tensor(inputs), spec, DATA_TYPE), blocks)
    expected = numpy_clip(weight.astype(np.float64), inputs.astype(np.float64), 3, group)
    assert (found == expected).mean() == 1.0
    assert len(set(found.flatten())) > 3


@pytest.mark.parametrize("golden", GOLDEN["awq_clip"], ids=lambda g: f"{g['seed']}")
def test_clip_equals_the_published_code(golden: dict[str, Any]) -> None:
    """All choices but near ties: float32 sums in another order decide fewer than one in a hundred otherwise."""
    generator = np.random.default_rng(golden["seed"])
    weight = torch.tensor(generator.standard_t(4, size=(64, 96)).astype(np.float32))
    inputs = torch.tensor(correlated_inputs(generator, 1030, 96).astype(np.float32))
    spec, blocks = awq_spec(golden["bits"], golden["group"]), Blocks.of(weight, golden["group"], "input")
    found = clip_steps(output_limits(blocks, evenly_spaced(inputs, 512), spec, DATA_TYPE), blocks)
    expected = np.array([[int(step) for step in row] for row in golden["steps"]])
    assert (found == expected).mean() >= 0.99


def test_clip_loss_is_never_above_that_of_the_whole_range() -> None:
    """And below it on the whole, on heavy-tailed weights at 3 bit."""
    generator = np.random.default_rng(3)
    weight = torch.tensor(generator.standard_t(3, size=(16, 64)).astype(np.float32))
    inputs = torch.tensor(correlated_inputs(generator, 200, 64).astype(np.float32))
    spec, blocks = awq_spec(3, 64), Blocks.of(weight, 64, "input")
    low, high = output_limits(blocks, inputs, spec, DATA_TYPE)
    errors = []
    for values in (blocks.values_NB.clamp(low, high), blocks.values_NB):
        qparams = DATA_TYPE.choose_qparams(Blocks(values_NB=values, layout=blocks.layout), spec)
        decoded = DATA_TYPE.dequantize(DATA_TYPE.quantize(values, qparams), qparams)
        errors.append((inputs @ (decoded - weight).T).square().sum(dim=0))
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].sum()) < 0.9 * float(errors[1].sum())


def linear_loss(weight: Tensor, inputs: Tensor) -> Any:
    def loss(weights: Sequence[Tensor]) -> float:
        return float((inputs @ (weights[0] - weight).T).square().mean())

    return loss


@pytest.mark.parametrize("golden", GOLDEN["awq_scale"], ids=lambda g: f"{g['seed']}")
def test_scale_equals_the_published_code(golden: dict[str, Any]) -> None:
    generator = np.random.default_rng(golden["seed"])
    weight = torch.tensor(generator.normal(size=(48, 64)).astype(np.float32))
    inputs = torch.tensor(correlated_inputs(generator, 256, 64).astype(np.float32))
    spec = awq_spec(golden["bits"], golden["group"])
    chosen = search_scale(inputs.abs().mean(0), [weight], lambda w: fake_quantize(DATA_TYPE, w, spec), linear_loss(weight, inputs))
    np.testing.assert_allclose(chosen.scale_I.numpy(), golden["scale"], rtol=1e-5)
    assert chosen.ratio > 0
    assert len(chosen.losses) == 20
    assert min(chosen.losses) < chosen.losses[0]


def test_scales_begin_with_one_and_never_reach_the_activations() -> None:
    """r = 0 is round to nearest; every scale is balanced about 1, and dead channels get the least, not zero."""
    mean = torch.tensor([4.0, 1.0, 0.25, 0.0])
    tried = list(candidates(mean))
    assert [ratio for ratio, _ in tried] == [i / 20 for i in range(20)]
    assert torch.equal(tried[0][1], torch.ones(4))
    for ratio, scale in tried[1:]:
        expected = np.maximum(mean.double().numpy() ** ratio, 1e-4)
        np.testing.assert_allclose(scale, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-5)


def test_first_of_equal_losses_wins() -> None:
    chosen = search_scale(torch.ones(3), [torch.ones(2, 3)], lambda w: w, lambda _: 1.0)
    assert (chosen.ratio, chosen.losses) == (0.0, (1.0,) * 20)
