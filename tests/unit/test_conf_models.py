"""Every file in `conf/model/` is a valid model, and every checkpoint of the studies has a file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantsweep.trial.specs import ModelSpec, Resources

ROOT = Path(__file__).parents[2]
TEMPLATES = ("local", "hub")  # any folder, any model of the hub: filled in on the command line
FILES = [path for path in sorted((ROOT / "conf" / "model").glob("*.yaml")) if path.stem not in TEMPLATES]
KEYS = ["name", "family", "hub_id", "path", "revision", "gguf_file", "dtype", "parameters", "unquantized", "unavailable", "resources"]
BUNDLED = "package:quantsweep/"

K_BIT = [
    "opt-125m",
    "opt-350m",
    "opt-1.3b",
    "opt-2.7b",
    "opt-6.7b",
    "opt-13b",
    "opt-30b",
    "opt-66b",
    "opt-175b",
    "bloom-560m",
    "bloom-1b1",
    "bloom-1b7",
    "bloom-3b",
    "bloom-7b1",
    "bloom-176b",
    "bloomz-560m",
    "bloomz-1b1",
    "bloomz-1b7",
    "bloomz-3b",
    "bloomz-7b1",
    "bloomz-176b",
    "pythia-70m",
    "pythia-160m",
    "pythia-410m",
    "pythia-1b",
    "pythia-1.4b",
    "pythia-2.8b",
    "pythia-6.9b",
    "pythia-12b",
    "gpt-neox-20b",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
]
SMOOTHQUANT = [
    "glm-130b",
    "mt-nlg-530b",
    "llama-7b",
    "llama-13b",
    "llama-30b",
    "llama-65b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "falcon-7b",
    "falcon-40b",
    "mistral-7b",
    "mixtral-8x7b",
]
LPCD = ["llama-2-7b", "llama-2-13b", "llama-3-8b", "qwen3-4b", "qwen3-8b", "qwen3-14b"]
MINI = ["mini-neox-0.3m", "mini-neox-0.9m", "mini-neox-2.2m", "mini-neox-6.0m", "mini-opt-0.4m", "mini-opt-1.1m", "mini-opt-3.8m"]
WITHOUT_PUBLIC_WEIGHTS = {"opt-175b", "glm-130b", "mt-nlg-530b"}


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def spec(path: Path) -> ModelSpec:
    values = read(path)
    return ModelSpec(**values | {"unquantized": tuple(values["unquantized"]), "resources": Resources(**values["resources"])})


SPECS = [spec(path) for path in FILES]
SIZES = [(model, size) for model in SPECS if model.hub_id and (size := re.search(r"-(\d+)(?:\.(\d+))?([mb])(\d*)$", model.name))]


def header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, types and shapes of the tensors in a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        tensors: dict[str, dict[str, Any]] = json.loads(file.read(size))
    tensors.pop("__metadata__", None)
    return tensors


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_form(path: Path) -> None:
    values = read(path)
    assert list(values) == KEYS
    assert values["name"] == path.stem
    assert list(values["resources"]) == ["gpus", "cpus", "memory_gb", "minutes"]
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what it is"


@pytest.mark.parametrize("model", SPECS, ids=lambda model: model.name)
def test_source(model: ModelSpec) -> None:
    assert model.revision is None or re.fullmatch(r"[0-9a-f]{40}", model.revision)
    if model.unavailable is not None:
        assert len(model.unavailable) > 20, "the reason, in words"
        assert model.hub_id is None
    if model.hub_id is not None:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub_id)
        assert model.gguf_file is None


def test_no_checkpoint_twice() -> None:
    sources = [(model.hub_id, model.path, model.gguf_file) for model in SPECS if model.unavailable is None]
    assert len(set(sources)) == len(sources)


def test_all_checkpoints_of_the_studies() -> None:
    names = {model.name for model in SPECS}
    assert set(K_BIT + SMOOTHQUANT + LPCD + MINI) <= names
    assert {model.name for model in SPECS if model.unavailable is not None} == WITHOUT_PUBLIC_WEIGHTS


@pytest.mark.parametrize("model", SPECS, ids=lambda model: model.name)
def test_resources(model: ModelSpec) -> None:
    assert model.parameters is not None
    gigabytes = model.parameters * 2 / 1e9
    if model.path is not None:
        assert model.resources.gpus == 0
        assert model.resources.memory_gb > 4 * gigabytes, "float32 weights, twice"
        return
    assert model.resources.gpus in {1, 2, 4, 8, 16}
    assert model.resources.gpus * 75 > 1.1 * gigabytes, "16-bit weights and activations fit into cards of 80 GB"
    assert model.resources.gpus == 1 or model.resources.gpus / 2 * 75 < 1.2 * gigabytes, "half the GPUs would not do"
    assert model.resources.cpus == 4 * model.resources.gpus
    assert 1.15 * gigabytes + 14 < model.resources.memory_gb < 1.8 * gigabytes + 24


@pytest.mark.parametrize(("model", "size"), SIZES, ids=lambda value: getattr(value, "name", ""))
def test_parameters_agree_with_the_name(model: ModelSpec, size: re.Match[str]) -> None:
    """`opt-1.3b` has about 1.3 billion parameters; `bloom-1b7` about 1.7 billion."""
    whole, fraction, unit, digits = size.groups()
    nominal = float(f"{whole}.{fraction or digits or 0}") * {"m": 1e6, "b": 1e9}[unit]
    assert model.parameters == pytest.approx(nominal, rel=0.09)


@pytest.mark.parametrize("name", MINI)
def test_bundled_models(name: str) -> None:
    model = spec(ROOT / "conf" / "model" / f"{name}.yaml")
    assert model.path == f"{BUNDLED}mini/models/{name}"
    assert (model.dtype, model.family) == ("float32", name.rsplit("-", 1)[0])
    tensors = header(ROOT / "quantsweep" / model.path.removeprefix(BUNDLED) / "model.safetensors")
    assert model.parameters == sum(math.prod(tensor["shape"]) for tensor in tensors.values())


def test_every_bundled_folder_has_a_file() -> None:
    folders = {path.parent.name for path in (ROOT / "quantsweep" / "mini" / "models").glob("*/config.json")}
    assert folders == set(MINI)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_name_models_that_exist(path: Path) -> None:
    names = {model.name for model in SPECS}
    for grid in read(path)["study"]["grids"]:
        asked = grid["axes"].get("model", [])
        if isinstance(asked, str) and (pattern := re.fullmatch(r"glob\((.+)\)", asked)):
            assert list((ROOT / "conf" / "model").glob(f"{pattern[1]}.yaml"))
        else:
            assert set([asked] if isinstance(asked, str) else asked) <= names


def test_k_bit_inference_asks_for_every_model_of_the_paper() -> None:
    for grid in read(ROOT / "sweeps" / "k_bit_inference.yaml")["study"]["grids"]:
        assert grid["axes"]["model"] == K_BIT
