"""Processes that we start import nothing from the working directory; a checkout and what PYTHONPATH names are found all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantsweep.failures import classes
from quantsweep.running.child_process import Child
from quantsweep.running.environment import module_command, module_variables
from quantsweep.running.stopping import Stop
from quantsweep.trial.specs import RunSettings
from tests.conftest import ROOT
from tests.unit.engine_cases import trial

TRAP = "from pathlib import Path\nPath({flag!r}).write_text(__name__)\nraise SystemExit('imported from the working directory')\n"


@pytest.fixture
def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory full of modules under names that we import; the path of a file that they would write."""
    flag = tmp_path / "flag"
    folder = tmp_path / "here"
    for name in ("torch", "transformers", "json", "queue", "pynvml"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(TRAP.format(flag=str(flag)))
    for name in ("quantsweep", "lm_eval"):
        (folder / f"{name}.py").write_text(TRAP.format(flag=str(flag)))
    monkeypatch.chdir(folder)
    return flag


@pytest.mark.parametrize("path", [None, "", os.pathsep, f"{os.pathsep}/nowhere"])
def test_the_child_imports_nothing_from_the_working_directory(
    trapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    """A real child, which imports all of it before it finds that there is no such model."""
    monkeypatch.delenv("PYTHONPATH", raising=False) if path is None else monkeypatch.setenv("PYTHONPATH", path)
    child = Child()
    *_, event = child.events(trial(2), RunSettings(device="cpu"), tmp_path / "log", Stop())
    child.kill()
    assert (event["event"], event["failure_class"]) == ("failed", classes.MODEL_OR_DATA), (tmp_path / "log").read_text()
    assert not trapped.exists()


def test_a_checkout_that_is_not_installed_finds_itself(tmp_path: Path) -> None:
    """Without site-packages, as where nothing is installed: from any folder."""
    program = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; import quantsweep; print(quantsweep.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", program], env=module_variables(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(ROOT)


def test_what_pythonpath_names_is_found_and_its_empty_parts_are_not_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/mine", "", str(ROOT), "/too"]))
    variables = module_variables()
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/mine", "/too"]
    assert variables["PYTHONSAFEPATH"] == "1", "what a child starts is isolated too"
    assert module_command("quantsweep.running.child", "7")[1:] == ["-P", "-u", "-m", "quantsweep.running.child", "7"]
