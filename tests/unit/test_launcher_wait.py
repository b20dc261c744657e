"""`hydra.launcher.wait=true`: the process that waits takes the sweep's steps, and ends when nothing is left that it could wait for."""

from __future__ import annotations

import pytest

from quantsweep.hydra_plugin import launcher
from quantsweep.launching.advance import StepSummary
from quantsweep.launching.refill import SubmitSummary
from quantsweep.paths import SweepFolder
from quantsweep.slurm import SlurmUnavailable

BUSY = (
    StepSummary(in_flight=1),
    StepSummary(unknown=1),
    StepSummary(submitted=SubmitSummary(shards=1)),
    StepSummary(submitted=SubmitSummary(waiting=1, refusal="no room")),
    SlurmUnavailable("no answer"),
)
OVER = (
    StepSummary(),
    StepSummary(given_up={"bug": 3}),
    StepSummary(submitted=SubmitSummary(waiting=1, budget_spent=True)),
    StepSummary(submitted=SubmitSummary(waiting=1, refused=("no such node",))),
)


@pytest.mark.parametrize("last", OVER)
def test_it_steps_until_nothing_runs_and_nothing_can_be_submitted(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: StepSummary
) -> None:
    script = [*BUSY, last]
    pauses: list[float] = []

    def step(folder: SweepFolder) -> StepSummary:
        assert folder == sweep
        now = script.pop(0)
        if isinstance(now, SlurmUnavailable):
            raise now
        return now

    monkeypatch.setattr(launcher, "step", step)
    monkeypatch.setattr(launcher.time, "sleep", pauses.append)
    launcher._wait(sweep)
    assert script == [], "nothing but the last was taken for the end"
    assert pauses == [launcher.WAIT_SECONDS] * (len(BUSY) + 1)
    assert "no answer; asking again" in capsys.readouterr().out
