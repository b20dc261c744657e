"""What a model's folder says of itself, read in milliseconds and without torch.

    config.json                               what will be built
    model.safetensors, or an index and parts  what will be put in: each file begins with 8 bytes of length, then as much JSON
                                              that gives every tensor's name, dtype, shape and place

Planning looks here before anything is submitted, and loading once more: what can be seen to be wrong is said in words, where
transformers would read something else than was hashed, drop what it does not know, or fail trial after trial.
Only tensors' values need loading (`quantsweep.models.loading`).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantsweep.errors import ModelError
from quantsweep.trial.identity import CONFIG, OTHER_TOKENIZER_FILES, TOKENIZER_FILES, WEIGHT_INDEX, model_files

KNOWN_ARCHITECTURES = ("bloom", "falcon", "glm", "glm4", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "qwen3")
"""Values of `model_type` whose blocks are described (`quantsweep.models.anatomy`): which of their layers are quantized was looked at."""

MAX_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
"""How configurations call the context, in the order in which lm-eval looks."""
WEIGHTS = "model.safetensors"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTIZED_DTYPES = re.compile(r"I8|U8|F[468]_\w+|F4")
_QUANTIZED_NAMES = re.compile(r"(^|\.)(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|absmax|quant_map|SCB|W_q)$")
_INTEGERS = re.compile(r"[IU](16|32|64)|BOOL")
_WEIGHT_NAMES = re.compile(r"(weight|bias|_proj)$")
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb)\.(original_)?(inv_freq|(cos|sin)_cached)$"  # recomputed from the configuration
    r"|^(model\.)?decoder\.version$"  # of the code that saved an OPT
    r"|(^|\.)position_ids$"
    r"|\.masked_bias$"
    r"|\.(attn|attention|self_attn|self_attention)\.bias$"  # causal masks of GPT-2 and GPT-NeoX; told from biases by their shape
)
_BESIDE_VOCABULARY = {"added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}
_BYTES_ALONE = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
"""Tokenizers that have no vocabulary in a file."""
_TOKEN_TABLE = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings)\.weight$")
_TABLE_WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd", "n_embed")
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound


@dataclass(frozen=True, slots=True)
class TensorFact:
    """What a file's header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def check_folder(folder: Path) -> None:
    """Refuse a folder of which its files tell that it is no plain, whole causal language model of this product's kind.

    Raises ModelError, naming folder or file, what is wrong and the remedy.
    """
    model_files(folder)
    _refuse_adapter(folder)
    config = read_config(folder)
    _refuse_quantized(folder, config)
    _refuse_unknown_architecture(folder, config)
    _refuse_other_files(folder / CONFIG, CONFIG, config.get("configuration_files"))
    _refuse_without_tokenizer(folder)
    tensors = read_tensors(folder)
    for name, fact in tensors.items():
        if not is_harmless(name, fact) and _is_quantized(name, fact):
            raise ModelError(_quantized_already(folder, f"its tensor {name} is {fact.dtype}"))
    _refuse_other_sizes(folder, config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model's config.json."""
    return _read_json(folder / CONFIG)


def architecture(config: Mapping[str, Any]) -> str:
    """The `model_type` of a configuration."""
    return str(config.get("model_type"))


def max_length(config: Mapping[str, Any]) -> int | None:
    """The context in tokens; None where the file does not say it, and loading must."""
    text = config.get("text_config") or config
    found = (text.get(key) for key in MAX_LENGTH_KEYS) if isinstance(text, Mapping) else ()
    length = next((value for value in found if value is not None), None)
    return length if type(length) is int else None


def read_tensors(folder: Path) -> dict[str, TensorFact]:
    """All tensors of those files that are read, by name."""
    tensors: dict[str, TensorFact] = {}
    listed = _read_index(folder) if not (folder / WEIGHTS).is_file() else {}
    for file in weight_files(folder):
        header = read_header(file)
        if twice := sorted(header.keys() & tensors.keys()):
            raise ModelError(f"model folder {folder}: {twice[0]} stands in {file.name} and in another file; keep one checkpoint a folder")
        tensors |= header
    if lost := [name for name in listed if name not in tensors]:
        raise ModelError(
            f"model folder {folder}: {len(lost)} tensors of {WEIGHT_INDEX} are in none of its files ({lost[0]}, …); "
            "copy the model again, whole"
        )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Those files of a folder that transformers reads the weights from; all of them are hashed (`identity.model_files`).

    Raises ModelError where they are not there, or lie elsewhere.
    """
    whole, index = folder / WEIGHTS, folder / WEIGHT_INDEX
    named = sorted(set(_read_index(folder).values())) if index.is_file() else []
    for name in named:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {name!r}: weights are read from *.safetensors files in the model's own folder, whose content is its "
                "identity; put the file there, and its plain name into the index"
            )
    if whole.is_file():  # before an index, as transformers has it; `planned_layers.left_out` says that there is one
        return [whole]
    if not named:
        raise ModelError(f"model folder {folder} holds neither {WEIGHTS} nor {WEIGHT_INDEX}; rename the file of its weights to {WEIGHTS}")
    if lost := [name for name in named if not (folder / name).is_file()]:
        raise ModelError(
            f"model folder {folder} lacks {len(lost)} of the {len(named)} files of {WEIGHT_INDEX} ({lost[0]}, …); "
            "copy or download them again"
        )
    return [folder / name for name in named]


def unread_parts(folder: Path) -> list[str]:
    """Files that an index names and nobody reads, since the weights stand in one file beside them."""
    index = folder / WEIGHT_INDEX
    return sorted({*_read_index(folder).values()} - {WEIGHTS}) if index.is_file() and (folder / WEIGHTS).is_file() else []


def read_header(file: Path) -> dict[str, TensorFact]:
    """Name, dtype and shape of each tensor of a safetensors file; raises ModelError for one that is damaged or cut short."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ModelError(f"{file} is a pointer of Git LFS, not the weights; fetch them (`git lfs pull`)")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{file} is no safetensors file, or was cut short ({size:,} bytes); copy or download it again")
        text = stream.read(length)
    try:
        content = json.loads(text)
        content.pop("__metadata__", None)
        ends = [fact["data_offsets"][1] for fact in content.values()]
        facts = {name: TensorFact(str(fact["dtype"]), tuple(map(int, fact["shape"]))) for name, fact in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} is no safetensors file: its header cannot be read ({error}); copy or download it again") from error
    if (whole := 8 + length + max(ends, default=0)) != size:
        raise ModelError(f"{file} has {size:,} bytes where its header promises {whole:,}; copy or download it again")
    return facts


