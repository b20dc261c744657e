"""SmoothQuant inside a session: the formula, the exact rewriting, the search, and what it gives back to models with loud channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantsweep.calibration.statistics import StatisticsStore
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.models.folding import pairs
from quantsweep.models.loading import LoadedModel, wrap_model
from quantsweep.models.planting import plant_outliers
from quantsweep.models.session import Session
from quantsweep.numerics.tokens import tokens_are
from quantsweep.pipeline.interface import Help, TransformRecord
from quantsweep.pipeline.run import quantize
from quantsweep.transforms.smooth import TRANSFORM as SMOOTH
from quantsweep.transforms.smooth import smoothing_scales
from quantsweep.trial.specs import ActivationSpec, ModelSpec, PlantedOutliers, QuantizationSpec, StepSpec, options_tuple
from tests.contract.architectures import random_model
from tests.contract.test_folding import logits_of
from tests.contract.test_session import Tokenizer, loaded_model

TEXT_NT = torch.randint(1, 2048, (6, 24), generator=torch.Generator().manual_seed(0))
INT8 = {
    "data_type": "int",
    "data_type_version": 1,
    "data_type_options": (("convention", "absmax_full"),),
    "bit_width": 8,
    "symmetric": True,
}
SMOOTHABLE = ["opt", "gpt_neox", "gpt2", "bloom", "llama", "qwen3", "mistral", "mixtral", "falcon-7b", "falcon-40b", "glm", "glm4"]


def step_of(**options: Any) -> StepSpec:
    return StepSpec("smooth", 1, options_tuple({"alpha": 0.5, "search": 0, "held_out": 0.25, **options}))


def spec_of(*, activation: str | None = None, weights: bool = True, smooth: StepSpec | None = None, **options: Any) -> QuantizationSpec:
    """W8 per tensor, and 8-bit activations of one kind."""
    fields: dict[str, Any] = {"rounding": StepSpec("none", 1)}
    if weights:
        fields = {
            "rounding": StepSpec("round_to_nearest", 1),
            **INT8,
            "block_size": "tensor",
            "block_axis": "flat",
            "scale_dtype": "float32",
        }
    chosen = None if activation is None else ActivationSpec(step=StepSpec(activation, 1, options_tuple(options)), **INT8)
    return QuantizationSpec(**fields, activation=chosen, transforms=() if smooth is None else (smooth,))


def helping(tokens_NT: Tensor | None = TEXT_NT) -> Help:
    return Help(tokens_NT=tokens_NT, generator=torch.Generator(), progress=lambda: None, statistics=StatisticsStore())


@pytest.mark.parametrize("family", SMOOTHABLE)
def test_the_function_stays_and_scales_are_the_formula(family: str) -> None:
    loaded = loaded_model(family, torch.float64)
    before = logits_of(loaded.model)
    found = pairs(loaded.model, "norm")
    norms = {pair.source: loaded.model.get_submodule(pair.source) for pair in found}
    maxima: dict[str, Tensor] = {}
    handles = [
        norm.register_forward_hook(lambda _m, _i, output, name=name: maxima.update(
            {name: torch.maximum(maxima.get(name, torch.zeros(1)), output.abs().flatten(0, -2).amax(0))}))
        for name, norm in norms.items()
    ]  # fmt: skip
    with torch.inference_mode():
        for tokens_T in TEXT_NT:
            loaded.model(tokens_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    gains = {name: norm.weight.clone() for name, norm in norms.items()}
    columns = {pair.source: [loaded.model.get_parameter(_parameter(reader)).clone() for reader in pair.readers] for pair in found}
    session = Session(loaded)
    records = SMOOTH.apply(session, spec_of(activation="per_token"), step_of(alpha=0.7), helping())
    assert [record.name for record in records] == [pair.source for pair in found]
    assert {record.detail for record in records} == {"alpha 0.7"}
    assert float((logits_of(loaded.model) - before).abs().max()) <= 1e-10 * float(before.abs().max())
    for name, norm in norms.items():
        weights = [np.abs(weight.numpy() if family != "gpt2" else weight.numpy().T).reshape(-1, 32) for weight in columns[name]]
        widest = np.maximum(np.max([weight.max(0) for weight in weights], axis=0), 1e-5)
        expected = np.maximum(np.maximum(maxima[name].numpy(), 1e-5) ** 0.7 / widest**0.3, 1e-5)
        np.testing.assert_allclose((gains[name] / norm.weight).numpy(), expected, rtol=1e-6)  # maxima are kept in float32
    session.restore()
    assert torch.equal(logits_of(loaded.model), before)


def _parameter(reader: str) -> str:
    return reader.rpartition(".")[0] if reader.rpartition(".")[2].isdigit() else f"{reader}.weight"


def test_half_and_half_makes_channels_and_columns_alike() -> None:
    x, w = torch.rand(16, dtype=torch.float64) + 0.1, torch.rand(16, dtype=torch.float64) + 0.1
    scale = smoothing_scales(x, w, 0.5)
    torch.testing.assert_close(x / scale, w * scale)
    torch.testing.assert_close(smoothing_scales(x, w, 1.0), x)
    torch.testing.assert_close(smoothing_scales(x, w, 0.0), 1 / w)
    assert smoothing_scales(torch.zeros(1), torch.ones(1), 1.0).item() == 1e-5, "a channel that is always zero"


def planted_model(family: str) -> LoadedModel:
    """A random model with four channels of each norm 64 times as loud."""
    model = random_model(family)
    plant_outliers(model, PlantedOutliers(channels=4, scale=64.0, seed=0))
    return wrap_model(model, Tokenizer(), ModelSpec(name=family, family=family, path="/nowhere"), None)


def error_of(loaded: LoadedModel, spec: QuantizationSpec, plain: Tensor) -> tuple[float, tuple[TransformRecord, ...]]:
    session = Session(loaded)
    outcome = quantize(session, spec, helping())
    with torch.inference_mode(), tokens_are(torch.ones_like(TEXT_NT, dtype=torch.bool)):
        quantized = loaded.model(TEXT_NT, use_cache=False).logits
    session.check_state(session.written_state())
    session.restore()
    return float((quantized - plain).square().mean() / plain.square().mean()), outcome.transforms


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("activation", ["per_token", "per_tensor", "per_tensor_static"])
def test_loud_channels_cost_little_once_smoothed(family: str, activation: str) -> None:
    """W8A8 of a model with four planted channels of 64: at least four times less error than without smoothing."""
    loaded = planted_model(family)
    with torch.inference_mode():
        plain = loaded.model(TEXT_NT, use_cache=False).logits
    naive, _ = error_of(loaded, spec_of(activation=activation), plain)
    smoothed, _ = error_of(loaded, spec_of(activation=activation, smooth=step_of()), plain)
    searched, records = error_of(loaded, spec_of(activation=activation, smooth=step_of(search=4)), plain)
    assert smoothed < naive / 4
    assert searched < naive / 4
    assert records[0].detail.endswith("the best of 4 on 2 windows held out")


def test_a_search_looks_at_held_out_text_alone_and_at_the_trial_s_own_formats() -> None:
    """With all difficulty in 4-bit weights and none in activations, little is moved; the other way round, much."""
    alphas = {}
    for activation in (None, "per_tensor"):
        session = Session(loaded_model("llama"))
        records = SMOOTH.apply(session, spec_of(activation=activation, weights=activation is None), step_of(search=9), helping())
        alphas[activation] = float(records[0].detail.split()[1].rstrip(","))
        session.restore()
    assert alphas[None] < alphas["per_tensor"]


class TestRefusals:
    def test_post_norms(self) -> None:
        with pytest.raises(QuantizationError, match="its norms come after the residual sums"):
            SMOOTH.apply(Session(loaded_model("opt-350m")), spec_of(), step_of(), helping())

    def test_no_text(self) -> None:
        with pytest.raises(QuantizationError, match="the trial has none"):
            SMOOTH.apply(Session(loaded_model("llama")), spec_of(), step_of(), helping(None))

    def test_one_window_cannot_be_held_out(self) -> None:
        with pytest.raises(QuantizationError, match="needs at least 2 windows of calibration text, got 1"):
            SMOOTH.apply(Session(loaded_model("llama")), spec_of(), step_of(search=3), helping(TEXT_NT[:1]))

    @pytest.mark.parametrize(("option", "value"), [("alpha", 1.5), ("alpha", -0.1), ("search", -1), ("held_out", 0.0), ("held_out", 1.0)])
    def test_options(self, option: str, value: float) -> None:
        with pytest.raises(ConfigurationError, match=rf"transform\.smooth\.options\.{option} must be"):
            SMOOTH.check(spec_of(), step_of(**{option: value}))


def test_a_search_quantizes_the_activations_that_the_trial_does() -> None:
    """Those of attention are none that a norm's readers are given; a static range that is clipped has a sample to be taken from."""

    def chosen(activation: ActivationSpec | None) -> str:
        session = Session(loaded_model("llama"))
        spec = replace(spec_of(), activation=activation)
        found = {record.detail for record in SMOOTH.apply(session, spec, step_of(search=5), helping())}
        session.restore()
        return found.pop()

    two_bit = {**INT8, "bit_width": 2}
    of_queries = ActivationSpec(step=StepSpec("per_token", 1), **two_bit, sites=("q",))
    assert chosen(of_queries) == chosen(None) != chosen(replace(of_queries, sites=("linear",)))
    clipped = ActivationSpec(step=StepSpec("per_tensor_static", 1), **two_bit, clip_percentile=99.0)
    assert chosen(clipped).startswith("alpha")


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("outlier_weights", ["int8", "fp16"])
def test_llm_int8_in_a_session(family: str, outlier_weights: str) -> None:
    """Loud channels cost little with 16-bit weights, which are counted; more with rounded ones: planted columns are small, and their
    rounding meets loud inputs.  Everything comes back.
    """
    loaded = planted_model(family)
    with torch.inference_mode():
        plain = loaded.model(TEXT_NT, use_cache=False).logits
    naive, _ = error_of(loaded, spec_of(activation="per_token"), plain)
    mixed, _ = error_of(loaded, spec_of(activation="llm_int8", threshold=6.0, outlier_weights=outlier_weights), plain)
    assert mixed < naive / (4 if outlier_weights == "fp16" else 1.5)
    session = Session(loaded)
    outcome = quantize(session, spec_of(activation="llm_int8", threshold=6.0, outlier_weights=outlier_weights), helping())
    bits = {layer.bits / (layer.out_features * layer.in_features) for layer in outcome.layers}
    assert (min(bits), max(bits)) == (16, 16) if outlier_weights == "fp16" else max(bits) < 8.1
    session.restore()
    with torch.inference_mode():
        assert torch.equal(loaded.model(TEXT_NT, use_cache=False).logits, plain)


def test_queries_keys_and_values_are_quantized_token_by_token() -> None:
    loaded = loaded_model("llama")
    with torch.inference_mode():
        plain = loaded.model(TEXT_NT, use_cache=False).logits
    sites = ("linear", "q", "k", "v", "probabilities")
    everywhere = ActivationSpec(step=StepSpec("per_token", 1), **INT8, sites=sites)
    inputs_alone, _ = error_of(loaded, spec_of(activation="per_token"), plain)
    with_attention, _ = error_of(loaded, replace(spec_of(activation="per_token"), activation=everywhere), plain)
    assert inputs_alone < with_attention < 0.01
    with torch.inference_mode():
        assert torch.equal(loaded.model(TEXT_NT, use_cache=False).logits, plain)
