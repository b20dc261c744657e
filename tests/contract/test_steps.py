"""What every step of the pipeline owes, calibrated ones included: over the registry, so that a new step is tested by being there.

On tiny random models: the same seed gives the same, every bit comes back, exact rewritings are exact on every architecture, bits are
those of what is stored, the text is really looked at or really not, somebody is told of progress.  Steps that break one of these
promises stand below and fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from component_cases import component, stems
from torch import Tensor, nn

from quantsweep.data_types._packed import pack, unpack
from quantsweep.errors import QuantizationError
from quantsweep.models.session import Session
from quantsweep.pipeline.interface import Help, InputNeeds, Layer, LayerContext, LayerRecord, Stored, TransformRecord
from quantsweep.pipeline.run import Outcome, quantize
from quantsweep.trial import registry
from quantsweep.trial.registry import ACTIVATIONS, CLIPPINGS, COMPENSATIONS, ROUNDINGS, TRANSFORMS
from quantsweep.trial.specs import ActivationSpec, QuantizationSpec, StepSpec, options_tuple
from tests.contract.architectures import CONFIGS
from tests.contract.rounding_cases import Remembering, help_for_tests
from tests.contract.test_session import loaded_model, logits

KINDS = {
    "rounding": ROUNDINGS, "transform": TRANSFORMS, "clipping": CLIPPINGS, "compensation": COMPENSATIONS, "activation": ACTIVATIONS,
}  # fmt: skip
STEPS = [(kind, name) for kind, known in KINDS.items() for name in known.names() if (kind, name) != ("rounding", "none")]
every_step = pytest.mark.parametrize(("kind", "name"), STEPS, ids=lambda value: value)
FAMILY = "llama"
_GENERATOR = torch.Generator().manual_seed(9)
TEXT, OTHER_TEXT = (torch.randint(1, 2048, (4, 32), generator=_GENERATOR) for _ in range(2))


def yaml_of(kind: str, name: str) -> Mapping[str, object]:
    """The yaml of a step."""
    return component(kind if name in stems(kind) else "method", name)


def step_spec(kind: str, name: str) -> StepSpec:
    """A step with the options of its yaml."""
    yaml = yaml_of(kind, name)
    return StepSpec(name, yaml["version"], options_tuple(yaml["options"]))


INT = {
    "data_type": "int", "data_type_version": 1, "data_type_options": (("convention", "gptq"),), "bit_width": 3, "block_size": 16,
    "block_axis": "input", "symmetric": False, "scale_dtype": "float16",
}  # fmt: skip
PLAIN = QuantizationSpec(rounding=StepSpec("round_to_nearest", 1), **INT)


def spec_with(kind: str, step: StepSpec) -> QuantizationSpec:
    """A trial with this step: beside it round to nearest at 3 bit, or activations at 8."""
    if kind == "activation":
        eight_bit = ActivationSpec(
            step=step, data_type="int", data_type_version=1, data_type_options=(("convention", "absmax_full"),), bit_width=8,
            symmetric=True, block_size=16 if step.name == "per_block" else None,
        )  # fmt: skip
        return replace(PLAIN, activation=eight_bit)
    return replace(PLAIN, transforms=(step,)) if kind == "transform" else replace(PLAIN, **{kind: step})


@dataclass(frozen=True)
class Run:
    """What a trial did to a model: its records, the model's state, its logits, how often somebody was told of progress."""

    outcome: Outcome
    state: Mapping[str, str]
    logits: Tensor
    signs: int

    @property
    def records(self) -> list[LayerRecord]:
        """Without what no two runs have in common."""
        return [replace(record, seconds=None) for record in self.outcome.layers]


@cache
def loaded(family: str, dtype: torch.dtype = torch.float32):
    return loaded_model(family, dtype)


def run(spec: QuantizationSpec, text: Tensor | None = TEXT, seed: int = 0, family: str = FAMILY) -> Run:
    """One trial on a random model, which is proven to be as it was afterwards."""
    session = Session(loaded(family))
    signs: list[int] = []
    help_ = replace(help_for_tests(text, seed), progress=lambda: signs.append(1))
    try:
        outcome = quantize(session, spec, help_)
        told = len(signs)
        state = session.written_state()
        values = logits(session.model)
        session.check_state(state)
    finally:
        session.restore()
    return Run(outcome, state, values, told)


