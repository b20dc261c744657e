"""Which task a user's own folder (`task_path`) defines: the part of a task's identity that its name cannot give.

    own content = hash over    the YAML that defines the task, those that it includes, the Python beside and below those that name some,
                               and the documents themselves, as they are scored

A task is read as lm-eval reads it: `task:` may stand in an included file, and what a YAML says wins over what it includes.
Paths of data are relative to the file that gives them, here and where the task is loaded (`Definition.overrides`).

The documents come from anywhere (a pattern, a folder, packed files, a function of the task's), so they are loaded and
hashed, by a child process (`quantsweep.tasks.documents`): planning runs no code of a task and imports no torch.
Data of the hub are told apart by their commit instead, which `quantsweep prewarm` pins.

The worker hashes what it loaded in the same way, and compares.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantsweep.errors import EvaluationError

logger = logging.getLogger(__name__)

HUB = "hub"
"""Stands for the documents of a data set of the hub, which are pinned by their commit."""
_UNREADABLE = "unreadable"
"""Stands for documents that planning could not load: whoever runs the task says why, or that they are others than these."""
_FOLDERS_TO_PASS = {"__pycache__", ".ipynb_checkpoints"}
FILE_FORMATS = {"arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml"}
"""Values of `dataset_path` that say how files are read, not where they are."""


class _Function(str):
    """A `!function module.name` of a YAML, as the path of its file without `.py`, and the name."""

    __slots__ = ()


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as lm-eval reads it, functions left unresolved."""


_Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One task of a user's folder.

    file: the YAML that defines it.  files: it, what it includes and their Python, in a fixed order.
    config: the merged keys.  origins: the file that gave each key.
    """

    name: str
    file: Path
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    origins: Mapping[str, Path]

    @property
    def is_hub(self) -> bool:
        """True if the documents are a data set of the hub."""
        path = self.overrides.get("dataset_path", self.config.get("dataset_path"))
        has_code = isinstance(self.config.get("custom_dataset"), _Function) or "class" in self.config
        return bool(path) and not has_code and path not in FILE_FORMATS and not Path(str(path)).expanduser().exists()

    @property
    def overrides(self) -> dict[str, Any]:
        """Keys of the task with relative paths of data made absolute: they begin where the file stands that gives them."""
        found: dict[str, Any] = {}
        path = self.config.get("dataset_path")
        if isinstance(path, str) and path and path not in FILE_FORMATS and (beside := self._beside("dataset_path", path)).exists():
            found["dataset_path"] = str(beside)
        arguments = self.config.get("dataset_kwargs")
        if path in FILE_FORMATS and isinstance(arguments, Mapping):
            places = {key: self._placed(arguments[key]) for key in ("data_files", "data_dir") if arguments.get(key) is not None}
            found["dataset_kwargs"] = {**arguments, **places}
        return found

    def content(self, documents: str) -> str:
        """The task's identity, 8 hexadecimal digits; `documents`: the hash of its documents (`HUB` for those of the hub)."""
        digest = hashlib.sha256("".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files).encode())
        digest.update(documents.encode())
        return digest.hexdigest()[:8]

    def _beside(self, key: str, path: str) -> Path:
        return self.origins[key].parent / Path(path).expanduser()

    def _placed(self, files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: self._placed(inner) for split, inner in files.items()}
        if isinstance(files, list):
            return [self._placed(inner) for inner in files]
        return files if not isinstance(files, str) or "://" in files else str(self._beside("dataset_kwargs", files))


@dataclass(frozen=True, kw_only=True)
class OwnTasks:
    """The tasks of a user's folder by name, and the YAMLs that cannot be read, with the reason."""

    folder: Path
    definitions: Mapping[str, Definition] = field(default_factory=dict)
    unreadable: Mapping[Path, str] = field(default_factory=dict)

    def definition(self, name: str) -> Definition | None:
        """The folder's definition of a task; None if it has none, and the built-in one is meant.

        Raises EvaluationError where a YAML that cannot be read seems to define it: the built-in task must not run in its place.
        """
        if name not in self.definitions:
            names_it = re.compile(rf"\btask['\"]?\s*:[\s\['\"]*{re.escape(name)}\b")
            for file, reason in self.unreadable.items():
                if file.stem == name or names_it.search(file.read_text(encoding="utf-8", errors="replace")):
                    raise EvaluationError(
                        f"task {name}: lm-eval cannot read {file}; check its YAML, and the files that it includes: {reason}"
                    )
        return self.definitions.get(name)

    def is_unloadable(self, name: str, content: str | None) -> bool:
        """True if `content`, the identity of a task of this folder, says that its documents could not be loaded."""
        definition = self.definitions.get(name)
        return definition is not None and content == definition.content(_UNREADABLE)

    def contents(self, names: Iterable[str]) -> dict[str, str]:
        """The identity (`Definition.content`) of those of the tasks that the folder defines; their documents are loaded for it."""
        found = {name: definition for name in names if (definition := self.definition(name)) is not None}
        to_load = [name for name, definition in found.items() if not definition.is_hub]
        documents = _load_documents(self.folder, to_load) if to_load else {}
        return {name: definition.content(documents.get(name, HUB)) for name, definition in found.items()}


