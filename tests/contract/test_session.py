"""One session owns the model: whatever went through it comes back, whatever did not is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantsweep.errors import ModelError, QuantizationError
from quantsweep.models.checksums import state_checksums, structure_of
from quantsweep.models.loading import LoadedModel, wrap_model
from quantsweep.models.session import Session
from quantsweep.numerics.tokens import tokens_are
from quantsweep.trial.specs import ModelSpec
from tests.contract.architectures import CONFIGS, random_model

TOKENS = torch.arange(1, 25)[None]


class Tokenizer:
    """As much of one as loading looks at."""

    model_max_length = 64


def loaded_model(family: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A random model of a family, in memory."""
    return wrap_model(random_model(family, dtype), Tokenizer(), ModelSpec(name=family, family=family, path="/nowhere"), None)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode(), tokens_are(torch.ones_like(TOKENS, dtype=torch.bool)):
        return model(TOKENS, use_cache=False).logits


class Halved(nn.Module):
    """Half of what another module gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor) -> Tensor:
        return self.inner(values) / 2


@pytest.mark.parametrize("family", CONFIGS)
def test_everything_comes_back_and_is_proven(family: str) -> None:
    """A layer's weight, a norm's gain, the embedding (tied or not), a replaced module, changed inputs, on every architecture."""
    loaded = loaded_model(family)
    model, before = loaded.model, logits(loaded.model)
    state, structure = state_checksums(model), structure_of(model)
    session = Session(loaded)
    first, *_, last = (name for name, layer in session.layers.items() if layer.expert is None)
    gain = next(name for name, value in model.named_parameters() if (value.ndim == 1 and "norm" in name) or "ln_" in name)
    embedding = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    changes: list[Callable[[], None]] = [
        *(lambda name=name: session.write(name, session.read(name) * 2) for name in (list(session.layers)[-1], gain, embedding)),
        lambda: session.replace(last, Halved(model.get_submodule(last))),
        lambda: session.on_input(first, lambda values: values.sign()),
    ]
    seen = [before]
    for change in changes:
        change()
        seen.append(logits(model))
        assert not torch.equal(seen[-1], seen[-2]), "a change changes something"
    session.check_state(session.written_state())
    assert session.restore() == 1
    assert torch.equal(logits(model), before)
    assert (state_checksums(model), structure_of(model)) == (state, structure)


def test_a_tied_head_is_written_alone_and_tied_again() -> None:
    loaded = loaded_model("gpt2")
    model, session = loaded.model, Session(loaded)
    assert model.lm_head.weight is model.transformer.wte.weight
    embedding = session.read("transformer.wte.weight")
    session.write("lm_head.weight", torch.zeros_like(embedding))
    assert torch.equal(session.read("transformer.wte.weight"), embedding)
    assert not logits(model).any()
    session.write("transformer.wte.weight", embedding * 2)
    assert not session.read("lm_head.weight").any()
    session.check_state(session.written_state())
    session.restore()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, embedding)


def test_layers_are_written_out_by_in_whatever_way_they_are_stored() -> None:
    """GPT-2 stores in × out, Mixtral all experts in one parameter; written by the parameter's name it is as stored."""
    for family, name, parameter in (
        ("gpt2", "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn.weight"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj.2", "model.layers.0.mlp.experts.down_proj"),
    ):
        session = Session(loaded_model(family))
        layer = session.layers[name]
        assert session.read(name).shape == (layer.out_features, layer.in_features)
        session.write(name, torch.ones(layer.out_features, layer.in_features))
        assert float(session.read(parameter).sum()) != 0
        session.write(parameter, torch.full_like(session.read(parameter), 3))
        assert bool((session.read(name) == 3).all())
        assert torch.equal(session.to_round(layer), session.read(name))
        session.written_state()
        session.restore()
        with pytest.raises(QuantizationError, match="does not fit"):
            session.write(parameter, torch.ones(2, 2))


def _gain(model: PreTrainedModel) -> None:
    model.gpt_neox.layers[0].input_layernorm.weight.mul_(1.001)


def _bias(model: PreTrainedModel) -> None:
    model.gpt_neox.layers[1].mlp.dense_h_to_4h.bias[0] += 1


def _buffer(model: PreTrainedModel) -> None:
    model.gpt_neox.rotary_emb.inv_freq.mul_(2)


def _hook(model: PreTrainedModel) -> None:
    model.gpt_neox.layers[0].mlp.register_forward_hook(lambda *_: None)


def _module(model: PreTrainedModel) -> None:
    model.gpt_neox.layers[0].mlp.act = nn.ReLU()


def _forward(model: PreTrainedModel) -> None:
    model.gpt_neox.layers[0].mlp.forward = lambda values: values


def _same_numbers(model: PreTrainedModel) -> None:
    linear = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)


