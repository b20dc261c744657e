"""What every model family must do: the right layers, bit-exact restore, and scores from selected positions.

The bundled models, and tiny random models of all architectures of the studies with every oddity that matters here:
OPT-350m's projections outside the blocks, GPT-2's transposed weights, fused QKV, grouped queries, experts in one parameter.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from quantsweep.evaluation.scoring import Plan, Scorer
from quantsweep.mini import MODEL_NAMES, model_path
from quantsweep.models.layers import LinearLayer
from quantsweep.models.loading import LoadedModel, load_model
from quantsweep.specs import ModelSpec

TOKENIZER = model_path(MODEL_NAMES[0])
VOCABULARY = 2048  # that of the tokenizer
MAPS = Path("/proc/self/maps")
DTYPES = ("float32", "float16", "bfloat16")

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 64}
_OPT = {**_SMALL, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {**_SMALL, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_GLM = {**_LLAMA, "head_dim": 8, "pad_token_id": 0}
_FALCON = {**_SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}
_EXPERTS = 3

CONFIGS: dict[str, PretrainedConfig] = {
    "opt": transformers.OPTConfig(**_OPT, word_embed_proj_dim=32),
    "opt-350m": transformers.OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt_neox": transformers.GPTNeoXConfig(
        **_SMALL, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2),
    "llama": transformers.LlamaConfig(**_LLAMA),
    "qwen3": transformers.Qwen3Config(**_LLAMA, head_dim=12),
    "mistral": transformers.MistralConfig(**_LLAMA),
    "mixtral": transformers.MixtralConfig(**_LLAMA, num_local_experts=_EXPERTS),
    "falcon-7b": transformers.FalconConfig(**_FALCON, multi_query=True, parallel_attn=True),
    "falcon-40b": transformers.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": transformers.FalconConfig(**_FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "glm": transformers.GlmConfig(**_GLM),
    "glm4": transformers.Glm4Config(**_GLM),
}  # fmt: skip

# The linear layers of one decoder block, written down from the architectures' descriptions.
_OPT_LAYERS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"}
_ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
_GATED = _ATTENTION | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
_FUSED = {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
LAYERS_OF_A_BLOCK = {
    "opt": _OPT_LAYERS,
    "opt-350m": _OPT_LAYERS,
    "gpt_neox": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "bloom": _FUSED,
    "llama": _GATED,
    "qwen3": _GATED,
    "mistral": _GATED,
    "mixtral": _ATTENTION | {f"mlp.experts.{name}.{n}" for name in ("gate_up_proj", "down_proj") for n in range(_EXPERTS)},
    "falcon-7b": _FUSED,
    "falcon-40b": _FUSED,
    "falcon-rw": _FUSED,
    "glm": _ATTENTION | {"mlp.gate_up_proj", "mlp.down_proj"},
    "glm4": _ATTENTION | {"mlp.gate_up_proj", "mlp.down_proj"},
}
BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}
"""Where the blocks are by model type; elsewhere model.layers."""


def save_random_model(family: str, folder: Path) -> Path:
    """A random model of this family with the bundled tokenizer, as safetensors."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


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
