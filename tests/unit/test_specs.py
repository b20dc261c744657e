"""Identity: everything that can change a number, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantsweep.errors import ConfigurationError
from quantsweep.trial.specs import (
    ActivationSpec,
    CalibrationSpec,
    ModelSpec,
    PlannedTrial,
    PlantedOutliers,
    QuantizationSpec,
    Resources,
    StepSpec,
    TaskSpec,
    TextSource,
    TrialSpec,
    canonical_json,
    check_name,
    options_tuple,
)

MODEL = ModelSpec(name="m", family="f", path="/a", content="sha256:1", parameters=10)
QUANTIZATION = QuantizationSpec(
    rounding=StepSpec("round_to_nearest", 1),
    data_type="fp",
    data_type_version=1,
    data_type_options=(("exponent_bits", 2),),
    bit_width=4,
    block_size=64,
    block_axis="flat",
    symmetric=True,
    scale_dtype="float16",
)
TRIAL = TrialSpec(model=MODEL, quantization=QUANTIZATION)
TASK = TaskSpec(name="t", lm_eval_task="t", folder="mini", version="1.0", primary_metric="acc", higher_is_better=True)


def changed(**changes: object) -> str:
    model = {k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(ModelSpec)}}
    quantization = {k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(QuantizationSpec)}}
    rest = {k: v for k, v in changes.items() if k in ("seed", "calibration")}
    return dataclasses.replace(
        TRIAL, model=dataclasses.replace(MODEL, **model), quantization=dataclasses.replace(QUANTIZATION, **quantization), **rest
    ).trial_id


@pytest.mark.parametrize(
    "changes",
    [
        {"content": "sha256:2"},
        {"dtype": "float32"},
        {"unquantized": ("*.0.*",)},
        {"plant_outliers": PlantedOutliers(channels=1, scale=2.0)},
        {"bit_width": 5},
        {"block_size": 128},
        {"block_size": "tensor"},
        {"block_axis": "input"},
        {"symmetric": False},
        {"scale_dtype": "float32"},
        {"data_type": "int"},
        {"data_type_version": 2},
        {"rounding": StepSpec("round_to_nearest", 2)},
        {"data_type_options": (("exponent_bits", 3),)},
        {"rounding": StepSpec("round_to_nearest", 1, (("a", 1),))},
        {"seed": 1},
        {"calibration": CalibrationSpec(name="c", path="/d.txt", num_samples=1, sequence_length=2)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_can_change_a_number_changes_the_id(changes: dict[str, object]) -> None:
    assert changed(**changes) != TRIAL.trial_id


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"family": "other"},
        {"path": "/elsewhere"},
        {"parameters": 11},
        {"resources": Resources(gpus=1)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_labels_places_and_resources_do_not(changes: dict[str, object]) -> None:
    assert changed(**changes) == TRIAL.trial_id


def test_the_id_of_a_trial_is_fixed() -> None:
    """A change here orphans every row that was ever written: raise a version instead, or migrate."""
    assert TRIAL.trial_id == "4bc07d0501712459"


def test_planted_outliers_are_part_of_the_id_where_they_are_set() -> None:
    assert "plant_outliers" not in MODEL.identity()
    base = PlantedOutliers(channels=1, scale=2.0)
    ids = {changed(plant_outliers=dataclasses.replace(base, **c)) for c in ({}, {"channels": 2}, {"scale": 4.0}, {"seed": 1})}
    assert len(ids) == 4
    assert changed(plant_outliers=PlantedOutliers(channels=1, scale=2)) in ids, "2 and 2.0 are the same scale"
    assert changed(plant_outliers=base) == "5c0ca2b6f71955c3"


def test_a_planted_model_says_so() -> None:
    model = dataclasses.replace(MODEL, plant_outliers=PlantedOutliers(channels=4, scale=16.0))
    assert dataclasses.replace(TRIAL, model=model).label.startswith("m planted 4×16 round_to_nearest fp 4-bit")
    assert PlantedOutliers(channels=4, scale=1.5, seed=3).label == "planted 4×1.5 seed 3"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"channels": 0, "scale": 2.0}, r"plant_outliers\.channels must be at least 1, or left out for the plain model; got 0"),
        ({"channels": 1, "scale": 1.0}, r"plant_outliers\.scale must be a number above 1, got 1; 1 is the plain model"),
        ({"channels": 1, "scale": -3.0}, "above 1, got -3"),
        ({"channels": 1, "scale": float("inf")}, "above 1, got inf"),
        ({"channels": 1, "scale": float("nan")}, "above 1, got nan"),
    ],
)
def test_what_cannot_be_planted_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        PlantedOutliers(**values)


# --- fields that come later -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterModel(ModelSpec):
    context: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterQuantization(QuantizationSpec):
    order: str = "natural"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterCalibration(CalibrationSpec):
    split: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterTrial(TrialSpec):
    activation: tuple[tuple[str, int], ...] = ()


def later(cls: type[Any], spec: Any, **values: object) -> Any:
    """The same spec with one more field."""
    return cls(**{field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}, **values)


CALIBRATION = CalibrationSpec(name="c", path="/d.txt", num_samples=1, sequence_length=2)


@pytest.mark.parametrize(
    ("part", "cls", "values"),
    [
        ("model", LaterModel, {"context": 5}),
        ("quantization", LaterQuantization, {"order": "magnitude"}),
        ("calibration", LaterCalibration, {"split": "train"}),
    ],
)
def test_one_more_optional_field_changes_no_id_until_it_is_set(part: str, cls: type[Any], values: dict[str, object]) -> None:
    for trial in (dataclasses.replace(TRIAL, calibration=CALIBRATION), dataclasses.replace(TRIAL, calibration=CALIBRATION, seed=3)):
        spec = getattr(trial, part)
        assert dataclasses.replace(trial, **{part: later(cls, spec)}).trial_id == trial.trial_id
        assert dataclasses.replace(trial, **{part: later(cls, spec, **values)}).trial_id != trial.trial_id


def test_one_more_part_of_a_trial_changes_no_id_until_it_is_set() -> None:
    assert later(LaterTrial, TRIAL).trial_id == TRIAL.trial_id
    assert later(LaterTrial, TRIAL, activation=(("bits", 8),)).trial_id != TRIAL.trial_id


def test_one_more_field_needs_a_default() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needy(QuantizationSpec):
        sites: int

    with pytest.raises(ConfigurationError, match=r"Needy\.sites needs a default"):
        later(Needy, QUANTIZATION, sites=3).identity()


NOT_IN_THE_KEY = {"lm_eval_task", "folder", "primary_metric", "higher_is_better", "default_num_fewshot", "fewshot_pool"}
NOT_IN_THE_KEY |= {"kind", *(field.name for field in dataclasses.fields(TextSource))}
"""Where a task is found and how it is read; two tell whether a prompt is another than lm-eval's (`+others`), `own_content` tells a text."""


