"""What was asked runs under its own name, or is refused in words: no method, data type or setting becomes another one unseen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from quantsweep.composing.composition import compose_base, make_request, search_folders
from quantsweep.composing.prepare import Prepared, prepare
from quantsweep.errors import ConfigurationError, ConfigurationErrors, ModelError
from quantsweep.pipeline.interface import Layer, LayerContext, Stored
from quantsweep.planning.plan import Expansion, expand
from quantsweep.running import child
from quantsweep.storage.paths import product_root
from quantsweep.tables.records import identity_columns
from quantsweep.trial import registry
from quantsweep.trial.registry import ROUNDINGS
from quantsweep.trial.specs import PlannedTrial, QuantizationSpec, RunSettings, StepSpec, TrialSpec

METHOD = """\
name: {name}
version: {version}
options: {{strength: 0.5}}
capabilities: {{needs_data_type: {typed}, needs_calibration: {calibrated}, uses_seed: false, data_types: null}}
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """The word that names a folder with four methods of one's own, each a rounding under its name."""
    for kind in ("method", "rounding"):
        (tmp_path / kind).mkdir()
    for name, version, typed, calibrated in (
        ("smoothing", 3, "false", "false"),
        ("typed", 1, "true", "false"),
        ("careful", 1, "true", "true"),
        ("broken", "one", "true", "false"),
    ):
        text = METHOD.format(name=name, version=version, typed=typed, calibrated=calibrated)
        (tmp_path / "rounding" / f"{name}.yaml").write_text(text)
        (tmp_path / "method" / f"{name}.yaml").write_text(f"{{name: {name}, source: null, factors: {{rounding: {name}}}}}")
    return f"hydra.searchpath=[file://{tmp_path}]"


def expansion(*words: str) -> Expansion:
    cfg = compose_base(words)
    request = make_request(cfg, search_folders(cfg.hydra), words)
    return expand(request.schema, request.grids)


def trials(*words: str) -> list[TrialSpec]:
    return [planned.trial for planned in expansion(*words).trials]


def planned(results: Path, *words: str) -> Prepared:
    typed = [f"results_dir={results}", "model=mini-neox-0.3m", *words]
    cfg = compose_base(typed)
    return prepare(cfg, search_folders(cfg.hydra), typed)


def test_a_method_without_a_data_type_is_a_trial_of_its_own(own: str) -> None:
    alone, baseline = trials(own, "method=smoothing,none")
    assert (alone.quantization.rounding.name, alone.quantization.rounding.version, alone.quantization.data_type) == ("smoothing", 3, None)
    assert dict(alone.quantization.rounding.options) == {"strength": 0.5}
    assert not alone.quantization.is_baseline
    assert alone.trial_id != baseline.trial_id
    assert "smoothing strength=0.5" in alone.label
    columns = identity_columns(alone)
    assert (columns["method"], columns["bit_width"], columns["granularity"]) == ("smoothing", None, None)
    assert PlannedTrial.from_json(PlannedTrial(trial=alone, tasks=()).to_json()).trial == alone


def test_formats_of_a_method_without_one_are_merged_on_an_axis(own: str) -> None:
    found = expansion(own, "method=smoothing,round_to_nearest", "bit_width=3,16", "data_type=int,fp")
    labels = {trial.quantization.method for trial in (p.trial for p in found.trials)}
    assert labels == {"smoothing", "round_to_nearest", "none"}
    assert (len(found.trials), found.duplicates) == (1 + 2 + 1, 3 + 1)


def test_sixteen_bit_is_the_baseline_of_round_to_nearest_alone(own: str) -> None:
    found = expansion(own, "method=round_to_nearest,centering,outlier_dependent,typed", "bit_width=4,16")
    assert sum(p.trial.quantization.is_baseline for p in found.trials) == 1
    assert found.skipped.keys() == {"data_type 'int' supports bit_width 2–8; got 16. 16 bits are the unquantized baseline, method=none"}
    assert sum(count for count, _ in found.skipped.values()) == 3
    with pytest.raises(ConfigurationErrors, match="supports bit_width 2–8; got 16"):
        trials("method=centering", "bit_width=16")


