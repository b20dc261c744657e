"""Planted outliers, in every architecture: the function stays, the activations grow, and what cannot be planted is refused.

Norms divide by a spread that planting does not touch, so in float64 all that can differ is the rounding
of the gain times s, of the column divided by s and of their products: parts in 1e16.  Softmax and
rotary angles in float32 (as some of the architectures compute them) round such a difference to nothing
or to one of theirs, 6e-8, which the tolerance allows.  With a power of two not even that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantsweep.errors import ModelError
from quantsweep.mini import model_path
from quantsweep.models.anatomy import anatomy_of
from quantsweep.models.blocks import decoder_blocks, quantizable_linears
from quantsweep.models.loading import load_model
from quantsweep.models.planting import plant_outliers, planted_channels
from quantsweep.trial.specs import ModelSpec, PlantedOutliers
from tests.contract.architectures import CONFIGS, random_model

PLANTABLE = sorted(set(CONFIGS) - {"opt-350m"})
TOKENS = torch.arange(1, 49).reshape(2, 24)
WIDTH = 32

NORMS = {
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2"),
    "falcon-7b": ("input_layernorm",),
    "falcon-40b": ("ln_attn", "ln_mlp"),
}
"""The norms of a block that feed its layers; elsewhere these two."""
USUAL_NORMS = ("input_layernorm", "post_attention_layernorm")


def planted(scale: float, channels: int = 3, seed: int = 0) -> PlantedOutliers:
    return PlantedOutliers(channels=channels, scale=scale, seed=seed)


@contextmanager
def outputs_of_norms(model: PreTrainedModel, family: str) -> Iterator[dict[str, Tensor]]:
    """What each norm that feeds layers puts out in a forward pass, by name."""
    found: dict[str, Tensor] = {}
    blocks = decoder_blocks(model)[1]
    handles = [
        block.get_submodule(norm).register_forward_hook(lambda _m, _i, output, name=f"{n}.{norm}": found.update({name: output.clone()}))
        for n, block in enumerate(blocks)
        for norm in NORMS.get(family, USUAL_NORMS)
    ]
    yield found
    for handle in handles:
        handle.remove()


def run(model: PreTrainedModel, family: str) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.inference_mode(), outputs_of_norms(model, family) as outputs:
        return model(TOKENS).logits, outputs


@pytest.mark.parametrize("family", PLANTABLE)
@pytest.mark.parametrize("scale", [10.0, 64.0])
def test_the_function_stays_and_the_channels_grow(family: str, scale: float) -> None:
    model = random_model(family, torch.float64)
    logits, outputs = run(model, family)
    plant_outliers(model, planted(scale))
    logits_after, outputs_after = run(model, family)
    torch.testing.assert_close(logits_after, logits, rtol=0, atol=1e-6 * float(logits.abs().max()))
    if scale == 64:
        assert torch.equal(logits_after, logits), "a power of two rounds nothing"
    factors = torch.ones(WIDTH, dtype=torch.float64)
    factors[list(planted_channels(planted(scale), WIDTH))] = scale
    assert set(outputs_after) == set(outputs)
    assert len(outputs) == len(decoder_blocks(model)[1]) * len(NORMS.get(family, USUAL_NORMS))
    for name, output in outputs.items():
        assert output.abs().min() > 0
        torch.testing.assert_close(outputs_after[name] / output, factors.expand_as(output), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", PLANTABLE)
def test_what_is_divided_is_columns_of_what_reads_the_norms(family: str) -> None:
    """Layers that read something else (attention's output, the second MLP layer), and everything outside the blocks, stay."""
    before, after = random_model(family), random_model(family)
    plant_outliers(after, planted(8.0))
    channels = torch.zeros(WIDTH, dtype=torch.bool)
    channels[list(planted_channels(planted(8.0), WIDTH))] = True
    changed = {name for name, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(name))}
    prefix = decoder_blocks(after)[0]
    anatomy = anatomy_of(after)
    inputs = {*anatomy.attention_inputs, *anatomy.mlp_inputs, *([anatomy.router] if anatomy.router else [])}
    names = [name.removesuffix(".weight").split(".", prefix.count(".") + 2)[-1] for name in changed if name.startswith(f"{prefix}.")]
    assert len(names) == len(changed)
    norms = set(NORMS.get(family, USUAL_NORMS))
    assert {name for name in names if name.removesuffix(".bias") not in norms} == inputs
    for name, place in quantizable_linears(after).items():
        part = name.split(".", prefix.count(".") + 2)[-1]
        if part in inputs:  # experts' names end in a number: the next test has them
            new, old = (module.get_submodule(name).get_parameter("weight") for module in (after, before))
            ratio = (old.T / new.T) if place.transposed else (old / new)
            assert set(ratio[:, ~channels].flatten().tolist()) == {1.0}
            assert set(ratio[:, channels].flatten().tolist()) == {8.0}


