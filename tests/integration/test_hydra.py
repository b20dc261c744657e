"""Hydra's own launcher contract, and the stock launchers on our shards."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite

import quantsweep
from tests.conftest import Launch

WAIT = ["hydra.launcher.wait=true"]


def test_hydra_finds_the_launcher() -> None:
    assert "QuantsweepLauncher" in [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("quantsweep", WAIT)])
class TestLauncher(LauncherTestSuite):
    """Hydra's suite, in the mode that returns what the jobs returned."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=quantsweep", *WAIT])])
class TestIntegration(IntegrationTestSuite):
    """Hydra's integration suite."""


@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_stock_launchers_run_our_shards(launch: Launch, tmp_path: Path, launcher: str) -> None:
    if launcher == "submitit_local":
        importlib.metadata.version("hydra-submitit-launcher")
    arguments = ("-m", "model=mini-neox-0.3m", "bit_width=4,8", "task=mini_ppl", "limit=4", f"hydra/launcher={launcher}", "sweep=stock")
    launch(*arguments)
    assert set(quantsweep.load_trials(tmp_path / "results" / "stock").status) == {"done"}
    assert "nothing left to run" in launch(*arguments).stdout


def test_waiting_returns_after_the_shards_have_run(launch: Launch, tmp_path: Path) -> None:
    launch("-m", "model=mini-neox-0.3m", "bit_width=4,8", "task=mini_ppl", "limit=4", "sweep=waited", *WAIT)
    assert len(quantsweep.load_trials(tmp_path / "results" / "waited")) == 2
