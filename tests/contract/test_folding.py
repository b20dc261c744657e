"""Exact rewritings in every architecture: the function stays, what is scaled is what reads, and what cannot carry a scale is refused.

Architectures take norms, softmax and rotary angles in float32 whatever their weights are; `float64_throughout` lifts that,
so that all that differs is the rounding of factors in float64: logits within 1e-10 of their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from quantsweep.errors import ModelError, QuantizationError
from quantsweep.models.blocks import quantizable_linears
from quantsweep.models.folding import Kind, Pair, fold, obstacle, pairs
from tests.contract.architectures import CONFIGS, random_model

TOKENS = torch.arange(1, 49).reshape(2, 24)
KINDS: tuple[Kind, ...] = ("norm", "value", "up")
GELU = {"gpt_neox", "gpt2", "bloom", "falcon-7b", "falcon-40b", "falcon-rw"}
GROUPED = {"llama", "qwen3", "mistral", "mixtral", "falcon-7b", "falcon-40b", "glm", "glm4"}
IMPOSSIBLE = {("opt-350m", "norm"), *((family, "up") for family in GELU)}
CASES = [(family, kind) for family in sorted(CONFIGS) for kind in KINDS if (family, kind) not in IMPOSSIBLE]


class Float64Throughout(TorchFunctionMode):
    """Whatever asks torch for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with float64 where it was to be float32."""
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if item is torch.float32 else item for item in args)
        return func(*args, **{key: torch.float64 if item is torch.float32 else item for key, item in (kwargs or {}).items()})


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode(), Float64Throughout():
        logits: Tensor = model(TOKENS, use_cache=False).logits
    assert logits.dtype == torch.float64
    return logits


def scales_of(pair: Pair, generator: torch.Generator) -> Tensor:
    """Between 1/8 and 8, as far apart as heads allow."""
    return pair.shared(torch.exp2(6 * torch.rand(len(pair.unit_of_column), generator=generator, dtype=torch.float64) - 3))


def write_into(model: PreTrainedModel) -> Any:
    return lambda name, value: model.get_parameter(name).data.copy_(value)


def fold_all(model: PreTrainedModel, kind: Kind) -> tuple[Pair, ...]:
    generator = torch.Generator().manual_seed(1)
    found = pairs(model, kind)
    for pair in found:
        fold(model, pair, scales_of(pair, generator), write_into(model))
    return found


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_function_stays(family: str, kind: Kind) -> None:
    model = random_model(family, torch.float64)
    before = logits_of(model)
    originals = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = fold_all(model, kind)
    after = logits_of(model)
    assert float((after - before).abs().max()) <= 1e-10 * float(before.abs().max())
    places = quantizable_linears(model)
    assert {reader for pair in found for reader in pair.readers} - set(places) <= {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, originals[name])}
    assert changed, "something was rewritten"
    assert not any("embed" in name or "wte" in name or "lm_head" in name or "embed_out" in name for name in changed)


@contextmanager
def readers_seen(model: PreTrainedModel, norms: set[str]) -> Iterator[dict[str, set[str]]]:
    """Who is given what a norm puts out, by the tensors themselves: every module with weights of its own that gets these numbers."""
    outputs: dict[str, Tensor] = {}
    seen: dict[str, set[str]] = {norm: set() for norm in norms}

    def given(name: str, args: tuple[Any, ...]) -> None:
        for norm, output in outputs.items():
            if isinstance(args[0], Tensor) and args[0].numel() == output.numel() and torch.equal(args[0].flatten(), output.flatten()):
                seen[norm].add(name)

    handles = []
    for name, module in model.named_modules():
        if name in norms:
            handles.append(module.register_forward_hook(lambda _m, _a, output, name=name: outputs.update({name: output.clone()})))
        elif next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: given(name, args)))
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"opt-350m"}))
def test_the_readers_of_a_norm_are_all_that_read_it(family: str) -> None:
    model = random_model(family)
    found = pairs(model, "norm")
    with torch.inference_mode(), readers_seen(model, {pair.source for pair in found}) as seen:
        model(TOKENS, use_cache=False)
    claimed = {pair.source: {reader.partition(".gate_up_proj.")[0] if ".experts." in reader else reader for reader in pair.readers}
               for pair in found}  # fmt: skip
    assert claimed == seen


def test_a_reader_left_out_is_noticed() -> None:
    """The tolerance is one that a mistake does not pass."""
    model = random_model("mixtral", torch.float64)
    before = logits_of(model)
    pair = next(pair for pair in pairs(model, "norm") if "mlp.gate" in " ".join(pair.readers))
    short = Pair(kind=pair.kind, block=pair.block, source=pair.source, readers=pair.readers[:-1], unit_of_column=pair.unit_of_column)
    fold(model, short, scales_of(pair, torch.Generator().manual_seed(1)), write_into(model))
    assert float((logits_of(model) - before).abs().max()) > 1e-4 * float(before.abs().max())


@pytest.mark.parametrize("family", sorted(GROUPED))
def test_heads_that_share_a_value_head_share_scales(family: str) -> None:
    model = random_model(family)
    pair = pairs(model, "value")[0]
    scale_I = torch.linspace(1, 2, len(pair.unit_of_column), dtype=torch.float64)
    with pytest.raises(QuantizationError, match=r"share a value head .* cannot have different scales"):
        fold(model, pair, scale_I, lambda *_: None)
    config = CONFIGS[family]
    heads = config.num_attention_heads
    falcon = {"falcon-7b": 1, "falcon-40b": 2}
    groups = falcon.get(family) or config.num_key_value_heads
    by_hand = scale_I.view(groups, heads // groups, -1).mean(1, keepdim=True).expand(-1, heads // groups, -1).flatten()
    torch.testing.assert_close(pair.shared(scale_I), by_hand, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = random_model("bloom", dtype)
    pair = pairs(model, "value")[1]
    scale_I = scales_of(pair, torch.Generator().manual_seed(2))
    weight, bias = (model.get_parameter(f"{pair.source}.{name}").double().numpy() for name in ("weight", "bias"))
    columns = model.get_parameter(f"{pair.readers[0]}.weight").double().numpy()
    written: dict[str, Tensor] = {}
    fold(model, pair, scale_I, written.__setitem__)
    rows = [head * 48 + 32 + unit for head in range(2) for unit in range(16)]  # BLOOM: q, k, v of 16 units, head by head
    weight[rows] *= (1 / scale_I.numpy())[:, None]
    bias[rows] *= 1 / scale_I.numpy()
    assert torch.equal(written[f"{pair.source}.weight"], torch.from_numpy(weight).to(dtype))
    assert torch.equal(written[f"{pair.source}.bias"], torch.from_numpy(bias).to(dtype))
    assert torch.equal(written[f"{pair.readers[0]}.weight"], torch.from_numpy(columns * scale_I.numpy()).to(dtype))
    assert set(written) == {f"{pair.source}.weight", f"{pair.source}.bias", f"{pair.readers[0]}.weight"}


class TestRefusals:
    def test_norms_after_the_residual(self) -> None:
        with pytest.raises(QuantizationError, match=r"\(norm\) in this opt model: its norms come after the residual sums"):
            pairs(random_model("opt-350m"), "norm")

    @pytest.mark.parametrize("family", sorted(GELU))
    def test_gelu_lets_no_factor_pass(self, family: str) -> None:
        model = random_model(family)
        assert obstacle(model, "norm") is None
        with pytest.raises(QuantizationError, match=r"\(up\) in this \w+ model: gelu\w* stands between"):
            pairs(model, "up")

    def test_norms_without_gain(self) -> None:
        config = transformers.OPTConfig(
            hidden_size=32, word_embed_proj_dim=32, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8,
            layer_norm_elementwise_affine=False)  # fmt: skip
        with pytest.raises(QuantizationError, match="the norm self_attn_layer_norm has no gain"):
            pairs(transformers.AutoModelForCausalLM.from_config(config), "norm")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda scale: scale[:-1], r"\(31,\) scales do not fit the 32 columns"),
            (lambda scale: -scale, "must be positive and finite, got -"),
            (lambda scale: scale * float("nan"), "must be positive and finite, got nan"),
            (lambda scale: scale * 1e-7, r"leave the range of torch\.float16"),
        ],
    )
    def test_scales_that_cannot_be(self, change: Any, words: str) -> None:
        model = random_model("llama", torch.float16)
        written: list[str] = []
        with pytest.raises(QuantizationError, match=words):
            fold(model, pairs(model, "norm")[0], change(torch.ones(32)), lambda name, _: written.append(name))
        assert not written, "nothing half folded"

    def test_an_architecture_that_is_not_described(self) -> None:
        model = nn.Module()
        model.config = transformers.GemmaConfig()
        with pytest.raises(ModelError, match="not described"):
            obstacle(model, "norm")  # type: ignore[arg-type]