def check_contract(kind: str, step: StepSpec, *, is_calibrated: bool) -> None:
    """What every step owes: fails with an AssertionError that says what is broken."""
    spec = spec_with(kind, step)
    first, again = run(spec), run(spec)
    assert first.records == again.records, "the same seed gives other records"
    assert first.state == again.state, "the same seed gives other weights"
    assert torch.equal(first.logits, again.logits), "the same seed gives other logits"
    other = run(spec, OTHER_TEXT)
    assert torch.equal(first.logits, other.logits) != is_calibrated, "other text changes nothing, or something in a step that reads none"
    if not is_calibrated:
        assert torch.equal(first.logits, run(spec, None).logits), "a step that reads no text needs some"
    assert not torch.equal(first.logits, logits(loaded(FAMILY).model)), "it does nothing"
    assert first.signs >= len(first.records), "nobody is told of progress"
    for record in first.records:
        assert record.bits == sum(bits for _, bits in record.bits_by_part), "the parts are not the whole"
        assert record.bits >= 3 * record.out_features * record.in_features, "the stored bits are fewer than the codes"
        assert record.relative_error < 1, "zeros in place of the weights would be nearer to them"


@every_step
def test_every_step_keeps_the_contract(kind: str, name: str) -> None:
    check_contract(kind, step_spec(kind, name), is_calibrated=yaml_of(kind, name)["capabilities"]["needs_calibration"])


@pytest.mark.parametrize("name", TRANSFORMS.names())
@pytest.mark.parametrize("family", CONFIGS)
def test_rewritings_are_exact_on_every_architecture(family: str, name: str) -> None:
    """In float64, where weights stay otherwise as they are; what cannot be folded is refused in words, and then nothing is left changed."""
    model = loaded(family, torch.float64)
    before = logits(model.model)
    session = Session(model)
    refusal = rewrite(session, name)
    after = logits(model.model)
    session.restore()
    assert torch.equal(logits(model.model), before)
    if refusal is None:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
    else:
        assert len(str(refusal).split()) > 5


def rewrite(session: Session, name: str) -> QuantizationError | None:
    """A transform alone, planned beside the rounding that it may look at; the refusal, if it was refused."""
    step = step_spec("transform", name) if name in stems("transform") else StepSpec(name, 1)
    try:
        registry.TRANSFORMS[name].apply(session, replace(PLAIN, transforms=(step,)), step, help_for_tests(TEXT))
    except QuantizationError as error:
        return error
    return None


@pytest.mark.parametrize("name", [name for name in ROUNDINGS.names() if name != "none"])
def test_what_a_rounding_stores_is_what_the_model_computes_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed to bytes and read again, decoded after all layers were encoded; the bytes are those that the record counts."""
    remembering = Remembering(ROUNDINGS[name])
    monkeypatch.setattr(registry, "ROUNDINGS", {name: remembering})
    spec = spec_with("rounding", step_spec("rounding", name))
    session = Session(loaded(FAMILY))
    try:
        for record in quantize(session, spec, help_for_tests(TEXT)).layers:
            stored = remembering.stored[record.layer]
            packed = pack(stored.blocks, str(spec.scale_dtype))
            decoded = remembering.decode(replace(stored, quantized=unpack(packed)), spec, torch.float32)
            assert torch.equal(decoded, session.read(record.layer))
            num_bytes = packed.num_bytes + sum(array.numel() * array.element_size() for array in stored.extras.values())
            assert record.bits <= 8 * num_bytes < record.bits + 16
    finally:
        session.restore()


@pytest.mark.parametrize("name", [name for name in ROUNDINGS.names() if name != "none"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "falcon-7b"])
def test_every_layer_of_other_architectures_is_recorded(family: str, name: str) -> None:
    """Weights stored in × out, experts as slices (with those that no token comes to), fused queries, keys and values."""
    found = run(spec_with("rounding", step_spec("rounding", name)), TEXT[:1], family=family)
    assert [record.layer for record in found.records] == list(loaded(family).layers)


# --- nonsense ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nonsense:
    """A rounding that claims to look at text and breaks one promise."""

    broken: str

    def check(self, spec: QuantizationSpec) -> None:
        """Anything goes."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds:
        """Inputs, which it may leave alone."""
        return InputNeeds(sample_tokens=8)

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """Round to nearest of a weight made a little smaller by what enters the layer, but for what is broken."""
        factor = 1 - 1e-3 / (1 + float(context.inputs.mean_abs_I.mean()))
        match self.broken:
            case "draws without its seed":
                factor -= float(torch.rand(())) / 100
            case "looks at no text":
                factor = 0.5
        return ROUNDINGS["round_to_nearest"].encode(layer, weight_OI * factor, spec, context)

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """As it was stored, but for what is broken."""
        weight_OI = ROUNDINGS["round_to_nearest"].decode(stored, spec, dtype)
        return weight_OI * 0 if self.broken == "writes zeros" else weight_OI


