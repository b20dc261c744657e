"""Tiny random models of all architectures of the studies, and the linear layers of their blocks."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from quantsweep.mini import MODEL_NAMES, model_path

TOKENIZER = model_path(MODEL_NAMES[0])
VOCABULARY = 2048  # that of the tokenizer

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


def random_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of this family, for inference; norms and biases differ from channel to channel, as in a trained one."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the quicker ways have no float64
    return model.to(dtype)


def save_random_model(family: str, folder: Path) -> Path:
    """A random model of this family with the bundled tokenizer, as safetensors."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder
