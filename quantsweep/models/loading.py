"""A language model in memory, ready to be quantized and put back as often as a shard has trials.

    loaded = load_model(spec, "cpu")
    for layer in loaded.layers.values():
        layer.write(quantize(layer.read()))
    ...                                   # evaluate
    loaded.restore()                      # the original bits, proven by checksum

Safe by default: safetensors only (a pickle can run code), no code from the hub, and no network for a
model on disk.  What is loaded is what was planned (`content.py`) and what config.json describes: a checkpoint that
lacks a weight is refused (transformers would fill it with random numbers and go on), and one that has more than the
model knows (they would be dropped).  From then on a trial's session (`session.py`) is what changes it, and proves what it was.

Memory: weights on the device in the compute dtype; the originals on the host, memory-mapped from the
model's files where they can be (`originals.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from quantsweep.checkpoints import headers
from quantsweep.checkpoints.content import ContentCheck, converted_check, local_check, snapshot_check
from quantsweep.checkpoints.dropped import check_nothing_dropped, noted_unplaced, some
from quantsweep.checkpoints.gguf import converted_folder as gguf_folder
from quantsweep.checkpoints.pins import converted_folder
from quantsweep.checkpoints.progress import no_progress_bars
from quantsweep.errors import ModelError
from quantsweep.models.anatomy import predecessors
from quantsweep.models.blocks import Place, quantizable_linears
from quantsweep.models.checksums import state_checksums
from quantsweep.models.layers import LinearLayer, Sources
from quantsweep.models.originals import FileTensors, expert_original_of, original_of
from quantsweep.models.planting import plant_outliers
from quantsweep.signs import OnProgress
from quantsweep.trial.identity import resolve_path
from quantsweep.trial.specs import ModelSpec

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_LOAD_OPTIONS: dict[str, Any] = {
    "use_safetensors": True,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # reported with the missing weights instead, by us, and refused
}

# Where configurations keep the longest context, and what lm-eval assumes when neither they nor the
# tokenizer tell; the order is lm-eval's, so that both cut long texts at the same token.
_DEFAULT_MAX_LENGTH = 2048
_LOOKS_AHEAD = 0.01
"""So much of what a token changes at its own place may show at earlier places; causal models differ there by rounding alone."""
_SOME_TEXT = "The sun is 8 light-minutes away."
_UNLIMITED = int(1e30)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer and its quantizable layers.

    layers: attention and MLP linears of the decoder blocks by name, in the order of the model.
    num_parameters: all parameters, tied ones counted once.
    num_embedding_parameters: token and position embeddings and an untied output head.
    num_quantizable: weights of `layers` (biases stay as they are).
    max_length: the longest input in tokens.
    state: checksums of all parameters and buffers by name, as loaded.
    contents: what its files are held against, while they are mapped.
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
    state: Mapping[str, str]
    contents: tuple[ContentCheck, ...] = ()

    @property
    def num_embeddings(self) -> int:
        """Tokens that the model knows: ids from here on cannot be looked up."""
        return _num_embeddings(self.model)

    def restore(self, on_progress: OnProgress = lambda: None) -> int:
        """Put the original bits back into every layer written since the last restore; the number of such layers.

        on_progress: called after each layer.

        Raises ModelError when the bits are not those that were loaded.
        """
        self.check_contents()
        written = [layer for layer in self.layers.values() if layer.is_written]
        for layer in written:
            layer.restore()
            on_progress()
        return len(written)

    def check_contents(self) -> None:
        """Raise ModelError when a mapped file has changed."""
        for content in self.contents:
            content.check()

    def changed(self, names: list[str], when: str) -> str:
        """The message that parameters, buffers or modules are not what they should be."""
        return (
            f"model {self.spec.name}: {len(names)} parameters, buffers or modules changed {when} ({some(names)}): something else than "
            "what was asked would be scored. Its files were written over, or code changed it in another way than through the session"
        )


def load_model(spec: ModelSpec, device: str) -> LoadedModel:
    """Load the model of `spec` onto `device`, in its compute dtype, for inference.

    device: "cpu", one GPU ("cuda:1"), or "cuda": the first GPU, or all that this process sees where the model asks for several.
    Raises ModelError when it cannot be had, lacks weights, or is not a decoder-only transformer.
    """
    if spec.unavailable is not None:
        raise ModelError(f"model {spec.name} cannot be loaded: {spec.unavailable}")
    # Full float32 products on every GPU: TF32 keeps 10 bits of mantissa.
    torch.set_float32_matmul_precision("highest")
    with ExitStack() as stack:
        source = _source(spec, stack)
        model, unplaced, reported = _load_weights(spec, source, device)
        source = _fetched(source, model)
        assert source.folder is not None
        check_nothing_dropped(spec.name, unplaced, reported, source.folder)
        if spec.plant_outliers is not None:
            plant_outliers(model, spec.plant_outliers)  # from here on these weights are the original ones
        tokenizer = _load_tokenizer(spec, source)
        loaded = wrap_model(model, tokenizer, spec, source.folder)
    return replace(loaded, contents=source.contents)


def wrap_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, weight_folder: Path | None) -> LoadedModel:
    """A model that is in memory already, as a LoadedModel; `weight_folder` holds its safetensors files, if anything does."""
    # Tied is what was tied by loading: called again (lm-eval does), it would overwrite a head that the checkpoint has.
    model.tie_weights = _tied_already  # type: ignore[method-assign]
    files = FileTensors([] if weight_folder is None else headers.weight_files(weight_folder))
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
        state=MappingProxyType(state_checksums(model)),
    )


@dataclass(frozen=True)
class _Source:
    """What `from_pretrained` is given: a folder or hub id, and keyword arguments shared by model and tokenizer.

    folder: where its files lie; None where the hub's cache has none yet.  contents: what they are held against.
    """

    name: str
    arguments: dict[str, Any]
    folder: Path | None
    contents: tuple[ContentCheck, ...]


def _source(spec: ModelSpec, stack: ExitStack) -> _Source:
    """Where the model is; from here until `stack` is left, its content is compared with what was planned."""
    if spec.path is None:
        return _hub_source(str(spec.hub_id), spec.revision, stack)
    planned = stack.enter_context(local_check(spec))
    if spec.gguf_file is None:
        return _folder_source(resolve_path(spec.path), planned)
    folder = gguf_folder(resolve_path(spec.path), spec.gguf_file)  # from here on the GGUF file itself is in use no more
    return _folder_source(folder, stack.enter_context(converted_check(folder)))


def _folder_source(folder: Path, *contents: ContentCheck) -> _Source:
    headers.check_folder(folder)
    return _Source(str(folder), {"local_files_only": True, "trust_remote_code": False}, folder, contents)


def _hub_source(hub_id: str, revision: str | None, stack: ExitStack) -> _Source:
    """The hub's cache, or what prewarm made of a checkpoint that has pickled weights only."""
    if revision is not None and (folder := converted_folder(hub_id, revision)).is_dir():
        return _folder_source(folder, stack.enter_context(converted_check(folder)))
    arguments = {"revision": revision or "main", "trust_remote_code": False}
    snapshot = _snapshot(hub_id, revision or "main")
    if snapshot is None or not _is_whole(snapshot):
        return _Source(hub_id, arguments, None, ())
    return _Source(hub_id, arguments, snapshot, (stack.enter_context(snapshot_check(snapshot)),))


