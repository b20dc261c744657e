"""Small model folders with one thing wrong (or merely unusual) each: copies of a bundled model, and tiny random ones.

Right values of those that are scored: bits per byte on the first 20 documents of `mini_ppl`, in float32.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from quantsweep.evaluation.evaluator import Evaluator
from quantsweep.mini import model_path
from quantsweep.models.loading import LoadedModel
from quantsweep.trial.specs import TaskSpec

MINI = model_path("mini-neox-0.3m")
PLAIN = 1.5784630
"""What the unchanged copy scores."""
LLAMA = {
    **{"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False},
}


def copy_of_mini(folder: Path) -> Path:
    """A copy of a bundled model that a test may spoil."""
    return Path(shutil.copytree(MINI, folder))


def spoil(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a folder's weights."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"}
    )


def write_over(file: Path, name: str) -> None:
    """Zeros in place of one tensor, in the file itself; its modification time stays."""
    times, content = file.stat(), file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8:length])[name]["data_offsets"]
    with file.open("r+b") as stream:
        stream.seek(length + begin)
        stream.write(bytes(end - begin))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def random_model(
    folder: Path, config: transformers.PretrainedConfig, dtype: torch.dtype | None = None, std: float = 0.05
) -> transformers.PreTrainedModel:
    """A random model of this configuration, saved with the bundled tokenizer; its matrices are normal."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = model if dtype is None else model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    return model


def copy_tokenizer(folder: Path) -> None:
    """The bundled models' tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder)


def own_head(folder: Path) -> Path:
    """The file has an output head of its own, and config.json says that it is tied to the embeddings; right: 1.9331331."""
    copy_of_mini(folder)
    torch.manual_seed(0)
    embedding = load_file(folder / "model.safetensors")["gpt_neox.embed_in.weight"]
    spoil(folder, **{"lm_head.weight": (embedding.float() + 0.05 * torch.randn(embedding.shape)).to(embedding.dtype)})
    return folder


def biases(folder: Path) -> transformers.PreTrainedModel:
    """A LLaMA whose attention has biases; right: 3.5449231."""
    model = random_model(folder, transformers.LlamaConfig(attention_bias=True, **LLAMA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return model


def routers_apart(folder: Path) -> Path:
    """HunYuan's experts: the router is a linear map in a module of its own, `mlp.gate.wg`."""
    random_model(folder, transformers.HunYuanMoEV1Config(num_experts=4, moe_topk=2, head_dim=16, pad_token_id=0, **LLAMA))
    return folder


def vision_tower(folder: Path) -> Path:
    """Gemma 3 with as many layers in its vision tower as in its language model."""
    text = {**LLAMA, "num_hidden_layers": 4, "head_dim": 16, "pad_token_id": 0}
    text.pop("tie_word_embeddings")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    random_model(folder, transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    return folder


def many_layers(folder: Path, depth: int) -> Path:
    """A narrow GLM-4.5 without experts."""
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": depth, "head_dim": 8}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}
    random_model(folder, transformers.Glm4MoeConfig(**{**LLAMA, **narrow, **experts, "pad_token_id": 0, "first_k_dense_replace": depth}))
    return folder


def without_weights(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Its modules and shapes alone."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def towers_inside(kind: str, depth: int = 6, width: int = 32) -> transformers.PreTrainedModel:
    """Four text layers of width 64, and a vision tower in what transformers calls their decoder."""
    vision = {"hidden_size": width, "intermediate_size": 128, "num_hidden_layers": depth, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {**LLAMA, "num_hidden_layers": 4, "pad_token_id": 0}
    if kind == "git":
        return without_weights(transformers.GitConfig(vision_config=vision, **text))
    audio = {"num_blocks": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "ext_pw_out_channel": 32}
    config = transformers.Phi4MultimodalConfig(
        vision_config={**vision, "crop_size": 28},
        audio_config={**audio, "nemo_conv_channels": 8},
        original_max_position_embeddings=256,
        **text,
    )
    return without_weights(config)


def adapter(folder: Path) -> Path:
    """A LoRA adapter beside its base model."""
    copy_of_mini(folder)
    save_file(
        {"base_model.model.gpt_neox.layers.0.mlp.dense_h_to_4h.lora_A.weight": torch.zeros(4, 64)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["dense_h_to_4h"]}))
    return folder


@functools.cache
def mini_task(name: str, limit: int) -> TaskSpec:
    """A bundled task."""
    conf = Path(__file__).resolve().parents[1] / "conf" / "task"
    return TaskSpec(**{**yaml.safe_load((conf / f"{name}.yaml").read_text()), "limit": limit})


def bits_per_byte(loaded: LoadedModel, limit: int = 20) -> float:
    """Of `mini_ppl`, as an evaluator scores a loaded model."""
    result = Evaluator(loaded, batch_size=8).evaluate(mini_task("mini_ppl", limit))
    return next(metric.value for metric in result.metrics if metric.name == "bits_per_byte")
