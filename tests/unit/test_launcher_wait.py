"""`hydra.launcher.wait=true`: the process that waits takes the sweep's steps, and ends when nothing is left that it could wait for."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from quantsweep.hydra_plugin import launcher, sweeper
from quantsweep.launching.advance import StepSummary
from quantsweep.launching.refill import SubmitSummary
from quantsweep.launching.settle import settle
from quantsweep.slurm import SlurmUnavailable
from quantsweep.storage.lock import launch_lock
from quantsweep.storage.paths import SweepFolder
from tests.unit.engine_cases import Site, finish, submit, trial, write

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
    launcher.wait_for_end(sweep)
    assert script == [], "nothing but the last was taken for the end"
    assert pauses == [launcher.WAIT_SECONDS] * (len(BUSY) + 1)
    assert "no answer; asking again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wait", "state", "waits"), [(True, "in flight", True), (True, "waiting", True), (True, "done", False), (False, "in flight", False)]
)
def test_with_nothing_new_it_waits_for_what_older_launches_have_in_flight(
    sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch, state: str, *, wait: bool, waits: bool
) -> None:
    waited: list[SweepFolder] = []
    monkeypatch.setattr(sweeper, "wait_for_end", waited.append)
    write(sweep, [trial(2)])
    if state == "in flight":
        submit(sweep)
    elif state == "done":
        finish(sweep, trial(2))
    made = sweeper.QuantsweepSweeper()
    made._config = OmegaConf.create({"hydra": {"launcher": {"wait": wait}}})
    with launch_lock(sweep.plan / "launch.lock"):
        assert made._submit_older(sweep, settle(sweep), here=False) == []
    assert waited == [sweep] * waits
    assert len(site.submitted) == (state != "done"), "once, then or now"


def test_a_stock_launcher_has_no_such_option(sweep: SweepFolder, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "wait_for_end", lambda folder: pytest.fail("nobody asked"))
    write(sweep, [trial(2)])
    submit(sweep)
    made = sweeper.QuantsweepSweeper()
    made._config = OmegaConf.create({"hydra": {"launcher": {"_target_": "hydra.BasicLauncher"}}})
    with launch_lock(sweep.plan / "launch.lock"):
        made._submit_older(sweep, settle(sweep), here=False)
