"""A language model in memory, ready to be quantized and put back as often as a shard has trials.

    loaded = load_model(spec, "cpu")
    for layer in loaded.layers.values():
        layer.write(quantize(layer.read()))
    ...                                   # evaluate
    loaded.restore()                      # the original bits, proven by checksum

Safe by default: safetensors only (a pickle can run code), no code from the hub, and no network for a
model on disk.  A checkpoint that lacks a weight is refused: transformers would fill it with random
numbers and go on.

Memory: weights on the device in the compute dtype; the originals on the host, memory-mapped from the
model's files where they can be (`originals.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from quantsweep.errors import ModelError
from quantsweep.identity import model_files, resolve_path
from quantsweep.models.blocks import Place, quantizable_linears
from quantsweep.models.gguf import converted_folder as gguf_folder
from quantsweep.models.layers import LinearLayer, Sources
from quantsweep.models.originals import FileTensors, expert_original_of, original_of
from quantsweep.models.planting import plant_outliers
from quantsweep.models.progress import no_progress_bars
from quantsweep.models.walk import predecessors
from quantsweep.pins import converted_folder
from quantsweep.specs import ModelSpec

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_LOAD_OPTIONS: dict[str, Any] = {
    "use_safetensors": True,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # reported with the missing weights instead, by us, and refused
}

# Where configurations keep the longest context, and what lm-eval assumes when neither they nor the
# tokenizer tell; the order is lm-eval's, so that both cut long texts at the same token.
_MAX_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
_DEFAULT_MAX_LENGTH = 2048
_UNLIMITED = int(1e30)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer and its quantizable layers.

    layers: attention and MLP linears of the decoder blocks by name, in the order of the model.
    num_parameters: all parameters, tied ones counted once.
    num_embedding_parameters: token and position embeddings and an untied output head.
    num_quantizable: weights of `layers` (biases stay as they are).
    max_length: the longest input in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    device: str
    layers: Mapping[str, LinearLayer]
    num_parameters: int
    num_embedding_parameters: int
    num_quantizable: int
    max_length: int

    def restore(self) -> int:
        """Put the original bits back into every layer written since the last restore; the number of such layers.

        Raises ModelError when the bits are not those that were loaded.
        """
        written = [layer for layer in self.layers.values() if layer.is_written]
        for layer in written:
            layer.restore()
        return len(written)


def load_model(spec: ModelSpec, device: str) -> LoadedModel:
    """Load the model of `spec` onto `device`, in its compute dtype, for inference.

    device: "cpu", one GPU ("cuda:1"), or "cuda": the first GPU, or all that this process sees where the model asks for several.
    Raises ModelError when it cannot be had, lacks weights, or is not a decoder-only transformer.
    """
    if spec.unavailable is not None:
        raise ModelError(f"model {spec.name} cannot be loaded: {spec.unavailable}")
    # Full float32 products on every GPU: TF32 keeps 10 bits of mantissa.
    torch.set_float32_matmul_precision("highest")
    source = _source(spec)
    model = _load_weights(spec, source, device)
    if spec.plant_outliers is not None:
        plant_outliers(model, spec.plant_outliers)  # from here on these weights are the original ones
    tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
    return wrap_model(model, tokenizer, spec, _weight_folder(source, model))


def wrap_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, weight_folder: Path | None) -> LoadedModel:
    """A model that is in memory already, as a LoadedModel; `weight_folder` holds its safetensors files, if anything does."""
    files = FileTensors(weight_folder)
    linears = quantizable_linears(model, spec.unquantized)
    sources = cache(lambda: predecessors(model))
    layers = {name: _linear_layer(name, place, files, model.base_model_prefix, sources) for name, place in linears.items()}
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        device=str(model.device),
        layers=MappingProxyType(layers),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_embedding_parameters=_count_embedding_parameters(model),
        num_quantizable=sum(layer.out_features * layer.in_features for layer in layers.values()),
        max_length=_max_length(model.config, tokenizer),
    )


@dataclass(frozen=True)
class _Source:
    """What `from_pretrained` is given: a folder or hub id, and keyword arguments shared by model and tokenizer."""

    name: str
    arguments: dict[str, Any]


def _source(spec: ModelSpec) -> _Source:
    if spec.path is None:
        return _hub_source(str(spec.hub_id), spec.revision)
    folder = resolve_path(spec.path)
    if spec.gguf_file is not None:
        folder = gguf_folder(folder, spec.gguf_file)
    model_files(folder)  # says what is missing better than transformers does
    return _Source(str(folder), {"local_files_only": True, "trust_remote_code": False})


def _hub_source(hub_id: str, revision: str | None) -> _Source:
    """The hub's cache, or what prewarm made of a checkpoint that has pickled weights only."""
    if revision is not None and (folder := converted_folder(hub_id, revision)).is_dir():
        return _Source(str(folder), {"local_files_only": True, "trust_remote_code": False})
    return _Source(hub_id, {"revision": revision or "main", "trust_remote_code": False})


