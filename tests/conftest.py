"""Shared by all tests: no network, one thread a process, results in a folder of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests that share two cores by chance slow each other badly


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those of one file share a process and its fixtures, and there is one cluster at a time."""
    for item in items:
        is_of_cluster = (ROOT / "tests" / "slurm") in item.path.parents
        item.add_marker(pytest.mark.xdist_group("cluster" if is_of_cluster else item.path.stem))


Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run `python launch.py …` as a user would, with results under tmp_path/results."""

    def run(*arguments: str, expect: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch.py"), *arguments, f"results_dir={tmp_path / 'results'}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=tmp_path, check=False)
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def quantsweep_command(tmp_path: Path) -> Launch:
    """Run `quantsweep …` as a user would, from tmp_path."""

    def run(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quantsweep.cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