def is_harmless(name: str, fact: TensorFact | None = None) -> bool:
    """True for a tensor that computes nothing of its own: tables that every model makes anew.

    `fact`, where it is known, tells a causal mask from an attention's bias: a bias has one dimension.
    """
    is_bias = name.endswith(".bias") and not (fact is not None and len(fact.shape) > 1)
    return _HARMLESS.search(name) is not None and not is_bias


def _refuse_adapter(folder: Path) -> None:
    if found := [name for name in _ADAPTERS if (folder / name).exists()]:
        raise ModelError(
            f"model folder {folder} holds an adapter ({found[0]}), and adapters are not applied: merge it into the base model "
            "(peft's merge_and_unload, then save_pretrained into a new folder), or take its files away for the base model alone"
        )


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("quantization_config", "compression_config"):
            if found := part.get(key):
                kind = found.get("quant_method", "") if isinstance(found, Mapping) else ""
                raise ModelError(_quantized_already(folder, f"{key} in its config.json{f' says {kind}' if kind else ''}"))
    if found_files := [name for name in _QUANTIZED_FILES if (folder / name).exists()]:
        raise ModelError(_quantized_already(folder, f"it holds {found_files[0]}"))


def _is_quantized(name: str, fact: TensorFact) -> bool:
    is_integer = _INTEGERS.fullmatch(fact.dtype) is not None and _WEIGHT_NAMES.search(name) is not None
    return is_integer or _QUANTIZED_DTYPES.fullmatch(fact.dtype) is not None or _QUANTIZED_NAMES.search(name) is not None


