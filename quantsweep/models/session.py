"""One piece owns the model for one trial: every change goes through it, into a ledger, and is undone at the end.

    write(name, value)      a layer's weight (out × in, an expert's too), or any parameter or buffer
    replace(name, module)   another module in the place of one
    on_input(name, change)  a change of what enters a module
    on_attention(site, …)   a change of queries, keys, values or probabilities, in all blocks
    restore()               all of it undone, and proven

Proof is a comparison of the whole model with what was loaded: checksums of all parameters and buffers, which
modules there are, which parameters they hold, and their hooks.  The same comparison before a trial is scored
(`written_state`) finds what a step changed without its session: a norm's gain, a bias, a hook, a module.

Originals come back from the model's mapped file where a layer has one (`layers.py`), from a host copy made at the
first write elsewhere.  A tensor under several names (a head tied to the embedding) is untied by the first
write to one of them: each name is written alone, and `restore` ties them again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from quantsweep.errors import ModelError, QuantizationError, did_you_mean
from quantsweep.models.blocks import decoder_blocks
from quantsweep.models.checksums import differing, state_checksums, structure_of, structure_of_module
from quantsweep.models.layers import LinearLayer
from quantsweep.models.loading import LoadedModel
from quantsweep.signs import OnProgress

Change = Callable[[Tensor], Tensor]
"""What is done to a tensor on its way: values in, values of the same shape and dtype out."""
_WITHOUT = "after loading, and not through the trial's session"
_NOT_BACK = "and did not come back when the trial was over"


ATTENTION_SITES = ("q", "k", "v", "probabilities")
_OURS = "quantsweep"
_CHANGES: dict[int, dict[str, Change]] = defaultdict(dict)
"""By model (the identity of its configuration), what is done at each site of its attention."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scaling + mask) v with the changes of this model: (1, heads, T, d) → (1, T, heads, d) and the probabilities."""
    if odd := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise QuantizationError(f"attention with {odd[0]} is not known: its sites cannot be quantized")
    changes = _CHANGES[id(module.config)]
    query, key, value = (changes.get(site, _same)(values) for site, values in (("q", query), ("k", key), ("v", value)))
    groups = query.shape[1] // key.shape[1]
    key, value = (values.repeat_interleave(groups, dim=1) for values in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if attention_mask is None else scores + attention_mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    probabilities = changes.get("probabilities", _same)(scores.softmax(dim=-1, dtype=exact).to(query.dtype))
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def _same(values: Tensor) -> Tensor:
    return values


AttentionInterface.register(_OURS, _attention)
AttentionMaskInterface.register(_OURS, eager_mask)


class Session:
    """The model of one trial, from its first change to `restore`.

    loaded: the model, whose layers nothing has been written to.  on_progress: called while long work goes on.
    """

    def __init__(self, loaded: LoadedModel, on_progress: OnProgress = lambda: None) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.layers: Mapping[str, LinearLayer] = loaded.layers
        self._on_progress = on_progress
        self._undo: list[Callable[[], None]] = []
        self._written: set[str] = set()
        self._replaced: set[str] = set()
        self._original_structure = structure_of(loaded.model)
        self._expected = dict(self._original_structure)
        self._inputs_are_plain = False

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the decoder blocks, in their order."""
        prefix, blocks = decoder_blocks(self.model)
        return tuple(f"{prefix}.{number}" for number in range(len(blocks)))

    @property
    def head_name(self) -> str:
        """Name of the output head; raises ModelError for a model without one."""
        head: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if name := next((name for name, module in self.model.named_modules() if module is head), ""):
            return str(name)
        raise ModelError(f"{type(self.model).__name__} has no output head")

    def read(self, name: str) -> Tensor:
        """A copy of what the model computes with now: a layer's weight (O, I), or a parameter or buffer as it is stored."""
        if name in self.layers:
            return self.layers[name].read_written()
        return self._tensor(name).detach().clone()

    def to_round(self, layer: LinearLayer) -> Tensor:
        """The weight (O, I) that is to be rounded, float32, a copy: the original, after exact rewriting if there was any."""
        return layer.read_written().to(torch.float32) if layer.is_written else layer.read()

    def write(self, name: str, value: Tensor) -> None:
        """Let the model compute with `value`, cast to the dtype that is there.

        name: a layer's (value out × in), or that of a parameter or buffer (value as it is stored).
        Raises ModelError for a name that is not there, QuantizationError for another shape.
        """
        if name in self.layers:
            self.layers[name].write(value)
            return
        tensor = self._tensor(name)
        if value.shape != tensor.shape:
            raise QuantizationError(f"{name}: a value of shape {tuple(value.shape)} does not fit {tuple(tensor.shape)}")
        if held := [layer for layer in self.layers.values() if layer.parameter is tensor]:
            for layer in held:
                layer.write(layer.as_out_in(value))
            return
        if name not in self._written:
            self._keep(name, tensor)
        with torch.no_grad():
            self._tensor(name).copy_(value)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of the one called `name`; hooks that place a spread model's inputs move over.

        Raises QuantizationError where something was hung on the old one: replace first.
        """
        old = self._module(name)
        self._check_untouched(name, old)
        if old._forward_pre_hooks:
            raise QuantizationError(f"{name} has changes of its input already; replace it before they are hung on it")
        parent, leaf = self._parent(name)
        module.train(old.training)
        if (hook := getattr(old, "_hf_hook", None)) is not None:
            add_hook_to_module(module, hook)
        setattr(parent, leaf, module)
        self._undo.append(lambda: setattr(parent, leaf, old))
        self._replaced.add(name)
        self._expected = {key: value for key, value in self._expected.items() if not _is_within(key, {name})}
        self._expected |= structure_of(module, name)

    def on_input(self, name: str, change: Change) -> None:
        """Change what enters the module called `name` (its first argument), from now on.

        change: a module of plain tensor operations is moved to where its layer computes.
        Raises QuantizationError for one of several experts, whose inputs no module sees alone.
        """
        if name in self.layers and self.layers[name].expert is not None:
            raise QuantizationError(f"layer {name} is one of several experts in one module: its inputs alone cannot be changed")
        module = self._module(name)
        self._check_untouched(name, module)
        if isinstance(change, nn.Module) and (parameter := next(module.parameters(), None)) is not None:
            change.to(parameter.device)

        def changed(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return None if self._inputs_are_plain else (change(arguments[0]), *arguments[1:])

        handle = module.register_forward_pre_hook(changed)
        self._undo.append(handle.remove)
        self._expected[name] = structure_of_module(module)

    def on_attention(self, site: str, change: Change) -> None:
        """Change queries, keys or values (1, heads, T, d) as they enter attention, or its probabilities (1, heads, T, T), in all blocks.

        site: q, k, v (after rotary embedding) or probabilities.  From then on attention is computed by plain matrix products.
        Raises QuantizationError for a model whose attention is code of its own (BLOOM, Falcon), or has more than queries, keys and values.
        """
        if site not in ATTENTION_SITES:
            raise QuantizationError(did_you_mean("attention site", site, ATTENTION_SITES))
        config: Any = self.model.config
        if config._attn_implementation != _OURS:
            before = config._attn_implementation
            config._attn_implementation = _OURS
            self._undo.append(lambda: setattr(config, "_attn_implementation", before))
            self._undo.append(_CHANGES[id(config)].clear)
        changes = _CHANGES[id(config)]
        calls: list[int] = []
        changes[site] = lambda values: calls.append(1) or values  # type: ignore[func-returns-value]
        with torch.no_grad(), self.plain_inputs():
            self.model(torch.zeros(1, 2, dtype=torch.int64, device=self.model.device), use_cache=False)
        if len(calls) != len(self.block_names):
            raise QuantizationError(f"{config.model_type} models compute attention in a way of their own: site {site} cannot be reached")
        if isinstance(change, nn.Module):
            change.to(self.model.device)
        changes[site] = lambda values: values if self._inputs_are_plain else change(values)

    @contextmanager
    def plain_inputs(self) -> Iterator[None]:
        """Inputs as they come, without the changes of `on_input` and `on_attention`, while the block lasts."""
        before, self._inputs_are_plain = self._inputs_are_plain, True
        try:
            yield
        finally:
            self._inputs_are_plain = before

    def written_state(self) -> Mapping[str, str]:
        """Checksums of all parameters and buffers as they are now.

        Raises ModelError where something has changed since loading that did not go through the session.
        """
        self.loaded.check_contents()
        self._check_structure(_WITHOUT)
        now = state_checksums(self.model)
        written = self._written | self._names_of_written_layers()
        if changed := [name for name in differing(self.loaded.state, now) if name not in written and not _is_within(name, self._replaced)]:
            raise ModelError(self.loaded.changed(changed, _WITHOUT))
        return now

    def check_state(self, state: Mapping[str, str]) -> None:
        """Raise ModelError when parameters, buffers, modules or hooks are not what `written_state` said: something else was scored."""
        self.loaded.check_contents()
        self._check_structure("while it was evaluated")
        if changed := differing(state, state_checksums(self.model)):
            raise ModelError(self.loaded.changed(changed, "while it was evaluated"))

    def rewritten(self) -> tuple[tuple[str, str], ...]:
        """What was written since loading, name and checksum: the part of a statistic's key that says of which model it is."""
        now = state_checksums(self.model)
        return tuple((name, now.get(name, "gone")) for name in differing(self.loaded.state, now))

    def restore(self) -> int:
        """Everything back as it was loaded; the number of layers that were written.

        Raises ModelError where the model is not what was loaded, down to the last parameter, buffer, module and hook.
        """
        for undo in reversed(self._undo):
            undo()
            self._on_progress()
        self._undo.clear()
        self._written.clear()
        self._replaced.clear()
        self._expected = dict(self._original_structure)
        count = self.loaded.restore(self._on_progress)
        self._check_structure(_NOT_BACK)
        if changed := differing(self.loaded.state, state_checksums(self.model)):
            raise ModelError(self.loaded.changed(changed, _NOT_BACK))
        return count

    def _keep(self, name: str, tensor: Tensor) -> None:
        """What the ledger needs to put a tensor back: itself where others share it, a copy on the host elsewhere."""
        self._written.add(name)
        owner, leaf = self._parent(name)
        if len(self._names_of(tensor)) > 1:
            held = owner._parameters if leaf in owner._parameters else owner._buffers
            alone = tensor.detach().clone()
            self._set(name, held, leaf, nn.Parameter(alone, requires_grad=tensor.requires_grad) if held is owner._parameters else alone)
            self._undo.append(lambda: self._set(name, held, leaf, tensor))
            return
        original = tensor.detach().to("cpu", copy=True)

        def put_back() -> None:
            with torch.no_grad():
                tensor.copy_(original)

        self._undo.append(put_back)

    def _set(self, name: str, held: dict[str, Any], leaf: str, tensor: Tensor) -> None:
        held[leaf] = tensor
        owner = name.rpartition(".")[0]
        self._expected[owner] = structure_of_module(self._module(owner))

    def _tensor(self, name: str) -> Tensor:
        owner, leaf = self._parent(name)
        tensor = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if tensor is None:
            raise ModelError(f"the model has no layer, parameter or buffer called {name}")
        return tensor

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"the model has no module called {name}") from error

    def _parent(self, name: str) -> tuple[nn.Module, str]:
        owner, _, leaf = name.rpartition(".")
        return self._module(owner), leaf

    def _names_of(self, tensor: Tensor) -> list[str]:
        named = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)]
        return [name for name, other in named if other is tensor]

    def _names_of_written_layers(self) -> set[str]:
        written = {id(layer.parameter) for layer in self.layers.values() if layer.is_written}
        return {name for name, parameter in self.model.named_parameters(remove_duplicate=False) if id(parameter) in written}

    def _check_untouched(self, name: str, module: nn.Module) -> None:
        """A change without the session is not to be covered by one with it."""
        if structure_of_module(module) != self._expected.get(name):
            raise ModelError(self.loaded.changed([name], _WITHOUT))

    def _check_structure(self, when: str) -> None:
        now = structure_of(self.model)
        if changed := sorted(name for name in self._expected.keys() | now.keys() if self._expected.get(name) != now.get(name)):
            raise ModelError(self.loaded.changed([name or "the model itself" for name in changed], when))


def _is_within(name: str, modules: set[str]) -> bool:
    """True for the name of one of the modules, or of what lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