def test_a_data_type_of_sixteen_bits_runs(tmp_path: Path) -> None:
    text = Path("conf/data_type/int.yaml").read_text().replace("name: int", "name: wide").replace("bit_widths: [2,", "bit_widths: [16,")
    (tmp_path / "data_type").mkdir()
    (tmp_path / "data_type" / "wide.yaml").write_text(text)
    found = trials(f"hydra.searchpath=[file://{tmp_path}]", "data_type=wide,int", "bit_width=16")
    assert [(trial.quantization.data_type, trial.quantization.bit_width) for trial in found] == [("wide", 16), (None, None)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "method=smoothing bit_width=3",
            "works without a data type and has no bit_width: bit_width=3 would change nothing",
        ),
        ("method=smoothing,none data_type=int,fp", "method smoothing works without a data type and has no data_type"),
        ("seed=3", "seed=3 would change nothing: the methods asked for (round_to_nearest) draw nothing"),
        ("method=none,centering seed=1,2", "seed=1,2 would change nothing"),
        ("+calibration.num_samples=3", "calibration.num_samples"),
        ("block_size=tensor block_axis=input", "block_axis=input would change nothing: every trial has flat"),
        ("method=none 'model.unquantized=[a]'", "model.unquantized=[a] would change nothing"),
        ("method=careful", "rounding careful needs calibration text, got calibration=none; give calibration=…"),
        ("method=broken", "rounding broken: its yaml must say version: 1 (a whole number, raised when its numbers change), got 'one'"),
        ("method=typed", "rounding typed has a yaml and no code: write quantsweep/rounding/typed.py"),
    ],
)
def test_what_nothing_would_read_is_refused(tmp_path: Path, own: str, words: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        planned(tmp_path / "results", own, *words.replace("'", "").split())
    assert said in str(caught.value)


def test_a_broken_component_that_a_glob_found_costs_itself(tmp_path: Path) -> None:
    (tmp_path / "data_type").mkdir()
    text = Path("conf/data_type/int.yaml").read_text().replace("name: int", "name: odd").replace("version: 1", "version: one")
    (tmp_path / "data_type" / "odd.yaml").write_text(text)
    words = (f"hydra.searchpath=[file://{tmp_path}]", "data_type=glob(*)", "bit_width=4")
    found = expansion(*words)
    assert {planned.trial.quantization.data_type for planned in found.trials} > {"int", "fp"}
    assert any("odd: its yaml must say version: 1" in reason for reason in found.skipped)
    with pytest.raises(ConfigurationError, match="odd: its yaml must say version: 1"):
        trials(words[0], "data_type=odd,int", "bit_width=4")


@pytest.mark.parametrize("words", ["seed=0", "method=none block_size=auto", "method=none block_axis=null symmetric=null", "bit_width=16"])
def test_what_asks_for_nothing_is_no_mistake(tmp_path: Path, words: str) -> None:
    assert len(planned(tmp_path, *words.split()).plan.trials) == 1


@pytest.mark.parametrize(
    ("patterns", "said"),
    [("['*']", "its `unquantized` patterns leave no layer to quantize"), ("['nosuch*']", "pattern 'nosuch*' matches no linear layer")],
)
def test_a_model_of_which_no_layer_is_quantized_is_refused_at_planning(tmp_path: Path, patterns: str, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        planned(tmp_path, f"model.unquantized={patterns}")
    assert said in str(caught.value)
    assert planned(tmp_path, "model.unquantized=['*attention*']").plan.trials


def test_a_copied_method_that_kept_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(Path("conf/method/centering.yaml").read_text())
    for words in ("method=mine", "method=mine,none"):  # (a step of it is an axis either way)
        with pytest.raises(ConfigurationError, match=r"method/mine\.yaml says name: centering; write name: mine"):
            trials(f"hydra.searchpath=[file://{tmp_path}]", words)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version: 1", "version: true", "version: 1 .* got True"),
        ("uses_seed: false", "uses_seed: no way", "capabilities.uses_seed as true or false, got 'no way'"),
        ("  needs_calibration: false\n", "", r"lacks capabilities\.needs_calibration; conf/rounding/round_to_nearest\.yaml has all"),
        ("options: {}", "options: [a]", r"keys and values under options .* got \['a'\]"),
    ],
)
def test_a_component_that_is_not_whole_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "rounding").mkdir()
    text = Path("conf/rounding/centering.yaml").read_text().replace("name: centering", "name: mine").replace(old, new)
    (tmp_path / "rounding" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=f"rounding mine: its yaml .*{said}"):
        trials(f"hydra.searchpath=[file://{tmp_path}]", "rounding=mine,none")