@pytest.mark.parametrize("change", [_gain, _bias, _buffer, _hook, _module, _forward, _same_numbers])
def test_what_does_not_go_through_the_session_is_found(change: Callable[[PreTrainedModel], None]) -> None:
    """Before the trial is scored, and after it: such a model is never the next trial's."""
    loaded = loaded_model("gpt_neox")
    session = Session(loaded)
    layer = next(iter(session.layers))
    session.write(layer, session.read(layer) * 2)
    state = session.written_state()
    with torch.no_grad():
        change(loaded.model)
    with pytest.raises(ModelError, match="changed after loading, and not through the trial's session"):
        session.written_state()
    with pytest.raises(ModelError, match="changed while it was evaluated"):
        session.check_state(state)
    with pytest.raises(ModelError, match="did not come back"):
        session.restore()


def test_a_change_without_the_session_is_not_covered_by_one_with_it() -> None:
    loaded = loaded_model("gpt_neox")
    session = Session(loaded)
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    loaded.model.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="not through the trial's session"):
        session.on_input(name, torch.neg)


def test_names_that_are_not_there_are_refused() -> None:
    session = Session(loaded_model("gpt_neox"))
    with pytest.raises(ModelError, match=r"no layer, parameter or buffer called gpt_neox\.nothing"):
        session.write("gpt_neox.nothing", torch.ones(1))
    with pytest.raises(ModelError, match="no module called nothing"):
        session.replace("nothing", nn.Identity())
    with pytest.raises(QuantizationError, match="one of several experts"):
        Session(loaded_model("mixtral")).on_input("model.layers.0.mlp.experts.down_proj.0", torch.neg)


@pytest.mark.parametrize("site", ["q", "k", "v", "probabilities"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama", "qwen3", "mixtral", "glm4"])
def test_attention_is_changed_at_its_sites_and_comes_back(family: str, site: str) -> None:
    """Where nothing is changed the function stays what it was; zeros in place of the values leave attention nothing to put out."""
    loaded = loaded_model(family, torch.float64)
    before = logits(loaded.model)
    session = Session(loaded)
    session.on_attention(site, lambda values: values)
    torch.testing.assert_close(logits(loaded.model), before, rtol=0, atol=1e-10)
    shapes: list[torch.Size] = []
    session.on_attention(site, lambda values: shapes.append(values.shape) or values * 0)
    assert not torch.allclose(logits(loaded.model), before)
    assert len(shapes) == len(session.block_names)
    assert shapes[0][2] == TOKENS.shape[1]
    with session.plain_inputs():
        torch.testing.assert_close(logits(loaded.model), before, rtol=0, atol=1e-10)
    session.restore()
    assert torch.equal(logits(loaded.model), before)


@pytest.mark.parametrize("family", ["bloom", "falcon-7b"])
def test_attention_that_is_code_of_its_own_is_refused(family: str) -> None:
    loaded = loaded_model(family)
    before = logits(loaded.model)
    session = Session(loaded)
    with pytest.raises(QuantizationError, match="compute attention in a way of their own: site q cannot be reached"):
        session.on_attention("q", torch.neg)
    session.restore()
    assert torch.equal(logits(loaded.model), before)