def read_own_tasks(folder: Path) -> OwnTasks:
    """What the YAMLs of a folder define; of several that define a task the first counts, as for lm-eval."""
    definitions: dict[str, Definition] = {}
    unreadable: dict[Path, str] = {}
    for file in sorted(folder.rglob("*.yaml"), key=lambda path: path.as_posix()):
        if _FOLDERS_TO_PASS.intersection(file.parts) or not file.is_file():
            continue
        try:
            config, origins, files = _merged(file.resolve())
        except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
            unreadable[file] = " ".join(str(error).split())
            continue
        name = config.get("task")
        if isinstance(name, str) and "group" not in config and name not in definitions:
            definitions[name] = Definition(name=name, file=file, files=tuple(files), config=config, origins=origins)
    return OwnTasks(folder=folder, definitions=definitions, unreadable=unreadable)


def _merged(file: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Path], list[Path]]:
    """The keys of a YAML over those of what it includes, the file that each came from, and all files behind them."""
    if file in above:
        raise ValueError(f"{file} includes itself")
    own = yaml.load(file.read_bytes(), Loader=_Loader)  # noqa: S506 - a safe loader
    if not isinstance(own, dict):
        raise ValueError(f"{file} holds no keys")  # noqa: TRY004 - what is in a file is no type of ours
    included = own.pop("include", None) or []
    config: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    files = [file]
    for name in included if isinstance(included, list) else [included]:
        inner_config, inner_origins, inner_files = _merged((file.parent / str(name)).expanduser().resolve(), (*above, file))
        inner_config.pop("task_list", None)  # as lm-eval: it is for the included file alone
        config |= inner_config
        origins |= inner_origins
        files += inner_files
    if functions := _functions(own):
        files += _python_below(file.parent)
        files += [path for function in functions if (path := _file_of(function, file.parent)).is_file()]
    return config | own, origins | dict.fromkeys(own, file), list(dict.fromkeys(files))


def _functions(value: Any) -> list[_Function]:
    """Every function that a YAML's value names, at any depth."""
    if isinstance(value, _Function):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [function for each in inner for function in _functions(each)]


def _python_below(folder: Path) -> list[Path]:
    """Every Python file that a task's function may import from its own folder; hidden folders (environments) hold none of these."""
    found = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return [folder / path for path in sorted(found) if not any(part.startswith(".") or part in _FOLDERS_TO_PASS for part in path.parts)]


def _file_of(function: _Function, folder: Path) -> Path:
    """Where lm-eval looks for a function first."""
    return folder / f"{function.rpartition('.')[0].replace('.', '/')}.py"


def _load_documents(folder: Path, names: list[str]) -> dict[str, str]:
    """The hash of each task's documents; those that cannot be loaded are named in the log."""
    with tempfile.TemporaryDirectory(prefix="quantsweep-tasks-") as place:
        asked, answered = Path(place) / "request.json", Path(place) / "answer.json"
        asked.write_text(json.dumps({"folder": str(folder), "tasks": names}))
        argv = [sys.executable, "-P", "-m", "quantsweep.tasks.documents", str(asked), str(answered)]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # nobody would see it ask
        answers = json.loads(answered.read_text()) if answered.is_file() else {}
    found: dict[str, str] = {}
    for name in names:
        answer = answers.get(name) or {"error": (done.stderr.strip().splitlines() or ["the process that loads them died"])[-1]}
        if "error" in answer:
            said = "task %s: its documents cannot be loaded here, so that what is planned is unknown and workers will refuse it: %s"
            logger.warning(said, name, answer["error"])
        found[name] = answer.get("documents", _UNREADABLE)
    return found