@pytest.mark.parametrize(
    "field", [field for field in dataclasses.fields(TaskSpec) if field.name not in NOT_IN_THE_KEY], ids=lambda f: f.name
)
def test_every_other_field_of_a_task_is_in_its_key(field: dataclasses.Field[Any]) -> None:
    other = 7 if "int" in str(field.type) else "lm_eval"
    assert dataclasses.replace(TASK, **{field.name: other}).task_key != TASK.task_key


def test_task_keys() -> None:
    assert TASK.task_key == "t@1.0"
    assert dataclasses.replace(TASK, num_fewshot=5, limit=100).task_key == "t@1.0+5shot+limit100"


@given(
    seed=st.none() | st.integers(0, 2**40),
    limit=st.none() | st.integers(1, 10**6),
    block=st.sampled_from([64, "tensor"]),
    option=st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    planted=st.none() | st.builds(PlantedOutliers, channels=st.integers(1, 9), scale=st.floats(1.5, 1e3), seed=st.integers(0, 9)),
)
def test_json_round_trip(seed: int | None, limit: int | None, block: int | str, option: object, planted: PlantedOutliers | None) -> None:
    quantization = dataclasses.replace(
        QUANTIZATION, block_size=block, rounding=StepSpec("round_to_nearest", 1, options_tuple({"x": option}))
    )  # type: ignore[arg-type]
    calibration = CalibrationSpec(name="c", path="/d.txt", num_samples=1, sequence_length=2)
    planned = PlannedTrial(
        trial=TrialSpec(
            model=dataclasses.replace(MODEL, unquantized=("a*",), plant_outliers=planted),
            quantization=quantization,
            seed=seed,
            calibration=calibration,
        ),
        tasks=(dataclasses.replace(TASK, limit=limit),),
    )
    again = PlannedTrial.from_json(planned.to_json())
    assert again == planned
    assert again.trial.trial_id == planned.trial.trial_id


def test_a_plan_from_before_outliers_could_be_planted_is_read() -> None:
    planned = PlannedTrial(trial=TRIAL, tasks=(TASK,))
    data = json.loads(planned.to_json())
    del data["trial"]["model"]["plant_outliers"]
    assert PlannedTrial.from_json(json.dumps(data)) == planned


# --- factors ----------------------------------------------------------------------------------------------------------------

