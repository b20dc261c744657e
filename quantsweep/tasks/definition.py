"""From a TaskSpec to lm-eval's own Task object: prompts, choices, filters, metrics and data are lm-eval's.

lm-eval indexes all of its 10,000 YAML files before it loads one task (6 s).  A TaskSpec names the folder
instead, so that only that folder is read (milliseconds):

    task_path            the user's own folder of YAMLs, searched first: a task there replaces a built-in one
    folder: mini         the tasks that ship with quantsweep
    folder: super_glue/copa   a folder below lm_eval/tasks

"What was asked is what ran": another version of the task, a few-shot count that the task refuses, a
metric it does not have, or a YAML that cannot be read are errors, never a fallback.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

import quantsweep
from quantsweep.errors import EvaluationError, did_you_mean
from quantsweep.tasks.documents import build_task, hash_documents, lm_eval_seeds, read_afresh
from quantsweep.tasks.fewshot import leave_out_own_answers
from quantsweep.tasks.mistakes import said_in_words
from quantsweep.tasks.quiet import quiet
from quantsweep.tasks.templates import compiled_once
from quantsweep.trial.specs import TaskSpec
from quantsweep.trial.task_identity import FILE_FORMATS, HUB, Definition, read_own_tasks

MINI_FOLDER = "mini"
_LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
_MINI_TASKS = Path(quantsweep.__file__).parent / "mini" / "tasks"
_OUTPUT_TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_task(spec: TaskSpec, task_path: Path | None = None, *, as_planned: bool = False) -> Task:
    """The task of `spec` with its data, few-shot count set and few-shot sampling seeded as lm-eval does it.

    as_planned: what the user's folder did not define when the trial was planned is not taken from there now.
    Raises EvaluationError when the task, its data or its primary metric cannot be had, or are not those of `spec`.
    """
    definition = None
    if task_path is not None and not (as_planned and spec.own_content is None):
        if not task_path.is_dir():
            raise EvaluationError(f"the folder of task YAMLs {task_path} does not exist")
        definition = own_definition(spec, task_path)
    manager = _manager(spec, task_path if definition is not None or not as_planned else None)
    afresh = contextlib.nullcontext() if definition is None else read_afresh()
    with said_in_words(spec, lambda: definition, "its data cannot be loaded"), quiet(), lm_eval_seeds(), compiled_once(), afresh:
        entry = manager.task_index[spec.lm_eval_task]
        if definition is None or entry.kind not in (Kind.TASK, Kind.PY_TASK):
            loaded = manager.load([spec.lm_eval_task])["tasks"]
        else:
            loaded = {spec.lm_eval_task: build_task(manager, definition)}
    if list(loaded) != [spec.lm_eval_task]:
        raise EvaluationError(f"task {spec.name}: {spec.lm_eval_task} is a group of lm-eval tasks; name its members: {', '.join(loaded)}")
    task: Task = loaded[spec.lm_eval_task]
    _check(task, spec, definition)
    with said_in_words(spec, lambda: definition, "its documents cannot be read"), quiet():
        _check_content(task, spec, definition)
    _set_fewshot(task, spec)
    if spec.protocol is None and (definition is not None or spec.replaces_own_answers):  # built-in tasks: where their key says so
        leave_out_own_answers(task)
    return task


def own_definition(spec: TaskSpec, task_path: Path | None) -> Definition | None:
    """What the user's folder says of a task; None where it says nothing, and the built-in one is meant."""
    return None if task_path is None else read_own_tasks(task_path).definition(spec.lm_eval_task)


def _check_content(task: Task, spec: TaskSpec, definition: Definition | None) -> None:
    """Refuse a user's own task whose files or documents are not those that were planned."""
    if spec.own_content is None:
        return
    if definition is None:
        raise EvaluationError(f"task {spec.name}: it was planned as one of your own folder (task_path), which does not define it any more")
    found = definition.content(HUB if definition.is_hub else hash_documents(task))
    if found != spec.own_content:
        raise EvaluationError(
            f"task {spec.name} ({definition.file}): its YAML, Python or documents are not those that were planned "
            f"({spec.own_content} then, {found} now). Launch again, which plans it as it is now; or bring the old ones back. "
            "(Code of the task that draws at random must seed itself, and not go through sets)"
        )


def data_revision(task: Task) -> str | None:
    """Which data the task has: "sha256:…" of local files or documents, "hub:<commit>", or None when it cannot be known."""
    data_files = (task.get_config("dataset_kwargs") or {}).get("data_files")
    if data_files is not None and (hashed := _hash_files(_flatten(data_files))) is not None:
        return hashed
    path = task.get_config("dataset_path")
    if callable(task.get_config("custom_dataset")) or path in FILE_FORMATS or (path and Path(path).exists()):
        return _hash_documents(task)
    return next((f"hub:{commit}" for name in _source_names(task) for commit in _COMMIT.findall(name)), None)


