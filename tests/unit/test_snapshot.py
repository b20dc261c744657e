"""The copy of the code that jobs run: named by its content, without what is nobody's business."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import quantsweep
from quantsweep.errors import ResultsError
from quantsweep.launching import snapshot
from quantsweep.running import environment
from quantsweep.storage import paths
from quantsweep.storage.paths import SweepFolder

SECRET = "hf_nobodys_token"
FILES = {
    ".gitignore": "__pycache__/\n.env\n/results/\n",
    "launch.py": "print('launch')\n",
    "README.md": "not needed by jobs\n",
    "conf/config.yaml": "model: m\n",
    "conf/model/m.yaml": "name: m\n",
    "sweeps/study.yaml": "a: 1\n",
    "quantsweep/__init__.py": "",
    "quantsweep/methods/rtn.py": "x = 1\n",
    "quantsweep/mini/corpus/text.txt": "only for training\n",
    "quantsweep/mini/models/m/weights.safetensors": "weights\n",
    "quantsweep/.env": f"TOKEN={SECRET}\n",
    ".env": f"TOKEN={SECRET}\n",
    "results/sweep/metrics/w-000.parquet": "rows\n",
    "quantsweep/__pycache__/x.cpython-311.pyc": "bytes\n",
}
COPIED = {
    "SNAPSHOT.json",
    "launch.py",
    "conf/config.yaml",
    "conf/model/m.yaml",
    "sweeps/study.yaml",
    "quantsweep/__init__.py",
    "quantsweep/methods/rtn.py",
    "quantsweep/mini/models/m/weights.safetensors",
}


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A product of its own, in whose place this process believes itself."""

    def made(name: str = "checkout", *, with_git: bool = True) -> Path:
        root = tmp_path / name
        for file, text in FILES.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)
        if with_git:
            git(root, "init", "-q")
            git(root, "add", "-A")
            git(root, "commit", "-q", "-m", "first")
        monkeypatch.setattr(quantsweep, "__file__", str(root / "quantsweep" / "__init__.py"))
        return root

    return made


def files(folder: SweepFolder, name: str) -> set[str]:
    return {str(path.relative_to(folder.code / name)) for path in (folder.code / name).rglob("*") if path.is_file()}


@pytest.mark.parametrize("with_git", [True, False])
def test_what_jobs_need_is_copied_and_nothing_else(sweep: SweepFolder, make: Callable[..., Path], *, with_git: bool) -> None:
    make(with_git=with_git)
    name = snapshot.take(sweep)
    assert files(sweep, name) == COPIED
    everything = b"".join(path.read_bytes() for path in sweep.path.rglob("*") if path.is_file())
    assert SECRET.encode() not in everything
    assert not [path for path in sweep.code.iterdir() if path.name.startswith(".")]


def test_equal_code_shares_one_copy_wherever_it_lies(sweep: SweepFolder, make: Callable[..., Path]) -> None:
    make("one")
    first = snapshot.take(sweep)
    before = (sweep.code / first).stat().st_ino
    assert snapshot.take(sweep) == first
    make("two", with_git=False)
    assert snapshot.take(sweep) == first
    assert (sweep.code / first).stat().st_ino == before


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename", "swap"])
def test_other_code_has_another_name_and_leaves_the_old_copy_alone(sweep: SweepFolder, make: Callable[..., Path], change: str) -> None:
    root = make()
    first = snapshot.take(sweep)
    method = root / "quantsweep/methods/rtn.py"
    if change == "edit":
        method.write_text("x = 2\n")
    elif change == "add":
        method.with_name("new.py").write_text("")
    elif change == "remove":
        method.unlink()
    elif change == "rename":
        method.rename(method.with_name("rtn2.py"))
    else:  # the same contents under each other's names
        one, two = root / "conf/config.yaml", root / "conf/model/m.yaml"
        one.write_text("name: m\n")
        two.write_text("model: m\n")
    second = snapshot.take(sweep)
    assert second != first
    assert (sweep.code / first / "quantsweep/methods/rtn.py").read_text() == "x = 1\n"


def test_commit_and_changes_are_noted_and_jobs_that_run_the_copy_say_the_same(
    sweep: SweepFolder, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make()
    clean = json.loads((sweep.code / snapshot.take(sweep) / "SNAPSHOT.json").read_text())
    assert (len(clean["code_commit"]), clean["code_diff"]) == (40, None)
    (root / "quantsweep/methods/rtn.py").write_text("x = 2\n")
    (root / "quantsweep/methods/mine.py").write_text("y = 3\n")
    name = snapshot.take(sweep)
    dirty = json.loads((sweep.code / name / "SNAPSHOT.json").read_text())
    diff = (sweep.code / f"{dirty['code_diff']}.diff").read_text()
    assert "+x = 2" in diff
    assert "y = 3" in diff
    monkeypatch.setattr(quantsweep, "__file__", str(sweep.code / name / "quantsweep" / "__init__.py"))
    assert environment.code_state(sweep) == (dirty["code_commit"], dirty["code_diff"])
    assert snapshot.take(sweep) == name, "a retry that is planned by a job is of the same code"


def test_a_wheel_copies_the_package(sweep: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "quantsweep"
    for file in ("__init__.py", "conf/config.yaml", "sweeps/study.yaml", "worker.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("")
    (package.parent / "torch").mkdir()
    (package.parent / "torch" / "large.so").write_text("")
    monkeypatch.setattr(quantsweep, "__file__", str(package / "__init__.py"))
    assert paths.product_root() == package
    name = snapshot.take(sweep)
    parts = {"__init__.py", "conf/config.yaml", "sweeps/study.yaml", "worker.py"}
    assert files(sweep, name) == {"SNAPSHOT.json", *(f"quantsweep/{part}" for part in parts)}


def test_others_may_not_write_to_what_jobs_run(sweep: SweepFolder, make: Callable[..., Path]) -> None:
    root = make()
    (root / "launch.py").chmod(0o777)
    before = os.umask(0)
    try:
        name = snapshot.take(sweep)
    finally:
        os.umask(before)
    for path in [sweep.code / name, *(sweep.code / name).rglob("*")]:
        assert path.stat().st_mode & 0o022 == 0, path
    assert (sweep.code / name / "launch.py").stat().st_mode & 0o100


def test_two_launches_at_once_make_one_copy(sweep: SweepFolder, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    genuine = shutil.copyfile
    inner: list[str] = []

    def copy(source: Path, target: Path) -> object:
        if not inner:
            inner.append("")
            inner[0] = snapshot.take(sweep)
        return genuine(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    assert snapshot.take(sweep) == inner[0]
    assert files(sweep, inner[0]) == COPIED
    assert not [path for path in sweep.code.iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_no_half_copy(sweep: SweepFolder, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    make()

    def full(source: Path, target: Path) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ResultsError, match="No space left"):
        snapshot.take(sweep)
    assert list(sweep.code.iterdir()) == []


def test_the_copy_of_this_product_runs(sweep: SweepFolder) -> None:
    """The real one: a job imports it and nothing of the checkout."""
    name = snapshot.take(sweep)
    code = "import quantsweep, quantsweep.crew.slurm_job as job; print(quantsweep.__file__, job.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=sweep.path,
        env={**os.environ, "PYTHONPATH": str(sweep.code / name)},
    )
    assert all(place.startswith(str(sweep.code / name)) for place in done.stdout.split())