def _is_whole(snapshot: Path) -> bool:
    """False for one that is not all here yet, or is to be refused: `_fetched` looks again when it is here."""
    try:
        headers.check_folder(snapshot)
    except ModelError:
        return False
    return True


def _fetched(source: _Source, model: PreTrainedModel) -> _Source:
    """The source of a model that was fetched from the hub while it was loaded, once that is looked at as others are before."""
    if source.folder is not None:
        return source
    commit = getattr(model.config, "_commit_hash", None) or source.arguments["revision"]
    folder = _snapshot(source.name, commit)
    if folder is None:
        raise ModelError(f"{source.name} was loaded from the hub, and its files are not in the hub's cache; prewarm it")
    headers.check_folder(folder)
    with snapshot_check(folder) as content:
        return replace(source, folder=folder, contents=(content,))


def _snapshot(hub_id: str, revision: str) -> Path | None:
    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _load_tokenizer(spec: ModelSpec, source: _Source) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.name, **source.arguments)
        tokens = tokenizer(_SOME_TEXT, add_special_tokens=False).input_ids
    except Exception as error:  # its files are data of users, and each kind of tokenizer fails in its own way
        raise ModelError(f"the tokenizer of model {spec.name} cannot be loaded from {source.name}: {_first_line(error)}") from error
    # Set to False where transformers knows that it splits texts wrongly, and warns in a log.
    if getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "fix_mistral_regex", None) is False:
        raise ModelError(
            f"the tokenizer of model {spec.name} ({source.name}) splits texts otherwise than the model was trained with (Mistral's, as "
            'transformers 4 saved it): put "fix_mistral_regex": true into its tokenizer_config.json'
        )
    if not tokens:
        raise ModelError(f"the tokenizer of model {spec.name} ({source.name}) makes no tokens of a text; are its files whole?")
    return tokenizer


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '(no words)').splitlines()[0]}"


def _load_weights(spec: ModelSpec, source: _Source, device: str) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, the tensors for which it has no place, and those of them that transformers reports."""
    placement = {} if device == "cpu" else {"device_map": _placement(device, spec.resources.gpus)}
    # Declared to return the model alone; with `output_loading_info` it returns a pair.
    from_pretrained: Callable[..., tuple[PreTrainedModel, Mapping[str, Any]]] = AutoModelForCausalLM.from_pretrained  # type: ignore[assignment]
    try:
        with no_progress_bars(), noted_unplaced() as unplaced:
            model, info = from_pretrained(source.name, dtype=_DTYPES[spec.dtype], **_LOAD_OPTIONS, **source.arguments, **placement)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model {spec.name} cannot be loaded from {source.name}: {error}") from error
    _check_complete(spec, info)
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    _check_finite(spec, model)
    _check_causal(spec, model)
    return model, unplaced, set(map(str, info["unexpected_keys"]))


def _tied_already(*_arguments: object, **_options: object) -> None:
    """In the place of `tie_weights` after loading."""


def _placement(device: str, gpus: int) -> str | dict[str, str]:
    """Where `from_pretrained` puts a model: GPUs are filled directly, without a whole copy on the host first.

    A model that asks for several GPUs is spread over those that this process sees, block by block; others lie on one.
    """
    return "balanced" if device == "cuda" and gpus > 1 and torch.cuda.device_count() > 1 else {"": device}


def _check_complete(spec: ModelSpec, info: Mapping[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise ModelError(
                f"model {spec.name}: {len(keys)} weights are {kind.removesuffix('_keys')} in the checkpoint ({some(keys)}) "
                "and would be random; the files and the config.json do not belong together, or the download is incomplete"
            )


def _check_finite(spec: ModelSpec, model: PreTrainedModel) -> None:
    """NaN and infinity in the weights make every score NaN: of the checkpoint, or of a dtype that is too narrow for it."""
    bad = [name for name, parameter in model.named_parameters() if parameter.numel() and not _is_finite(parameter)]
    if bad:
        raise ModelError(
            f"model {spec.name}: {len(bad)} weights hold NaN or infinity in {spec.dtype} ({some(bad)}): the checkpoint is damaged, or "
            f"its numbers are beyond {spec.dtype}'s {torch.finfo(_DTYPES[spec.dtype]).max:g}. Try model.dtype=bfloat16 or float32"
        )


@torch.inference_mode()
def _check_causal(spec: ModelSpec, model: PreTrainedModel) -> None:
    """Scores are of the next token given those before: a model that looks ahead (a BERT without `is_decoder`) has seen it."""
    tokens = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], device=model.device) % _num_embeddings(model)
    logits: Tensor = model(tokens, use_cache=False).logits
    change = (logits[0].float() - logits[1].float()).abs().amax(dim=-1)
    # Not zero: experts may gather tokens in another order, and 16-bit sums then differ in their last places.
    if float(change[:-1].max()) > _LOOKS_AHEAD * float(change[-1]) > 0:
        raise ModelError(
            f"model {spec.name} ({model.config.model_type}) is no causal language model: what it says of a token depends on later ones. "
            "An encoder may need is_decoder=true in its config.json; a masked language model cannot be scored so"
        )


def _num_embeddings(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().get_parameter("weight"))


def _is_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor.detach())  # NaN wins; one pass, and no mask as large as the tensor
    return bool(torch.isfinite(low) & torch.isfinite(high))


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
    for key in headers.MAX_LENGTH_KEYS:
        if (value := getattr(text_config, key, None)) is not None:
            return int(value)
    limit = tokenizer.model_max_length
    return int(limit) if limit is not None and limit < _UNLIMITED else _DEFAULT_MAX_LENGTH