# --- where it runs ------------------------------------------------------------------------------------------------------------


class Own:
    """A rounding that works without a data type: signs of the weights, with one scale a layer."""

    def check(self, spec: QuantizationSpec) -> None:
        """Anything goes."""

    def needs(self, spec: QuantizationSpec) -> None:
        """It looks at no text."""

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """One byte a sign."""
        return Stored(extras={"signs": weight_OI.sign().to(torch.int8), "scale": weight_OI.abs().mean().half()})

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """Signs times scale."""
        return (stored.extras["signs"] * stored.extras["scale"].float()).to(dtype)


def run_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Mapping[str, Any]]:
    """The messages of a child that runs this method on the smallest bundled model."""
    trial = planned(tmp_path, "task=mini_ppl", "limit=1").plan.trials[0]
    quantization = QuantizationSpec(rounding=StepSpec("own", 1))
    sent: list[Mapping[str, Any]] = []
    monkeypatch.setattr(registry, "ROUNDINGS", {"own": Own()})
    runner = child.TrialRunner(sent.append)
    try:
        runner.run(replace(trial, trial=replace(trial.trial, quantization=quantization), tasks=()), RunSettings(device="cpu"))
    finally:
        torch.set_grad_enabled(True)
    return sent


def test_a_method_without_a_data_type_has_sizes_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [quantized] = [message for message in run_own(monkeypatch, tmp_path) if message["event"] == "quantized"]
    assert quantized["layers"]
    assert 8 < quantized["sizes"]["bits_per_weight"] < 8.1


def test_the_bundled_roundings_record_all_layers(tmp_path: Path) -> None:
    """In the child as a worker has it; those that look at text are in tests/contract/test_steps.py."""
    sent: list[Mapping[str, Any]] = []
    runner = child.TrialRunner(sent.append)
    trial = planned(tmp_path, "task=mini_ppl", "limit=1").plan.trials[0].trial
    yamls = {path.stem: yaml.safe_load(path.read_text()) for path in (product_root() / "conf" / "rounding").glob("*.yaml")}
    data_free = [name for name in ROUNDINGS.names() if not yamls[name]["capabilities"]["needs_calibration"]]
    for name in data_free:
        options = (("fraction", 0.1),) if name == "outlier_dependent" else ()
        quantization = (
            QuantizationSpec(rounding=StepSpec("none", 1))
            if name == "none"
            else replace(trial.quantization, rounding=StepSpec(name, 1, options))
        )
        runner.run(PlannedTrial(trial=replace(trial, quantization=quantization), tasks=()), RunSettings(device="cpu"))
    assert len([message for message in sent if message["event"] == "done"]) == len(data_free)
    recorded = [len(message["layers"]) for message in sent if message["event"] == "quantized"]
    assert [count > 0 for count in recorded] == [name != "none" for name in data_free]
