"""The weights that were planned are the weights that are loaded, and stay so while they are in use.

A trial's identity says which content its model has; between planning and loading hours may pass.  While the model is
loaded, a thread hashes the same files (or finds their hashes remembered: unchanged inode, size and times on this
machine), and both are over before a weight is used:

    local folder, GGUF file     the hash in the spec
    snapshot of the hub         each file's blob is named by its hash
    converted folders           the hash that was written down when they were made (`CONTENT_FILE`)

Later, files that are mapped into memory may be written over in place; that is looked for after quantizing, before each result
is reported, and before originals are read back: the state of a file tells in microseconds, its hash where the state is another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from quantsweep.errors import ModelError
from quantsweep.trial import identity
from quantsweep.trial.identity import FileState
from quantsweep.trial.specs import ModelSpec

CONTENT_FILE = ".content"
"""Beside the files of a converted folder: their hash, as `identity.local_content` gives it."""


class ContentCheck:
    """Holds what is loaded against what was planned; used as a context around loading, asked again afterwards.

    Raises ModelError at the end of the context (also in place of an error of loading, which then is its consequence).
    """

    def __init__(self, what: str, files: Callable[[], list[Path]], content: Callable[[], str], planned: str | None) -> None:
        self._what, self._files, self._content, self._planned = what, files, content, planned
        self._states: dict[Path, FileState] = {}
        self._found: str | ModelError | OSError | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)

    def __enter__(self) -> ContentCheck:
        self._states = self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.join()
        if isinstance(self._found, Exception):
            raise self._found
        if self._planned is not None and self._found != self._planned:
            raise ModelError(
                f"{self._what} is not what was planned: its content is {self._found}, the plan says {self._planned}. "
                "Put the planned files back, or launch again for what is there now"
            )
        if self._look() != self._states:
            raise ModelError(f"{self._what} was changed while it was loaded; launch again when its files are as they shall be")

    def check(self) -> None:
        """Raise ModelError if a file of weights, which is mapped into memory, was written over in place since it was loaded.

        A file that was replaced by another one is in use no more, and the old one is still what it was.
        """
        was = self._found if self._planned is None else self._planned
        mapped = [(file, state) for file, state in self._states.items() if file.suffix == ".safetensors"]
        for file, loaded in mapped:
            now = _state(file)
            # All of the state: a modification time can be set back, the time of change cannot.
            if now is None or now.inode != loaded.inode or now == loaded:
                continue
            if self._content() != was:
                raise ModelError(
                    f"{self._what}: {file} was written over while the model was in use. Write new weights beside and rename; "
                    "launch again for what is there now"
                )
            self._states[file] = now

    def _look(self) -> dict[Path, FileState]:
        return {file: FileState.of(file) for file in self._files()}

    def _hash(self) -> None:
        try:
            self._found = self._content()
        except (ModelError, OSError) as error:
            self._found = error


def _state(file: Path) -> FileState | None:
    try:
        return FileState.of(file)
    except OSError:
        return None


def local_check(spec: ModelSpec) -> ContentCheck:
    """For the files that a local model's `path` names."""
    path = identity.resolve_path(str(spec.path))
    return ContentCheck(
        f"model {spec.name} ({path})",
        lambda: identity.content_files(path, spec.gguf_file),
        lambda: identity.local_content(path, spec.gguf_file),
        spec.content,
    )


def converted_check(folder: Path) -> ContentCheck:
    """For a folder that was converted by us; one that lacks its hash is compared with nothing."""
    written = folder / CONTENT_FILE
    planned = written.read_text().strip() if written.is_file() else None
    return ContentCheck(
        f"the converted model {folder}", lambda: identity.model_files(folder), lambda: identity.local_content(folder), planned
    )


def snapshot_check(folder: Path) -> ContentCheck:
    """For a snapshot in the hub's cache."""
    return ContentCheck(
        f"the snapshot {folder}",
        lambda: identity.model_files(folder),
        lambda: identity.snapshot_content(folder),
        identity.BLOBS_AS_NAMED,
    )
