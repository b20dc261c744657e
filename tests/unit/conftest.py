"""Fixtures that several modules here use: the engine's (tests/unit/engine_cases.py) and the analysis' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from quantsweep.storage.paths import SweepFolder
from tests.conftest import ROOT
from tests.unit import engine_cases


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    """An empty sweep folder."""
    folder = SweepFolder(tmp_path / "results" / "sweep")
    folder.create()
    return folder


@pytest.fixture(autouse=True)
def _every_trial_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of paper take no time, of which a look would be a share."""
    monkeypatch.setattr("quantsweep.running.wanted.LOOK_SHARE", float("inf"))


@pytest.fixture(autouse=True)
def _new_names_are_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one machine looks: compaction need not wait until all hosts have seen a name."""
    monkeypatch.setattr("quantsweep.tables.compaction.NAME_SECONDS", 0.0)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, sweep: SweepFolder) -> engine_cases.Site:
    """A cluster on paper in Slurm's place."""
    return engine_cases.install(monkeypatch, sweep)


@pytest.fixture
def reference() -> pd.DataFrame:
    """The committed results of the quickstart."""
    return pd.read_parquet(ROOT / "results" / "reference" / "quickstart.parquet")


@pytest.fixture
def closed_figures() -> Iterator[None]:
    """What a test drew is let go after it."""
    yield
    import matplotlib.pyplot as plt

    plt.close("all")