STEP = StepSpec("smooth", 1, (("alpha", 0.5),))
ACTIVATION = ActivationSpec(
    step=StepSpec("per_token", 1), data_type="int", data_type_version=1, bit_width=8, symmetric=True, data_type_options=(("x", 1),)
)
UNTOUCHED = QuantizationSpec(rounding=StepSpec("none", 1))
FACTORS_SET: list[dict[str, Any]] = [
    {"transforms": (STEP,)},
    {"transforms": (STEP, StepSpec("awq_scale", 1))},
    {"transforms": (StepSpec("awq_scale", 1), STEP)},
    {"transforms": (StepSpec("smooth", 2, STEP.options),)},
    {"clipping": StepSpec("mse", 1)},
    {"correction": StepSpec("qep", 1)},
    {"tuning": StepSpec("lkd", 1)},
    {"compensation": StepSpec("lorc", 1, (("rank", 8),))},
    {"activation": ACTIVATION},
    {"activation": dataclasses.replace(ACTIVATION, bit_width=4)},
    {"activation": dataclasses.replace(ACTIVATION, sites=("linear", "q"))},
    {"activation": dataclasses.replace(ACTIVATION, clip_percentile=99.9)},
    {"kv_cache": ACTIVATION},
    {"scope": (("lm_head", "none"),)},
]


def test_each_factor_is_part_of_the_id_where_it_is_set() -> None:
    ids = [changed(**factors) for factors in ({}, *FACTORS_SET)]
    assert len(set(ids)) == len(ids)
    assert ids[0] == "4bc07d0501712459", "factors at none leave no trace"


@pytest.mark.parametrize("factors", FACTORS_SET, ids=lambda factors: next(iter(factors)))
def test_factors_travel_in_plans(factors: dict[str, Any]) -> None:
    trial = dataclasses.replace(TRIAL, quantization=dataclasses.replace(QUANTIZATION, **factors))
    again = PlannedTrial.from_json(PlannedTrial(trial=trial, tasks=(TASK,)).to_json())
    assert again.trial == trial
    assert again.trial.trial_id == trial.trial_id


def test_the_name_is_a_label() -> None:
    named = dataclasses.replace(QUANTIZATION, method="rtn+clipping=mse", clipping=StepSpec("mse", 1))
    assert changed(method="other") == TRIAL.trial_id
    assert named.label == "rtn+clipping=mse fp 4-bit block 64 exponent_bits=2, clipping mse"
    assert dataclasses.replace(UNTOUCHED, activation=ACTIVATION).label == "none, activation per_token int 8-bit"


def test_the_baseline_is_every_factor_at_none() -> None:
    assert UNTOUCHED.is_baseline
    assert not dataclasses.replace(UNTOUCHED, activation=ACTIVATION).is_baseline, "W16A8"
    assert not dataclasses.replace(UNTOUCHED, transforms=(STEP,)).is_baseline
    with pytest.raises(ConfigurationError, match="nothing for compensation to do"):
        dataclasses.replace(UNTOUCHED, compensation=StepSpec("lorc", 1))


def test_a_step_tells_its_options() -> None:
    assert STEP.option("alpha") == 0.5
    with pytest.raises(ConfigurationError, match="step smooth has no option beta; it has alpha"):
        STEP.option("beta")


def test_a_plan_from_before_there_were_factors_is_read() -> None:
    planned = PlannedTrial(trial=TRIAL, tasks=(TASK,))
    data = json.loads(planned.to_json())
    of = data["trial"]["quantization"]
    for key in ("transforms", "clipping", "correction", "tuning", "compensation", "activation", "kv_cache", "scope"):
        del of[key]
    rounding = of.pop("rounding")
    of |= {"method_version": rounding["version"], "method_options": rounding["options"]}
    assert PlannedTrial.from_json(json.dumps(data)) == planned


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "-x", "x\n"])
def test_names_cannot_leave_their_folder(name: str) -> None:
    with pytest.raises(ConfigurationError, match="plain name"):
        check_name("sweep", name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_size": 1}, "at least 2"),
        ({"block_size": None}, "needs block_axis=input"),
        ({"block_axis": "output"}, "flat, input"),
        ({"scale_dtype": "float8"}, "float16"),
        ({"bit_width": 0}, "at least 1"),
        ({"data_type": None}, "needs a data_type"),
        ({"bit_width": None}, "needs a bit_width"),
        ({"rounding": StepSpec("none", 1)}, "unquantized baseline"),
    ],
)
def test_impossible_quantization_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        dataclasses.replace(QUANTIZATION, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"revision": "main"}, "full commit"),
        ({"hub_id": "a/b"}, "exactly one"),
        ({"path": None}, "exactly one"),
        ({"name": "a/b"}, "plain name"),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        dataclasses.replace(MODEL, **changes)
