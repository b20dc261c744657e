"""Tracking is a courtesy: whatever breaks in it, the trial and the shard go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantsweep import tracking
from quantsweep.paths import SweepFolder
from quantsweep.specs import RunSettings, options_tuple
from quantsweep.tracking import NoTracker, WandbTracker, make_tracker
from tests.unit.test_records import row

CONFIG = {"kind": "wandb", "project": "p", "entity": None, "mode": "offline"}


class BrokenRun:
    """A wandb run whose `log` or `finish` fails."""

    def __init__(self, breaks: str) -> None:
        self.breaks = breaks

    def log(self, data: dict[str, Any]) -> None:
        """Fail if asked to."""
        if self.breaks == "log":
            raise ConnectionError("no network")

    def finish(self) -> None:
        """Fail if asked to."""
        if self.breaks == "finish":
            raise ConnectionError("no network")


@pytest.mark.parametrize("breaks", ["log", "finish", "table"])
def test_a_failure_at_any_point_is_swallowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, breaks: str) -> None:
    def start(self: WandbTracker, config: Any, folder: SweepFolder, shard_id: int) -> None:
        self._run = BrokenRun(breaks)  # type: ignore[assignment]
        self._wandb = None  # type: ignore[assignment]  # breaks the table

    monkeypatch.setattr(tracking.WandbTracker, "_start", start)
    tracker = WandbTracker(CONFIG, SweepFolder(tmp_path), 0)
    tracker.log_evaluation(row("metrics"))
    tracker.finish()


def test_none_is_the_default(tmp_path: Path) -> None:
    assert isinstance(make_tracker(RunSettings(), SweepFolder(tmp_path), 0), NoTracker)
    assert options_tuple(CONFIG)[0] == ("entity", None)
