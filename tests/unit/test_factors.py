"""A trial as a pipeline of factors: what is typed, what a method supplies, what merges, what excludes what; from yamls, without code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from quantsweep.composing.composition import compose_base, make_request, search_folders
from quantsweep.composing.prepare import prepare
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.errors import ConfigurationError, ConfigurationErrors
from quantsweep.hydra_plugin.task import checked_arguments
from quantsweep.planning.conditions import facts_of
from quantsweep.planning.inapplicable import refuse_inapplicable
from quantsweep.planning.plan import Expansion, expand
from quantsweep.rounding._columns import WHOLE_TENSOR
from quantsweep.storage.paths import product_root
from quantsweep.tables.filters import PLAN_COLUMNS, parse
from quantsweep.tables.records import identity_columns
from quantsweep.trial.declared import check_component
from quantsweep.trial.quantization import FACTORS
from quantsweep.trial.specs import QuantizationSpec, TrialSpec

FREE = "capabilities: {needs_calibration: false, uses_seed: false%s}"
CALIBRATED = "capabilities: {needs_calibration: true, uses_seed: false%s}"
YAMLS = {
    "rounding/greedy": "version: 2\noptions: {damping: 0.01, order: true, chunk: 128}\n"
    "capabilities:\n  {needs_calibration: true, uses_seed: true, needs_data_type: true, data_types: [int, fp], ranges: {damping: [0, 1]},\n"
    "   needs: [{block_axis: [input], because: columns are rounded one after the other}]}",
    "transform/even": "version: 1\noptions: {alpha: 0.5}\nno_op: {alpha: 0}\n" + CALIBRATED % ", bounds: {alpha: [0, 1]}",
    "transform/turn": "version: 1\noptions: {size: 64}\n" + FREE % "",
    "clipping/grid": "version: 1\noptions: {steps: 100}\n" + FREE % "",
    "correction/carry": "version: 1\noptions: {}\n" + FREE % ", needs: [{rounding: [greedy], because: it follows its columns}]",
    "compensation/rest": "version: 1\noptions: {rank: 8}\nno_op: {rank: 0}\n"
    + FREE % ", excludes: [{transform: [turn], because: it is not its own inverse}]",
    "activation/rows": "version: 1\noptions: {}\ndata_type: int\ndata_type_options: {convention: absmax_full}\nbit_width: 8\n"
    "symmetric: true\n"
    "block_size: null\nclip_percentile: null\nsites: [linear]\n" + FREE % "",
    "method/published": "source: a paper\nfactors: {transform: [even], transform.even.options.alpha: 0.75, rounding: greedy,\n"
    "  rounding.options.damping: 0.05, block_axis: input, bit_width: 3, activation: rows, activation.bit_width: 6}",
    "method/greedy": "source: null\nfactors: {rounding: greedy, block_axis: input}",
    "method/old": "version: 1\noptions: {}\n" + FREE % ", needs_data_type: true, data_types: null",
    "method/odd": "source: null\nfactors: {roundin: greedy}",
}
"""Steps that planning can know from their yamls alone: no code of theirs is imported."""
TEXT = "calibration=mini"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    for path, text in YAMLS.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / f"{path}.yaml").write_text(f"name: {path.rpartition('/')[2]}\n{text}\n")
    return folder


def planned(folder: Path, *typed: str) -> Expansion:
    words = expand_shorthand([f"hydra.searchpath=[file://{folder}]", "model=mini-neox-0.3m", *typed])
    cfg = compose_base(words)
    request = make_request(cfg, search_folders(cfg.hydra), words)
    return expand(request.schema, request.grids)


def trials(folder: Path, *typed: str) -> list[TrialSpec]:
    return [each.trial for each in planned(folder, *typed).trials]


def one_trial(folder: Path, *typed: str) -> TrialSpec:
    (trial,) = trials(folder, *typed)
    return trial


def one(folder: Path, *typed: str) -> QuantizationSpec:
    return one_trial(folder, *typed).quantization


def test_a_method_supplies_what_nobody_else_does(steps: Path) -> None:
    spec = one(steps, "method=published", TEXT)
    assert (spec.rounding.name, spec.rounding.version, spec.rounding.option("damping"), spec.rounding.option("chunk")) == (
        "greedy",
        2,
        0.05,
        128,
    )
    assert [(step.name, step.option("alpha")) for step in spec.transforms] == [("even", 0.75)]
    assert (spec.bit_width, spec.block_axis, spec.method) == (3, "input", "published")
    assert spec.activation is not None
    assert (spec.activation.data_type, spec.activation.bit_width, dict(spec.activation.data_type_options)) == (
        "int",
        6,
        {"convention": "absmax_full"},
    )


def test_what_is_typed_or_an_axis_wins_over_the_method(steps: Path) -> None:
    typed = ("bit_width=4,8", "rounding.options.damping=0.1", "activation.bit_width=8", "transform=none", "activation.symmetric=true")
    specs = [trial.quantization for trial in trials(steps, "method=published", TEXT, *typed)]
    assert [(spec.bit_width, spec.rounding.option("damping"), spec.transforms) for spec in specs] == [(4, 0.1, ()), (8, 0.1, ())]
    assert {spec.activation.bit_width for spec in specs if spec.activation} == {8}
    assert {spec.method for spec in specs} == {"published+transform=none"}
    assert one(steps, "method=published", "rounding=round_to_nearest", "transform=turn", "bit_width=4").rounding.options == ()


def test_identity_is_the_factors_and_not_the_name(steps: Path) -> None:
    by_name, by_factors = (trials(steps, TEXT, *words)[0] for words in (("method=greedy",), ("rounding=greedy", "block_axis=input")))
    assert by_name.trial_id == by_factors.trial_id
    assert (by_name.calibration, by_name.seed) != (None, None)
    found = planned(
        steps,
        TEXT,
        "method=greedy,published",
        "rounding=greedy",
        "transform=none",
        "activation=none",
        "rounding.options.damping=0.05",
        "bit_width=3",
    )
    assert (len(found.trials), found.duplicates) == (1, 1), "two names for one thing merge"
    assert found.trials[0].trial.quantization.method == "greedy"


@pytest.mark.parametrize(
    ("words", "method", "bits"),
    [
        ("rounding=none activation=rows", "none+activation=rows", (None, 8)),
        ("method=none activation=rows", "none+activation=rows", (None, 8)),
        ("bit_width=16 activation=rows", "none+activation=rows", (None, 8)),
        ("activation=rows", "round_to_nearest+activation=rows", (4, 8)),
        ("activation=rows activation.bit_width=16", "round_to_nearest", (4, None)),
        ("rounding=none activation=rows activation.bit_width=16", "none", (None, None)),
        ("bit_width=16 clipping=grid,absmax", "none", (None, None)),
        ("compensation=rest compensation.options.rank=0", "round_to_nearest", (4, None)),
        ("compensation=rest", "round_to_nearest+compensation=rest", (4, None)),
        ("transform=[turn] bit_width=16", "none+transform=turn", (None, None)),
        ("transform=[even,turn] transform.even.options.alpha=0", "round_to_nearest+transform=turn", (4, None)),
    ],
)
def test_weights_activations_both_or_neither_and_what_moves_nothing(
    steps: Path, words: str, method: str, bits: tuple[int | None, int | None]
) -> None:
    spec = one(steps, *words.split())
    assert spec.method == method
    assert (spec.bit_width, spec.activation.bit_width if spec.activation else None) == bits
    assert spec.is_baseline == (method == "none")


def test_sites_are_a_set(steps: Path) -> None:
    ids = {one_trial(steps, "activation=rows", f"activation.sites=[{sites}]").trial_id for sites in ("linear,q", "q,linear", "q,linear,q")}
    assert len(ids) == 1


def test_lists_of_transforms_are_values_of_an_axis(steps: Path) -> None:
    specs = [t.quantization for t in trials(steps, TEXT, "transform=none,[even],[even,turn],[turn,even]", "transform.even.options.alpha=1")]
    assert [[step.label for step in spec.transforms] for spec in specs] == [
        [], ["even alpha=1.0"], ["even alpha=1.0", "turn size=64"], ["turn size=64", "even alpha=1.0"],
    ]  # fmt: skip
    assert len({spec.label for spec in specs}) == 4
    with pytest.raises(ConfigurationError, match="names a step twice"):
        trials(steps, "transform=[turn,turn]")


def test_calibration_and_seed_are_part_of_a_trial_only_where_a_step_asks(steps: Path) -> None:
    plain, both = trials(steps, TEXT, "method=round_to_nearest,greedy", "bit_width=3", "seed=5")
    assert (plain.calibration, plain.seed, both.seed) == (None, None, 5)
    assert both.calibration is not None
    (even,) = trials(steps, TEXT, "transform=even")
    assert even.calibration is not None
    assert even.seed is None
    with pytest.raises(ConfigurationError, match=r"rounding greedy and transform even need calibration text, got calibration=none"):
        trials(steps, "method=published", "calibration=none")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("rounding=greedy", "rounding 'greedy' needs block_axis input; got flat: columns are rounded one after the other"),
        ("method=greedy data_type=nf", "rounding 'greedy' works with data_type int or fp; got nf"),
        ("correction=carry", "correction 'carry' needs rounding greedy; got round_to_nearest: it follows its columns"),
        ("transform=[turn] compensation=rest", "compensation 'rest' excludes transform turn: it is not its own inverse"),
        ("transform=even transform.even.options.alpha=2", "'even' needs transform.even.options.alpha at least 0 and at most 1; got 2.0"),
        ("activation=rows activation.bit_width=1", "activation 'rows' in data_type 'int' supports bit_width 2–8; got 1"),
        ("activation=rows activation.symmetric=false", "with symmetric=false supports convention gptq, awq or deepspeed; got absmax_full"),
        ("method=greedy bit_width=16", "supports bit_width 2–8; got 16. 16 bits are the unquantized baseline, method=none"),
        ("method=awq bit_width=16", "'awq_scale' excludes rounding none (16 bits are the unquantized baseline, method=none): "),
        ("calibration.sequence_length=257 method=gptq", "the model's context has 256; give calibration.sequence_length=256"),
        ("method=greedy rounding.options.chunk=0.5", r"rounding.options.chunk must be a whole number, got 0.5"),
        ("method=old", "method old: its yaml is that of a step, which a method names now: move it to rounding/old.yaml"),
        ("method=odd", "method odd: its yaml: unknown factor 'roundin'"),
        ("rounding=gredy", "gredy"),
        ("rounding.options.dampin=0.1 method=greedy", "Did you mean 'rounding.options.damping'"),
        ("transform=turning", "turning"),
    ],
)  # fmt: skip
def test_what_cannot_be_says_why(steps: Path, words: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        trials(steps, TEXT, *words.split())
    assert reason in str(caught.value)


@pytest.mark.parametrize("data_type", ["quantile", "nvfp4"])
def test_levels_of_the_whole_tensor_are_not_refit_group_by_group(steps: Path, data_type: str) -> None:
    """What GPTQ would refuse trial by trial; channels, and groups that are chosen beforehand, it takes."""
    words = (TEXT, "method=gptq", f"data_type={data_type}", "bit_width=4")
    assert len(trials(steps, *words, "block_size=null")) == len(trials(steps, *words, "rounding.options.static_groups=true")) == 1
    with pytest.raises(ConfigurationError) as caught:
        trials(steps, *words)
    assert f"rounding 'gptq' with data_type={data_type}, options.static_groups=false needs block_size null; got " in str(caught.value)
    assert WHOLE_TENSOR in str(caught.value)
    found = planned(steps, *words[:2], f"data_type=int,{data_type}", "bit_width=4", "block_size=64,null")
    assert (len(found.trials), [count for count, _ in found.skipped.values()]) == (3, [1])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{options.rank: [8], because: so}", None),
        ("{when: {options.rank: [8]}, data_type: [int], because: so}", None),
        ("{options.rang: [8], because: so}", "capabilities.needs names unknown key 'options.rang'"),
        ("{when: {options.rang: [8]}, data_type: [int], because: so}", "capabilities.needs names unknown key 'options.rang'"),
        ("{when: {options.rank: [8]}, because: so}", "each of capabilities.needs is {KEY: [VALUES], because: REASON}"),
        ("{data_type: int, because: so}", "each of capabilities.needs is {KEY: [VALUES], because: REASON}"),
    ],
)
def test_what_a_step_needs_may_name_its_own_options(entry: str, said: str | None) -> None:
    text = (
        f"{{name: rest, version: 1, options: {{rank: 8}}, capabilities: {{needs_calibration: false, uses_seed: false, needs: [{entry}]}}}}"
    )
    if said is None:
        check_component("compensation", yaml.safe_load(text))
    else:
        with pytest.raises(ConfigurationError) as caught:
            check_component("compensation", yaml.safe_load(text))
        assert said in str(caught.value)


def test_on_an_axis_it_is_counted_with_the_reason(steps: Path) -> None:
    found = planned(steps, TEXT, "method=greedy,round_to_nearest", "correction=none,carry", "bit_width=4")
    assert [p.trial.quantization.method for p in found.trials] == ["greedy", "greedy+correction=carry", "round_to_nearest"]
    assert [count for count, _ in found.skipped.values()] == [1]


def test_a_typed_factor_goes_where_a_study_quantizes(steps: Path) -> None:
    found = planned(steps, "+sweeps=quickstart", "activation=rows", "bit_width=4", "data_type=int")
    assert [p.trial.quantization.method for p in found.trials] == ["round_to_nearest+activation=rows"] * 2 + ["none"]


def test_a_step_without_code_is_refused_before_anything_runs(steps: Path, tmp_path: Path) -> None:
    words = expand_shorthand([f"hydra.searchpath=[file://{steps}]", "model=mini-neox-0.3m", "clipping=grid", f"results_dir={tmp_path}"])
    cfg = compose_base(words)
    with pytest.raises(ConfigurationError, match=r"clipping grid has a yaml and no code: write quantsweep/clipping/grid\.py"):
        prepare(cfg, search_folders(cfg.hydra), words)


def test_each_factor_is_a_column(steps: Path) -> None:
    (trial,) = trials(steps, "method=published", TEXT, "compensation=rest", "transform=[even]")
    columns = identity_columns(trial)
    assert {factor: columns[factor] for factor in FACTORS} == {
        **{"rounding": "greedy", "transform": "even", "clipping": "absmax", "correction": "none", "tuning": "none", "compensation": "rest"},
        **{"activation": "rows", "kv_cache": "none", "scope": "none"},
    }
    assert (columns["method"], columns["activation_bit_width"], columns["calibration"]) == ("published+compensation=rest", 6, "mini")
    assert json.loads(columns["step_options"]) == {
        **{"transform.even.alpha": 0.75, "compensation.rank": 8, "activation.data_type": "int", "activation.symmetric": True},
        **{"activation.convention": "absmax_full", "activation.sites": "linear"},
    }
    assert json.loads(columns["method_options"]) == {"chunk": 128, "damping": 0.05, "order": True}


def test_conditions_and_filters_know_factors(steps: Path) -> None:
    found = planned(steps, "compensation=none,rest", "transform=none,[turn],[even]", TEXT, "bit_width=4")
    kept = parse(["compensation=rest", "transform=even"], PLAN_COLUMNS)
    matched = [p.trial.quantization.method for p in found.trials if kept.matches_planned(p)]
    assert matched == ["round_to_nearest+transform=even+compensation=rest"]
    facts = [facts_of(p.trial) for p in found.trials]
    assert [(f["compensation"], f["transform"]) for f in facts][:2] == [("none", "none"), ("none", "turn")]
    assert [f.get("transform.even.options.alpha") for f in facts if f["transform"] == "even"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("clipping=grid bit_width=16", "clipping=grid would change nothing"),
        ("compensation=rest compensation.options.rank=0", "compensation=rest would change nothing"),
        (
            "activation=rows rounding=none block_size=64",
            "weights that stay at 16 bit have no block_size: block_size=64",
        ),
        (
            "activation=rows activation.bit_width=16",
            "activation=rows would change nothing: activation.bit_width=16 leaves them as they are",
        ),
        ("activation=rows bit_width=16", None),
        ("clipping=grid,absmax bit_width=4,16", None),
    ],
)
def test_a_step_that_is_in_no_trial_is_refused(steps: Path, words: str, said: str | None) -> None:
    typed = dict(word.split("=") for word in words.split())
    found = trials(steps, *words.split())
    if said is None:
        refuse_inapplicable(found, typed)
        return
    with pytest.raises(ConfigurationErrors, match=said):
        refuse_inapplicable(found, typed)


def test_one_trial_is_what_hydra_composes_by_itself(steps: Path) -> None:
    """Without -m Hydra gets the words as they are: options of steps that only the method chooses, and lists, are no mistakes there."""
    typed = [
        *(TEXT, "method=published", "rounding.options.damping=0.1", "transform=[turn,even]", "transform.even.options.alpha=0.25"),
        *("activation.bit_width=4", "clipping=grid", "clipping.options.steps=7"),
    ]
    words = checked_arguments([f"hydra.searchpath=[file://{steps}]", "model=mini-neox-0.3m", *typed])
    with initialize_config_dir(config_dir=str(product_root() / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=words, return_hydra_config=True)
    request = make_request(cfg, search_folders(cfg.hydra), words)
    (found,) = expand(request.schema, request.grids).trials
    assert found.trial == one_trial(steps, *typed)
    spec = found.trial.quantization
    assert spec.clipping is not None
    assert (spec.rounding.option("damping"), [step.name for step in spec.transforms], spec.clipping.option("steps")) == (
        0.1,
        ["turn", "even"],
        7,
    )