def test_columns_of_experts_and_router_are_divided() -> None:
    before, after = random_model("mixtral"), random_model("mixtral")
    plant_outliers(after, planted(8.0))
    factors = torch.ones(WIDTH)
    factors[list(planted_channels(planted(8.0), WIDTH))] = 8
    for old, new in zip(*(decoder_blocks(model)[1] for model in (before, after)), strict=True):
        for name in ("mlp.experts.gate_up_proj", "mlp.gate.weight"):
            assert torch.equal(new.get_parameter(name) * factors, old.get_parameter(name))
        assert torch.equal(new.mlp.experts.down_proj, old.mlp.experts.down_proj)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_of_norm_and_weight_are_the_same_bits_for_a_power_of_two(dtype: torch.dtype) -> None:
    """But for float16 weights that become subnormal."""
    before, after = random_model("llama", dtype), random_model("llama", dtype)
    plant_outliers(after, planted(16.0))

    def products(model: PreTrainedModel) -> Tensor:
        block = decoder_blocks(model)[1][0]
        product: Tensor = block.input_layernorm.weight.float() * block.self_attn.q_proj.weight.float()
        return product

    is_normal = decoder_blocks(after)[1][0].self_attn.q_proj.weight.abs() >= torch.finfo(dtype).tiny
    assert is_normal.float().mean() > 0.9
    assert torch.equal(products(after)[is_normal], products(before)[is_normal])


def test_the_channels_are_those_of_the_seed_everywhere() -> None:
    assert planted_channels(planted(2.0, 3), 32) == (15, 20, 25)  # the first by `sha256sum` of 0:0, 0:1, …
    assert set(planted_channels(planted(2.0, 3), 32)) < set(planted_channels(planted(2.0, 8), 32))
    assert planted_channels(planted(2.0, 3, seed=1), 32) != planted_channels(planted(2.0, 3), 32)
    assert planted_channels(planted(2.0, 32), 32) == tuple(range(32))
    with pytest.raises(ModelError, match=r"plant_outliers\.channels is 33, and the model has 32 channels"):
        planted_channels(planted(2.0, 33), 32)


class TestRefusals:
    def test_norms_after_the_residual(self) -> None:
        with pytest.raises(ModelError, match=r"cannot be planted in this opt model: its norms come after the residual sums"):
            plant_outliers(random_model("opt-350m"), planted(2.0))

    def test_a_residual_that_carries_norms(self) -> None:
        config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=8, apply_residual_connection_post_layernorm=True)
        with pytest.raises(ModelError, match="apply_residual_connection_post_layernorm is set"):
            plant_outliers(transformers.AutoModelForCausalLM.from_config(config), planted(2.0))

    def test_norms_without_gain(self) -> None:
        config = transformers.OPTConfig(
            hidden_size=32, word_embed_proj_dim=32, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8,
            layer_norm_elementwise_affine=False)  # fmt: skip
        with pytest.raises(ModelError, match="self_attn_layer_norm has no gain"):
            plant_outliers(transformers.AutoModelForCausalLM.from_config(config), planted(2.0))

    def test_a_gain_that_does_not_fit(self) -> None:
        with pytest.raises(ModelError, match=r"times 1e\+06 does not fit torch\.float16; plant a smaller scale"):
            plant_outliers(random_model("llama", torch.float16), planted(1e6))

    def test_an_architecture_that_is_not_described(self) -> None:
        model = nn.Module()
        model.config = transformers.GemmaConfig()
        with pytest.raises(ModelError, match=r"blocks of gemma models are not described in .*anatomy\.py.* described are bloom, falcon"):
            anatomy_of(model)


def test_loaded_planted_weights_are_the_originals() -> None:
    plain = ModelSpec(name="m", family="f", path=str(model_path("mini-opt-0.4m")), dtype="float32")
    original, loaded = load_model(plain, "cpu"), load_model(replace(plain, plant_outliers=planted(4.0)), "cpu")
    for name, layer in loaded.layers.items():
        weight = layer.read()
        assert torch.equal(weight, original.layers[name].read()) == name.endswith(("out_proj", "fc2"))
        layer.write(torch.zeros_like(weight))
        layer.restore()
        assert torch.equal(layer.module.weight, weight)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(TOKENS).logits, original.model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_the_file_is_not_written_to(tmp_path: Path) -> None:
    path = model_path("mini-opt-0.4m") / "model.safetensors"
    before = path.read_bytes()
    spec = ModelSpec(name="m", family="f", path=str(path.parent), dtype="float32", plant_outliers=planted(4.0))
    load_model(spec, "cpu")
    assert path.read_bytes() == before
