"""What a trial's configuration resolves to is what Hydra would compose for that trial alone; mistakes are named."""

from __future__ import annotations

import dataclasses
import random
import shutil
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from quantsweep.composing.command_line import check_command_line
from quantsweep.composing.composition import Request, compose_base, make_request, plain, search_folders
from quantsweep.composing.prepare import Prepared, prepare
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.data_types._base import fake_quantize
from quantsweep.errors import ConfigurationError, ConfigurationErrors
from quantsweep.planning.plan import expand
from quantsweep.planning.schema import SECTIONS, Schema
from quantsweep.storage.paths import product_root
from quantsweep.trial.quantization import FACTORS
from quantsweep.trial.registry import DATA_TYPES, data_type_of
from quantsweep.trial.specs import PlannedTrial, PlantedOutliers, QuantizationSpec, Resources

GRIDS = [
    ["model=mini-neox-0.3m,mini-opt-1.1m", "data_type=int,fp,quantile", "bit_width=range(3,9)", "block_size=64,1024,tensor"],
    ["model=glob(mini-*)", "method=none,round_to_nearest", "model.dtype=float32,float16", "task=mini_ppl,mini"],
    ["data_type=fp", "data_type.options.exponent_bits=2,3", "data_type.options.subnormal=appendix,ieee", "seed=0,1", "limit=5"],
    ["model=mini-neox-0.3m", "model.dtype=bfloat16", "bit_width=4", "symmetric=true", "num_fewshot=0,2", "scale_dtype=float32"],
    ["model=mini-neox-0.3m,mini-opt-1.1m", "model.plant_outliers.channels=2,4", "model.plant_outliers.scale=1,10"],
    ["rounding=outlier_dependent", "rounding.options.fraction=0.05,0.1", "clipping=absmax", "bit_width=3,4"],
]


def request(*arguments: str) -> Request:
    expanded = expand_shorthand(arguments)
    cfg = compose_base(expanded)
    return make_request(cfg, search_folders(cfg.hydra), expanded)


def as_override(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("arguments", GRIDS, ids=["formats", "models", "options", "scalars", "planted", "factors"])
def test_candidates_equal_hydras_own_composition(arguments: list[str]) -> None:
    asked = request(*arguments)
    fixed = [a for a in arguments if a.split("=")[0] not in {axis.key for axis in asked.grids[0].axes}]
    candidates = list(asked.grids[0].candidates())
    for candidate in random.Random(0).sample(candidates, min(8, len(candidates))):
        overrides = [*fixed, *(f"{key}={as_override(value)}" for key, value in candidate.items())]
        with initialize_config_dir(config_dir=str(product_root() / "conf"), version_base="1.3"):
            alone = OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)
        assert isinstance(alone, dict)
        for section in SECTIONS:
            assert asked.schema.section(section, candidate) == alone[section]
        for key, value in candidate.items():
            if "." not in key and key not in SECTIONS:
                assert alone[key] == value


# --- the same, over whatever Hypothesis types -----------------------------------------------------------------------------