class Rewrites:
    """A transform that breaks one promise: each of them changes what the model computes, or changes it behind the session's back."""

    def __init__(self, broken: str) -> None:
        self.broken = broken

    def check(self, spec: QuantizationSpec, step: StepSpec) -> None:
        """Anything goes."""

    def apply(self, session: Session, spec: QuantizationSpec, step: StepSpec, help: Help) -> tuple[TransformRecord, ...]:
        """Records nothing."""
        gain, layer = "model.layers.0.input_layernorm.weight", next(iter(session.layers))
        match self.broken:
            case "writes zeros":
                session.write(layer, session.read(layer) * 0)
            case "half a fold":
                session.write(gain, session.read(gain) * 2)
            case "a gain without the session":
                session.model.get_parameter(gain).mul_(2)
            case "a module without the session":
                session.model.get_submodule("model.layers.0").mlp.act_fn = nn.ReLU()
            case "a hook without the session":
                session.model.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)
        return ()


@contextmanager
def known(monkeypatch: pytest.MonkeyPatch, kind: str, step: object) -> Iterator[None]:
    """A step called nonsense, beside those that there are."""
    attribute = {"rounding": "ROUNDINGS", "transform": "TRANSFORMS"}[kind]
    with monkeypatch.context() as patch:
        patch.setattr(registry, attribute, {"nonsense": step, "round_to_nearest": ROUNDINGS["round_to_nearest"]})
        yield


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("draws without its seed", "the same seed gives other"),
        ("looks at no text", "other text changes nothing"),
        ("writes zeros", "other text changes nothing|zeros in place of the weights"),
    ],
)
def test_a_rounding_of_nonsense_fails_the_contract(broken: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with known(monkeypatch, "rounding", Nonsense(broken)), pytest.raises(AssertionError, match=said):
        check_contract("rounding", StepSpec("nonsense", 1), is_calibrated=True)


def test_a_rounding_that_looks_at_text_may_keep_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one, with nothing broken."""
    with known(monkeypatch, "rounding", Nonsense("nothing")):
        check_contract("rounding", StepSpec("nonsense", 1), is_calibrated=True)


@pytest.mark.parametrize("broken", ["writes zeros", "half a fold"])
def test_a_rewriting_that_is_none_fails_the_contract(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with known(monkeypatch, "transform", Rewrites(broken)), pytest.raises(AssertionError):
        test_rewritings_are_exact_on_every_architecture(FAMILY, "nonsense")


@pytest.mark.parametrize("what", ["gain", "module", "hook"])
def test_what_a_step_changes_without_its_session_scores_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of its own, which is lost with it."""
    session = Session(loaded_model(FAMILY))
    with known(monkeypatch, "transform", Rewrites(f"a {what} without the session")):
        quantize(session, spec_with("transform", StepSpec("nonsense", 1)), help_for_tests(TEXT))
    with pytest.raises(Exception, match="changed after loading, and not through the trial's session"):
        session.written_state()


def test_factors_that_nothing_does_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuantizationError, match="nothing is there yet that does correction"):
        run(replace(PLAIN, correction=StepSpec("qep", 1)))
    monkeypatch.setattr(registry, "ROUNDINGS", {"nonsense": Nonsense("nothing")})
    with pytest.raises(QuantizationError, match="needs_calibration: true"):
        run(replace(PLAIN, rounding=StepSpec("nonsense", 1)), None)


