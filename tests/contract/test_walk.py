"""The walk from layer to earlier layer, in every architecture: by experiment where units stay units, by size over the residual."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantsweep.errors import ModelError
from quantsweep.mini import model_path
from quantsweep.models.anatomy import predecessors
from quantsweep.models.blocks import Place, decoder_blocks, quantizable_linears
from quantsweep.models.loading import load_model
from quantsweep.models.session import Session
from quantsweep.pipeline.run import quantize
from quantsweep.trial.specs import ModelSpec, QuantizationSpec, StepSpec
from tests.contract.architectures import CONFIGS, LAYERS_OF_A_BLOCK, random_model
from tests.contract.rounding_cases import help_for_tests

TOKENS = torch.arange(1, 33)[None]
QKV = {
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("attn.c_attn", "attention.query_key_value", "self_attention.query_key_value"),
}
USUAL_OUTPUT = ("self_attn.o_proj", "self_attn.v_proj")
OF_OUTPUT = {
    "opt": ("self_attn.out_proj", "self_attn.v_proj"),
    "opt-350m": ("self_attn.out_proj", "self_attn.v_proj"),
    "gpt2": ("attn.c_proj", "attn.c_attn"),
    "gpt_neox": ("attention.dense", "attention.query_key_value"),
    "bloom": ("self_attention.dense", "self_attention.query_key_value"),
    "falcon-7b": ("self_attention.dense", "self_attention.query_key_value"),
    "falcon-40b": ("self_attention.dense", "self_attention.query_key_value"),
    "falcon-rw": ("self_attention.dense", "self_attention.query_key_value"),
}
"""Attention output, and what holds V; elsewhere USUAL_OUTPUT."""
OF_DOWN = {
    "opt": ("fc2", "fc1"),
    "opt-350m": ("fc2", "fc1"),
    "gpt2": ("mlp.c_proj", "mlp.c_fc"),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon-7b", "falcon-40b", "falcon-rw"), ("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")),
    **dict.fromkeys(("llama", "qwen3", "mistral"), ("mlp.down_proj", "mlp.up_proj")),
    **dict.fromkeys(("glm", "glm4"), ("mlp.down_proj", "mlp.gate_up_proj")),
}
"""Second MLP layer, and the first; without experts."""


def weight_OI(place: Place) -> Tensor:
    """The weight that the model computes with, out × in, as a view."""
    weight = place.module.get_parameter(place.parameter)
    weight = weight if place.expert is None else weight[place.expert]
    return weight.T if place.transposed else weight


@contextmanager
def zeroed(*tensors: Tensor) -> Iterator[None]:
    """Views of weights or biases at zero for a while."""
    kept = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    yield
    for tensor, old in zip(tensors, kept, strict=True):
        tensor.copy_(old)


def unit_of(place: Place, unit: int) -> list[Tensor]:
    """The weights and the bias of one output unit."""
    bias = getattr(place.module, "bias", None)
    return [weight_OI(place)[unit], *([] if bias is None else [bias[unit : unit + 1]])]


def inputs_of(model: PreTrainedModel, module: nn.Module) -> Tensor:
    """What a module is given in a forward pass: tokens × columns."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].clone()))
    with torch.inference_mode():
        model(TOKENS)
    handle.remove()
    return found[0].flatten(0, -2)