def _load_weights(spec: ModelSpec, source: _Source, device: str) -> PreTrainedModel:
    placement = {} if device == "cpu" else {"device_map": _placement(device, spec.resources.gpus)}
    # Declared to return the model alone; with `output_loading_info` it returns a pair.
    from_pretrained: Callable[..., tuple[PreTrainedModel, Mapping[str, Any]]] = AutoModelForCausalLM.from_pretrained  # type: ignore[assignment]
    try:
        with no_progress_bars():
            model, info = from_pretrained(source.name, dtype=_DTYPES[spec.dtype], **_LOAD_OPTIONS, **source.arguments, **placement)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model {spec.name} cannot be loaded from {source.name}: {error}") from error
    _check_complete(spec, info)
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return model


def _placement(device: str, gpus: int) -> str | dict[str, str]:
    """Where `from_pretrained` puts a model: GPUs are filled directly, without a whole copy on the host first.

    A model that asks for several GPUs is spread over those that this process sees, block by block; others lie on one.
    """
    return "balanced" if device == "cuda" and gpus > 1 and torch.cuda.device_count() > 1 else {"": device}


def _check_complete(spec: ModelSpec, info: Mapping[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise ModelError(
                f"model {spec.name}: {len(keys)} weights are {kind.removesuffix('_keys')} in the checkpoint ({', '.join(keys[:3])}, …) "
                "and would be random; the files and the config.json do not belong together, or the download is incomplete"
            )


def _weight_folder(source: _Source, model: PreTrainedModel) -> Path | None:
    if "revision" not in source.arguments:
        return Path(source.name)
    commit = getattr(model.config, "_commit_hash", None)
    config = try_to_load_from_cache(source.name, "config.json", revision=commit or source.arguments["revision"])
    return Path(config).parent if isinstance(config, str) else None


def _linear_layer(name: str, place: Place, files: FileTensors, base_prefix: str, sources: Sources) -> LinearLayer:
    weight = place.module.get_parameter(place.parameter)
    if place.expert is None:
        original: tuple[Tensor, ...] = (original_of(f"{name}.{place.parameter}", weight, files, base_prefix),)
    else:
        parameter_name = name.rpartition(".")[0]
        original = expert_original_of(parameter_name, place.expert, weight[place.expert], files, base_prefix)
    return LinearLayer(
        name, place.module, original, transposed=place.transposed, parameter=place.parameter, expert=place.expert, sources=sources
    )


def _count_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters of all embedding tables and of the output head, those shared between them counted once."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weights = {id(weight): weight for weight in (tables if head is None else [*tables, head.get_parameter("weight")])}
    return sum(weight.numel() for weight in weights.values())


def _max_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    text_config = getattr(config, "text_config", None) or config
    for key in _MAX_LENGTH_KEYS:
        if (value := getattr(text_config, key, None)) is not None:
            return int(value)
    limit = tokenizer.model_max_length
    return int(limit) if limit is not None and limit < _UNLIMITED else _DEFAULT_MAX_LENGTH
