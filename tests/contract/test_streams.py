"""Reading block by block is reading the model: what enters blocks and layers, on every architecture, and in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from quantsweep.calibration.inputs import InputSums
from quantsweep.calibration.statistics import StatisticsStore
from quantsweep.calibration.streams import walk
from quantsweep.errors import QuantizationError
from quantsweep.models.session import Session
from tests.contract.architectures import CONFIGS
from tests.contract.test_session import loaded_model

TOKENS = torch.randint(1, 2048, (3, 24), generator=torch.Generator().manual_seed(4))


def inputs_of(session: Session, module: nn.Module) -> Tensor:
    """What the whole model gives a module, window by window: (N·T, I)."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].clone()))
    with torch.inference_mode():
        for tokens in TOKENS:
            session.model(tokens[None], use_cache=False)
    handle.remove()
    return torch.cat([each.flatten(0, -2) for each in found])


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_meet_what_the_whole_model_gives_them(family: str) -> None:
    """Bit for bit: masks, positions and rotary tables are the model's own; also where something was quantized before."""
    session = Session(loaded_model(family))
    session.model.config.use_cache = True  # on purpose: a cache that stays would be read by the next pass
    names = []
    for block in walk(session, TOKENS):
        names.append(block.name)
        expected: list[Tensor] = []
        handle = block.module.register_forward_pre_hook(
            lambda _module, inputs, options, expected=expected: expected.append(inputs[0] if inputs else options["hidden_states"]),
            with_kwargs=True,
        )
        with torch.inference_mode():
            for tokens in TOKENS:
                session.model(tokens[None], use_cache=False)
        handle.remove()
        for window in range(len(TOKENS)):
            assert torch.equal(block.hidden(window), expected[window])
        once, twice = (list(block.outputs()) for _ in range(2))
        assert all(map(torch.equal, once, twice)), "a pass leaves nothing behind for the next"
        name = next(iter(block.layers))
        session.write(name, session.read(name).sign() / 10)
    assert names == list(session.block_names)
    session.restore()


def test_blocks_of_a_model_spread_over_devices_are_read_and_written_like_others() -> None:
    """With the hooks by which accelerate moves inputs to where a block lies, and with a layer replaced that has one."""
    plain, spread = Session(loaded_model("llama")), Session(loaded_model("llama"))
    places = [*spread.block_names, "model.layers.1.mlp.down_proj"]
    for name in places:
        add_hook_to_module(spread.model.get_submodule(name), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    spread = Session(spread.loaded)
    for one, other in zip(walk(plain, TOKENS), walk(spread, TOKENS), strict=True):
        assert one.groups == other.groups
        for group in one.groups:
            expected, found = one.capture(group), other.capture(group)
            for name in group:
                assert torch.equal(expected[name].hessian_II, found[name].hessian_II)
                for session in (plain, spread):
                    session.write(name, session.read(name).sign() / 10)
                assert torch.equal(plain.read(name), spread.read(name)), "no hook puts the old weight back"
    for session in (plain, spread):
        session.replace(places[-1], nn.Linear(48, 32, bias=False).requires_grad_(False))
    assert spread.model.get_submodule(places[-1])._hf_hook is not None
    spread.restore()
    plain.restore()


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_run_in_groups_of_one_input(family: str) -> None:
    session = Session(loaded_model(family))
    block = next(walk(session, TOKENS))
    short = [tuple(name.removeprefix(f"{block.name}.") for name in group) for group in block.groups]
    assert sorted(name for group in block.groups for name in group) == sorted(block.layers)
    if family == "llama":
        assert short == [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ]
    if family == "mixtral":
        assert [group[0] for group in short[2:]] == ["mlp.experts.gate_up_proj.0", "mlp.experts.down_proj.0"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "falcon-7b"])
def test_hessians_are_those_of_the_inputs(family: str) -> None:
    """2/n Σ x xᵀ against numpy in float64; mean, extremes and samples too; layers of one input share one."""
    session = Session(loaded_model(family))
    for block in walk(session, TOKENS):
        for group in block.groups:
            captured = block.capture(group, hessian=torch.float64, sample_tokens=24)
            assert len({id(inputs) for inputs in captured.values()}) == 1
            for name, inputs in captured.items():
                rows = inputs_of(session, session.layers[name].module).double().numpy()
                assert inputs.num_tokens == len(rows) == TOKENS.numel()
                torch.testing.assert_close(inputs.hessian_II, torch.tensor(2 / len(rows) * rows.T @ rows), rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(inputs.mean_abs_I.double(), torch.tensor(abs(rows).mean(axis=0)), rtol=1e-6, atol=0)
                assert inputs.max_abs_I.tolist() == abs(rows).max(axis=0).tolist()
                assert inputs.sample_TI.double().tolist() == rows[::3].tolist()
    session.restore()


def test_experts_see_their_own_tokens() -> None:
    """Routed by the model itself: together they see each token twice, and the second layer what the first one's gate gives."""
    session = Session(loaded_model("mixtral"))
    block = next(walk(session, TOKENS))
    names = [name for name in block.layers if "experts" in name]
    captured = block.capture(names, hessian=torch.float64)
    for part in ("gate_up_proj", "down_proj"):
        assert sum(inputs.num_tokens for name, inputs in captured.items() if part in name) == 2 * TOKENS.numel()
    experts = block.module.mlp.experts
    seen: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda _module, inputs: seen.append((inputs[0].clone(), inputs[1].clone())))
    list(block.outputs())
    handle.remove()
    for expert in range(3):
        rows = torch.cat([hidden[(chosen == expert).any(dim=-1)] for hidden, chosen in seen]).double()
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        inner = nn.functional.silu(gate) * up
        for part, values in (("gate_up_proj", rows), ("down_proj", inner)):
            hessian = captured[f"{block.name}.mlp.experts.{part}.{expert}"].hessian_II
            torch.testing.assert_close(hessian, 2 / len(rows) * values.T @ values, rtol=1e-4, atol=1e-6)