def pinned_data(task: Task, spec: TaskSpec, pinned: str | None) -> str | None:
    """The revision of the task's data (`data_revision`); raises EvaluationError if it is not the one that was pinned (None: none was).

    Data sets move on the hub, and a cache may hold several of their revisions: rows of two of them would not be comparable.
    """
    found = data_revision(task)
    if pinned is not None and found != pinned:
        raise EvaluationError(
            f"task {spec.name}: its data are {found or 'of unknown revision'} here, and were pinned as {pinned} before the launch. "
            "Bring the pinned ones back into the Hugging Face cache; or accept these for all that is still to run: "
            "`quantsweep prewarm … --update`, then launch again (rows that are written keep theirs, in the column data_revision)"
        )
    return found


def _manager(spec: TaskSpec, task_path: Path | None) -> TaskManager:
    if task_path is not None:
        own = TaskManager(include_path=[task_path], include_defaults=False)
        if spec.lm_eval_task in own.task_index:
            return own
    folder = _MINI_TASKS if spec.folder == MINI_FOLDER else _LM_EVAL_TASKS / spec.folder
    if not folder.is_dir() or ".." in Path(spec.folder).parts:
        raise EvaluationError(f"task {spec.name}: {did_you_mean('folder', spec.folder, _folders())}")
    manager = TaskManager(include_path=[folder], include_defaults=False)
    if spec.lm_eval_task not in manager.task_index:
        raise EvaluationError(f"task {spec.name}: {did_you_mean('lm-eval task', spec.lm_eval_task, manager.all_tasks)} (in {folder})")
    return manager


def _folders() -> list[str]:
    return [MINI_FOLDER, *(entry.name for entry in _LM_EVAL_TASKS.iterdir() if entry.is_dir() and entry.name.isidentifier())]


def _check(task: Task, spec: TaskSpec, definition: Definition | None) -> None:
    lies = "" if definition is None else f". It is defined by {definition.file}"
    if str(task.VERSION) != spec.version:
        raise EvaluationError(
            f"task {spec.name}: version {spec.version} was asked for, lm-eval {lm_eval.__version__} has version {task.VERSION}; "
            f"install the lm-eval that has {spec.version}, or change `version:` in the task's yaml (rows of both versions stay apart){lies}"
        )
    if task.OUTPUT_TYPE not in _OUTPUT_TYPES:
        raise EvaluationError(f"task {spec.name}: output type {task.OUTPUT_TYPE} is not supported; supported: {', '.join(_OUTPUT_TYPES)}")
    directions = task.higher_is_better()
    if spec.primary_metric not in directions:
        raise EvaluationError(f"task {spec.name}: {did_you_mean('primary_metric', spec.primary_metric, directions)}")
    if directions[spec.primary_metric] != spec.higher_is_better:
        direction = directions[spec.primary_metric]
        raise EvaluationError(f"task {spec.name}: lm-eval says higher_is_better={direction} for {spec.primary_metric}; set it so")


def _set_fewshot(task: Task, spec: TaskSpec) -> None:
    default = task.get_config("num_fewshot")
    asked = spec.num_fewshot
    if asked and default == 0:
        # lm-eval would say so in its log and go on with 0.
        raise EvaluationError(f"task {spec.name}: its definition fixes num_fewshot at 0, {asked} cannot be had; set num_fewshot: null")
    task.set_config(key="num_fewshot", value=asked if asked is not None else default or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _flatten(data_files: object) -> list[str]:
    if isinstance(data_files, str | Path):
        return [str(data_files)]
    if isinstance(data_files, Mapping):
        return _flatten(list(data_files.values()))
    return [name for part in data_files for name in _flatten(part)] if isinstance(data_files, Iterable) else []


def _hash_files(names: list[str]) -> str | None:
    files = sorted(map(Path, names))
    if not all(file.is_file() for file in files):  # patterns and addresses
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _hash_documents(task: Task) -> str:
    digest = hashlib.sha256()
    with read_afresh():
        for document in task.eval_docs:
            digest.update(json.dumps(document, sort_keys=True, default=repr).encode())
    return f"sha256:{digest.hexdigest()}"


def _source_names(task: Task) -> Iterator[str]:
    """Names that carry the commit of a hub data set: the addresses it came from, the folder it is cached in."""
    documents = task.eval_docs
    yield from getattr(documents.info, "download_checksums", None) or ()
    yield from (entry["filename"] for entry in documents.cache_files)
