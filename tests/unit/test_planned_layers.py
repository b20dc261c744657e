"""What a plan says of the layers that it would quantize, and of architectures that nobody has looked at."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from quantsweep.checkpoints import headers, planned_layers
from quantsweep.checkpoints.pins import Pins
from quantsweep.cli import main
from quantsweep.composing import prepare
from quantsweep.errors import ConfigurationError
from quantsweep.models.anatomy import _DESCRIPTIONS
from quantsweep.models.loading import _max_length, load_model
from quantsweep.planning.schema import build_model
from quantsweep.trial.specs import ClusterSpec, ModelSpec, RunSettings
from tests import model_cases as cases


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_known_are_the_architectures_that_are_described() -> None:
    assert set(headers.KNOWN_ARCHITECTURES) == set(_DESCRIPTIONS)


def test_the_list_is_what_loading_finds_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unseen, seen = cases.vision_tower(tmp_path / "v"), cases.MINI
    models = [
        ModelSpec(name="v", family="f", path=str(unseen), dtype="float32"),
        ModelSpec(name="s", family="f", path=str(seen), dtype="float32", unquantized=("*.attention.*",)),
        ModelSpec(name="h", family="f", hub_id="lab/not-here"),
        ModelSpec(name="m", family="f", path=str(cases.copy_of_mini(tmp_path / "m")), dtype="float32"),
    ]
    cases.edit_json(tmp_path / "m" / "config.json", num_hidden_layers=0)
    places = planned_layers.folders(models, Pins())
    assert [model.name for model in places] == ["v", "s", "m"]
    lines = planned_layers.listed(places)
    assert lines["s"] == "gpt_neox.layers.*: mlp.dense_h_to_4h, mlp.dense_4h_to_h × 4"
    assert lines["m"].startswith("none: GPTNeoXForCausalLM has no list of decoder blocks")
    prefix, _, rest = lines["v"].removesuffix(" × 4").partition(": ")
    assert {f"{prefix.replace('*', '0')}.{name}" for name in rest.split(", ")} == {
        name for name in load_model(models[0], "cpu").layers if ".layers.0." in name
    }
    monkeypatch.setattr(planned_layers.subprocess, "run", lambda *_, **__: pytest.fail("asked again"))
    assert planned_layers.listed(places) == lines
    (said,) = planned_layers.unseen(places)
    assert said.startswith("gemma3 (v): nobody has looked at which layers")


def test_plan_says_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cases.routers_apart(tmp_path / "hun")
    words = [f"model={folder}", "bit_width=3", f"results_dir={tmp_path}", "model.dtype=float32"]
    assert main.main(["plan", *words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "mlp.shared_mlp.gate_proj" in facts["layers"]["hun"]
    assert "wg" not in facts["layers"]["hun"]
    assert facts["unseen"][0].startswith("hunyuan_v1_moe (hun): ")
    assert main.main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "  quantized   hun: model.layers.*: " in said
    assert "  unseen      hunyuan_v1_moe (hun): nobody has looked at" in said


@pytest.mark.parametrize("step", ["smooth", "awq_scale"])
def test_steps_that_must_know_the_blocks_are_refused_for_models_that_nobody_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    words = [f"model={cases.routers_apart(tmp_path / 'hun')}", "bit_width=3", "calibration=mini", "calibration.sequence_length=16"]
    words += [f"results_dir={tmp_path}", "model.dtype=float32"]
    assert main.main(["plan", *words, "rounding=gptq", "block_axis=input"]) == 0
    assert main.main(["plan", *words, f"transform={step}"]) != 0
    said = capsys.readouterr().err
    assert (
        f"transform {step} must know what reads what in a decoder block, and those of hunyuan_v1_moe models (hun) are not described" in said
    )


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(n_positions=48),
        transformers.LlamaConfig(max_position_embeddings=96),
        transformers.BloomConfig(),
        transformers.Gemma3Config(text_config={"max_position_embeddings": 80}),
    ],
)
def test_the_context_of_a_folder_is_the_one_that_loading_finds(tmp_path: Path, config: transformers.PretrainedConfig) -> None:
    """Where its file does not say it, loading asks the tokenizer."""
    config.save_pretrained(tmp_path)
    found = headers.max_length(headers.read_config(tmp_path))
    assert (found or 77) == _max_length(config, SimpleNamespace(model_max_length=77))  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_said_at_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "num_gpus", lambda: 0)
    monkeypatch.setattr(prepare, "_GPU_DEVICES", ())
    with pytest.raises(ConfigurationError, match="this machine has no GPU; use device=auto"):
        prepare._refuse_missing_gpu(RunSettings(device="cuda"), ClusterSpec(kind="local"))
    prepare._refuse_missing_gpu(RunSettings(device="cuda"), ClusterSpec(kind="slurm"))
    prepare._refuse_missing_gpu(RunSettings(device="auto"), ClusterSpec(kind="local"))


def test_a_broken_folder_is_refused_before_anything_is_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cases.copy_of_mini(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main.main(["plan", f"model={folder}", f"results_dir={tmp_path}"]) != 0
    assert "has 667,735 bytes where its header promises 667,736" in capsys.readouterr().err


def test_the_size_of_a_folder_is_what_its_headers_say(tmp_path: Path) -> None:
    """A folder's yaml says no size; a billion parameters were assumed, and hours predicted for seconds."""
    folder = cases.copy_of_mini(tmp_path / "mine")
    model = build_model({"path": str(folder), "family": "own", "dtype": "float32"})
    assert model.parameters == sum(weight.numel() for weight in load_model(model, "cpu").model.parameters())
    assert build_model({"path": str(folder), "family": "own", "parameters": 5}).parameters == 5
    assert model.identity() == dataclasses.replace(model, parameters=None).identity()