def test_streams_differ_in_what_they_have_been_through() -> None:
    """Original: as it was; weights: what was written; activations: the changes of inputs too, a layer's own included."""
    session = Session(loaded_model("llama"))
    plain = {name: inputs_of(session, layer.module) for name, layer in session.layers.items()}
    for name in session.layers:
        session.on_input(name, lambda values: (values * 8).round() / 8)
    quantized = "model.layers.0.self_attn.q_proj"
    for block in walk(session, TOKENS, original=True, activations=True):
        if block.name == "model.layers.0":
            session.write(quantized, session.read(quantized) * 3)
        name = f"{block.name}.self_attn.o_proj"
        original, activations = (block.capture([name], stream, hessian=None)[name] for stream in ("original", "activations"))
        assert torch.equal(original.max_I, plain[name].amax(dim=0))
        assert not torch.equal(original.max_I, activations.max_I)
        assert torch.equal(activations.max_I, (activations.max_I * 8).round() / 8), "its own change comes before it is heard"
    session.restore()


def test_true_sequential_groups_see_what_was_quantized_before_them() -> None:
    session = Session(loaded_model("llama"))
    block = next(walk(session, TOKENS))
    qkv, (output,), *_ = block.groups
    before = block.capture([output])[output].hessian_II
    for name in qkv:
        session.write(name, session.read(name).sign() / 10)
    after = block.capture([output])[output].hessian_II
    assert not torch.equal(before, after)
    session.restore()


def test_sums_do_not_depend_on_how_the_text_is_cut() -> None:
    """512 and 32 tokens, the second three times larger: the mean over tokens, not over batches; one row is one token, none is none."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat([torch.randn(512, 6, generator=generator), 3 * torch.randn(32, 6, generator=generator)]).half()
    whole, parts = (InputSums(6, torch.device("cpu"), hessian=torch.float32, sample_every=7) for _ in range(2))
    whole.add(rows)
    for part in (rows[:512], rows[512:513], rows[:0], rows[513:].reshape(1, 31, 6)):
        parts.add(part)
    one, other = whole.total("x"), parts.total("x")
    torch.testing.assert_close(one.hessian_II, other.hessian_II)
    assert one.num_tokens == other.num_tokens == 544
    assert torch.equal(one.sample_TI, other.sample_TI)
    assert one.hessian_II.diagonal().mean() == pytest.approx(2 * (512 + 32 * 9) / 544, rel=0.1)
    saturating = InputSums(1, torch.device("cpu"), hessian=torch.float32)
    saturating.add(torch.full((2048, 1), 8.0, dtype=torch.float16))
    assert saturating.total("x").hessian_II.item() == 128, "a sum in float16 would be infinite"


def test_inputs_that_are_no_numbers_are_refused_with_the_layers_name() -> None:
    loaded = loaded_model("llama")
    session = Session(loaded)
    session.write("model.embed_tokens.weight", session.read("model.embed_tokens.weight") * torch.nan)
    block = next(walk(session, TOKENS))
    with pytest.raises(QuantizationError, match=r"layer model\.layers\.0\.self_attn\.q_proj: what enters it .* is NaN or infinite"):
        block.capture(block.groups[0])
    session.restore()


def test_a_layer_that_runs_twice_is_refused() -> None:
    session = Session(loaded_model("llama"))
    block = next(walk(session, TOKENS))
    mlp: Any = block.module.mlp
    mlp.forward = lambda values, inner=mlp.forward: inner(inner(values))
    with pytest.raises(QuantizationError, match="runs 2 times in one pass of its block"):
        _ = block.groups
    del mlp.forward


def test_statistics_are_taken_once_for_one_original_model() -> None:
    """Other trials of the shard find them; other text, or a model that was rewritten otherwise, has its own."""
    loaded, store = loaded_model("llama"), StatisticsStore()
    signs: list[int] = []
    for factor in (1.0, 1.0, 2.0):
        session = Session(loaded)
        if factor != 1:
            session.write("model.norm.weight", session.read("model.norm.weight") * factor)
        found = store.inputs(session, TOKENS, lambda: signs.append(1))
        name = "model.layers.1.mlp.down_proj"
        assert found[name].max_abs_I.tolist() == inputs_of(session, session.layers[name].module).abs().amax(dim=0).tolist()
        session.restore()
    assert store.passes == 2
    assert len(signs) == 2 * len(TOKENS)
    store.inputs(Session(loaded), TOKENS[:1], lambda: None)
    assert store.passes == 3
    store.inputs(Session(loaded), TOKENS.view(2 * len(TOKENS), -1), lambda: None)  # the same stream, in windows of half the length
    assert store.passes == 4
