"""The documents of a user's own tasks as they are scored, loaded and hashed, in a process of its own.

    python -m quantsweep.tasks.documents REQUEST ANSWER     {"folder": …, "tasks": […]} → {task: {"documents": hash} | {"error": …}}

Of its own, because a task's code may do what it likes, and because planning waits for no torch.  The answer is written after
each task, so that one that takes the process down costs itself and those behind it.

What counts is what comes out of the task's own processing (`process_docs`, functions, templates), which may read any file: the
scored documents, the few-shot pool, and what functions make prompts of.  Caches that go by a file's time are not asked (`read_afresh`).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import datasets.data_files
import numpy as np
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from quantsweep.errors import EvaluationError
from quantsweep.storage.files import write_text
from quantsweep.tasks.templates import compiled_once
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


@contextmanager
def read_afresh() -> Iterator[None]:
    """Within this context nothing old answers for a file that was replaced: `datasets` and Python know files by their time.

    Data sets are kept in their cache by their files' bytes, what a task's code makes of them is made again, and its code is compiled.
    """
    by_time, had_caching, wrote_none = (
        datasets.data_files._get_single_origin_metadata,
        datasets.is_caching_enabled(),
        sys.dont_write_bytecode,
    )

    def by_content(data_file: str, download_config: Any = None) -> tuple[str, ...]:
        if not Path(data_file).is_file():
            return tuple(by_time(data_file, download_config=download_config))
        with Path(data_file).open("rb") as stream:
            return (hashlib.file_digest(stream, "sha256").hexdigest(),)

    datasets.data_files._get_single_origin_metadata = by_content
    datasets.disable_caching()
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        datasets.data_files._get_single_origin_metadata = by_time
        if had_caching:
            datasets.enable_caching()
        sys.dont_write_bytecode = wrote_none


def build_task(manager: TaskManager, definition: Definition) -> Task:
    """A user's own task as lm-eval builds it, its data beside its YAML."""
    return manager._factory.build(manager.task_index[definition.name], overrides=definition.overrides, registry=manager.task_index)


def hash_documents(task: Task) -> str:
    """Hash of the documents that a task scores and draws examples from, in their order, and of what it makes of each."""
    with lm_eval_seeds(), read_afresh(), compiled_once():
        return hash_values(_told_documents(task))


def hash_values(values: Iterable[Any]) -> str:
    """Hash of values of JSON, and of arrays, images and dates within them."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=_in_words).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _told_documents(task: Task) -> Iterator[list[Any]]:
    examples = task.sampler.fewshot_docs() if hasattr(task, "sampler") else task.fewshot_docs()
    for part, documents, config in (("scored", task.eval_docs, None), ("examples", examples or (), getattr(task, "fewshot_cfg", None))):
        for document in documents:
            yield [part, document, *_rendered(task, document, config)]


def _rendered(task: Task, document: Any, config: Any) -> Iterator[Any]:
    """What functions of the task make of a document; a template says no more than its YAML and the document.

    A function that fails says so where its request is made.
    """
    for field in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        given = task.get_config(field) if config is None else getattr(config, field)
        if not callable(given) and type(task) is ConfigurableTask:
            continue
        try:
            yield getattr(task, field)(document, *(() if config is None else (given,)))
        except Exception as error:  # noqa: BLE001 - functions of a task raise what they like
            yield type(error).__name__


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
    manager = TaskManager(include_path=[asked["folder"]], include_defaults=False)
    datasets.disable_progress_bars()
    answers: dict[str, dict[str, str]] = {}
    for name in asked["tasks"]:
        definition = own.definitions[name]
        try:
            with lm_eval_seeds(), read_afresh(), compiled_once():
                task = build_task(manager, definition)
            answers[name] = {"documents": hash_documents(task)}
        except Exception as error:  # noqa: BLE001 - whatever a task's data or code raise is said to who plans
            answers[name] = {"error": f"{definition.file}: {type(error).__name__}: {error}"}
        write_text(answer, json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
