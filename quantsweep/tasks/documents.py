"""The documents of a user's own tasks, loaded and hashed, in a process of its own.

    python -m quantsweep.tasks.documents REQUEST ANSWER     {"folder": …, "tasks": […]} → {task: {"documents": hash} | {"error": …}}

Of its own, because a task's code may do what it likes, and because planning waits for no torch.  The answer is written after
each task, so that one that takes the process down costs itself and those behind it.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from quantsweep.errors import EvaluationError
from quantsweep.storage.files import write_text
from quantsweep.trial.task_identity import Definition, read_own_tasks

RANDOM_SEED, NUMPY_SEED = 0, 1234
"""The seeds that lm-eval sets before it loads a task."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@contextmanager
def lm_eval_seeds() -> Iterator[None]:
    """The random state that lm-eval loads tasks in (some draw their examples); ours is put back afterwards."""
    ours = random.getstate(), np.random.get_state()
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(ours[0])
        np.random.set_state(ours[1])


def hash_documents(dataset: Any, definition: Definition) -> str:
    """Hash of the splits that a task reads, document by document in their order; all, where it names none that is there."""
    splits = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
    named = {name: split for name, split in splits.items() if name in definition.splits} or splits
    digest = hashlib.sha256()
    for name in sorted(named):
        digest.update(f"{name}\0".encode())
        for document in named[name]:
            digest.update(json.dumps(document, sort_keys=True, default=_in_words).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def _in_words(value: Any) -> str:
    """The content of what JSON does not know: never where it lies in memory, never a part of it.

    Raises EvaluationError for an object of which neither its words nor its bytes tell it.
    """
    words = repr(value)
    if not isinstance(value, np.ndarray) and _ADDRESS.search(words) is None:
        return words
    if not callable(getattr(value, "tobytes", None)):
        raise EvaluationError(f"a document holds {words}, whose content cannot be hashed; leave that column out (remove_columns)")
    return f"{type(value).__name__} {hashlib.sha256(value.tobytes()).hexdigest()}"


def load_dataset(definition: Definition) -> Any:
    """A task's data set as lm-eval loads it, without the task around it."""
    config = {**definition.config, **definition.overrides}
    arguments = dict(config.get("dataset_kwargs") or {})
    if "class" in config:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=[definition.file.parent], include_defaults=False)
        return manager.load([definition.name])["tasks"][definition.name].dataset
    if config.get("custom_dataset") is not None:
        from lm_eval.tasks._yaml_loader import load_yaml

        metadata = config.get("metadata", {})
        metadata = {**(metadata if isinstance(metadata, dict) else {"_metadata": metadata}), "config_source": str(definition.file)}
        return load_yaml(definition.file)["custom_dataset"](**metadata, **arguments)
    arguments.pop("trust_remote_code", None)
    return datasets.load_dataset(path=config.get("dataset_path"), name=config.get("dataset_name"), **arguments)


def main(argv: list[str]) -> int:
    """Answer one request."""
    request, answer = (Path(argument) for argument in argv)
    asked = json.loads(request.read_text())
    own = read_own_tasks(Path(asked["folder"]))
    datasets.disable_progress_bars()
    answers: dict[str, dict[str, str]] = {}
    for name in asked["tasks"]:
        definition = own.definitions[name]
        try:
            with lm_eval_seeds():
                answers[name] = {"documents": hash_documents(load_dataset(definition), definition)}
        except Exception as error:  # noqa: BLE001 - whatever a task's data or code raise is said to who plans
            answers[name] = {"error": f"{definition.file}: {type(error).__name__}: {error}"}
        write_text(answer, json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
