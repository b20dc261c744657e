"""Hands lm-eval the examples that lie beside this file.

`custom_dataset` in the three YAMLs points here. The usual route, `dataset_path: json` with `data_files`,
would need a path relative to the *working directory* and would write to the cache of `datasets`, where
parallel workers meet. This reads three files, needs no network, and works from any directory and wheel.

The fingerprint is the file's. Without one, `datasets` would hash a pickle of the table, which fails where
pyarrow is not in `site-packages` (a `pip install --target` folder on PYTHONPATH): `dill` then takes the
module pyarrow for data and pickles what is in it ("Can't pickle <class 'MonthDayNano'>").

lm-eval imports this file by path, outside the package, so it imports nothing of quantsweep.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.table import InMemoryTable


def _load(name: str) -> dict[str, Dataset]:
    path = Path(__file__).resolve().parent / "data" / f"{name}.jsonl"
    content = path.read_bytes()
    table = InMemoryTable.from_pylist([json.loads(line) for line in content.splitlines()])
    return {"test": Dataset(table, fingerprint=hashlib.sha256(content).hexdigest()[:16])}


def cloze(**_metadata: Any) -> dict[str, Dataset]:
    """{"test": rows of text, repeated, source}; lm-eval passes the YAML's metadata, which is not needed."""
    return _load("cloze")


def continuation(**_metadata: Any) -> dict[str, Dataset]:
    """{"test": rows of query, choices, label, source}."""
    return _load("continuation")


def ppl(**_metadata: Any) -> dict[str, Dataset]:
    """{"test": rows of text, source}."""
    return _load("ppl")