CALIBRATED = """\
name: calibrated
version: 3
options: {damping: 0.01, order: null}
capabilities: {needs_data_type: true, needs_calibration: true, uses_seed: true, data_types: null}
"""
CALIBRATION = "name: {name}\nhub_id: d/{name}\nfiles: a.parquet\nnum_samples: 128\nsequence_length: 2048\nseed: 0\n"
VALUES: dict[str, list[Any]] = {
    "model": ["mini-neox-0.3m", "mini-opt-0.4m", "opt-125m", "mini-neox-6.0m", "opt-175b"],
    "method": ["none", "round_to_nearest", "outlier_dependent"],
    "rounding": ["none", "round_to_nearest", "calibrated"],
    "data_type": ["int", "fp", "quantile", "dynamic", "mxfp", "nvfp4", "af4"],
    "calibration": ["some", "other"],
    "task": ["mini_ppl", "mini", "piqa", "zero_shot"],
    "bit_width": [2, 3, 4, 8, 16],
    "block_size": [16, 64, 1024, "tensor", None, "auto"],
    "block_axis": [None, "flat", "input"],
    "symmetric": [None, True, False],
    "scale_dtype": [None, "float16", "float32", "e8m0"],
    "limit": [None, 1, 50],
    "num_fewshot": [None, 0, 5],
    "seed": [0, 1, 7],
    "model.dtype": ["float16", "float32"],
    "model.plant_outliers.channels": [None, 2],
    "model.plant_outliers.scale": [1, 1.5, 8],
    "data_type.options.exponent_bits": [None, 1, 2, 3],
    "data_type.options.subnormal": ["appendix", "body", "ieee"],
    "data_type.options.scale_mode": ["floor", "even"],
    "data_type.options.convention": ["kbit", "gptq", "deepspeed"],
    "rounding.options.damping": [0.01, 0.5],
    "calibration.num_samples": [16, 128],
}
BASE = {
    "model": "mini-neox-6.0m",
    "method": "round_to_nearest",
    "rounding": "round_to_nearest",
    "data_type": "int",
    "calibration": "none",
    "task": "mini",
}
"""Choices of conf/config.yaml: what Hydra composes for a section that is an axis."""
ABSENT = BASE | {"rounding": "calibrated", "calibration": "some"}
"""What is typed for a section of which nothing is drawn."""


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rounding that uses calibration text and a seed, and two such texts, in a folder of one's own."""
    folder = tmp_path_factory.mktemp("components")
    for name, text in (
        ("rounding/calibrated", CALIBRATED),
        *((f"calibration/{n}", CALIBRATION.format(name=n)) for n in VALUES["calibration"]),
    ):
        (folder / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@st.composite
def command_lines(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Keys with one value (typed) or several (an axis); where Hydra itself would refuse an option, it is not typed."""
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=4, max_size=9, unique=True))
    line = {key: draw(st.lists(st.sampled_from(VALUES[key]), min_size=1, max_size=3, unique=True)) for key in sorted(keys)}
    for key in [key for key in line if "." in key]:
        section = key.split(".")[0]
        options = line.get(section, [ABSENT[section]])
        is_typed = len(line[key]) == 1
        in_play = [*options, BASE[section]] if is_typed and len(options) > 1 else options
        if not (all if is_typed else any)(has_key(option, key) for option in in_play):
            del line[key]
    return line


@cache
def has_key(option: str, key: str) -> bool:
    """True if the yaml of an option has a dotted key, as `data_type.options.subnormal` of fp, or conf/config.yaml has it for all."""
    if key.startswith("model.plant_outliers."):
        return True
    section, *path, last = key.split(".")
    if option in VALUES["calibration"]:
        node = OmegaConf.create(CALIBRATION.format(name=option))
    elif option == "calibrated":
        node = OmegaConf.create(CALIBRATED)
    else:
        node = OmegaConf.load(product_root() / "conf" / section / f"{option}.yaml")
    for part in path:
        node = node[part]
    return last in node


def outcome(schema: Schema, candidate: dict[str, Any]) -> Any:
    """What a candidate comes to, or the words in which it is refused."""
    try:
        return schema.resolve(candidate)
    except ConfigurationError as error:
        return str(error)


# (no shrinking: each step of it composes some configurations, and the command line that failed is short anyway)
@settings(max_examples=40, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(line=command_lines(), choice=st.randoms(use_true_random=False))
def test_any_candidate_resolves_as_if_hydra_had_composed_it_alone(components: Path, line: dict[str, list[Any]], choice: Any) -> None:
    path = f"hydra.searchpath=[file://{components}]"
    first = {section: option for section, option in ABSENT.items() if section not in line}
    typed = [f"{key}={as_override(value)}" for key, value in first.items()]
    grid = request(path, *typed, *(f"{key}={','.join(map(as_override, values))}" for key, values in line.items()))
    candidates = list(grid.grids[0].candidates())
    assert len(candidates) == prod(map(len, line.values()))
    for candidate in candidates:  # as planning does, so that what is remembered of one candidate could spoil another
        outcome(grid.schema, candidate)
    for candidate in choice.sample(candidates, min(2, len(candidates))):
        whole = {**first, **{key: values[0] for key, values in line.items()}, **candidate}
        applicable = {key: value for key, value in whole.items() if "." not in key or has_key(whole[key.split(".")[0]], key)}
        alone = request(path, *(f"{key}={as_override(value)}" for key, value in applicable.items()))
        (same,) = alone.grids[0].candidates()  # factors are axes also where they are typed once
        assert outcome(grid.schema, candidate) == outcome(alone.schema, same)
        for section in SECTIONS:
            assert grid.schema.section(section, candidate) == alone.schema.section(section, same)
            assert section in FACTORS or grid.schema.section(section, candidate) == alone.base[section]


def test_a_study_is_refined_on_the_command_line() -> None:
    whole = expand(*schema_and_grids("+sweeps=quickstart"))
    assert len(whole.trials) == 175
    one = expand(*schema_and_grids("+sweeps=quickstart", "model=mini-neox-0.3m", "bit_width=5"))
    assert len(one.trials) == 4 * 2 + 1
    assert {p.trial.quantization.bit_width for p in one.trials} == {5, None}


def schema_and_grids(*arguments: str) -> tuple[Any, Any]:
    asked = request(*arguments)
    return asked.schema, asked.grids


@pytest.mark.parametrize(
    "arguments",
    [["model=mini-neox-0.3m,mini-opt-0.4m"], ["model=pythia-70m", f"model.revision={'a' * 40},{'b' * 40}"]],
    ids=["paths", "revisions"],
)
def test_different_models_of_one_name_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigurationErrors, match=r"are different models of one name, m, .*model\.name=…"):
        expand(*schema_and_grids(*arguments, "model.name=m"))


def test_variants_and_copies_of_one_model_may_bear_its_name(tmp_path: Path) -> None:
    folders = [shutil.copytree(product_root() / "quantsweep/mini/models/mini-neox-0.3m", tmp_path / name / "m") for name in "ab"]
    models = f"model={','.join(map(str, folders))}"
    expansion = expand(
        *schema_and_grids(models, "model.dtype=float16,float32", "model.plant_outliers.channels=2", "model.plant_outliers.scale=1,4")
    )
    assert (len(expansion.trials), expansion.duplicates) == (4, 4)


def test_sixteen_bit_has_no_block_size_and_is_merged() -> None:
    expansion = expand(*schema_and_grids("bit_width=4,16", "block_size=64,128,256"))
    assert len(expansion.trials) == 4
    assert expansion.duplicates == 2


def test_default_options_written_out_are_the_same_trial() -> None:
    expansion = expand(*schema_and_grids("data_type=fp", "data_type.options.exponent_bits=null,2,3"))
    assert len(expansion.trials) == 2
    assert expansion.duplicates == 1


def test_an_option_that_a_data_type_does_not_have_is_merged_on_an_axis() -> None:
    expansion = expand(*schema_and_grids("data_type=int,fp", "data_type.options.exponent_bits=2,3"))
    assert len(expansion.trials) == 3
    assert expansion.duplicates == 1


def quantizations(*arguments: str) -> list[QuantizationSpec]:
    return [p.trial.quantization for p in expand(*schema_and_grids(*arguments)).trials]


def test_what_is_not_asked_is_the_data_types_own() -> None:
    found = {q.data_type: (q.block_size, q.block_axis, q.scale_dtype) for q in quantizations("data_type=glob(*)", "bit_width=4,8")}
    assert found.pop("mxfp") == (32, "input", "e8m0")
    assert found.pop("nvfp4") == (16, "input", "e4m3")
    assert found.pop("fp8") == (64, "flat", "float32")
    assert found == dict.fromkeys(("int", "fp", "quantile", "dynamic", "nf", "af4"), (64, "flat", "float16"))


def test_the_defaults_written_out_are_the_same_trial() -> None:
    asked = [*schema_and_grids("data_type=mxfp", "block_size=auto,32", "scale_dtype=null,e8m0", "data_type.options.exponent_bits=null,2")]
    expansion = expand(*asked)
    assert len(expansion.trials) == 1
    assert expansion.duplicates == 7


def test_other_block_sizes_of_mx_are_allowed_and_labelled() -> None:
    found = quantizations("data_type=mxfp,nvfp4", "block_size=16,32,64,tensor,null")
    assert len(found) == 10
    assert {(q.data_type, q.block_size) for q in found} == {(d, b) for d in ("mxfp", "nvfp4") for b in (16, 32, 64, "tensor", None)}


def test_scales_that_a_data_type_does_not_have_are_skipped_with_the_reason() -> None:
    expansion = expand(*schema_and_grids("data_type=int,mxfp,nvfp4", "scale_dtype=float16,e4m3,e8m0"))
    found = {p.trial.quantization.data_type: p.trial.quantization.scale_dtype for p in expansion.trials}
    assert found == {"int": "float16", "mxfp": "e8m0", "nvfp4": "e4m3"}
    assert set(expansion.skipped) == {
        "data_type 'int' supports scale_dtype float16, bfloat16 or float32; got e4m3.",
        "data_type 'int' supports scale_dtype float16, bfloat16 or float32; got e8m0.",
        "data_type 'mxfp' supports scale_dtype e8m0; got float16.",
        "data_type 'mxfp' supports scale_dtype e8m0; got e4m3.",
        "data_type 'nvfp4' supports scale_dtype e4m3; got float16.",
        "data_type 'nvfp4' supports scale_dtype e4m3; got e8m0.",
    }


def test_scales_that_one_trial_cannot_have_are_refused() -> None:
    with pytest.raises(ConfigurationErrors, match="data_type 'mxfp' supports scale_dtype e8m0; got float16"):
        expand(*schema_and_grids("data_type=mxfp", "scale_dtype=float16"))


def test_a_codebook_of_ones_own_is_a_yaml(tmp_path: Path) -> None:
    own_codebook(tmp_path, "mine", "[-1, -0.5, 0, 0.25, 1]")
    path = f"hydra.searchpath=[file://{tmp_path}]"
    [alone] = quantizations(path, "data_type=mine", "bit_width=3")
    swept = quantizations(path, "data_type=int,mine", "bit_width=3,4")
    assert [q.data_type for q in swept] == ["int", "int", "mine"]
    assert alone == swept[2]
    assert dict(alone.data_type_options) == {"levels": (-1.0, -0.5, 0.0, 0.25, 1.0)}
    weight = torch.tensor([[2.0, -0.9, 0.4, 0.1]])
    assert fake_quantize(data_type_of(alone), weight, alone).tolist() == [[2.0, -1.0, 0.5, 0.0]]


def test_a_plan_that_travels_keeps_the_levels() -> None:
    [planned] = expand(*schema_and_grids("data_type=af4")).trials
    again = PlannedTrial.from_json(planned.to_json())
    assert again == planned
    assert data_type_of(again.trial.quantization) is DATA_TYPES["codebook"]
    assert "levels" not in planned.trial.label


def test_whole_numbers_among_levels_make_no_other_trial(tmp_path: Path) -> None:
    path, ids = f"hydra.searchpath=[file://{tmp_path}]", []
    for levels in ("[-1, 0, 1]", "[-1.0, -0.0, 1.0]"):
        own_codebook(tmp_path, "mine", levels)
        ids.append(expand(*schema_and_grids(path, "data_type=mine", "bit_width=2")).trials[0].trial.trial_id)
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ("[-1, 0, 0.5, 0.2, 1]", "levels must rise from one to the next, got 0.5 before 0.2"),
        ("[-1, 0, 0, 1]", "levels must rise from one to the next, got 0 before 0"),
        ("[-1, -0.5, 0.5, 1]", "levels must contain 0"),
        ("[-0.5, 0, 0.7]", "the largest magnitude of the levels must be 1, got 0.7"),
        ("[-2, 0, 1]", "the largest magnitude of the levels must be 1, got 2"),
        ("[-1, 0, a]", "levels must be a list of numbers"),
        ("[-1, 0, .nan]", "levels must be a list of numbers"),
        ("[]", "levels must contain 0"),
        ("some", "levels must be a list of numbers, got 'some'"),
    ],
)
def test_levels_that_are_no_codebook_are_refused(tmp_path: Path, levels: str, said: str) -> None:
    own_codebook(tmp_path, "mine", levels)
    with pytest.raises(ConfigurationErrors, match="data_type mine: ") as caught:
        expand(*schema_and_grids(f"hydra.searchpath=[file://{tmp_path}]", "data_type=mine", "bit_width=2"))
    assert said in str(caught.value)


def test_levels_belong_to_one_bit_width(tmp_path: Path) -> None:
    own_codebook(tmp_path, "mine", "[-1, -0.5, 0, 0.25, 1]")
    expansion = expand(*schema_and_grids(f"hydra.searchpath=[file://{tmp_path}]", "data_type=int,mine", "bit_width=2,3,4"))
    assert [p.trial.quantization.bit_width for p in expansion.trials if p.trial.quantization.data_type == "mine"] == [3]
    assert "data_type 'mine': its 5 levels are codes of 3 bits; got bit_width=4" in expansion.skipped


def test_a_copied_yaml_must_not_keep_its_name(tmp_path: Path) -> None:
    own_codebook(tmp_path, "mine", "[-1, 0, 1]", name="af4")
    for value in ("mine", "mine,int"):
        with pytest.raises(ConfigurationError, match=r"data_type/mine\.yaml says name: af4.* write name: mine"):
            schema_and_grids(f"hydra.searchpath=[file://{tmp_path}]", f"data_type={value}")


def test_a_yaml_without_all_capabilities_is_refused(tmp_path: Path) -> None:
    text = own_codebook(tmp_path, "mine", "[-1, 0, 1]").read_text()
    (tmp_path / "data_type" / "mine.yaml").write_text(text.replace("  block_size: 64\n", "").replace("  scale_dtype: float16\n", ""))
    with pytest.raises(ConfigurationErrors, match=r"lacks capabilities\.block_size, capabilities\.scale_dtype"):
        expand(*schema_and_grids(f"hydra.searchpath=[file://{tmp_path}]", "data_type=mine", "bit_width=2"))


def own_codebook(folder: Path, stem: str, levels: str, name: str | None = None) -> Path:
    """A copy of af4 with other levels, that claims every bit width."""
    data = yaml.safe_load((product_root() / "conf" / "data_type" / "af4.yaml").read_text())
    data |= {"name": name or stem, "options": {"levels": yaml.safe_load(levels)}}
    data["capabilities"]["bit_widths"] = list(range(1, 9))
    path = folder / "data_type" / f"{stem}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(data))
    return path


def test_tasks_on_an_axis_are_evaluations_of_one_trial() -> None:
    expansion = expand(*schema_and_grids("task=mini_ppl,mini_cloze"))
    assert [[task.name for task in p.tasks] for p in expansion.trials] == [["mini_ppl", "mini_cloze"]]


def test_a_meaningless_combination_is_skipped_with_its_reason() -> None:
    expansion = expand(*schema_and_grids("data_type=int,fp", "bit_width=2,4"))
    assert len(expansion.trials) == 3
    [(reason, (count, _))] = expansion.skipped.items()
    assert "fp" in reason
    assert count == 1


def test_outliers_are_planted_by_a_dose_and_a_scale_of_one_is_the_plain_model() -> None:
    plain = expand(*schema_and_grids("bit_width=3,4")).trials
    doses = expand(*schema_and_grids("bit_width=3,4", "model.plant_outliers.channels=2,4", "model.plant_outliers.scale=1,8,16"))
    assert doses.duplicates == 2  # no channels of scale 1 are no channels of scale 1
    assert len(doses.trials) == 2 * (1 + 4)
    assert {p.trial.trial_id for p in plain} < {p.trial.trial_id for p in doses.trials}
    planted = {p.trial.model.plant_outliers for p in doses.trials}
    assert planted == {None, *(PlantedOutliers(channels=c, scale=s) for c in (2, 4) for s in (8.0, 16.0))}


@pytest.mark.parametrize("typed", ["channels=-3", "channels=x", "seed=half"])
def test_a_planted_scale_of_1_hides_no_mistake(typed: str) -> None:
    with pytest.raises(ConfigurationError, match=r"plant_outliers"):
        expand(*schema_and_grids("model.plant_outliers.scale=1", f"model.plant_outliers.{typed}"))


def test_a_model_yaml_may_plant_outliers_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = (product_root() / "conf" / "model" / "mini-opt-0.4m.yaml").read_text()
    (tmp_path / "model" / "own.yaml").write_text(f"{text}\nplant_outliers: {{channels: 3, scale: 4}}\n")
    path = f"hydra.searchpath=[file://{tmp_path}]"
    for arguments in ([path, "model=own"], [path, "model=own,mini-neox-0.3m"]):
        first = expand(*schema_and_grids(*arguments)).trials[0].trial
        assert first.model.plant_outliers == PlantedOutliers(channels=3, scale=4.0)
    typed = expand(*schema_and_grids(path, "model=own", "model.plant_outliers.scale=8")).trials[0].trial
    assert typed.model.plant_outliers == PlantedOutliers(channels=3, scale=8.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.plant_outliers.scale=10"], "model mini-neox-6.0m.plant_outliers: missing channels"),
        (["model.plant_outliers.channels=4"], "plant_outliers: missing scale"),
        (["model.plant_outliers.seed=4"], "plant_outliers: missing channels, scale"),
        (["model.plant_outliers.channels=4", "model.plant_outliers.scale=2,big"], "plant_outliers.scale must be a number, got 'big'"),
        (["model.plant_outliers.channels=4", "model.plant_outliers.scale=0.5"], "must be a number above 1, got 0.5"),
        (["bit_width=1,4"], "2–8"),
        (["bit_width=4,foo"], "bit_width must be a whole number, got 'foo'"),
        (["block_size=1,64"], "block_size must be at least 2"),
        (["block_size=null,64"], "needs block_axis=input"),
        (["bit_width=3,17"], "at most 16"),
        (["limit=0,5"], "limit must be at least 1"),
        (["model.dtype=float8,float16"], "float8"),
        (["data_type=int", "data_type.options.exponent_bits=2,3"], "data_type.options.exponent_bits"),
        (["block_size=large,64"], "got 'large' (str); 'auto' is the data type's own"),
        (["scale_dtype=e4m2,float16"], "'e4m2' is not one of float16, bfloat16, float32, e8m0, e4m3"),
    ],
)
def test_impossible_values_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigurationErrors) as caught:
        expand(*schema_and_grids(*arguments))
    assert said in str(caught.value)


def test_a_misspelled_option_of_planting_is_said_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationErrors, match=r"'model\.plant_outliers\.scael'\. Did you mean 'model\.plant_outliers\.scale'"):
        check_command_line(["model.plant_outliers.scael=10"])


def test_all_mistakes_on_a_command_line_are_said_at_once_with_the_nearest_names() -> None:
    with pytest.raises(ConfigurationErrors) as caught:
        check_command_line(
            ["data_type=quantil", "bit_widht=4", "-m", "model=mini-neox-0.3,mini-opt-1.1m", "+sweeps=quickstar", "model.dtpye=float16"]
        )
    text = str(caught.value)
    for near in ("'quantile'", "'bit_width'", "'mini-neox-0.3m'", "'quickstart'", "'model.dtype'"):
        assert near in text
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("typed", [["bit_width=3,", "4"], ["bit_width=3", "4"]])
def test_a_space_in_a_list_is_said_in_words(typed: list[str]) -> None:
    with pytest.raises(ConfigurationErrors, match="lists have no spaces") as caught:
        check_command_line(typed)
    assert "expecting" not in str(caught.value)


@pytest.mark.parametrize("typed", [["+sweeps=quickstart,k_bit_inference"], ["+sweeps=quickstart", "+sweeps=k_bit_inference"]])
def test_two_studies_are_refused_not_ignored(typed: list[str]) -> None:
    with pytest.raises(ConfigurationErrors, match="one study, got quickstart and k_bit_inference"):
        check_command_line(typed)


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ("{grids: [{axes: {modle: [a]}}]}", "'model'"),
        ("{grids: [{axes: {data_type: [quantil]}}]}", "'quantile'"),
        ("{grids: [{axes: {bit_width: []}}]}", "no values"),
        ("{grids: []}", "study.grids"),
        ("{grids: [{axis: {bit_width: [4]}}]}", "`axes`"),
        ("{gird: 1, grids: [{axes: {bit_width: [4]}}]}", "gird"),
        ("{grids: [{axes: {model: glob(zzz*)}}]}", "matches no model"),
    ],
)
def test_mistakes_in_a_study_are_named_with_its_file(tmp_path: Path, study: str, said: str) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "broken.yaml").write_text(f"# @package _global_\nsweep: broken\nstudy: {study}\n")
    with initialize_config_dir(config_dir=str(product_root() / "conf"), version_base="1.3"):
        arguments = ["+sweeps=broken", f"hydra.searchpath=[file://{tmp_path}]"]
        cfg = compose("config", overrides=arguments, return_hydra_config=True)
        with pytest.raises(ConfigurationErrors) as caught:
            make_request(cfg, search_folders(cfg.hydra), arguments)
    assert said in str(caught.value)
    assert "sweeps/broken.yaml" in str(caught.value)


@pytest.mark.parametrize("path", sorted((product_root() / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_that_comes_with_the_product_plans(path: Path) -> None:
    expansion = expand(*schema_and_grids(f"+sweeps={path.stem}"))
    assert expansion.trials


def test_the_k_bit_study_has_the_published_scale() -> None:
    expansion = expand(*schema_and_grids("+sweeps=k_bit_inference"))
    assert (len(expansion.trials), sum(len(p.tasks) for p in expansion.trials)) == (9_405, 47_025), "as sweeps/README.md says"


def test_shorthand_for_folders_and_hub_names(tmp_path: Path) -> None:
    assert expand_shorthand([f"model={tmp_path}"])[0] == "model=local"
    assert expand_shorthand(["model=org/name"]) == ["model=hub", "model.hub_id=org/name"]
    assert expand_shorthand(["model=mini-neox-0.3m"]) == ["model=mini-neox-0.3m"]


def test_a_folder_may_stand_on_the_model_axis() -> None:
    folder = product_root() / "quantsweep" / "mini" / "models" / "mini-neox-0.3m"
    expansion = expand(*schema_and_grids(f"model={folder},mini-neox-0.9m", "model.dtype=float32"))
    assert [p.trial.model.name for p in expansion.trials] == ["mini-neox-0.3m", "mini-neox-0.9m"]


def test_a_copy_of_a_model_is_the_same_trial_wherever_it_lies(tmp_path: Path) -> None:
    import shutil

    source = product_root() / "quantsweep" / "mini" / "models" / "mini-neox-0.3m"
    copy = tmp_path / "mini-neox-0.3m"
    shutil.copytree(source, copy)
    ids = [expand(*schema_and_grids(f"model={folder}")).trials[0].trial.trial_id for folder in (source, copy)]
    assert ids[0] == ids[1]
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x00\x01")
    from quantsweep.planning.schema import _content

    _content.cache_clear()
    assert expand(*schema_and_grids(f"model={copy}")).trials[0].trial.trial_id != ids[0]


def test_plain_leaves_hydra_out() -> None:
    assert "hydra" not in plain(compose_base([]))


def skipped(*arguments: str) -> int:
    return sum(count for count, _ in expand(*schema_and_grids(*arguments)).skipped.values())


@pytest.mark.parametrize(
    ("typed", "count_of_skipped"),
    [
        (["data_type=int"], 0),  # no `int` has the exponent widths of grid 2: merged
        (["bit_width=4"], 4),  # exponents of 4 and 5 bits, which no 4-bit number has, at two block sizes
        (["data_type=nf,fp8", "bit_width=8"], 0),
        (["method.options.fraction=0.1,0.2"], 24),
        (["method.options.fraction=0.1"], 12),
        (["+method.options.fraction=0.1"], 12),
    ],
)
def test_a_replaced_axis_leaves_other_values_without_meaning_and_they_are_skipped(typed: list[str], count_of_skipped: int) -> None:
    assert skipped("+sweeps=k_bit_inference_mini", "model=mini-neox-0.3m", *typed) == count_of_skipped


@pytest.mark.parametrize(
    "typed", [["data_type=nvfp4", "bit_width=8"], ["scale_dtype=e4m3"], ["data_type.options.exponent_bits=1,9"], ["block_size=null"]]
)
def test_a_typed_value_that_leads_nowhere_in_a_study_is_a_mistake(typed: list[str]) -> None:
    with pytest.raises(ConfigurationErrors):
        expand(*schema_and_grids("+sweeps=k_bit_inference_mini", "model=mini-neox-0.3m", *typed))


@pytest.mark.parametrize("plus", ["", "+"])
def test_one_value_of_an_option_reaches_the_methods_that_have_it(plus: str) -> None:
    specs = quantizations("method=round_to_nearest,outlier_dependent", f"{plus}method.options.fraction=0.05")
    assert [dict(spec.rounding.options) for spec in specs] == [{}, {"fraction": 0.05}]


def test_channels_need_an_axis_and_are_skipped_without_it() -> None:
    assert skipped("block_axis=flat,input", "block_size=32,null") == 1
    assert [spec.block_size for spec in quantizations("data_type=int,mxfp", "block_size=32,null")] == [32, 32, None]


def test_unknown_keys_are_refused_with_a_plus_and_with_folders_of_ones_own(tmp_path: Path) -> None:
    own_codebook(tmp_path, "mine", "[-1.0, 0.0, 1.0]")
    path = f"hydra.searchpath=[file://{tmp_path}]"
    check_command_line([path, "data_type=mine"])
    for arguments, near in ((["+bitwidth=3"], "'bit_width'"), ([path, "bitwidth=3"], "'bit_width'"), ([path, "data_type=mien"], "'mine'")):
        with pytest.raises(ConfigurationErrors, match=near):
            check_command_line(arguments)
    with pytest.raises(ConfigurationErrors, match="missing is not a folder"):
        check_command_line([f"hydra.searchpath=[file://{tmp_path}/missing]"])


def planned(*arguments: str, results: Path) -> Prepared:
    own = [] if any(word.startswith("results_dir=") for word in arguments) else [f"results_dir={results}"]
    typed = [*own, "model=mini-neox-0.3m", *arguments]
    cfg = compose_base(typed)
    return prepare(cfg, search_folders(cfg.hydra), typed)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("assume_dead=no", "assume_dead must be true or false, got 'no'"),
        ("block_axis=0", "block_axis must be 'flat' or 'input', got 0"),
        ("block_size=99999999999", "block_size must be at most 2147483647"),
        ("seed=abc", "seed must be a whole number; got 'abc'"),
        ("budget.gpu_hours=nan", "budget.gpu_hours must be a number above 0, or null for none; got nan"),
        ("budget=5", "budget has keys of its own: budget.gpu_hours=…; got 5"),
        ("budget=null", "budget has keys of its own: budget.gpu_hours=…; got null"),
        ("trial_timeout_minutes=0", "trial_timeout_minutes must be a number above 0, or null for the rule; got 0"),
        ("shard_minutes=nan", "shard_minutes must be a number above 0; got nan"),
        ("workers=0", "workers must be at least 1, or null"),
        ("workers=two", "workers must be a whole number, or null"),
        ("cluster=slurm cluster.minutes=-5", "cluster.minutes must be at least 1; got -5"),
        ("cluster=slurm cluster.cpus=0", "cluster.cpus must be at least 1; got 0"),
        ("cluster=slurm cluster.max_minutes=-1", "cluster.max_minutes must be at least 1; got -1"),
        ("model.resources.minutes=0", "resources.minutes must be at least 1; got 0"),
        ("model.parameters=-5", "model mini-neox-0.3m: parameters must be at least 1, or null where it is not known; got -5"),
        ("sweep=true", "got true; write sweep=NAME"),
        ("results_dir=null", "results_dir must be text that is not empty, got null; write results_dir=FOLDER"),
        ("results_dir=", "results_dir must be text that is not empty, got ''"),
        ("sweep=null", "sweep must be text that is not empty, got null; write sweep=NAME"),
        ("task_path=", "task_path must be text that is not empty, got ''; write task_path=FOLDER, or task_path=null for none"),
        ("task_path=5", "is not a folder"),
        ("tag=", "tag must be text that is not empty, got ''; write tag=TEXT, or tag=null for none"),
        ("tag=true", "got true; write tag=TEXT, or tag=null for none"),
    ],
)
def test_values_that_only_pass_for_something_are_refused(tmp_path: Path, typed: str, said: str) -> None:
    with pytest.raises(ConfigurationErrors) as caught:
        planned(*typed.split(), results=tmp_path)
    assert [said in problem for problem in caught.value.problems] == [True]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("method=none bit_width=3 data_type=fp", "has no bit_width, data_type: bit_width=3, data_type=fp would change nothing"),
        ("method=none bit_width=3,4", "bit_width=3,4 would change nothing"),
        ("bit_width=16 block_size=64,128 task=mini_ppl,mini", "has no block_size"),
    ],
)
def test_settings_that_no_trial_of_a_launch_has_are_refused(tmp_path: Path, typed: str, said: str) -> None:
    with pytest.raises(ConfigurationErrors) as caught:
        planned(*typed.split(), results=tmp_path)
    assert [said in problem for problem in caught.value.problems] == [True]


@pytest.mark.parametrize("typed", ["bit_width=16", "method=none,round_to_nearest bit_width=3", "+sweeps=quickstart method=none"])
def test_baselines_alone_and_beside_others_are_planned(tmp_path: Path, typed: str) -> None:
    assert any(p.trial.quantization.is_baseline for p in planned(*typed.split(), results=tmp_path).plan.expansion.trials)


def test_a_folder_of_tasks_without_any_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: 'mine'  # of my own\n")
    with pytest.raises(ConfigurationErrors) as caught:
        planned(f"task_path={tmp_path}", "task=mini_ppl,mini_cloze", "limit=5,6", results=tmp_path)
    said = f"task_path {tmp_path} defines none of the tasks asked for (mini_cloze, mini_ppl); its YAMLs define mine. Give task="
    assert said in str(caught.value)
    (tmp_path / "ppl.yaml").write_text("task: mini_ppl\n")
    own = planned(f"task_path={tmp_path}", "task=mini_ppl,mini_cloze", results=tmp_path).plan.expansion.trials[0].tasks
    assert [task.own_content is not None for task in own] == [True, False], "the others are the built-in ones"


# --- nothing that is typed, or stands in a study's file, is dropped without a word ------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["+sweeps=glob(quick*)"], "sweeps is set once a launch and cannot be a list"),
        (["+sweeps=choice(quickstart)"], "sweeps is set once a launch and cannot be a list"),
        (["+sweeps=quickstart,other", "hydra.searchpath=[pkg://conf]"], "one launch runs one study, got quickstart and other"),
        (["cluster=slurm,local"], "cluster is set once"),
        (["hydra.launcher.wait=true,false"], "hydra.launcher.wait is set once"),
        (["plan_path=a,b"], "`quantsweep resume SWEEP` types a launch again"),
        (["shard_id=3"], "this is how our sweeper names a shard to a launcher"),
        (["hydra.sweep.dir=/tmp/x"], "give results_dir=FOLDER and sweep=NAME"),
        (["hydra.run.dir=/tmp/x"], "give results_dir=FOLDER and sweep=NAME"),
        (["budget.gpu_hours=range(1,3)"], "budget.gpu_hours is set once"),
        (["hydra.searchpath=[pkg://no_such_package]", "bitwidth=3"], "'bit_width'"),
        (["hydra.searchpath=/my/conf"], "hydra.searchpath must be a list"),
        (["+sweeps=quickstart", "study=null"], "study is set by a file in sweeps/"),
        (["bit_width=3,4", "+bit_width=8"], "bit_width is given twice (3,4 and 8): write its values with commas"),
        (["cluster=local", "cluster=slurm"], "cluster is given twice (local and slurm): give it once"),
        (["model.resources={minutes: 3}", "model.resources.minutes=4"], "model.resources.minutes is given twice"),
        (["+cluster.partition=gpu"], "cluster=local has no partition; give cluster=slurm first"),
        (["+cluster.additional_parameters.hold=true"], "cluster=local has no additional_parameters; give cluster=slurm first"),
        (["cluster=slurm", "+cluster.partiton=gpu"], "Did you mean 'partition'?"),
        (["+tracking.project=mine"], "tracking=none has no project; give tracking=wandb first"),
        (["+task.limit=5"], "a suite of tasks has no limit: use limit=…"),
        (["task=mini,mini_ppl", "task.limit=5,7"], "a suite of tasks has no limit: use limit=…"),
        (["bit_width={3: 4}"], "as in bit_width=3,4"),
        (["bit_width=(3,4)"], "no brackets (bit_width=3,4)"),
        (["model=glob(mini-*),gpt2"], "cannot stand in a list with other values"),
        (["~bit_width"], "cannot be deleted"),
        (["model@other=gpt2"], "without a package (model=…)"),
        (["budget=5"], "budget.gpu_hours=…"),
        (["budget={gpu_hors: 5}"], "'budget.gpu_hours'"),
        (["task.suite=mini_ppl"], "task.suite must be a list"),
        (["model=null"], "unknown model 'null'"),
        (["--config-dir", "/my/conf", "cluster=mine"], "hydra.searchpath=[file:///my/conf]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_be_dropped_is_refused(typed: list[str], said: str) -> None:
    with pytest.raises(ConfigurationErrors) as caught:
        check_command_line(typed)
    assert said in str(caught.value)
    assert len(caught.value.problems) <= 2


def test_a_choice_in_a_list_of_an_axis_is_said_in_words() -> None:
    with pytest.raises(ConfigurationErrors, match="a choice or a glob cannot stand in a list"):
        schema_and_grids("bit_width=choice(3,4),8")


def test_what_a_cluster_of_ones_own_leaves_out_may_be_typed(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("kind: slurm\npartition: gpu\n")
    check_command_line(
        [f"hydra.searchpath=[file://{tmp_path}]", "cluster=mine", "+cluster.qos=long", "+cluster.additional_parameters.hold=1"]
    )


def test_a_folder_of_a_package_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_codebook(tmp_path, "mine", "[-1, 0, 1]")
    (tmp_path / "own_conf").mkdir()
    (tmp_path / "own_conf" / "__init__.py").touch()
    (tmp_path / "data_type").rename(tmp_path / "own_conf" / "data_type")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(quantizations("hydra.searchpath=[pkg://own_conf]", "data_type=int,mine", "bit_width=2")) == 2


def test_a_limit_of_the_task_beside_a_limit_is_refused() -> None:
    with pytest.raises(ConfigurationErrors, match=r"limit is given twice \(5 and 7\)"):
        schema_and_grids("limit=5", "task=mini_ppl", "task.limit=7")


def test_a_typed_mapping_is_merged() -> None:
    trials = expand(*schema_and_grids("model=gpt2-xl,opt-13b", "model.resources={minutes: 30}")).trials
    assert [(r.gpus, r.memory_gb, r.minutes) for r in (p.trial.model.resources for p in trials)] == [(1, 24, 30), (1, 48, 30)]
    planted = "model.plant_outliers={channels: 3, scale: 4}"  # two axes of the study, one of them of two values
    asked = expand(*schema_and_grids("+sweeps=k_bit_inference_mini", "model=mini-neox-0.3m", "method=none", planted)).trials
    assert {p.trial.model.plant_outliers for p in asked} == {None, PlantedOutliers(channels=3, scale=4.0)}, "one grid varies them"


def test_a_path_in_quotes_of_its_own_is_a_path() -> None:
    assert expand_shorthand(["model='/some/path'", '+model="org/name"']) == [
        "model=local", "model.path=/some/path", "model=hub", "model.hub_id=org/name"
    ]  # fmt: skip


GRID = "study: {grids: [{axes: {model: [mini-neox-0.3m], data_type: [int]}}]}\n"


def study(folder: Path, text: str) -> list[str]:
    """The words that name a study with this text."""
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "own.yaml").write_text(f"# @package _global_\n{text}")
    return ["+sweeps=own", f"hydra.searchpath=[file://{folder}]"]


def test_what_a_study_sets_of_a_component_holds_for_its_axes_too(tmp_path: Path) -> None:
    settings_ = "model: {plant_outliers: {channels: 4, scale: 16}, dtype: bfloat16}\ndata_type: {options: {convention: gptq}}\n"
    words = study(tmp_path, settings_ + GRID)
    [planned] = expand(*schema_and_grids(*words)).trials
    assert planned.trial.model.plant_outliers == PlantedOutliers(channels=4, scale=16.0)
    assert planned.trial.model.dtype == "bfloat16"
    assert dict(planned.trial.quantization.data_type_options) == {"convention": "gptq"}
    [typed] = expand(*schema_and_grids(*words, "model.dtype=float16", "data_type.options.convention=awq")).trials
    assert (typed.trial.model.dtype, dict(typed.trial.quantization.data_type_options)) == ("float16", {"convention": "awq"})
    swept = expand(*schema_and_grids(*words, "model.dtype=float16,float32")).trials
    assert [p.trial.model.dtype for p in swept] == ["float16", "float32"]


LOCAL = "defaults:\n  - override /model: local\nmodel: {path: package:quantsweep/mini/models/mini-opt-0.4m, dtype: bfloat16}\n"


@pytest.mark.parametrize(
    ("typed", "models"),
    [
        ([], ["mini-opt-0.4m"]),
        (["model=mini-neox-0.3m"], ["mini-neox-0.3m"]),
        (["model=mini-neox-0.3m,mini-opt-1.1m"], ["mini-neox-0.3m", "mini-opt-1.1m"]),
        (["model=package:quantsweep/mini/models/mini-neox-0.9m"], ["mini-neox-0.9m"]),
    ],
)
def test_the_weights_that_a_study_names_are_those_of_its_own_model_only(tmp_path: Path, typed: list[str], models: list[str]) -> None:
    words = [*study(tmp_path, LOCAL + "study: {grids: [{axes: {bit_width: [3, 4]}}]}\n"), *expand_shorthand(typed)]
    check_command_line(words)
    found = {p.trial.model for p in expand(*schema_and_grids(*words)).trials}
    assert sorted((m.name, Path(m.path or "").name, m.dtype) for m in found) == [(name, name, "bfloat16") for name in models]


@pytest.mark.parametrize(
    ("typed", "options"),
    [
        (["cluster=local"], {"exponent_bits": 2, "subnormal": "appendix"}),
        (["tracking=none", "cluster=local"], {"exponent_bits": 2, "subnormal": "appendix"}),
        (["data_type=int"], {"convention": "kbit"}),
        (["method=none"], {}),
    ],
)
def test_other_components_than_the_studys_leave_behind_what_they_do_not_have(
    tmp_path: Path, typed: list[str], options: dict[str, Any]
) -> None:
    text = (
        "defaults:\n  - override /cluster: slurm\n  - override /tracking: wandb\n  - override /data_type: fp\n"
        "cluster: {partition: gpu}\ntracking: {project: p, mode: offline}\ndata_type: {options: {exponent_bits: 2}}\n"
        "study: {grids: [{axes: {model: [mini-neox-0.3m], bit_width: [4]}}]}\n"
    )
    words = [*study(tmp_path, text), *typed]
    check_command_line(words)
    [planned] = expand(*schema_and_grids(*words)).trials
    assert dict(planned.trial.quantization.data_type_options) == options
    cfg = compose_base([*words, f"results_dir={tmp_path}"])
    assert prepare(cfg, search_folders(cfg.hydra), words).cluster.kind == ("local" if "cluster=local" in typed else "slurm")


def test_one_value_of_a_studys_axis_changes_only_the_grids_that_have_it() -> None:
    """Planting is an axis of one grid of three."""
    words = ["+sweeps=k_bit_inference_mini", "model=mini-neox-0.3m", "model.plant_outliers.channels=4", "model.plant_outliers.scale=4,16"]
    planted = {p.trial.model.plant_outliers for p in expand(*schema_and_grids(*words)).trials}
    assert {p and (p.channels, p.scale) for p in planted} == {None, (4, 4.0), (4, 16.0)}


def test_what_all_models_need_of_a_cluster_is_what_the_code_assumes(tmp_path: Path) -> None:
    assert yaml.safe_load((product_root() / "conf" / "config.yaml").read_text())["model"]["resources"] == {
        key: value for key, value in dataclasses.asdict(Resources()).items() if key != "raised"
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "name: mine\nfamily: f\npath: package:quantsweep/mini/models/mini-opt-0.4m\ndtype: float32\n"
    )
    words = study(tmp_path, "model: {resources: {minutes: 30}}\nstudy: {grids: [{axes: {model: [mine], bit_width: [4]}}]}\n")
    check_command_line(words)
    [planned] = expand(*schema_and_grids(*words)).trials
    assert (planned.trial.model.resources.minutes, planned.trial.model.resources.cpus) == (30, 1)


@pytest.mark.parametrize(
    "typed", ["~cluster.additional_parameters", "cluster.additional_parameters=null", "+cluster.additional_parameters.x=1"]
)
def test_what_a_site_adds_to_sbatch_may_be_taken_away(typed: str) -> None:
    check_command_line(["cluster=slurm", typed])


def test_an_axis_of_a_grid_wins_over_what_the_study_sets(tmp_path: Path) -> None:
    grids = "study: {grids: [{axes: {model: [mini-neox-0.3m], model.dtype: [float32]}}, {axes: {model: [mini-opt-0.4m]}}]}\n"
    expansion = expand(*schema_and_grids(*study(tmp_path, "model: {dtype: bfloat16}\n" + grids)))
    assert [p.trial.model.dtype for p in expansion.trials] == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("limt: 30\n" + GRID, "'limit'"),
        ("stduy: {}\n", "'study'"),
        ("grids: []\n", "unknown key 'grids'"),
        ("sweep: own\n", "has no `study:`"),
        ("model.dtype: float16\n" + GRID, "unknown key 'model.dtype'"),
        ("model: {dtpye: float16}\n" + GRID, "'model.dtype'"),
        ("model: gpt2\n" + GRID, "`- override /model: gpt2`"),
        ("bit_width: [3, 4]\n" + GRID, "is an axis, which stands in a grid"),
        ("data_type: {options: {exponent_bits: 3}}\n" + GRID, "write it as an axis, data_type.options.exponent_bits: [3]"),
        ("budget: 5\n" + GRID, "budget has keys of its own"),
        ("cluster: {partition: gpu}\n" + GRID, "give cluster=slurm first"),
        ("task: {limit: 5}\n" + GRID, "use limit=…"),
        ("method: {options: {fraction: 0.1}}\n" + GRID, "method.options.fraction is rounding.options.fraction now"),
    ],
)
def test_what_a_study_sets_to_no_effect_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationErrors) as caught:
        check_command_line(study(tmp_path, text), [product_root() / "conf", product_root()])
    assert said in str(caught.value)


def test_what_a_study_sets_that_reaches_none_of_its_components_is_refused(tmp_path: Path) -> None:
    text = "rounding: {options: {fraction: 0.1}}\nstudy: {grids: [{axes: {method: [centering, none]}}]}\n"
    words = study(tmp_path, "defaults:\n  - override /method: outlier_dependent\n" + text)
    with pytest.raises(ConfigurationErrors, match=r"no candidate of this grid has the key 'rounding\.options\.fraction'"):
        expand(*schema_and_grids(*words))


def test_a_study_may_stand_on_another(tmp_path: Path) -> None:
    expansion = expand(*schema_and_grids(*study(tmp_path, "defaults: [quickstart]\nlimit: 3\n"), "model=mini-neox-0.3m"))
    assert len(expansion.trials) == 25
    assert {task.limit for p in expansion.trials for task in p.tasks} == {3}
