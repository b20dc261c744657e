"""A typed method goes where a study quantizes; a plan says what was changed; conditions leave combinations out, with their reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from quantsweep.composing.composition import compose_base, make_request, search_folders
from quantsweep.composing.prepare import prepare
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.errors import ConfigurationErrors
from quantsweep.operations.messages import plan_text
from quantsweep.planning.plan import Expansion, expand


def expansion(*typed: str) -> Expansion:
    words = expand_shorthand(typed)
    cfg = compose_base(words)
    request = make_request(cfg, search_folders(cfg.hydra), words)
    return expand(request.schema, request.grids)


def study(folder: Path, text: str) -> list[str]:
    """The words that name a study with this text."""
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "own.yaml").write_text(f"# @package _global_\nsweep: own\n{text}")
    return ["+sweeps=own", f"hydra.searchpath=[file://{folder}]"]


def methods(found: Expansion) -> Counter[str]:
    return Counter(planned.trial.quantization.method for planned in found.trials)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["method=centering"], {"centering": 24, "none": 1}),
        (["method=centering,round_to_nearest"], {"centering": 24, "round_to_nearest": 24, "none": 1}),
        (["method=outlier_dependent", "method.options.fraction=0.1"], {"outlier_dependent": 24, "none": 1}),
        (["method=none"], {"none": 1}),
    ],
)
def test_a_typed_method_goes_where_a_study_quantizes(typed: list[str], expected: dict[str, int]) -> None:
    assert methods(expansion("+sweeps=quickstart", "model=mini-neox-0.3m", *typed)) == expected


GRIDS = """\
study:
  grids:
    - axes: {model: [mini-neox-0.3m], data_type: [int, fp], bit_width: [4, 16]}
    - axes: {model: [mini-neox-0.3m], method: [none, round_to_nearest, outlier_dependent], data_type: [dynamic]}
    - axes: {model: [mini-neox-0.3m], method: none, model.dtype: [bfloat16]}
"""


def test_baselines_stay_however_a_study_writes_them(tmp_path: Path) -> None:
    """As 16 bits on an axis, as one of several methods, and in a grid of their own."""
    found = expansion(*study(tmp_path, GRIDS), "method=centering")
    assert methods(found) == {"centering": 3, "none": 2}
    assert not found.skipped
    assert {p.trial.model.dtype for p in found.trials if p.trial.quantization.is_baseline} == {"float32", "bfloat16"}


def test_a_plan_lists_what_was_changed_grid_by_grid(tmp_path: Path) -> None:
    words = ["+sweeps=quickstart", "model=mini-neox-0.3m", "bit_width=5", "method=centering", "limit=3", f"results_dir={tmp_path}"]
    cfg = compose_base(words)
    plan = prepare(cfg, search_folders(cfg.hydra), words).plan
    said = [line.split("changed     ")[1] for line in plan_text(plan, title="", folder=tmp_path).splitlines() if "changed     " in line]
    first, second = "sweeps/quickstart.yaml, grid 1", "sweeps/quickstart.yaml, grid 2"
    models = "model=mini-neox-0.3m in place of"
    assert said[0] == "every grid: limit=3"
    assert said[1].startswith(f"{first}: method=centering; {models}")
    assert said[1].endswith("(7 values); bit_width=5 in place of 3,4,8")
    assert said[2].startswith(f"{second}: {models}")
    assert "bit_width" not in said[2]


def test_a_plan_of_a_study_as_it_is_lists_no_change(tmp_path: Path) -> None:
    words = ["+sweeps=quickstart", f"results_dir={tmp_path}", "workers=1"]
    cfg = compose_base(words)
    assert prepare(cfg, search_folders(cfg.hydra), words).plan.expansion.changes == ()


WHERE = """\
study:
  where:
    - exclude: {data_type: [fp, glob(quan*)], bit_width: "range(3,5)"}
      because: too coarse
  grids:
    - axes: {model: [mini-neox-0.3m, mini-opt-0.4m], data_type: [int, fp, quantile], bit_width: [3, 4, 8, 16]}
      where:
        - exclude: {model: mini-opt-0.4m, data_type: int, data_type.options.convention: kbit, block_size: 64}
          because: known already
        - exclude: {model.dtype: float16}
          because: nobody has it
"""


def test_conditions_leave_combinations_out_with_their_reason(tmp_path: Path) -> None:
    found = expansion(*study(tmp_path, WHERE))
    counts = {reason: count for reason, (count, _) in found.skipped.items()}
    assert counts == {
        "left out by sweeps/own.yaml, where 1: too coarse": 8,
        "left out by sweeps/own.yaml, grid 1, where 1: known already": 3,
        "left out by sweeps/own.yaml, grid 1, where 2: nobody has it": 0,
    }
    assert len(found.trials) == 3 + 2 + 2 + 2  # int of one model, 8 bit of the others, two baselines
    example = found.skipped["left out by sweeps/own.yaml, where 1: too coarse"][1]
    assert example.startswith("mini-neox-0.3m round_to_nearest fp 3-bit")


@pytest.mark.parametrize("condition", ["{method: none}", "{bit_width: 16}"])
def test_conditions_know_the_baseline(tmp_path: Path, condition: str) -> None:
    where = f"study:\n  where: [{{exclude: {condition}, because: done before}}]\n"
    found = expansion(*study(tmp_path, where + "  grids: [{axes: {model: [mini-neox-0.3m], bit_width: [4, 16]}}]\n"))
    assert methods(found) == {"round_to_nearest": 1}


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("{bit_width: 3}", "`where` is a list of `exclude:"),
        ("[{exclude: {bit_width: 3}}]", "`exclude: {KEY: VALUES, …}` and `because: REASON`"),
        ("[{exclude: {}, because: x}]", "`exclude: {KEY: VALUES, …}` and `because: REASON`"),
        ("[{exclude: bit_width < 4, because: x}]", "`exclude: {KEY: VALUES, …}` and `because: REASON`"),
        ("[{exclude: {bitwidth: 3}, because: x}]", "Did you mean 'bit_width'?"),
        ("[{exclude: {data_type: quantil}, because: x}]", "Did you mean 'quantile'?"),
        ("[{exclude: {data_type.options.convntion: kbit}, because: x}]", "no trial has the key 'data_type.options.convntion'"),
        ("[{exclude: {model.dtyp: float16}, because: x}]", "no trial has the key 'model.dtyp'"),
        ("[{exclude: {limit: 3}, because: x}]", "limit is asked of every trial and is no part of one"),
        ("[{exclude: {task: mini}, because: x}]", "task is asked of every trial and is no part of one"),
        ("[{exclude: {bit_width: 'range(3,9,0)'}, because: x}]", "a step that is not 0"),
        ("[{exclude: {bit_width: range(3,9)}, because: x}]", "in quotes where it stands in braces"),
    ],
)
def test_conditions_that_cannot_be_are_named(tmp_path: Path, where: str, said: str) -> None:
    text = f"study:\n  where: {where}\n  grids: [{{axes: {{model: [mini-neox-0.3m], bit_width: [4, 8]}}}}]\n"
    with pytest.raises(ConfigurationErrors) as caught:
        expansion(*study(tmp_path, text))
    assert said in str(caught.value)
    assert "sweeps/own.yaml, where" in str(caught.value) or "sweeps/own.yaml: `where`" in str(caught.value)
