"""Holds: files that workers look at between two trials, while others write and lift them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quantsweep import holds
from quantsweep.errors import ConfigurationError, ResultsError
from quantsweep.holds import Hold, cancelled, holding, read_holds, release
from quantsweep.paths import SweepFolder
from quantsweep.specs import QuantizationSpec
from tests.unit.engine_cases import trial


def test_what_is_saved_is_what_is_read(sweep: SweepFolder) -> None:
    made = [Hold(name="breaker-aa", by="breaker", filters=("model=m0", "bit_width=2"), because="x", count=3), cancelled(["bit_width=3,4"])]
    for hold in made:
        hold.save(sweep)
    assert read_holds(sweep) == sorted(made, key=lambda hold: hold.name)
    assert release(sweep) == 2
    assert (read_holds(sweep), release(sweep)) == ([], 0)


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
def test_a_hold_holds_what_its_filters_say(texts: list[str], held: bool) -> None:
    hold = cancelled(texts)
    assert hold.holds(trial(2)) == held
    assert (holding([hold], trial(2)) is hold) == held


def test_a_baseline_is_held_by_null() -> None:
    baseline = dataclasses.replace(
        trial(2), trial=dataclasses.replace(trial(2).trial, quantization=QuantizationSpec(method="none", method_version=1))
    )
    assert cancelled(["bit_width=null", "data_type=null"]).holds(baseline)


def test_an_outcome_cannot_be_held() -> None:
    with pytest.raises(ConfigurationError, match="status"):
        cancelled(["status=failed"]).holds(trial(2))


def test_a_hold_that_is_lifted_while_it_is_read_is_no_hold(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch lifts holds while workers look: that must not end a worker."""
    cancelled(["bit_width=2"]).save(sweep)
    genuine = Path.read_text

    def lifted(path: Path, *arguments: object) -> str:
        path.unlink(missing_ok=True)
        return genuine(path)

    monkeypatch.setattr(Path, "read_text", lifted)
    assert read_holds(sweep) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', '{"name": "x", "by": "cancel", "filters": [], "because": "", "more": 1}'])
def test_a_damaged_hold_is_said_by_name(sweep: SweepFolder, text: str) -> None:
    (sweep.holds / "cancel-1.json").write_text(text)
    with pytest.raises(ResultsError, match=r"cancel-1\.json"):
        read_holds(sweep)
    assert holds.release(sweep) == 1
