"""Calibrated and clipped rounding through the runner, on random models of the studies' architectures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from quantsweep.calibration.streams import walk
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.models.session import Session
from quantsweep.pipeline.run import Outcome, quantize
from quantsweep.trial.registry import TRANSFORMS
from quantsweep.trial.specs import QuantizationSpec, StepSpec, options_tuple
from tests.contract.component_cases import CONF
from tests.contract.rounding_cases import help_for_tests
from tests.contract.test_folding import logits_of
from tests.contract.test_session import loaded_model
from tests.numerics.gptq_reference import gptq
from tests.numerics.make_spec import make_spec

TOKENS, OTHER_TOKENS = (torch.randint(1, 2048, (4, 32), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
FAMILIES = ("opt", "gpt2", "gpt_neox", "llama", "mixtral")


def step(factor: str, name: str, **changes: Any) -> StepSpec:
    """A step with the defaults of its yaml."""
    options = yaml.safe_load((CONF / factor / f"{name}.yaml").read_text())["options"]
    assert not set(changes) - set(options)
    return StepSpec(name, 1, options_tuple({**options, **changes}))


def spec_of(
    bits: int = 3, group: Any = 16, rounding: StepSpec | None = None, *, convention: str = "gptq", **factors: Any
) -> QuantizationSpec:
    spec = make_spec("int", bits, group, block_axis="input", symmetric=False, scale_dtype="float32", convention=convention)
    return replace(spec, rounding=rounding or StepSpec("round_to_nearest", 1), **factors)


def run(spec: QuantizationSpec, family: str = "llama", tokens: Tensor | None = TOKENS) -> tuple[Outcome, dict[str, Tensor]]:
    """The records and the weights that a trial leaves, restored afterwards."""
    session = Session(loaded_model(family))
    outcome = quantize(session, spec, help_for_tests(tokens))
    weights = {name: session.read(name) for name in session.layers}
    session.check_state(session.written_state())
    session.restore()
    return outcome, weights


def errors_of_first_block(weights: dict[str, Tensor]) -> dict[str, float]:
    """tr(Δ H Δᵀ) of each of its layers, H that of the original model."""
    block = next(iter(walk(Session(loaded_model("llama")), TOKENS)))
    inputs = block.capture(list(block.layers), hessian=torch.float64)
    differences = {name: (weights[name] - layer.read()).double() for name, layer in block.layers.items()}
    return {name: float((delta @ inputs[name].hessian_II * delta).sum()) for name, delta in differences.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_through_the_runner_is_gptq(family: str) -> None:
    """The first block's layers against the reference, from Hessians taken here; every layer's bits; another text, other codes."""
    rounding = step("rounding", "gptq", group_refit="eager")
    outcome, weights = run(spec_of(rounding=rounding), family)
    session = Session(loaded_model(family))
    block = next(iter(walk(session, TOKENS)))
    inputs = block.capture(list(block.layers), hessian=torch.float64)
    for name, layer in block.layers.items():
        expected = gptq(layer.read().double().numpy(), inputs[name].hessian_II.numpy(), 3, group=16)
        share = (np.abs(weights[name].double().numpy() - expected) > 1e-4).mean()
        assert share <= 0.01, f"{name}: float32 sums may move a near tie, and what follows in its row"
    assert [record.layer for record in outcome.layers] == list(session.layers)
    assert all(record.bits == 3 * layer.out_features * layer.in_features + 35 * layer.out_features * -(-layer.in_features // 16)
               for record, layer in zip(outcome.layers, session.layers.values(), strict=True))  # fmt: skip
    other = run(spec_of(rounding=rounding), family, OTHER_TOKENS)[1]
    assert not [name for name in weights if torch.equal(weights[name], other[name])]


@pytest.mark.parametrize("factors", [{}, {"clipping": "mse"}, {"clipping": "percentile"}, {"clipping": "awq_clip"}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"activation_order": True, "granularity": "group"}, {"activation_order": True, "static_groups": True}], ids=str
)
def test_gptq_beats_round_to_nearest(options: dict[str, Any], factors: dict[str, str]) -> None:
    """Error of the first block's outputs, layer by layer, on the calibration text; indices are counted where they are stored."""
    clipping = {key: step(key, name) for key, name in factors.items()}
    outcome, weights = run(spec_of(rounding=step("rounding", "gptq", **options), **clipping))
    error, reference = errors_of_first_block(weights), errors_of_first_block(run(spec_of(), tokens=None)[1])
    assert np.mean([error[name] / reference[name] for name in error]) < 0.8
    stored = dict(outcome.layers[0].bits_by_part)
    assert stored.get("column_order") == (16 * 32 if options.get("activation_order") and not options.get("static_groups") else None)