def sample(units: Tensor) -> list[int]:
    """The first and last unit, and some between them."""
    values = units.unique().tolist()
    return sorted({values[0], values[-1], *values[1 :: max(1, len(values) // 5)]})


@pytest.mark.parametrize("family", CONFIGS)
def test_each_layer_but_the_first_inputs_has_its_predecessor(family: str) -> None:
    model = random_model(family)
    prefix = decoder_blocks(model)[0]
    found = predecessors(model)
    # Nothing comes before the first block, and no single layer is the source of what leaves Mixtral's experts.
    blocks = range(2) if family == "mixtral" else range(1)
    without = {f"{prefix}.{number}.{name}" for number in blocks for name in QKV & LAYERS_OF_A_BLOCK[family]}
    assert set(found) == set(quantizable_linears(model)) - without
    assert list(found) == [name for name in quantizable_linears(model) if name in found]


@pytest.mark.parametrize("family", CONFIGS)
def test_sources_are_earlier_layers_with_a_unit_for_each_column(family: str) -> None:
    model = random_model(family)
    places = quantizable_linears(model)
    for name, source in predecessors(model).items():
        (rows, _), (_, columns) = weight_OI(places[source.layer]).shape, weight_OI(places[name]).shape
        assert source.unit_of_column.shape == (columns,)
        assert source.unit_of_column.dtype == torch.int64
        assert 0 <= source.unit_of_column.min() <= source.unit_of_column.max() < rows


@pytest.mark.parametrize("family", CONFIGS)
def test_over_the_residual_units_are_channels(family: str) -> None:
    """Attention output → first MLP layers, second MLP layer → next QKV: as many units as columns, in their order."""
    model = random_model(family)
    prefix = decoder_blocks(model)[0]
    places, found = quantizable_linears(model), predecessors(model)
    output, _ = OF_OUTPUT.get(family, USUAL_OUTPUT)
    inside = {output, OF_DOWN[family][0]} if family in OF_DOWN else {output, *(f"mlp.experts.down_proj.{n}" for n in range(3))}
    for name, source in found.items():
        number, _, part = name.removeprefix(f"{prefix}.").partition(".")
        if part in inside:
            continue
        is_input = part in QKV
        assert source.layer == (f"{prefix}.{int(number) - 1}.{OF_DOWN[family][0]}" if is_input else f"{prefix}.{number}.{output}")
        assert torch.equal(source.unit_of_column, torch.arange(32))
        assert len(weight_OI(places[source.layer])) == weight_OI(places[name]).shape[1] == 32


@pytest.mark.parametrize("family", CONFIGS)
def test_a_unit_of_v_is_exactly_its_columns_of_the_attention_output(family: str) -> None:
    model = random_model(family)
    output, value = OF_OUTPUT.get(family, USUAL_OUTPUT)
    units_are_columns(model, output, value)


@pytest.mark.parametrize("family", OF_DOWN)
def test_a_unit_of_the_first_mlp_layer_is_exactly_its_column_of_the_second(family: str) -> None:
    model = random_model(family)
    units_are_columns(model, *OF_DOWN[family])


def units_are_columns(model: PreTrainedModel, later: str, earlier: str) -> None:
    """With a unit of `earlier` at zero, the columns of it in `later`'s input are zero and all others what they were."""
    prefix, blocks = decoder_blocks(model)
    places, found = quantizable_linears(model), predecessors(model)
    for number in range(len(blocks)):
        name = f"{prefix}.{number}.{later}"
        source = found[name]
        assert source.layer == f"{prefix}.{number}.{earlier}"
        before = inputs_of(model, places[name].module)
        alive = before.any(dim=0)  # ReLU may leave a column at zero by itself, which tells nothing
        assert alive.float().mean() > 0.25
        for unit in sample(source.unit_of_column[alive]):
            with zeroed(*unit_of(places[source.layer], unit)):
                after = inputs_of(model, places[name].module)
            mapped = source.unit_of_column == unit
            assert not after[:, mapped].any()
            torch.testing.assert_close(after[:, ~mapped], before[:, ~mapped], rtol=1e-5, atol=1e-6)


def test_a_unit_of_an_experts_first_layer_is_exactly_its_column_of_the_second() -> None:
    """No module has an expert's hidden units as inputs: the unit at zero is to be what the column at zero is."""
    model = random_model("mixtral", torch.float64)
    places, found = quantizable_linears(model), predecessors(model)
    experts = [name for name in found if ".down_proj." in name]
    assert len(experts) == 2 * 3
    with torch.inference_mode():
        plain = model(TOKENS).logits
        for name in experts:
            source = found[name]
            assert source.layer == name.replace("down_proj", "gate_up_proj")
            for unit in sample(source.unit_of_column):
                columns = (source.unit_of_column == unit).nonzero().flatten().tolist()
                assert columns == [unit - 48], "the lower half of gate_up_proj is up"
                with zeroed(*unit_of(places[source.layer], unit)):
                    without_unit = model(TOKENS).logits
                with zeroed(weight_OI(places[name])[:, columns[0]]):
                    without_column = model(TOKENS).logits
                torch.testing.assert_close(without_unit, without_column, rtol=0, atol=1e-12)
                assert not torch.equal(without_unit, plain)


def test_grouped_queries_repeat_a_unit_of_v() -> None:
    """Four query heads of 8, two value heads: each value head's units come twice, side by side."""
    source = predecessors(random_model("llama"))["model.layers.0.self_attn.o_proj"]
    first, second = torch.arange(8), torch.arange(8, 16)
    assert torch.equal(source.unit_of_column, torch.cat([first, first, second, second]))


def test_fused_qkv_is_walked_by_its_interleaving() -> None:
    """Two heads of 16 as (q, k, v) each; four heads of 8 over one value head; two groups of (q, q, k, v)."""
    units = {
        "gpt_neox": [*range(32, 48), *range(80, 96)],
        "falcon-7b": [*range(40, 48)] * 4,
        "falcon-40b": [*range(24, 32), *range(24, 32), *range(56, 64), *range(56, 64)],
        "gpt2": [*range(64, 96)],
    }
    for family, expected in units.items():
        model = random_model(family)
        [source] = [s for n, s in predecessors(model).items() if n == f"{decoder_blocks(model)[0]}.0.{OF_OUTPUT[family][0]}"]
        assert source.unit_of_column.tolist() == expected, family


def test_an_architecture_that_is_not_described_is_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.GemmaConfig(vocab_size=8, head_dim=8, **sizes)
    with pytest.raises(ModelError, match="blocks of gemma models are not described"):
        predecessors(transformers.AutoModelForCausalLM.from_config(config))


def test_a_loaded_layer_knows_where_its_inputs_come_from() -> None:
    loaded = load_model(ModelSpec(name="m", family="f", path=str(model_path("mini-opt-0.4m")), dtype="float32"), "cpu")
    expected = predecessors(loaded.model)
    for name, layer in loaded.layers.items():
        source = layer.inputs_from
        if name not in expected:
            assert source is None
        else:
            assert source is not None
            assert source.layer == expected[name].layer
            assert torch.equal(source.unit_of_column, expected[name].unit_of_column)


def test_outlier_dependent_quantization_keeps_columns_in_every_layer_but_the_first_ones() -> None:
    loaded = load_model(ModelSpec(name="m", family="f", path=str(model_path("mini-neox-0.9m")), dtype="float32"), "cpu")
    spec = QuantizationSpec(
        rounding=StepSpec("outlier_dependent", 1, (("fraction", 0.02),)), data_type="int", data_type_version=1,
        data_type_options=(("convention", "kbit"),), bit_width=3, block_size=64, block_axis="flat", symmetric=True, scale_dtype="float16",
    )  # fmt: skip
    records = quantize(Session(loaded), spec, help_for_tests()).layers
    for record in records:
        kept = 0 if loaded.layers[record.layer].inputs_from is None else max(1, round(0.02 * record.in_features))
        assert record.num_kept_columns == kept, record.layer
    assert [record.layer for record in records if not record.num_kept_columns] == ["gpt_neox.layers.0.attention.query_key_value"]
    loaded.restore()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_sources_come_before_what_they_feed(family: str) -> None:
    """In the order of the model, in which methods meet its layers."""
    model = random_model(family)
    order = list(quantizable_linears(model))
    pairs = predecessors(model)
    assert pairs
    assert all(order.index(source.layer) < order.index(name) for name, source in pairs.items())
