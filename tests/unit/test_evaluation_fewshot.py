"""A few-shot prompt never holds its own answer; all other prompts are lm-eval's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_cases import CONF, spec_of
from lm_eval.api.task import Task

from quantsweep.errors import EvaluationError
from quantsweep.tasks.definition import load_task
from quantsweep.tasks.quiet import quiet
from quantsweep.trial.specs import TaskSpec, first_own_answer


def prompts(spec: TaskSpec, task_path: Path | None = None) -> tuple[Task, list[str]]:
    task = load_task(spec, task_path)
    with quiet():
        task.build_all_requests(limit=spec.limit)
    return task, [instance.args[0] for instance in task.instances if instance.idx == 0]


def own_answers(task: Task, found: list[str]) -> list[int]:
    """Documents whose prompt holds their own question with its answer."""
    held = []
    for number, (prompt, document) in enumerate(zip(found, task.eval_docs, strict=False)):
        question, answer = task.doc_to_text(document), task.doc_to_target(document)
        answer = task.doc_to_choice(document)[answer] if isinstance(answer, int) else answer
        before = prompt.removesuffix(question)
        if question + task.config.target_delimiter + answer in before or question + answer in before:
            held.append(number)
    return held


def five(folder: Path, **changes: Any) -> TaskSpec:
    """A task of five documents, by default with a test split alone."""
    rows = [{"q": f"Question {i}:", "a": f"word{i}"} for i in range(5)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "five",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": " {{a}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
        **changes,
    }
    (folder / "five.yaml").write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return spec_of("mini_cloze", name="five", lm_eval_task="five", num_fewshot=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fewshot_split": "test"},
        {"fewshot_config": {"sampler": "first_n"}},
        {"fewshot_config": {"samples": [{"q": f"Question {i}:", "a": f"word{i}"} for i in range(4)]}},
        {"fewshot_config": {"samples": [{"q": f"Question {i}:", "a": f"word{i}", "more": 1} for i in range(4)]}},
        {"training_split": "test"},
    ],
    ids=str,
)
def test_no_prompt_holds_its_own_answer(tmp_path: Path, changes: dict[str, Any]) -> None:
    task, found = prompts(five(tmp_path, **changes), tmp_path)
    assert own_answers(task, found) == []
    assert [prompt.count("Question") for prompt in found] == [3] * 5


def test_a_validation_split_that_is_scored_too(tmp_path: Path) -> None:
    spec = five(tmp_path, test_split=None, validation_split="validation", fewshot_split="validation")
    text = (tmp_path / "five.yaml").read_text().replace("test: ", "validation: ")
    (tmp_path / "five.yaml").write_text(text)
    assert own_answers(*prompts(spec, tmp_path)) == []


@pytest.mark.parametrize("output_type", ["loglikelihood", "multiple_choice"])
def test_the_same_question_in_another_form(tmp_path: Path, output_type: str) -> None:
    """Other blanks, choices in another order (and so the number of the answer): each document has such a twin among the others."""
    spec = five(tmp_path, output_type=output_type, **({"doc_to_choice": "c", "doc_to_target": "{{l}}"} if output_type[0] == "m" else {}))
    rows = [{"q": f"Question {i % 3}:", "a": f"word{i % 3}", "c": [f"word{i % 3}", "x y"], "l": 0, "id": i} for i in range(6)]
    for row in rows[3:]:
        row |= {"q": f" {row['q'].replace(' ', '  ')}\n", "c": ["x  y ", row["a"]], "l": 1}
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, found = prompts(replace(spec, num_fewshot=3), tmp_path)
    for prompt, document in zip(found, task.eval_docs, strict=True):
        assert document["a"] not in prompt
        assert prompt.count("Question") == 4


def test_too_few_others_are_said(tmp_path: Path) -> None:
    five(tmp_path)
    spec = spec_of("mini_cloze", name="five", lm_eval_task="five", num_fewshot=5)
    with pytest.raises(EvaluationError, match="task five: 5 few-shot examples were asked for, and it has 4 beside the document itself"):
        prompts(spec, tmp_path)


def test_only_prompts_with_their_own_answer_change() -> None:
    """Documents 23 and 1191 of mini_cloze at two shots, as the key says before anything is loaded."""
    ours, theirs = (prompts(spec_of("mini_cloze", num_fewshot=2, limit=30, protocol=p)) for p in (None, "lm_eval"))
    assert own_answers(*theirs) == [23]
    assert own_answers(*ours) == []
    assert [n for n, (one, other) in enumerate(zip(ours[1], theirs[1], strict=True)) if one != other] == [23]
    assert first_own_answer(2400, 2) == 23


@pytest.mark.parametrize("name", ["mini_cloze", "mini_continuation"])
def test_the_pools_of_the_bundled_tasks_are_what_their_yamls_say(name: str) -> None:
    assert len(load_task(spec_of(name)).sampler.fewshot_docs()) == yaml.safe_load((CONF / f"{name}.yaml").read_text())["fewshot_pool"]


@pytest.mark.parametrize("changes", [{"limit": 20}, {"limit": 30, "fewshot_pool": None}], ids=str)
def test_where_the_key_of_a_built_in_task_says_nothing_its_prompts_are_lm_evals(changes: dict[str, Any]) -> None:
    """Also where two documents ask the same: train and test splits that overlap are lm-eval's, under the key of always."""
    spec = spec_of("mini_cloze", num_fewshot=2, **changes)
    assert "+others" not in spec.task_key
    assert prompts(spec)[1] == prompts(replace(spec, protocol="lm_eval"))[1]