def test_experts_without_tokens_are_rounded_to_nearest_and_say_so() -> None:
    """One window of two tokens reaches few experts; what no token reached has plain codes."""
    outcome, weights = run(spec_of(rounding=step("rounding", "gptq")), "mixtral", TOKENS[:1, :1])
    unreached = [record for record in outcome.layers if record.num_tokens == 0]
    assert unreached
    expected = run(spec_of(), "mixtral")[1]
    for record in unreached:
        assert any("rounded to nearest" in words for words in record.fallbacks)
        assert torch.equal(weights[record.layer], expected[record.layer])


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "qwen3", "falcon-7b", "falcon-40b", "glm"])
def test_awq_scales_change_nothing_but_what_is_rounded(family: str) -> None:
    """Folded in float64 the logits stay; each search tried s = 1 first and found nothing worse; all pairs are told."""
    session = Session(loaded_model(family, torch.float64))
    before = logits_of(session.model)
    spec = spec_of(convention="awq", transforms=(step("transform", "awq_scale", grid=5),))
    records = TRANSFORMS["awq_scale"].apply(session, spec, spec.transforms[0], help_for_tests(TOKENS))
    after = logits_of(session.model)
    assert float((after - before).abs().max()) < 1e-10 * float(before.abs().max())
    chosen = [record.detail for record in records if record.detail.startswith("r ")]
    ratios = [float(detail.split()[1].rstrip(",")) for detail in chosen]
    assert any(ratios), "something is magnified"
    for detail in chosen:
        best, plain_loss = (float(word.rstrip(",)")) for word in (detail.split()[3], detail.split()[-1]))
        assert best <= plain_loss
    session.restore()


def test_awq_refuses_what_it_cannot_fold() -> None:
    with pytest.raises(QuantizationError, match="gelu stands between"):
        run(spec_of(transforms=(step("transform", "awq_scale", unfoldable="refuse"),)), "gpt_neox")
    with pytest.raises(QuantizationError, match="norms come after"):
        run(spec_of(transforms=(step("transform", "awq_scale", unfoldable="refuse"),)), "opt-350m")


def test_awq_lowers_the_error_of_outputs() -> None:
    """Scales and clipping, against round to nearest of the same convention, mean over layers; queries and keys are not cut."""
    spec = spec_of(convention="awq", clipping=step("clipping", "awq_clip"))
    clipped, _ = run(spec, "opt")
    unclipped, _ = run(spec_of(convention="awq"), "opt", None)
    by_name = {record.layer: record.relative_error for record in unclipped.layers}
    for record in clipped.layers:
        assert (record.relative_error == by_name[record.layer]) == record.layer.endswith(("q_proj", "k_proj"))


@pytest.mark.parametrize(("bits", "part_bits"), [(16, 16), (8, 8)])
def test_lorc_takes_off_error_and_counts_its_factors(bits: int, part_bits: int) -> None:
    lorc = step("compensation", "lorc", rank=4, factor_bits=bits)
    with_factors, _ = run(spec_of(compensation=lorc), tokens=None)
    without, _ = run(spec_of(), tokens=None)
    for record, bare in zip(with_factors.layers, without.layers, strict=True):
        assert record.relative_error < bare.relative_error
        scales = 0 if bits == 16 else 2 * 4 * 16
        assert record.bits - bare.bits == 4 * (record.out_features + record.in_features) * part_bits + scales


@pytest.mark.parametrize(("name", "factors", "words"), [
    ("flat", {"rounding": "gptq"}, "block_axis=input"),
    ("flat", {"clipping": "awq_clip"}, "block_axis=input"),
])  # fmt: skip
def test_blocks_across_rows_are_refused(name: str, factors: dict[str, str], words: str) -> None:
    spec = replace(spec_of(), block_axis=name, **{key: step(key, value) for key, value in factors.items()})
    with pytest.raises(ConfigurationError, match=words):
        run(spec)


def test_ranges_that_levels_of_the_whole_tensor_share_are_refused() -> None:
    for data_type, more in (("quantile", {}), ("nvfp4", {"scale_dtype": "e4m3"})):
        spec = replace(make_spec(data_type, 4, 16, block_axis="input", **more), clipping=step("clipping", "mse"))
        with pytest.raises(ConfigurationError, match="whole tensor"):
            run(spec)


def test_a_percentile_of_all_is_no_clipping() -> None:
    clipped, everything = (run(spec_of(clipping=step("clipping", "percentile", percentile=p)), tokens=None)[1] for p in (90.0, 100.0))
    bare = run(spec_of(), tokens=None)[1]
    assert all(torch.equal(everything[name], bare[name]) for name in bare)
    assert not any(torch.equal(clipped[name], bare[name]) for name in bare)


def test_defaults_are_the_published_ones() -> None:
    """A changed default is another method under the old name: whoever means it raises the version, and changes this."""
    assert dict(step("rounding", "gptq").options) == {
        "damping": 0.01, "activation_order": False, "static_groups": False, "group_refit": "stale", "update_columns": 128,
        "stream": "weights", "granularity": "block",
    }  # fmt: skip
    assert dict(step("transform", "awq_scale").options) == {"grid": 20, "unfoldable": "skip"}
    assert dict(step("clipping", "mse").options) == {"exponent": 2.4, "grid": 100, "least": 0.2}
    assert dict(step("clipping", "awq_clip").options) == {"sample_tokens": 512}
    assert dict(step("compensation", "lorc").options) == {"rank": 8, "factor_bits": 16}
