"""What goes wrong in a task's data or YAML, in words: which task, which file, what to do.

lm-eval, datasets and Jinja raise what they come upon (StopIteration for a file without documents, KeyError for a split that
is not there).  An exception out of the task's own Python passes as it is: it is a bug, and its traceback says where.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from quantsweep.errors import EvaluationError, QuantsweepError
from quantsweep.tasks.documents import load_dataset
from quantsweep.trial.specs import TaskSpec
from quantsweep.trial.task_identity import Definition

_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO}
"""Errors of a disk, which say nothing about the task."""
FETCH_IT = (
    "Load it once where there is a network (it stays in the Hugging Face cache), or give a folder of task YAMLs with local data (task_path)"
)


@contextlib.contextmanager
def said_in_words(spec: TaskSpec, find: Callable[[], Definition | None], what: str) -> Iterator[None]:
    """Turn what a task's data or YAML make others raise into an EvaluationError.

    find: the user's own definition of the task, asked for when something went wrong; what: says what could not be done.
    """
    try:
        yield
    except (QuantsweepError, MemoryError):
        raise
    except Exception as error:
        definition = find()
        if _innermost_file(error) in _python(definition) or (isinstance(error, OSError) and error.errno in _MACHINE):
            raise
        if isinstance(error, RuntimeError) and "CUDA" in str(error):
            raise
        place = "" if definition is None else f" ({definition.file})"
        said = str(error) or type(error).__name__
        raise EvaluationError(f"task {spec.name}{place}: {what}: {said}. {_remedy(error, definition)}") from error


def _python(definition: Definition | None) -> set[Path]:
    return set() if definition is None else {file for file in definition.files if file.suffix == ".py"}


def _innermost_file(error: BaseException) -> Path | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else Path(trace.tb_frame.f_code.co_filename)


def _remedy(error: Exception, definition: Definition | None) -> str:
    if isinstance(error, RuntimeError) and "script" in str(error):
        return (
            "Data sets with a loading script are not run: save the documents as files (parquet, jsonl), and name these in the task's YAML "
            "(dataset_path: json, dataset_kwargs: {data_files: {test: docs.jsonl}})"
        )
    if isinstance(error, SecurityError):
        return "Templates are rendered in a sandbox: use plain expressions over the document's columns, or a !function of your own"
    if isinstance(error, (StopIteration, IndexError)):
        return "It has no documents, or fewer than it needs: look at its data files and splits" + _there(definition)
    if isinstance(error, (LookupError, TemplateError)):
        return "Its YAML names a split or a column that its data do not have" + _there(definition)
    if definition is not None and not definition.is_hub:
        return "Look at its dataset_path and dataset_kwargs" + _there(definition)
    return FETCH_IT


def _there(definition: Definition | None) -> str:
    """The splits and columns that the data of a user's own task have, as far as they can be loaded."""
    if definition is None or definition.is_hub:
        return ""
    try:
        splits = dict(load_dataset(definition))
        return ". There are: " + "; ".join(f"{name} with {len(s)} documents of {', '.join(s.column_names)}" for name, s in splits.items())
    except Exception:  # noqa: BLE001 - that they cannot be loaded is what is being said
        return ""
