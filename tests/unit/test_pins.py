"""Prewarm's parts that need no hub: conversion and what it refuses, the pins file, what may be shown.

The whole of it, against a hub on loopback, is in tests/integration/test_prewarm.py.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantsweep.checkpoints.pins import FileFact, ModelPin, Pins, TaskPin, add_pins, offline_environment, pins_path, read_pins
from quantsweep.errors import ModelError, ResultsError
from quantsweep.mini import model_path
from quantsweep.operations.prewarm import without_addresses
from quantsweep.operations.prewarm_child import convert
from quantsweep.trial.specs import ModelSpec, TaskSpec

MINI = model_path("mini-neox-0.3m")
COMMIT, OTHER = "a" * 40, "b" * 40
PIN = ModelPin(revision=COMMIT, files={"config.json": FileFact(size=3, blob="c" * 40)}, resolved_at="2026-01-01T00:00:00Z")
TASK = TaskSpec(name="t", lm_eval_task="t", folder="t", version="1.0", primary_metric="acc", higher_is_better=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder as old checkpoints are: config, tokenizer, and a pickle with the tied output head in it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MINI / name, folder)
    return folder


def pickle_weights(folder: Path, **changes: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = load_file(MINI / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["gpt_neox.embed_in.weight"]} | changes
    torch.save(tensors, folder / "pytorch_model.bin")
    return tensors


class TestConversion:
    def test_every_bit_is_kept_and_the_tied_head_is_left_out(self, checkpoint: Path, tmp_path: Path) -> None:
        odd = torch.tensor([float("nan"), -0.0, float("inf")])
        original = pickle_weights(checkpoint, extra=odd)
        convert(checkpoint, tmp_path / "new" / COMMIT, ["config.json", "tokenizer.json"])
        written = load_file(tmp_path / "new" / COMMIT / "model.safetensors")
        assert set(written) == set(original) - {"lm_head.weight"}
        assert all(torch.equal(written[key].view(torch.uint8), original[key].view(torch.uint8)) for key in written)
        assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == [
            ".content", COMMIT, "config.json", "model.safetensors", "tokenizer.json",
        ]  # fmt: skip

    def test_weights_that_share_memory_and_are_not_tied_are_both_kept(self, checkpoint: Path, tmp_path: Path) -> None:
        shared = torch.arange(6.0).reshape(2, 3)
        pickle_weights(checkpoint, one=shared, two=shared.T)
        convert(checkpoint, tmp_path / "new", ["config.json"])
        written = load_file(tmp_path / "new" / "model.safetensors")
        assert torch.equal(written["one"], shared)
        assert torch.equal(written["two"], shared.T)

    def test_a_head_that_stands_alone_is_kept(self, checkpoint: Path, tmp_path: Path) -> None:
        tensors = pickle_weights(checkpoint)
        torch.save({"lm_head.weight": tensors["lm_head.weight"]}, checkpoint / "pytorch_model.bin")
        convert(checkpoint, tmp_path / "new", ["config.json"])
        assert list(load_file(tmp_path / "new" / "model.safetensors")) == ["lm_head.weight"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param(
                {"lm_head.weight": torch.zeros(2, 2)}, "ties lm_head.weight to embed_in.weight, and the checkpoint has different", id="tied"
            ),
            pytest.param({"epoch": 3}, "holds something that is no tensor", id="no-tensor"),
        ],
    )
    def test_refusals_leave_nothing_behind(self, checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        pickle_weights(checkpoint, **changes)
        with pytest.raises(ModelError, match=message):
            convert(checkpoint, tmp_path / "new" / COMMIT, [])
        assert list((tmp_path / "new").iterdir()) == []

    @pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps({"w": Path("x")}, protocol=2)], ids=["empty", "cut", "an-object"])
    def test_what_is_no_plain_file_of_weights(self, checkpoint: Path, tmp_path: Path, content: bytes) -> None:
        (checkpoint / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ModelError, match=r"pytorch_model\.bin is not a plain file of weights"):
            convert(checkpoint, tmp_path / "new", ["config.json"])


class TestPins:
    def test_they_come_back_as_they_were_and_others_stay(self, tmp_path: Path) -> None:
        task = TaskPin(dataset="lab/words", config=None, revision=None, resolved_at="2026-01-01T00:00:00Z", cached=("lab___words/x",))
        add_pins(tmp_path / "new", models={"lab/one": PIN})
        add_pins(tmp_path / "new", models={"lab/two": replace(PIN, revision=OTHER)}, tasks={"t": task})
        pins = read_pins(tmp_path / "new")
        assert (pins.models["lab/one"], pins.revision("lab/two"), pins.tasks) == (PIN, OTHER, {"t": task})
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["pins.json"]
        text = pins_path(tmp_path / "new").read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"

    def test_no_file_is_no_pins(self, tmp_path: Path) -> None:
        assert read_pins(tmp_path) == Pins()

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda c: c["models"]["lab/one"].update(revision="main"), id="a-branch"),
            pytest.param(lambda c: c["models"]["lab/one"].update(note="x"), id="unknown-key"),
            pytest.param(lambda c: c["models"]["lab/one"]["files"].update({"../x": {"size": 1}}), id="leaves-its-folder"),
            pytest.param(lambda c: c.pop("tasks"), id="half"),
            pytest.param(lambda c: c.update(format=2), id="newer"),
        ],
    )
    def test_a_file_that_is_not_understood_is_refused(self, tmp_path: Path, change: Any) -> None:
        add_pins(tmp_path, models={"lab/one": PIN})
        content = json.loads(pins_path(tmp_path).read_text())
        change(content)
        pins_path(tmp_path).write_text(json.dumps(content))
        with pytest.raises(ResultsError, match=r"pins\.json"):
            read_pins(tmp_path)

    def test_a_model_at_another_commit_than_the_pinned_one_is_not_known(self) -> None:
        pins = Pins(models={"lab/one": PIN, f"lab/one@{OTHER}": replace(PIN, revision=OTHER)})
        spec = ModelSpec(name="one", family="f", hub_id="lab/one")
        assert pins.of_model(spec) is PIN
        found = pins.of_model(replace(spec, revision=OTHER))
        assert found is not None
        assert found.revision == OTHER
        assert pins.of_model(replace(spec, revision="c" * 40)) is None

    def test_workers_go_offline_only_if_everything_is_known(self, tmp_path: Path) -> None:
        local = ModelSpec(name="m", family="f", path="/somewhere")
        bundled = replace(TASK, folder="mini")
        assert offline_environment([local], [bundled], tmp_path)["HF_HUB_OFFLINE"] == "1"
        assert offline_environment([ModelSpec(name="m", family="f", hub_id="lab/one", revision=COMMIT)], [bundled], tmp_path) == {}
        assert offline_environment([local], [TASK], tmp_path) == {}
        assert offline_environment([local], [replace(bundled, own_content="12345678")], tmp_path) == {}
        add_pins(tmp_path, tasks={"t": TaskPin(dataset="", config=None, revision=None, resolved_at="", own_content="12345678")})
        assert offline_environment([local], [replace(bundled, own_content="12345678")], tmp_path) != {}
        assert offline_environment([local], [replace(bundled, own_content="87654321")], tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("403 for 'https://cdn.x/y?Signature=s&Key=k' now", "403 for 'https://cdn.x/y?…' now"),
        ("nothing to hide?", "nothing to hide?"),
    ],
)
def test_no_signature_of_an_address_is_shown(text: str, shown: str) -> None:
    assert without_addresses(text) == shown
