"""Write what is made from the corpus: tokenizer, held-out texts, task examples.

    python -m quantsweep.mini.prepare

Half a minute on one core. The output is a function of `corpus/` and the seeds in the modules that this
one calls; a second run leaves `git status` clean. Training comes next (`train.py`), then the card
(`card.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quantsweep.mini import CALIBRATION_TEXT, EVALUATION_TEXT, MODEL_NAMES, TASKS_DIR, model_path
from quantsweep.mini.corpus import Section, split_corpus
from quantsweep.mini.items import cloze_items, continuation_items, documents
from quantsweep.mini.vocabulary import save_tokenizer, train_tokenizer

# Two blank lines; within a section there is at most one.
SECTION_BREAK = "\n\n\n"


def write_text(path: Path, sections: Iterable[Section]) -> None:
    """The sections of a split as one plain text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SECTION_BREAK.join(s.text for s in sections) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_tasks(sections: list[Section], tokenizer: Tokenizer) -> None:
    """The examples of the three tasks, from the evaluation split."""

    @cache
    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    write_rows(TASKS_DIR / "data" / "cloze.jsonl", cloze_items(sections, count))
    write_rows(TASKS_DIR / "data" / "continuation.jsonl", continuation_items(sections, count))
    write_rows(TASKS_DIR / "data" / "ppl.jsonl", documents(sections, count))


def main() -> None:
    """Everything short of training."""
    splits = split_corpus()
    tokenizer = train_tokenizer(section.text for section in splits["train"])
    for name in MODEL_NAMES:
        save_tokenizer(tokenizer, model_path(name))
    write_text(CALIBRATION_TEXT, splits["calibration"])
    write_text(EVALUATION_TEXT, splits["evaluation"])
    write_tasks(splits["evaluation"], tokenizer)


if __name__ == "__main__":
    main()
