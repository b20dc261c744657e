"""What every model family must do: the right layers, bit-exact restore, and scores from selected positions.

The bundled models, and tiny random models of six architectures with every oddity that matters here:
OPT-350m's projections outside the blocks, GPT-2's transposed weights, fused QKV, grouped queries.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from quantsweep.evaluation.scoring import Plan, Scorer
from quantsweep.mini import MODEL_NAMES, model_path
from quantsweep.models.loading import LoadedModel, load_model
from quantsweep.specs import ModelSpec

TOKENIZER = model_path(MODEL_NAMES[0])
VOCABULARY = 2048  # that of the tokenizer
MAPS = Path("/proc/self/maps")
DTYPES = ("float32", "float16", "bfloat16")

CONFIGS: dict[str, PretrainedConfig] = {
    "opt": transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2),
    "llama": transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64),
    "falcon": transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64),
}  # fmt: skip

# The linear layers of one decoder block, written down from the architectures' descriptions.
LAYERS_OF_A_BLOCK = {
    "opt": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"},
    "gpt_neox": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "bloom": {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "llama": {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "falcon": {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}  # fmt: skip


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
    return loaded.model.config.model_type


def bits_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_right_layers_and_no_others(loaded: LoadedModel) -> None:
    blocks: dict[str, set[str]] = {}
    for name in loaded.layers:
        match = re.fullmatch(r".*\.(\d+)\.(.+)", name)
        assert match, name
        blocks.setdefault(match[1], set()).add(match[2])
    assert len(blocks) == loaded.model.config.num_hidden_layers
    assert set(map(frozenset, blocks.values())) == {frozenset(LAYERS_OF_A_BLOCK[family_of(loaded)])}


def test_counts(loaded: LoadedModel) -> None:
    """Everything is either quantizable, an embedding or head, or small (norms, biases, OPT's projections)."""
    assert loaded.num_parameters == sum({p.data_ptr(): p.numel() for p in loaded.model.parameters()}.values())
    assert loaded.num_quantizable == sum(layer.module.weight.numel() for layer in loaded.layers.values())
    rest = loaded.num_parameters - loaded.num_quantizable - loaded.num_embedding_parameters
    others = sum(
        parameter.numel()
        for name, parameter in loaded.model.named_parameters()
        if parameter.ndim == 1 or "project_" in name
    )  # fmt: skip
    assert rest == others


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_then_restore_is_bit_exact(spec: ModelSpec, dtype: str) -> None:
    loaded = load_model(replace(spec, dtype=dtype), "cpu")
    assert loaded.model.dtype == getattr(torch, dtype)
    before = bits_of(loaded.model)
    for layer in loaded.layers.values():
        layer.write(layer.read() * 0.37 + 0.01)
    written = {f"{name}.weight" for name in loaded.layers}
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
        output = layer.module(inputs)
        layer.restore()
        bias = layer.module.bias if layer.module.bias is not None else 0
        torch.testing.assert_close(output, inputs @ weight_OI.T + bias)


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not list its memory maps")
def test_originals_are_views_of_the_files(loaded: LoadedModel) -> None:
    """No second copy of the weights: each original lies where a safetensors file is mapped."""
    mapped = [line.split()[0].split("-") for line in MAPS.read_text().splitlines() if line.endswith(".safetensors")]
    ranges = [(int(first, 16), int(last, 16)) for first, last in mapped]
    for layer in loaded.layers.values():
        address = layer._original.data_ptr()
        assert any(first <= address < last for first, last in ranges), layer


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
