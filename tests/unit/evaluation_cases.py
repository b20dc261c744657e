"""Task YAMLs with tiny local data under the names of built-in tasks, and specs for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

from quantsweep.trial.specs import TaskSpec

CONF = Path(__file__).resolve().parents[2] / "conf" / "task"
BUILT_IN = Path(lm_eval.tasks.__file__).parent

SENTENCE = "the king of the sea went down to the house and said to all the people that the day was good"
WORDS = SENTENCE.split()
ROLLING: dict[str, Any] = {
    "dataset_path": "json",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
    "metadata": {"version": 1.0},
}
"""A rolling task over JSON lines with the column `text`, but for its name and its data."""
# By task: lm-eval's YAML, the split that is scored, and rows in the columns of the original data.
LOCAL: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", [{"text": " ".join(WORDS[: 8 + i])} for i in range(8)]),
    "piqa": (
        "piqa/piqa.yaml",
        "validation",
        [{"goal": " ".join(WORDS[i : i + 5]), "sol1": "go to " + WORDS[i], "sol2": "stay", "label": i % 2} for i in range(9)],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        "validation",
        [
            {"sentence": "The man saw the king and _ said no " + WORDS[i], "option1": "man", "option2": "king", "answer": "12"[i % 2]}
            for i in range(6)
        ],
    ),
    "copa": (
        "super_glue/copa/default.yaml",
        "validation",
        [
            {"premise": "The sea rose.", "choice1": "It was day.", "choice2": "He went.", "question": question, "label": label}
            for label, question in ((0, "cause"), (1, "effect")) * 3
        ],
    ),
    "wikitext": ("wikitext/wikitext.yaml", "test", [{"page": " ".join(WORDS * n) + " ."} for n in (1, 3, 20, 30)]),
}  # fmt: skip


def write_local_tasks(folder: Path) -> Path:
    """A folder of YAMLs that put local rows under built-in tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (built_in, split, rows) in LOCAL.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = {f"{kind}_split": kind if kind == split else None for kind in ("training", "validation", "test")}
        config = {"include": str(BUILT_IN / built_in), "task": name, "dataset_path": "json", "dataset_name": None, **splits}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, "dataset_kwargs": {"data_files": {split: str(data)}}}))
    return folder


def spec_of(name: str, /, **changes: Any) -> TaskSpec:
    """The spec that conf/task/<name>.yaml describes."""
    return replace(TaskSpec(**yaml.safe_load((CONF / f"{name}.yaml").read_text())), **changes)
