"""The process that runs trials: what is wrong with one task costs that task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluation_cases import ROLLING, spec_of
from torch import Tensor
from transformers import AutoTokenizer

from quantsweep.calibration.data import load_tokens
from quantsweep.errors import EvaluationError
from quantsweep.mini import TASKS_DIR, model_path
from quantsweep.pipeline.interface import InputNeeds, Layer, LayerContext, Stored
from quantsweep.running.child import TrialRunner
from quantsweep.tables.records import COLUMNS
from quantsweep.trial import registry
from quantsweep.trial.identity import local_content
from quantsweep.trial.specs import CalibrationSpec, ModelSpec, PlannedTrial, QuantizationSpec, RunSettings, StepSpec, TaskSpec, TrialSpec
from quantsweep.trial.task_identity import read_own_tasks


def planned(*tasks: TaskSpec) -> PlannedTrial:
    path = model_path("mini-neox-0.3m")
    model = ModelSpec(name="m", family="f", path=str(path), dtype="float32", content=local_content(path))
    return PlannedTrial(trial=TrialSpec(model=model, quantization=QuantizationSpec(rounding=StepSpec("none", 1))), tasks=tasks)


def write(folder: Path, name: str, **changes: Any) -> None:
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": f"A sentence number {n}."}) + "\n" for n in range(3)))
    config = {
        **ROLLING,
        "task": name,
        "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config).replace("RESULTS", "!function code.results"))


def specs(folder: Path, *names: str) -> list[TaskSpec]:
    """The folder's tasks as they are planned now."""
    contents = read_own_tasks(folder).contents(names)
    return [spec_of("mini_ppl", name=name, lm_eval_task=name, own_content=contents[name]) for name in names]


def run(folder: Path, *tasks: TaskSpec) -> tuple[list[str], Exception | None]:
    """The tasks that got a result, and what the trial ended with."""
    events: list[Mapping[str, Any]] = []
    error: Exception | None = None
    try:
        TrialRunner(events.append).run(planned(*tasks), RunSettings(device="cpu", task_path=str(folder)))
    except Exception as raised:
        error = raised
    return [event["task_key"] for event in events if event["event"] == "task"], error


def test_tasks_that_fail_leave_the_others_their_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "good")
    write(tmp_path, "gone", dataset_kwargs={"data_files": {"test": "gone.jsonl"}})
    write(tmp_path, "column", doc_to_target="{{txt}}")
    good, gone, column = specs(tmp_path, "good", "gone", "column")
    cloze = spec_of("mini_cloze", limit=2)
    done, error = run(tmp_path, gone, good, column, cloze)
    assert done == [good.task_key, cloze.task_key]
    assert isinstance(error, EvaluationError)
    assert "task gone (" in str(error)
    assert "task column (" in str(error)
    assert "task gone: its documents cannot be loaded here" in caplog.text


def test_a_bug_of_a_tasks_python_costs_that_task_and_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def results(doc, results):\n    raise ZeroDivisionError('mine')\n")
    write(tmp_path, "buggy", process_results="RESULTS")
    write(tmp_path, "good")
    buggy, good = specs(tmp_path, "buggy", "good")
    done, error = run(tmp_path, buggy, good)
    assert done == [good.task_key]
    assert isinstance(error, ZeroDivisionError)


def test_documents_that_changed_since_planning_are_no_row(tmp_path: Path) -> None:
    write(tmp_path, "good")
    (good,) = specs(tmp_path, "good")
    same = spec_of("mini_cloze", limit=2)
    (tmp_path / "docs.jsonl").write_text('{"text": "Another text altogether."}\n')
    done, error = run(tmp_path, good, same)
    assert done == [same.task_key]
    assert "its YAML, Python or documents are not those that were planned" in str(error)


class Asking:
    """A rounding that looks at text, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[LayerContext] = []

    def check(self, spec: QuantizationSpec) -> None:
        """Anything goes."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds:
        """Some inputs."""
        return InputNeeds(sample_tokens=4)

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """Bytes of zeros beside the signs of the weight."""
        self.given.append(context)
        return Stored(extras={"signs": weight_OI.sign().to(torch.int8)}, fallbacks=("tried twice",) if len(self.given) == 1 else ())

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """A tenth of the signs."""
        return stored.extras["signs"].to(dtype) / 10


def test_calibration_and_seed_reach_the_steps_and_records_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of the trial's text, cut for the model; statistics are shared by the trials of a child."""
    text = CalibrationSpec(name="mini", path="package://quantsweep/mini/text/calibration.txt", num_samples=2, sequence_length=16, seed=3)
    asking, events = Asking(), []
    monkeypatch.setattr(registry, "ROUNDINGS", {"asking": asking})
    trial = replace(planned().trial, quantization=QuantizationSpec(rounding=StepSpec("asking", 1)), calibration=text, seed=5)
    runner = TrialRunner(events.append)
    for seed in (5, 6):
        runner.run(PlannedTrial(trial=replace(trial, seed=seed), tasks=()), RunSettings(device="cpu"))
    [loaded, quantized, done, *_] = [event for event in events if event["event"] != "progress"]
    assert (loaded["event"], done["event"]) == ("loaded", "done")
    given = [context.help for context in asking.given]
    tokenizer = AutoTokenizer.from_pretrained(model_path("mini-neox-0.3m"))
    expected = load_tokens(text, tokenizer, max_length=256, num_embeddings=2048).tokens_NT
    assert torch.equal(given[0].tokens_NT, expected)
    assert (given[0].generator.initial_seed(), given[-1].generator.initial_seed()) == (5, 6)
    assert given[0].statistics is given[-1].statistics
    assert quantized["sizes"]["num_fallbacks"] == 1
    assert len(quantized["sizes"]["calibration_hash"]) == 32
    assert [row["fallbacks"] for row in quantized["layers"]][:2] == ["tried twice", ""]
    columns = {column.name for column in COLUMNS["layers"]}
    for row in quantized["layers"]:
        assert set(row) <= columns
        assert row["num_tokens"] == 32
        assert row["bits_by_part"] == f"signs={8 * row['in_features'] * row['out_features']}"


def test_what_calibration_text_shares_with_the_tasks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the text is documents that two tasks score; another task scores none of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scored = [json.loads(line)["text"] for line in (TASKS_DIR / "data" / "ppl.jsonl").read_text().splitlines()[:3]]
    strange = [" ".join(f"{word}{n}" for n in range(400)) for word in ("king", "sea", "day")]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in (*scored, *strange)))
    calibration = CalibrationSpec(name="c", path=str(text), num_samples=24, sequence_length=128, rule="document_crops")
    events: list[Mapping[str, Any]] = []
    runner = TrialRunner(events.append)
    for task in (spec_of("mini_ppl", limit=3), spec_of("mini_window_ppl", limit=8), spec_of("mini_cloze", limit=3)):
        trial = planned(task)
        runner.run(replace(trial, trial=replace(trial.trial, calibration=calibration)), RunSettings(device="cpu"))
    runner.run(planned(spec_of("mini_cloze", limit=2)), RunSettings(device="cpu"))
    documents, windows, cloze, without = (event["calibration_overlap"] for event in events if event["event"] == "done")
    assert 0.2 < documents < 0.8
    assert (windows, cloze, without) == (documents, 0.0, None)
