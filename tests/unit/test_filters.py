"""Filters: what a person types selects the rows that a plain loop over them would."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsweep.errors import ConfigurationError
from quantsweep.tables.filters import PLAN_COLUMNS, ROW_COLUMNS, parse
from quantsweep.trial.specs import ModelSpec, PlannedTrial, QuantizationSpec, StepSpec, TaskSpec, TrialSpec

ROW = {
    "trial_id": "3f9c0123456789ab",
    "model": "mini-neox-0.3m",
    "bit_width": 4,
    "block_size": None,
    "symmetric": True,
    "data_type": "int",
    "status": "failed",
    "plant_scale": 16.0,
}


@pytest.mark.parametrize(
    ("texts", "matches"),
    [
        ([], True),
        (["model=mini-neox-0.3m"], True),
        (["model=mini-*"], True),
        (["model=mini-opt-*"], False),
        (["model=mini-neox-0.3"], False),  # a name is whole, only hashes may be cut short
        (["model=mini-[no]*"], True),
        (["bit_width=3,4"], True),
        (["bit_width=3"], False),
        (["bit_width=4", "data_type=fp"], False),
        (["trial_id=3f9c"], True),
        (["trial_id=9c"], False),
        (["block_size=null"], True),
        (["block_size=64"], False),
        (["symmetric=true", "status=failed"], True),
        (["symmetric=false"], False),
        (["plant_scale=16"], True),
        (["plant_scale=16.0"], True),
        (["bit_width=04"], True),
        (["plant_scale=1.6,1"], False),
    ],
)
def test_a_row_matches(texts: list[str], matches: bool) -> None:
    assert parse(texts).matches(ROW) is matches
    table = pa.Table.from_pylist([ROW, ROW | {"model": "other", "trial_id": "00", "bit_width": 8, "block_size": 64, "symmetric": None}])
    assert parse(texts).mask(table)[0] == matches


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle=x", "unknown filter column 'modle'. Did you mean 'model'"),
        ("model", "not of the form column=value"),
        ("model=", "the empty value of a table is null"),
        ("bit_width=four", "bit_width is a whole number or null, not 'four'"),
        ("block_size=channel", "values of granularity"),
        ("plant_scale=large", "plant_scale is a number or null, not 'large'"),
        ("symmetric=yes", "true, false or null"),
        ("status=fialed", "Did you mean 'failed'"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("?", r"\?")):
        parse([text])


def test_a_column_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="given twice"):
        parse(["bit_width=3", "bit_width=4"])


def test_a_plan_knows_no_outcomes() -> None:
    with pytest.raises(ConfigurationError, match="known only of trials that ran"):
        parse(["status=failed"], PLAN_COLUMNS)
    assert set(PLAN_COLUMNS) < set(ROW_COLUMNS)


def planned(bit_width: int = 4) -> PlannedTrial:
    quantization = QuantizationSpec(
        rounding=StepSpec("round_to_nearest", 1),
        data_type="int",
        data_type_version=1,
        bit_width=bit_width,
        block_size=64,
        block_axis="flat",
        symmetric=True,
        scale_dtype="float16",
    )
    tasks = tuple(
        TaskSpec(name=name, lm_eval_task=name, folder="mini", version="1.0", primary_metric="acc", higher_is_better=True, limit=limit)
        for name, limit in (("piqa", None), ("mini_ppl", 20))
    )
    return PlannedTrial(trial=TrialSpec(model=ModelSpec(name="m", family="f", path="/m"), quantization=quantization), tasks=tasks)


@pytest.mark.parametrize(
    ("texts", "matches"),
    [
        (["bit_width=4"], True),
        (["bit_width=3"], False),
        (["task=piqa"], True),
        (["task=mini_*", "limit=20"], True),
        (["task=piqa", "limit=20"], False),  # one and the same task must meet both
        (["granularity=block", "block_size=64"], True),
    ],
)
def test_planned_trials(texts: list[str], matches: bool) -> None:
    assert parse(texts, PLAN_COLUMNS).matches_planned(planned()) is matches
    trial_id = planned().trial.trial_id
    assert parse([f"trial_id={trial_id[:6]}"], PLAN_COLUMNS).matches_planned(planned())


def test_each_value_that_nothing_has_is_told_with_the_nearest() -> None:
    there = {"model": ["mini-neox-0.3m", "mini-opt-0.4m"], "bit_width": [4, None], "plant_scale": [4.0]}
    parse(["model=mini-neox-0.3m,mini-*", "bit_width=4,null", "plant_scale=4.0"]).refuse_unmet(there, "s")
    with pytest.raises(ConfigurationError, match=r"(?s)s does not have .*Did you mean 'mini-neox-0\.3m'\?.*bit_width '3'") as caught:
        parse(["model=mini-neox-0.3,mini-opt-0.4m", "bit_width=3,4"]).refuse_unmet(there, "s")
    assert len(str(caught.value).splitlines()) == 3


rows = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["a", "ab", "b*c", "null"]),
        "bit_width": st.none() | st.integers(2, 5),
        "symmetric": st.none() | st.booleans(),
        "trial_id": st.text("0123", min_size=2, max_size=3),
    }
)
terms = st.lists(
    st.sampled_from(["model=a", "model=a*", "model=?b,null", "bit_width=3,null", "bit_width=[23]", "symmetric=null,true", "trial_id=0,12"]),
    unique_by=lambda term: term.split("=")[0],
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, max_size=20), terms, st.booleans())
def test_a_mask_says_of_each_row_what_matches_says(table_rows: list[dict[str, object]], texts: list[str], encode: bool) -> None:
    schema = pa.schema([("model", pa.string()), ("bit_width", pa.int32()), ("symmetric", pa.bool_()), ("trial_id", pa.string())])
    table = pa.Table.from_pylist(table_rows, schema=schema)
    if encode:
        table = table.cast(pa.schema([(f.name, pa.dictionary(pa.int32(), f.type) if f.type == pa.string() else f.type) for f in schema]))
    wanted = parse(texts)
    assert wanted.mask(table).tolist() == [wanted.matches(row) for row in table_rows]
