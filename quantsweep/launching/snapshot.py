"""The code that queued jobs run: a copy of the product as it was when it was launched.

    code/<hash>/      quantsweep/ conf/ sweeps/ launch.py, and SNAPSHOT.json (commit, uncommitted changes)

Between submission and the last job of a long sweep the checkout is edited, pulled, moved to another
branch.  Jobs therefore import the snapshot: PYTHONPATH names it before everything else.  It is named by
the hash of its files, so launches of equal code share one.  What git ignores (results, caches, a
`.env`) is left out; in a wheel the installed package itself is copied, but for hidden files.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

import quantsweep
from quantsweep.errors import ResultsError
from quantsweep.running import environment
from quantsweep.storage.files import OTHERS_MAY_WRITE, write_atomic
from quantsweep.storage.paths import SweepFolder, product_root

PARTS = ("quantsweep", "conf", "sweeps", "launch.py")
SHARED = ".code"
"""Folder beside the sweeps in which large files of the code (the bundled models) lie once, by their hash."""
LARGE_BYTES = 256 * 1024
LEFT_OUT = ("quantsweep/mini/corpus/",)
"""Only needed to train the bundled models."""


def take(folder: SweepFolder) -> str:
    """Copy the code that runs now into the sweep's folder, unless it is there already; returns the name of the copy."""
    base, files = _files()
    name = _hash(base, files)
    target = folder.code / name
    if target.is_dir():
        return name
    temporary = folder.code / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        for file in files:
            copy = temporary / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            _put(base / file, copy, folder.path.parent / SHARED)
        commit, digest = environment.code_state(folder)
        (temporary / environment.SNAPSHOT).write_text(json.dumps({"code_commit": commit, "code_diff": digest}))
        for path in (temporary, *temporary.rglob("*")):  # jobs run what is in it, whatever the umask of the site
            path.chmod(path.stat().st_mode & ~OTHERS_MAY_WRITE)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():  # else another launch of the same code was first
            raise ResultsError(f"the code cannot be copied to {target}: {error.strerror}. Jobs run from that copy") from error
    return name


def _put(source: Path, copy: Path, shared: Path) -> None:
    """Copy a file; a large one lies once in the results folder, by its content, and copies of the code are hard links to it."""
    if source.stat().st_size >= LARGE_BYTES:
        with source.open("rb") as stream:
            content = shared / hashlib.file_digest(stream, "sha256").hexdigest()
        try:
            shared.mkdir(mode=0o755, exist_ok=True)
            if not content.exists():
                write_atomic(content, lambda file: file.write(source.read_bytes()))
            os.link(content, copy)
        except OSError:
            pass  # somebody else's folder, or a file system without links: a copy of its own
        else:
            if filecmp.cmp(source, copy, shallow=False):
                return
            copy.unlink()  # damaged since: a copy of its own
    shutil.copyfile(source, copy)
    copy.chmod(source.stat().st_mode)


def _files() -> tuple[Path, list[str]]:
    """The folder that jobs will import from, and the files in it to copy."""
    root = product_root()
    package = Path(quantsweep.__file__).resolve().parent
    base, parts = (package.parent, (package.name,)) if root == package else (root, PARTS)
    files = environment.tracked_files(base, parts)
    if files is None:
        found = (path for part in parts for path in ([base / part] if (base / part).is_file() else (base / part).rglob("*")))
        whole = (path.relative_to(base) for path in found if path.is_file())
        files = [str(path) for path in whole if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)]
    return base, sorted(file for file in files if not file.startswith(LEFT_OUT))


def _hash(base: Path, files: list[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with (base / file).open("rb") as stream:
            digest.update(f"{file}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
