"""Hands lm-eval the examples that lie beside this file.

`custom_dataset` in the three YAMLs points here. The usual route, `dataset_path: json` with `data_files`,
would need a path relative to the *working directory* and would write to the cache of `datasets`, where
parallel workers meet. This reads three files, needs no network, and works from any directory and wheel.

lm-eval imports this file by path, outside the package, so it imports nothing of quantsweep.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def _load(name: str) -> dict[str, Dataset]:
    path = Path(__file__).resolve().parent / "data" / f"{name}.jsonl"
    with path.open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def cloze(**_metadata: Any) -> dict[str, Dataset]:
    """{"test": rows of text, repeated, source}; lm-eval passes the YAML's metadata, which is not needed."""
    return _load("cloze")


def continuation(**_metadata: Any) -> dict[str, Dataset]:
    """{"test": rows of query, choices, label, source}."""
    return _load("continuation")


def ppl(**_metadata: Any) -> dict[str, Dataset]:
    """{"test": rows of text, source}."""
    return _load("ppl")
