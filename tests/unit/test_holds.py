"""Holds: files that workers look at between two trials, while others write and lift them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quantsweep.errors import ConfigurationError, ResultsError
from quantsweep.failures.holds import Hold, cancelled, holding, read_holds
from quantsweep.planning.plan_files import read_header
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import QuantizationSpec, StepSpec
from tests.unit.engine_cases import trial, write


def test_what_is_saved_is_what_is_read(sweep: SweepFolder) -> None:
    made = [
        Hold(name="breaker-aa", by="breaker", filters=("model=m0", "bit_width=2"), because="x", up_to=4, count=3),
        cancelled(["bit_width=3,4"], sweep),
    ]
    assert read_holds(sweep) == []
    for hold in made:
        hold.save(sweep)
    assert read_holds(sweep) == sorted(made, key=lambda hold: hold.name)


@pytest.mark.parametrize(
    ("texts", "held"),
    [
        ([], True),
        (["bit_width=2"], True),
        (["bit_width=3"], False),
        (["model=m*", "bit_width=2,3"], True),
        (["model=m*", "bit_width=3"], False),
        (["task=u"], True),
        (["task=v"], False),
        (["block_size=null"], False),
    ],
)
def test_a_hold_holds_what_its_filters_say(sweep: SweepFolder, texts: list[str], held: bool) -> None:
    plan = write(sweep, [trial(2)])
    hold = cancelled(texts, sweep)
    assert hold.holds(trial(2), plan.name) == hold.names(trial(2)) == held
    assert (holding([hold], trial(2), plan.name) is hold) == held


def test_a_hold_is_in_force_for_the_launches_that_there_were_and_their_retries(sweep: SweepFolder) -> None:
    first = write(sweep, [trial(2)])
    retry = write(sweep, [trial(2)], root=first.name)
    hold = cancelled([], sweep)
    later = write(sweep, [trial(2)], root=first.name)
    launched = write(sweep, [trial(2)])
    roots = [read_header(path).root for path in (first, retry, later, launched)]
    assert [hold.holds(trial(2), root) for root in roots] == [True, True, True, False], "a retry is held with the launch it comes from"
    assert holding([hold], trial(2), launched.name) is None


def test_what_is_cancelled_before_anything_was_launched_holds_no_launch(sweep: SweepFolder) -> None:
    hold = cancelled([], sweep)
    assert not hold.holds(trial(2), write(sweep, [trial(2)]).name)


def test_a_baseline_is_held_by_null(sweep: SweepFolder) -> None:
    baseline = dataclasses.replace(
        trial(2), trial=dataclasses.replace(trial(2).trial, quantization=QuantizationSpec(rounding=StepSpec("none", 1)))
    )
    assert cancelled(["bit_width=null", "data_type=null"], sweep).names(baseline)


def test_an_outcome_cannot_be_held(sweep: SweepFolder) -> None:
    with pytest.raises(ConfigurationError, match="status"):
        cancelled(["status=failed"], sweep).names(trial(2))


def test_a_hold_that_is_lifted_while_it_is_read_is_no_hold(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody deletes it while workers look: that must not end a worker."""
    cancelled(["bit_width=2"], sweep).save(sweep)
    genuine = Path.read_text

    def lifted(path: Path, *arguments: object) -> str:
        path.unlink(missing_ok=True)
        return genuine(path)

    monkeypatch.setattr(Path, "read_text", lifted)
    assert read_holds(sweep) == []


DAMAGED = (
    '{"name": "x", "by": "cancel", "filters": [], "because": "", "up_to": 1, "more": 1}',
    '{"name": "x", "by": "cancel", "filters": []}',
)


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', *DAMAGED])
def test_a_damaged_hold_is_said_by_name(sweep: SweepFolder, text: str) -> None:
    (sweep.holds / "cancel-1.json").write_text(text)
    with pytest.raises(ResultsError, match=r"cancel-1\.json"):
        read_holds(sweep)
