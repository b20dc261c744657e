"""The mean of three perplexities, its difference to the baseline, and the classes of ZeroQuant-V2 with their bounds and their scope."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from analysis.sensitivity import TASKS, mean_perplexity, sensitivity, sensitivity_class
from quantsweep.errors import ConfigurationError


def rows(trial: str, values: tuple[float, ...] = (27.0, 32.0, 25.0), **changes: Any) -> list[dict[str, Any]]:
    about = {
        "trial_id": trial,
        "model": "opt-125m",
        "family": "opt",
        "model_content": "c",
        "dtype": "float16",
        **dict.fromkeys(("transform", "correction", "tuning", "compensation", "activation", "kv_cache"), "none"),
        **{"method": "round_to_nearest", "rounding": "round_to_nearest"},
    }
    about |= {"plant_channels": None, "plant_scale": None, "plant_seed": None, "metric": "perplexity", "window": 2048}
    return [about | {"task_key": task, "value": value} | changes for task, value in zip(TASKS, values, strict=False)]


NONE = {"method": "none", "rounding": "none"}
BASELINE = rows("base", (27.0, 32.0, 25.0), **NONE)


@pytest.mark.parametrize(
    ("increase", "expected"),
    [
        (-3.0, "Class-1"), (0.0, "Class-1"), (0.1, "Class-1"), (math.nextafter(0.1, 1), "Class-2"),
        (0.5, "Class-2"), (math.nextafter(0.5, 1), "Class-3"), (math.inf, "Class-3"), (math.nan, None),
    ],
)  # fmt: skip
def test_bounds_belong_to_the_better_class(increase: float, expected: str | None) -> None:
    assert sensitivity_class(increase) == expected


def test_the_mean_is_of_all_three_or_none() -> None:
    found = mean_perplexity(pd.DataFrame([*rows("a", (1.0, 2.0, 6.0)), *rows("b", (1.0, 2.0))]))
    assert found["a"] == 3.0
    assert math.isnan(found["b"])
    with pytest.raises(ConfigurationError, match="several rows for one perplexity"):
        mean_perplexity(pd.DataFrame([*rows("a"), *rows("a")]))


def test_a_planted_models_baseline_is_not_the_plain_models() -> None:
    """The weights' content is the same, and which of the two comes first does not matter."""
    planted = {"plant_channels": 4, "plant_scale": 16.0, "plant_seed": 0}
    theirs = rows("planted", (27.6, 32.6, 25.6), **NONE, **planted)
    for baselines in ([*theirs, *BASELINE], [*BASELINE, *theirs]):
        frame = pd.DataFrame([*baselines, *rows("x", (27.3, 32.6, 25.3)), *rows("y", (28.6, 33.6, 26.6), **planted)])
        found = sensitivity(frame)
        assert found.loc["x", "increase"] == pytest.approx(0.4)
        assert found.loc["y", "increase"] == pytest.approx(1.0)


def test_a_trial_is_held_against_its_own_models_baseline() -> None:
    other = {"model": "opt-1.3b", "model_content": "d"}
    quantized = [*rows("x", (27.3, 32.6, 25.3)), *rows("y", (11.0, 12.0, 13.03), **other)]
    frame = pd.DataFrame([*BASELINE, *quantized, *rows("z", (11.0, 12.0, 13.0), **NONE, **other)])
    found = sensitivity(frame)
    assert found.loc["x", "increase"] == pytest.approx(0.4)
    assert found.loc["y", "increase"] == pytest.approx(0.01)
    assert found["sensitivity"].to_dict() == {"base": "Class-1", "x": "Class-2", "y": "Class-1", "z": "Class-1"}
    assert found["out_of_scope"].isna().all()


def test_activations_alone_are_no_baseline() -> None:
    found = sensitivity(pd.DataFrame([*rows("w16a8", (28.0, 33.0, 26.0), **NONE, activation="per_token"), *BASELINE]))
    assert found.loc["w16a8", "increase"] == pytest.approx(1.0)
    assert found.loc["w16a8", "sensitivity"] == "Class-3"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"family": "mini-neox"}, "the classes are those of opt and bloom, not of mini-neox"),
        ({"plant_channels": 4}, "outliers were planted into the model"),
        ({"window": 256}, "its windows have 256 tokens, not 2048"),
        ({"model_content": "elsewhere"}, "its baseline has not been measured"),
        ({"dtype": "float32"}, "its baseline has not been measured"),
    ],
)
def test_what_the_classes_were_not_made_for_has_none_and_says_why(changes: dict[str, Any], why: str) -> None:
    found = sensitivity(pd.DataFrame([*BASELINE, *rows("x", (90.0, 90.0, 90.0), **changes)])).loc["x"]
    assert (found["sensitivity"], found["out_of_scope"]) == (None, why)


def test_other_protocols_and_limits_are_not_the_published_ones() -> None:
    short = [row | {"task_key": f"{row['task_key'].split('+')[0]}+limit5+{row['task_key'].split('+')[1]}"} for row in rows("x")]
    found = sensitivity(pd.DataFrame([*BASELINE, *short, *rows("y")[:2]]))
    assert found.loc["x", "out_of_scope"].startswith("it needs all of wikitext2@1+joined_paragraphs")
    assert found.loc["y", "sensitivity"] is None
