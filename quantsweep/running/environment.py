"""What ran a trial: code, libraries, machine.  Captured once a worker, written into each row.

Nothing of the process environment is kept but Slurm's job ids: variables may hold secrets.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import quantsweep
from quantsweep.redaction import redacted
from quantsweep.storage.files import write_text
from quantsweep.storage.paths import SweepFolder, product_root
from quantsweep.trial.specs import canonical_json

LIBRARIES = ("quantsweep", "torch", "transformers", "tokenizers", "lm_eval", "datasets", "numpy", "pyarrow", "hydra-core", "submitit")
"""Libraries whose version may change a number, or how a trial was run."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The provenance that the parent process knows; the child adds device and driver."""

    host: str
    slurm_job: str | None
    code_commit: str | None
    code_diff: str | None
    versions: str


CLUSTERS = "conf/cluster/"
NOT_RUN = tuple(f"{room}/" for room in ("mini/corpus", "cli", "composing", "crew", "hydra_plugin", "launching", "operations", "_plugins"))
"""Code that no trial's process imports: it trains the bundled models, launches, or talks to people."""
SNAPSHOT = "SNAPSHOT.json"
"""In a copy of the code that jobs run from: which commit and which changes it is a copy of."""


def capture(folder: SweepFolder) -> Environment:
    """Look around once; keeps uncommitted changes of the checkout as `code/<hash>.diff`."""
    commit, digest = code_state(folder)
    return Environment(
        host=node_name(),
        slurm_job=slurm_job(),
        code_commit=commit,
        code_diff=digest,
        versions=canonical_json(versions()),
    )


def code_state(folder: SweepFolder) -> tuple[str | None, str | None]:
    """(commit, hash of the uncommitted changes, which are kept in `code/`) of the code that runs."""
    snapshot = product_root() / SNAPSHOT
    if snapshot.is_file():
        known = json.loads(snapshot.read_text())
        return known["code_commit"], known["code_diff"]
    commit, diff = git_state(product_root())
    if not diff:
        return commit, None
    digest = hashlib.sha256(diff.encode()).hexdigest()[:16]
    path = folder.code / f"{digest}.diff"
    if not path.exists():
        write_text(path, redacted(diff), private=True)
    return commit, digest


def source_digest(package: Path) -> str:
    """A hash of the Python files of a package's folder that a trial may run: what a process that imports them now would run.

    Hidden files (an editor's locks and copies) cannot be imported.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        name = place.as_posix()
        if not name.startswith(NOT_RUN) and not any(part.startswith(".") for part in place.parts):
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def running_package() -> Path:
    """The folder of the package that this process runs."""
    return Path(quantsweep.__file__).resolve().parent


class RunningCode:
    """What this very process has imported of the product, by the hash of its files.

    Modules are imported when they are first needed, so the files are hashed again whenever another module was: code that is edited
    in between is told, code that is edited once everything is imported changes nothing here.
    """

    def __init__(self) -> None:
        self._imported: frozenset[str] = frozenset()
        self._digest = ""

    def digest(self) -> str:
        """The hash of now."""
        imported = frozenset(name for name in list(sys.modules) if name.partition(".")[0] == "quantsweep")
        if imported != self._imported:
            self._imported, self._digest = imported, source_digest(running_package())
        return self._digest


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules in a process of its own, which imports nothing from the working directory."""
    return [sys.executable, "-P", "-u", "-m", module, *arguments]


def module_variables() -> dict[str, str]:
    """The environment for `module_command`: that of this process, and the checkout that it runs from where the code comes from there.

    An empty part of PYTHONPATH is the working directory, and hardly ever meant.
    """
    root = product_root()
    own = [str(root)] if (root / "quantsweep").is_dir() else []
    given = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part not in own]
    path = {"PYTHONPATH": os.pathsep.join([*own, *given])} if own or given else {}
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | path | {"PYTHONSAFEPATH": "1"}


def node_name() -> str:
    """The machine, by the name that Slurm has for it inside a job."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def versions() -> dict[str, str]:
    """Versions of Python and of LIBRARIES, without importing them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout that is not installed: the commit says which version
    return found


def slurm_job() -> str | None:
    """`<array job>_<task>`, `<job>`, or None outside Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def git_state(root: Path) -> tuple[str | None, str | None]:
    """(commit, uncommitted changes) of a checkout; (None, None) where there is none."""
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    # How a site's cluster is called changes no number: its yaml makes no other code of this.
    changes = _git(root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--", ".", f":(exclude){CLUSTERS}") or ""
    return commit.strip() if commit else None, changes + _untracked(root)


def _untracked(root: Path) -> str:
    """New files of the product's own folders (a new method, a new yaml), whole: they run as much as edited ones."""
    names = (_git(root, "ls-files", "--others", "--exclude-standard", "--", "quantsweep", "conf", "sweeps", "launch.py") or "").splitlines()
    return "".join(
        f"new file {name}\n{(root / name).read_text(errors='replace')}\n"
        for name in names
        if (root / name).is_file() and not name.startswith(CLUSTERS)
    )


def tracked_files(root: Path, parts: Sequence[str]) -> list[str] | None:
    """Files of a checkout under `parts` that git tracks or would (new ones, not ignored ones); None where there is no checkout."""
    if not (root / ".git").exists():
        return None
    listed = _git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *parts)
    return None if listed is None else sorted({name for name in listed.split("\0") if name and (root / name).is_file()})


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git on this node: the row says null
    return done.stdout if done.returncode == 0 else None
