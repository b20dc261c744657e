"""Fixtures of the engine's tests (tests/unit/engine_cases.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantsweep.paths import SweepFolder
from tests.unit import engine_cases


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    """An empty sweep folder."""
    folder = SweepFolder(tmp_path / "results" / "sweep")
    folder.create()
    return folder


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, sweep: SweepFolder) -> engine_cases.Site:
    """A cluster on paper in Slurm's place."""
    return engine_cases.install(monkeypatch, sweep)
