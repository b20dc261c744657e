"""`quantsweep prewarm` against a hub on loopback, then the same machine with the hub switched off."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import quantsweep
from quantsweep.mini import model_path
from quantsweep.trial.identity import local_content
from tests.conftest import ROOT
from tests.hub import Hub

SECRET = "_".join(("hf", "this", "is", "nobodys", "token"))  # not in one piece: changes of this file end up in code/*.diff
MINI = {file.name: file.read_bytes() for file in model_path("mini-neox-0.3m").iterdir()}
OTHER = {**MINI, "model.safetensors": MINI["model.safetensors"][:-4] + b"\0\0\0\0"}
COMPANIONS = {name: content for name, content in MINI.items() if name != "model.safetensors"}

PLAN = """
import json, sys
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.composing.composition import compose_base, search_folders
from quantsweep.composing.prepare import prepare
from quantsweep.checkpoints.pins import offline_environment
overrides = expand_shorthand(sys.argv[1:])
cfg = compose_base(overrides)
plan = prepare(cfg, search_folders(cfg.hydra), overrides).plan
models = [planned.trial.model for planned in plan.trials]
tasks = [task for planned in plan.trials for task in planned.tasks]
print(json.dumps({"ids": [p.trial.trial_id for p in plan.trials], "revisions": [m.revision for m in models],
    "content": [m.content for m in models], "unpinned": plan.unpinned, "data": dict(plan.settings.data_revisions),
    "offline": offline_environment(models, tasks, cfg.results_dir)}))
"""
LOAD = """
import json, sys
from quantsweep.models.loading import load_model
from quantsweep.trial.specs import ModelSpec
loaded = load_model(ModelSpec(name="m", family="f", hub_id=sys.argv[1], revision=sys.argv[2], dtype="float32"), "cpu")
layer = next(iter(loaded.layers.values()))
print(json.dumps([float(layer.read().double().sum()), loaded.num_parameters, len(loaded.tokenizer)]))
"""
READ_TEXT = """
import json, sys
from quantsweep.texts.documents import read_documents
from quantsweep.trial.specs import TextSource
print(json.dumps(read_documents(TextSource(hub_id=sys.argv[1], files=sys.argv[2], revision=sys.argv[3])).to_pylist()))
"""
LOAD_TASK = """
import sys
from pathlib import Path
from quantsweep.tasks.definition import data_revision, load_task
from quantsweep.trial.specs import TaskSpec
task = load_task(TaskSpec(name="mini_ppl", lm_eval_task="mini_ppl", folder="mini", version="1.0", primary_metric="bits_per_byte",
    higher_is_better=False), Path(sys.argv[1]))