# --- the order --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listening:
    """A rounding that keeps what it was told of inputs."""

    needed: InputNeeds
    heard: dict[str, LayerContext]

    def check(self, spec: QuantizationSpec) -> None:
        """Anything goes."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds:
        """What the test asks for."""
        return self.needed

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """To nearest."""
        self.heard[layer.name] = context
        return ROUNDINGS["round_to_nearest"].encode(layer, weight_OI, spec, context)

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """To nearest."""
        return ROUNDINGS["round_to_nearest"].decode(stored, spec, dtype)


def heard(needs: InputNeeds, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The largest inputs of each layer, as a rounding of these needs is told."""
    listening = Listening(needs, {})
    with known(monkeypatch, "rounding", listening):
        run(replace(PLAIN, rounding=StepSpec("nonsense", 1)))
    return {name.removeprefix("model.layers."): context.inputs.max_abs_I for name, context in listening.heard.items()}


def test_a_rounding_meets_the_stream_and_the_granularity_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Original: nothing before it was rounded.  Block: what other blocks have become.  Group: what its own block has become too."""
    original, block, group = (
        heard(InputNeeds(stream=stream, granularity=granularity), monkeypatch)
        for stream, granularity in (("original", "group"), ("weights", "block"), ("weights", "group"))
    )
    for name, is_same_in_block, is_same_in_group in (
        ("0.self_attn.q_proj", True, True),
        ("0.self_attn.o_proj", True, False),
        ("0.mlp.down_proj", True, False),
        ("1.self_attn.q_proj", False, False),
    ):
        assert torch.equal(original[name], block[name]) == is_same_in_block, name
        assert torch.equal(original[name], group[name]) == is_same_in_group, name


def test_a_step_that_looks_at_the_original_does_not_coarsen_anothers_granularity(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ's clipping takes the original's inputs once a block: a rounding that goes group by group does so beside it too."""
    largest = {}
    for granularity in ("block", "group"):
        listening = Listening(InputNeeds(granularity=granularity), {})
        with known(monkeypatch, "rounding", listening):
            clipped = spec_with("clipping", step_spec("clipping", "awq_clip"))
            run(replace(clipped, rounding=StepSpec("nonsense", 1), block_axis="input"))
        largest[granularity] = listening.heard["model.layers.0.mlp.down_proj"].inputs.max_abs_I
    assert not torch.equal(largest["block"], largest["group"])


def test_ranges_of_whole_windows_are_known_where_inputs_are_quantized_while_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounding on the stream of quantized activations meets few values: those of 8 bit and one range a window."""
    listening = Listening(InputNeeds(sample_tokens=TEXT.numel(), stream="activations"), {})
    with known(monkeypatch, "rounding", listening):
        run(replace(spec_with("activation", step_spec("activation", "per_tensor")), rounding=StepSpec("nonsense", 1)))
    for context in listening.heard.values():
        assert len(context.inputs.sample_TI.unique()) <= len(TEXT) * 256


def test_errors_of_outputs_are_those_of_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """tr(Δ H Δᵀ) / tr(W H Wᵀ) by hand, for a layer of the first block, whose inputs nothing has changed."""
    listening = Listening(InputNeeds(hessian=torch.float64, granularity="block"), {})
    session = Session(loaded(FAMILY))
    name = "model.layers.0.mlp.down_proj"
    original = session.read(name).double()
    with known(monkeypatch, "rounding", listening):
        [record] = [
            r for r in quantize(session, replace(PLAIN, rounding=StepSpec("nonsense", 1)), help_for_tests(TEXT)).layers if r.layer == name
        ]
    difference, hessian = original - session.read(name).double(), listening.heard[name].inputs.hessian_II
    expected = torch.trace(difference @ hessian @ difference.T) / torch.trace(original @ hessian @ original.T)
    assert record.output_error == pytest.approx(float(expected), rel=1e-6)
    assert record.num_tokens == TEXT.numel()
    session.restore()


def test_too_many_fallbacks_are_another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Falls(Listening):
        def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
            return replace(super().encode(layer, weight_OI, spec, context), fallbacks=("damping 0.1",))

    with (
        known(monkeypatch, "rounding", Falls(InputNeeds(), {})),
        pytest.raises(QuantizationError, match=r"14 of 14 layers were quantized otherwise than asked .*damping 0\.1"),
    ):
        run(replace(PLAIN, rounding=StepSpec("nonsense", 1)))