def _refuse_other_sizes(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]) -> None:
    """The table of tokens tells two sizes of the model; only where it is known how the configuration calls them."""
    tables = [(name, fact.shape) for name, fact in tensors.items() if _TOKEN_TABLE.search(name) and len(fact.shape) == 2]
    if architecture(config) not in KNOWN_ARCHITECTURES or len(tables) != 1:
        return
    ((name, shape),) = tables
    width = next((key for key in _TABLE_WIDTHS if config.get(key) is not None), None)
    for key, found in (("vocab_size", shape[0]), (width, shape[1])):
        if key is not None and config.get(key, found) != found:
            raise ModelError(
                f"{folder / CONFIG} says {key}={config[key]}, and {name} is {shape[0]}×{shape[1]}: they do not belong together; "
                "copy both from where the weights come from"
            )


def _refuse_other_files(path: Path, kept: str, listed: object) -> None:
    """A list in `path` by which transformers chooses, by its own version, another file in the place of `kept`; that one is not hashed."""
    if others := [str(file) for file in listed if file != kept] if isinstance(listed, list) else []:
        raise ModelError(
            f"{path} lists {others[0]}, which some versions of transformers read in place of {kept}; only {kept} is part of the "
            f"model's identity. Rename the file that shall be read to {kept}, and take the list away"
        )


def _quantized_already(folder: Path, seen: str) -> str:
    return (
        f"model folder {folder} is quantized already ({seen}): it is no 16-bit baseline, and quantizing it again would measure both. "
        "Give the original checkpoint"
    )


def _refuse_unknown_architecture(folder: Path, config: Mapping[str, Any]) -> None:
    explicit = config.get("transformers_weights")
    if explicit not in (None, WEIGHTS, WEIGHT_INDEX):
        raise ModelError(f"{folder / CONFIG} names its weights itself (transformers_weights: {explicit!r}); rename the file to {WEIGHTS}")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{folder / CONFIG} has no model_type, which says what the model is; copy it from where the weights come from")
    known = _causal_models()
    if not known or kind in known:
        return
    if config.get("auto_map"):
        raise ModelError(
            f"model folder {folder}: {kind} needs Python code of its own (auto_map in config.json), which is never run. "
            "Use a checkpoint in a form that transformers has itself"
        )
    raise ModelError(f"model folder {folder}: the installed transformers has no causal language model of type {kind}")


@cache
def _causal_models() -> frozenset[str]:
    """Values of `model_type` that transformers can load as a causal language model, read from its source; empty if not found there.

    (Importing it takes seconds.)
    """
    spec = importlib.util.find_spec("transformers")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    source = Path(*places[:1], "models", "auto", "modeling_auto.py")
    if not places or not source.is_file():
        return frozenset()
    table = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = .*?^\)", source.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return frozenset(re.findall(r'^ +\("([^"]+)", ', table[0], re.MULTILINE)) if table else frozenset()


def _refuse_without_tokenizer(folder: Path) -> None:
    path, whole = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config = _read_json(path) if path.is_file() else {}
    _refuse_other_files(path, whole.name, config.get("fast_tokenizer_files"))
    vocabularies = (*(name for name in TOKENIZER_FILES if name not in _BESIDE_VOCABULARY), *OTHER_TOKENIZER_FILES)
    if not any(True for pattern in vocabularies for _ in folder.glob(pattern)) and config.get("tokenizer_class") not in _BYTES_ALONE:
        raise ModelError(
            f"model folder {folder} holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json, …); "
            "copy its files from where the weights come from"
        )
    if whole.is_file() and not whole.stat().st_size:
        raise ModelError(f"{whole} is empty; copy it from where the weights come from")


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / WEIGHT_INDEX
    if not path.is_file():
        return {}
    found = _read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ModelError(f"{path} has no weight_map of tensors and files; copy it from where the weights come from")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no JSON in UTF-8: {error}; copy it from where the weights come from") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; copy it from where the weights come from")
    return content