print(len(task.eval_docs), data_revision(task))
"""


@dataclass
class Machine:
    """A login node with a home, caches and results of its own, and one hub to talk to."""

    root: Path
    hub: Hub

    def python(self, *arguments: str, expect: int | None = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        own = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.root / "hf"),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "HF_TOKEN": SECRET,
        }
        done = subprocess.run(
            [sys.executable, *arguments], env={**kept, **own, **variables}, cwd=self.root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert expect is None or done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert SECRET not in done.stdout + done.stderr
        return done

    def prewarm(self, *arguments: str, expect: int = 0, **variables: str) -> str:
        words = ["prewarm", *arguments, f"results_dir={self.root / 'results'}"]
        return self.python("-m", "quantsweep.cli.main", *words, expect=expect, **variables).stdout

    def plan(self, *arguments: str) -> dict[str, Any]:
        done = self.python("-c", PLAN, *arguments, f"results_dir={self.root / 'results'}", "bit_width=4", **OFFLINE)
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def load(self, hub_id: str, revision: str) -> list[float]:
        """Load a model with the hub switched off."""
        before = len(self.hub.asked)
        done = self.python("-c", LOAD, hub_id, revision, **OFFLINE)
        assert self.hub.asked[before:] == []
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    @property
    def pins(self) -> dict[str, Any]:
        return json.loads((self.root / "results" / "pins.json").read_text())  # type: ignore[no-any-return]


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with Hub() as hub:
        yield Machine(tmp_path, hub)
    # Whatever was written, no token is in it.
    assert [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []


def pickled() -> bytes:
    """The weights of the bundled model as the pickle that torch.save makes of them, the tied output head included."""
    tensors = load_file(model_path("mini-neox-0.3m") / "model.safetensors")
    file = io.BytesIO()
    torch.save({**tensors, "lm_head.weight": tensors["gpt_neox.embed_in.weight"]}, file)
    return file.getvalue()


def test_a_model_is_fetched_and_pinned_and_a_branch_that_moves_later_changes_nothing(machine: Machine) -> None:
    extras = {"pytorch_model.bin": b"never read", "modeling_evil.py": b"raise SystemExit", "onnx/model.safetensors": b"another form"}
    first = machine.hub.commit("lab/mini", {**MINI, **extras})
    assert machine.plan("model=lab/mini")["unpinned"] == ["mini"]
    assert f"lab/mini@{first[:12]}" in machine.prewarm("model=lab/mini")
    planned = machine.plan("model=lab/mini")
    assert (planned["revisions"], planned["content"], planned["unpinned"]) == ([first], [f"hub:lab/mini@{first}"], [])
    assert planned["offline"] == OFFLINE
    fetched = {path.name for path in (machine.root / "hf").rglob(f"snapshots/{first}/*")}
    assert fetched == set(MINI)
    assert {name: fact["size"] for name, fact in machine.pins["models"]["lab/mini"]["files"].items()} == {
        k: len(v) for k, v in MINI.items()
    }
    assert machine.load("lab/mini", first)[2] == len(json.loads(MINI["tokenizer.json"])["model"]["vocab"])

    second = machine.hub.commit("lab/mini", OTHER)
    asked = len(machine.hub.asked)
    assert "here already" in machine.prewarm("model=lab/mini")
    assert machine.hub.asked[asked:] == []
    assert machine.plan("model=lab/mini")["ids"] == planned["ids"]

    assert f"it was at {first[:12]}" in machine.prewarm("model=lab/mini", "--update")
    moved = machine.plan("model=lab/mini")
    assert moved["revisions"] == [second]
    assert set(moved["ids"]).isdisjoint(planned["ids"])


def test_a_commit_that_was_typed_is_what_is_fetched(machine: Machine) -> None:
    first = machine.hub.commit("lab/mini", MINI)
    machine.hub.commit("lab/mini", OTHER)
    machine.prewarm("model=lab/mini", f"model.revision={first}")
    assert list(machine.pins["models"]) == [f"lab/mini@{first}"]
    assert machine.plan("model=lab/mini", f"model.revision={first}")["offline"] == OFFLINE
    # The name alone is not pinned by that.
    assert machine.plan("model=lab/mini")["unpinned"] == ["mini"]
    assert machine.plan("model=lab/mini")["offline"] == {}


def test_an_interrupted_or_damaged_cache_is_mended_at_the_pinned_commit(machine: Machine) -> None:
    first = machine.hub.commit("lab/mini", MINI)
    machine.prewarm("model=lab/mini")
    machine.hub.commit("lab/mini", OTHER)
    (weights,) = (machine.root / "hf").rglob(f"snapshots/{first}/model.safetensors")
    weights.unlink()
    assert machine.plan("model=lab/mini")["offline"] == {}
    assert f"fetched: lab/mini@{first[:12]}" in machine.prewarm("model=lab/mini")
    assert machine.plan("model=lab/mini")["offline"] == OFFLINE


def test_a_text_is_fetched_at_one_commit_and_read_without_the_hub(machine: Machine) -> None:
    """The files that its pattern names, and no others of the data set; a branch that moves later changes nothing."""
    place, pattern = "Salesforce/wikitext", "wikitext-2-raw-v1/test-*.parquet"
    first = machine.hub.commit(place, {f"wikitext-2-raw-v1/{part}-0.parquet": parquet(part) for part in ("test", "train")}, kind="datasets")
    assert machine.plan("task=wikitext2")["unpinned"] == ["task wikitext2"]
    assert f"{place}@{first[:12]}: wikitext-2-raw-v1/test-0.parquet" in machine.prewarm("task=wikitext2")
    planned = machine.plan("task=wikitext2")
    assert (planned["unpinned"], planned["offline"]) == ([], OFFLINE)
    assert machine.pins["texts"][f"{place}/{pattern}"]["revision"] == first
    assert list(machine.pins["texts"][f"{place}/{pattern}"]["files"]) == ["wikitext-2-raw-v1/test-0.parquet"]

    machine.hub.commit(place, {"wikitext-2-raw-v1/test-0.parquet": parquet("moved")}, kind="datasets")
    asked = len(machine.hub.asked)
    assert "here already" in machine.prewarm("task=wikitext2")
    read = machine.python("-c", READ_TEXT, place, pattern, first, **OFFLINE).stdout
    assert (json.loads(read), machine.hub.asked[asked:]) == (["test", "text"], [])


def parquet(word: str) -> bytes:
    """Two documents."""
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [word, "text"]}), file)
    return file.getvalue()


def test_pickled_weights_are_converted_once_and_load_with_the_same_bits(machine: Machine) -> None:
    safe = machine.hub.commit("lab/safe", MINI)
    commit = machine.hub.commit("lab/pickled", {**COMPANIONS, "pytorch_model.bin": pickled()})
    said = machine.prewarm("model=lab/pickled,lab/safe")
    assert "converted to safetensors" in said
    pin = machine.pins["models"]["lab/pickled"]
    assert pin["converted"]
    assert all(len(fact["sha256"]) == 64 for fact in pin["files"].values())
    assert machine.load("lab/pickled", commit) == machine.load("lab/safe", safe)
    folder = machine.root / "cache" / "quantsweep" / "converted" / "lab--pickled" / commit
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert (folder / ".content").read_text() == local_content(folder), "loading holds the folder against it"
    assert machine.plan("model=lab/pickled")["offline"] == OFFLINE
    asked = len(machine.hub.asked)
    machine.prewarm("model=lab/pickled")
    assert machine.hub.asked[asked:] == []


def test_pickled_weights_in_parts(machine: Machine) -> None:
    tensors = load_file(model_path("mini-neox-0.3m") / "model.safetensors")
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    files = dict(COMPANIONS)
    for part, keys in parts.items():
        file = io.BytesIO()
        torch.save({key: tensors[key] for key in keys}, file)
        files[part] = file.getvalue()
    weight_map = {key: part for part, keys in parts.items() for key in keys}
    files["pytorch_model.bin.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    commit = machine.hub.commit("lab/parts", files)
    machine.prewarm("model=lab/parts")
    folder = machine.root / "cache" / "quantsweep" / "converted" / "lab--parts" / commit
    written = {key: value for file in folder.glob("model-*.safetensors") for key, value in load_file(file).items()}
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        key: part.replace("pytorch_model", "model").replace(".bin", ".safetensors") for key, part in weight_map.items()
    }


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def test_a_pickle_that_is_a_program_is_not_run(machine: Machine) -> None:
    machine.hub.commit("lab/bad", {**COMPANIONS, "pytorch_model.bin": pickle.dumps({"w": Evil()})})
    assert "converting them failed: pytorch_model.bin is not a plain file of weights" in machine.prewarm("model=lab/bad", expect=1)
    assert not list(machine.root.rglob("pwned"))
    assert not (machine.root / "results" / "pins.json").exists()


def test_what_cannot_be_had_is_named_with_its_remedy_and_the_rest_goes_on(machine: Machine) -> None:
    machine.hub.commit("lab/good", MINI)
    machine.hub.commit("lab/gated", MINI, gated=True)
    machine.hub.commit("lab/empty", {"README.md": b"soon"})
    machine.hub.commit("lab/flax", {**COMPANIONS, "flax_model.msgpack": b"x"})
    said = machine.prewarm("model=lab/gated,lab/absent,lab/empty,lab/flax,lab/good,opt-175b", expect=1)
    lines = {line.split()[1]: line for line in said.splitlines() if line.startswith("model")}
    assert "is gated: accept its terms" in lines["gated"]
    assert "hf auth login" in lines["gated"]
    assert "does not exist on the hub, or is private" in lines["absent"]
    assert "has no config.json" in lines["empty"]
    assert "holds neither model.safetensors nor pytorch_model.bin" in lines["flax"]
    assert "cannot be had: the weights are given out by Meta on request only" in lines["opt-175b"]
    assert "fetched" in lines["good"]
    assert list(machine.pins["models"]) == ["lab/good"]
    # The token went to the hub, and nowhere else.
    assert f"Bearer {SECRET}" in machine.hub.tokens


def test_a_study_that_needs_no_hub_asks_none_and_skips_are_no_failure(machine: Machine) -> None:
    machine.prewarm("+sweeps=quickstart")
    machine.prewarm("model=opt-175b,mini-neox-0.3m")
    assert machine.hub.asked == []
    assert not (machine.root / "results").exists()
    assert machine.plan("model=mini-neox-0.3m")["offline"] == OFFLINE


def test_no_network_and_a_hub_that_is_switched_off(machine: Machine) -> None:
    machine.hub.commit("lab/mini", MINI)
    assert "HF_HUB_OFFLINE switches the hub off" in machine.prewarm("model=lab/mini", expect=1, HF_HUB_OFFLINE="1")
    said = machine.prewarm("model=lab/mini", expect=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be fetched" in said
    assert "Is there a network here?" in said


def test_data_of_a_task_are_fetched_and_load_without_the_hub(machine: Machine) -> None:
    lines = "".join(json.dumps({"text": f"The cat number {n} sat on the mat."}) + "\n" for n in range(5))
    commit = machine.hub.commit("lab/words", {"test.jsonl": lines.encode()}, kind="datasets")
    own = machine.root / "tasks"
    own.mkdir()
    builtin = (model_path("mini-neox-0.3m").parents[1] / "tasks" / "mini_ppl.yaml").read_text()
    text = builtin.replace('dataset_path: ""', "dataset_path: lab/words").replace("custom_dataset: !function mini_data.ppl\n", "")
    (own / "mini_ppl.yaml").write_text(text)
    words = ["model=mini-neox-0.3m", "task=mini_ppl", f"task_path={own}"]
    assert (machine.plan(*words)["offline"], machine.plan(*words)["data"]) == ({}, {})
    assert "fetched: lab/words" in machine.prewarm(*words)
    pin = machine.pins["tasks"]["mini_ppl"]
    assert (pin["dataset"], pin["revision"]) == ("lab/words", f"hub:{commit}")
    assert (machine.plan(*words)["offline"], machine.plan(*words)["data"]) == (OFFLINE, {"mini_ppl": f"hub:{commit}"})
    asked = len(machine.hub.asked)
    done = machine.python("-c", LOAD_TASK, str(own), **OFFLINE)
    assert done.stdout.split() == ["5", f"hub:{commit}"]
    assert "here already" in machine.prewarm(*words)
    assert machine.hub.asked[asked:] == []

    # The data move on the hub and the cache is lost: that is said, and nothing is changed unasked.
    machine.hub.commit("lab/words", {"test.jsonl": lines.replace("cat", "dog").encode()}, kind="datasets")
    for place in pin["cached"]:
        (machine.root / "hf" / "datasets" / place).rename(machine.root / "lost")
    launch = (str(ROOT / "launch.py"), *words, "bit_width=4", f"results_dir={machine.root / 'results'}")
    refused = machine.python(*launch, expect=3).stdout
    assert f"and were pinned as hub:{commit} before the launch" in refused
    assert "prewarm … --update" in refused
    assert "accept the new ones with --update" in machine.prewarm(*words, expect=1)
    assert machine.pins["tasks"]["mini_ppl"] == pin
    machine.prewarm(*words, "--update")
    moved = machine.pins["tasks"]["mini_ppl"]["revision"]
    assert moved != pin["revision"]
    machine.python(*launch)
    assert list(quantsweep.load_results(machine.root / "results" / "adhoc").data_revision.unique()) == [moved]
