"""What every model family must do: the right layers, bit-exact restore, and scores from selected positions.

The bundled models, and tiny random models of all architectures of the studies with every oddity that matters here:
OPT-350m's projections outside the blocks, GPT-2's transposed weights, fused QKV, grouped queries, experts in one parameter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantsweep.evaluation.scoring import Plan, Scorer
from quantsweep.mini import MODEL_NAMES, model_path
from quantsweep.models.layers import LinearLayer
from quantsweep.models.loading import LoadedModel, load_model
from quantsweep.trial.specs import ModelSpec
from tests.contract.architectures import BLOCKS, CONFIGS, LAYERS_OF_A_BLOCK, save_random_model

MAPS = Path("/proc/self/maps")
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module", params=[*CONFIGS, *MODEL_NAMES])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    name = request.param
    path = save_random_model(name, tmp_path_factory.mktemp(name)) if name in CONFIGS else model_path(name)
    return ModelSpec(name=name, family="test", path=str(path), dtype="float32")


@pytest.fixture(scope="module")
def loaded(spec: ModelSpec) -> LoadedModel:
    return load_model(spec, "cpu")


def family_of(loaded: LoadedModel) -> str:
    return loaded.spec.name if loaded.spec.name in CONFIGS else loaded.model.config.model_type


def parameter_of(loaded: LoadedModel, layer: LinearLayer) -> str:
    """The name of the parameter that holds the layer's weight."""
    return f"{layer.name}.weight" if layer.expert is None else layer.name.rpartition(".")[0]


def bits_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_right_layers_and_no_others(loaded: LoadedModel) -> None:
    config = loaded.model.config
    blocks = BLOCKS.get(config.model_type, "model.layers")
    expected = {f"{blocks}.{n}.{name}" for n in range(config.num_hidden_layers) for name in LAYERS_OF_A_BLOCK[family_of(loaded)]}
    assert set(loaded.layers) == expected


def test_counts(loaded: LoadedModel) -> None:
    """Everything is either quantizable, an embedding or head, or small (norms, biases, routers, OPT's projections)."""
    assert loaded.num_parameters == sum({p.data_ptr(): p.numel() for p in loaded.model.parameters()}.values())
    weights = {name: loaded.model.get_parameter(name) for name in {parameter_of(loaded, layer) for layer in loaded.layers.values()}}
    assert loaded.num_quantizable == sum(weight.numel() for weight in weights.values())
    rest = loaded.num_parameters - loaded.num_quantizable - loaded.num_embedding_parameters
    others = sum(
        parameter.numel()
        for name, parameter in loaded.model.named_parameters()
        if parameter.ndim == 1 or "project_" in name or name.endswith("mlp.gate.weight")
    )  # fmt: skip
    assert rest == others


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_then_restore_is_bit_exact(spec: ModelSpec, dtype: str) -> None:
    loaded = load_model(replace(spec, dtype=dtype), "cpu")
    assert loaded.model.dtype == getattr(torch, dtype)
    before = bits_of(loaded.model)
    for layer in loaded.layers.values():
        layer.write(layer.read() * 0.37 + 0.01)
    written = {parameter_of(loaded, layer) for layer in loaded.layers.values()}
    changed = {name for name, tensor in bits_of(loaded.model).items() if not torch.equal(tensor, before[name])}
    assert changed == written
    assert loaded.restore() == len(loaded.layers)
    assert loaded.restore() == 0
    for name, tensor in bits_of(loaded.model).items():
        assert torch.equal(tensor, before[name]), name


def test_write_and_forward_agree_on_out_times_in(loaded: LoadedModel) -> None:
    """In each layer: what the module computes is inputs · Wᵀ with the W that was written."""
    torch.manual_seed(1)
    for layer in loaded.layers.values():
        weight_OI = torch.randn(layer.out_features, layer.in_features)
        inputs = torch.randn(3, layer.in_features)
        layer.write(weight_OI)
        if layer.expert is None:
            output, expected = layer.module(inputs), inputs @ weight_OI.T + (layer.module.bias if layer.module.bias is not None else 0)
        else:
            inputs = torch.randn(3, loaded.model.config.hidden_size)
            output, expected = through_one_expert(layer, inputs), expert_by_hand(loaded, layer, weight_OI, inputs)
        layer.restore()
        torch.testing.assert_close(output, expected)


def through_one_expert(layer: LinearLayer, inputs: torch.Tensor) -> torch.Tensor:
    """What the experts' module gives when each token goes to this layer's expert, with a weight of 1."""
    with torch.inference_mode():
        output: torch.Tensor = layer.module(inputs, torch.full((len(inputs), 1), layer.expert), torch.ones(len(inputs), 1))
        return output


def expert_by_hand(loaded: LoadedModel, layer: LinearLayer, weight_OI: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """silu(x Gᵀ) · x Uᵀ, then Dᵀ, with the written weight in the place of its original."""
    experts = layer.name.rsplit(".", 2)[0]
    names = {kind: f"{experts}.{kind}.{layer.expert}" for kind in ("gate_up_proj", "down_proj")}
    weights = {kind: weight_OI if name == layer.name else loaded.layers[name].read() for kind, name in names.items()}
    gate, up = (inputs @ weights["gate_up_proj"].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ weights["down_proj"].T


def test_a_written_layer_changes_what_the_whole_model_computes(loaded: LoadedModel) -> None:
    """No layer is a copy that the model does not look at."""
    tokens = torch.arange(1, 33)[None]
    with torch.inference_mode():
        before = loaded.model(tokens).logits
        for layer in loaded.layers.values():
            layer.write(layer.read() * -1)
            assert not torch.equal(loaded.model(tokens).logits, before), layer
            layer.restore()
        assert torch.equal(loaded.model(tokens).logits, before)


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not list its memory maps")
def test_originals_are_views_of_the_files(loaded: LoadedModel) -> None:
    """No second copy of the weights: each original lies where a safetensors file is mapped."""
    mapped = [line.split()[0].split("-") for line in MAPS.read_text().splitlines() if line.endswith(".safetensors")]
    ranges = [(int(first, 16), int(last, 16)) for first, last in mapped]
    for layer in loaded.layers.values():
        for part in layer._original:
            assert any(first <= part.data_ptr() < last for first, last in ranges), layer


def test_selecting_before_the_head_gives_the_scores_of_all_positions(loaded: LoadedModel) -> None:
    scorer = Scorer(loaded.model)
    assert scorer._head is not None
    spans = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), ([1, 2, 3], [9]), ([1, 2, 3], [11])]
    plan = Plan.of(spans, loaded.max_length)
    loglikelihoods, is_greedy = scorer.score(plan.batches(2), plan.num_spans)
    for (context, continuation), loglikelihood, greedy in zip(spans, loglikelihoods, is_greedy, strict=True):
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        tokens = torch.tensor(continuation)
        expected = logits.log_softmax(-1).gather(1, tokens[:, None]).sum()
        assert loglikelihood == pytest.approx(float(expected), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == tokens).all())
