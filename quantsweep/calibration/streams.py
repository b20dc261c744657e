"""A model read block by block: what enters each block lies on the host, and one block at a time computes.

    for block in walk(session, tokens_NT):
        for group in block.groups:                      # layers that run on one input: (q, k, v), (o), (gate, up), (down)
            inputs = block.capture(group)
            ...                                         # quantize the layers of the group, through the session
                                                        # the outputs of the quantized block are the next one's inputs

Streams say what a layer's inputs have been through:

    original      the blocks as they were when the walk came to them
    weights       the blocks as they are: weights quantized, what enters them not
    activations   as they are, with the changes of inputs that hang on the session, the layer's own included

A block is given exactly what the model gives it (masks, positions, rotary tables): it is caught from the model's own forward
pass, without a cache.  The windows are of one length and unpadded, so that these are the same for all; that is
compared.  One window is read at a time: what it gives does not depend on its company.

Memory: beside the model the inputs of one block (N × T × H a stream, host), the sums of one group, and, where the
original stream is read, a copy of one block.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache

from quantsweep.calibration.inputs import InputSums, LayerInputs, listening
from quantsweep.errors import QuantizationError
from quantsweep.models.layers import LinearLayer
from quantsweep.models.session import Session
from quantsweep.numerics.tokens import tokens_are
from quantsweep.signs import OnProgress

Stream = Literal["original", "weights", "activations"]
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_position")


class _Enough(Exception):
    """All that was to be heard was heard."""


@dataclass(frozen=True, slots=True, eq=False)
class _Arguments:
    """What a block is called with beside the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class BlockPass:
    """One decoder block on its way through the calibration text.

    name, module: the block.  layers: those of its linear layers that are quantized, by full name.
    groups: their names, in the order in which they run, those of one input together.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        arguments: _Arguments,
        inputs: Mapping[Stream, Tensor],
        on_progress: OnProgress,
    ) -> None:
        self.name = name
        self.module = session.model.get_submodule(name)
        self.layers: Mapping[str, LinearLayer] = {key: layer for key, layer in session.layers.items() if key.startswith(f"{name}.")}
        self._session = session
        self._arguments = arguments
        self._inputs = inputs
        self._on_progress = on_progress
        self._original = {key: tensor.detach().clone() for key, tensor in self.module.state_dict().items()} if "original" in inputs else {}
        self._groups: tuple[tuple[str, ...], ...] | None = None

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Found by running the block on the first window; raises QuantizationError for a layer that runs several times or not at all."""
        if self._groups is None:
            self._groups = self._find_groups()
        return self._groups

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return next(self.module.parameters()).device

    @property
    def num_windows(self) -> int:
        """N."""
        return len(next(iter(self._inputs.values())))

    def hidden(self, window: int, stream: Stream = "weights") -> Tensor:
        """What enters the block at one window, (1, T, H) on the block's device."""
        kept = self._inputs["original" if stream == "original" else self._quantized]
        return kept[window : window + 1].to(self.device, non_blocking=True)

    def run(self, hidden_1TH: Tensor, stream: Stream = "weights", *, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output (1, T, H); differentiable where gradients are on.

        weights: parameters of the block, by their names in it, to compute with instead of its own, this once.
        """
        instead = {**(self._original if stream == "original" else {}), **(weights or {})}
        with ExitStack() as stack:
            if stream != "activations":
                stack.enter_context(self._session.plain_inputs())
            stack.enter_context(tokens_are(torch.ones(hidden_1TH.shape[:2], dtype=torch.bool)))
            arguments = (hidden_1TH, *self._arguments.positional)
            if instead:
                found = torch.func.functional_call(self.module, instead, arguments, self._arguments.named)
            else:
                found = self.module(*arguments, **self._arguments.named)
        output: Tensor = found[0] if isinstance(found, (tuple, list)) else found  # some blocks return more, some the tensor itself
        if output.shape != hidden_1TH.shape:
            raise QuantizationError(f"block {self.name} makes {tuple(output.shape)} of {tuple(hidden_1TH.shape)}: no plain decoder block")
        return output

    def capture(
        self,
        names: Sequence[str],
        stream: Stream = "weights",
        *,
        hessian: torch.dtype | None = torch.float32,
        sample_tokens: int = 0,
    ) -> dict[str, LayerInputs]:
        """What enters these layers over the whole text.  Layers of one input share the result.

        hessian: float32, float64, or None for none.  sample_tokens: about so many inputs are kept (of an expert its share of them).
        Raises QuantizationError for a layer that does not run, and for inputs that are no numbers.
        """
        layers = {name: self.layers[name] for name in names}
        width = next(iter(self._inputs.values())).shape[1]
        every = 0 if not sample_tokens else max(1, self.num_windows * width // sample_tokens)
        leader: dict[str, str] = {}
        sums: dict[str, InputSums] = {}
        heard: dict[str, Tensor] = {}

        def hear(name: str, values: Tensor) -> None:
            if name not in leader:
                leader[name] = next((other for other in sums if heard.get(other) is values), name)
                if leader[name] == name:
                    sums[name] = InputSums(layers[name].in_features, values.device, hessian=hessian, sample_every=every)
            heard[name] = values
            if leader[name] == name:
                sums[name].add(values)
            if len(heard) == len(layers):
                raise _Enough

        with torch.no_grad(), listening(layers, hear):
            for window in range(self.num_windows):
                heard.clear()
                try:
                    self.run(self.hidden(window, stream), stream)
                except _Enough:
                    pass
                else:
                    raise QuantizationError(f"layer {next(name for name in names if name not in heard)} did not run in its block")
                self._on_progress()
        totals = {name: each.total(name) for name, each in sums.items()}
        return {name: totals[leader[name]] for name in names}

    def outputs(self, stream: Stream = "weights") -> Iterator[Tensor]:
        """The block's output at each window, (1, T, H)."""
        for window in range(self.num_windows):
            with torch.no_grad():
                output = self.run(self.hidden(window, stream), stream)
            self._on_progress()
            yield output

    @property
    def _quantized(self) -> Stream:
        return next((stream for stream in self._inputs if stream != "original"), "original")

    def _find_groups(self) -> tuple[tuple[str, ...], ...]:
        calls: Counter[str] = Counter()
        groups: dict[int, tuple[Tensor, list[str]]] = {}  # by identity, which is one's own while the tensor is held

        def hear(name: str, values: Tensor) -> None:
            calls[name] += 1
            # Experts see different tokens: what they have in common is the parameter of which each is a part.
            source = values if self.layers[name].expert is None else self.layers[name].parameter
            groups.setdefault(id(source), (source, []))[1].append(name)

        with torch.no_grad(), listening(self.layers, hear):
            self.run(self.hidden(0, self._quantized), "weights")
        if odd := [name for name in self.layers if calls[name] != 1]:
            times = "does not run" if not calls[odd[0]] else f"runs {calls[odd[0]]} times"
            raise QuantizationError(f"layer {odd[0]} {times} in one pass of its block: it cannot be calibrated")
        return tuple(tuple(names) for _, names in groups.values())


def walk(
    session: Session, tokens_NT: Tensor, *, original: bool = False, activations: bool = False, on_progress: OnProgress = lambda: None
) -> Iterator[BlockPass]:
    """The decoder blocks in their order, each with what enters it; when the next one is asked for, the block as it then is has been run.

    tokens_NT: N windows of T tokens, int64.  original: also the original stream.
    activations: the other stream has the changes of inputs, and is called "activations"; otherwise it is "weights".
    """
    arguments, first_NTH = _entering(session, tokens_NT, on_progress)
    stream: Stream = "activations" if activations else "weights"
    inputs: dict[Stream, Tensor] = {stream: first_NTH}
    if original:
        inputs["original"] = first_NTH.clone()
    for name in session.block_names:
        block = BlockPass(session, name, arguments[name], inputs, on_progress)
        yield block
        if name == session.block_names[-1]:
            return
        for kind, values_NTH in inputs.items():
            for window, output in enumerate(block.outputs(kind)):
                values_NTH[window].copy_(output[0], non_blocking=True)
            if block.device.type == "cuda":
                torch.cuda.synchronize(block.device)  # the next block may lie on another one, which waits for none of this


def _entering(session: Session, tokens_NT: Tensor, on_progress: OnProgress) -> tuple[dict[str, _Arguments], Tensor]:
    """What each block is called with beside the hidden states, and what enters the first block at each window (N, T, H), on the host."""
    names = session.block_names
    caught: dict[str, _Arguments] = {}
    hidden: list[Tensor] = []
    wanted = len(names)  # all blocks at the first window, then the first block alone

    def catcher(name: str) -> Any:
        def catch(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            values, arguments = _split(module, positional, named)
            if name == names[0]:
                hidden.append(values)
                if name in caught and not _equal(caught[name], arguments):
                    raise QuantizationError(f"block {name} is called with other masks or positions at each window: windows must be alike")
            caught.setdefault(name, arguments)
            if len(caught) >= wanted:
                raise _Enough

        return catch

    with ExitStack() as stack, torch.no_grad(), session.plain_inputs():
        for name in names:
            handle = session.model.get_submodule(name).register_forward_pre_hook(catcher(name), with_kwargs=True)
            stack.callback(handle.remove)
        device = session.model.get_input_embeddings().get_parameter("weight").device
        inputs_NTH: Tensor | None = None
        for window, tokens_T in enumerate(tokens_NT):
            with suppress(_Enough):
                session.model(tokens_T[None].to(device), use_cache=False)
            if inputs_NTH is None:
                shape = (len(tokens_NT), *hidden[0].shape[1:])
                inputs_NTH = torch.empty(shape, dtype=hidden[0].dtype, pin_memory=hidden[0].is_cuda)
            inputs_NTH[window].copy_(hidden.pop()[0])
            on_progress()
    if inputs_NTH is None:
        raise QuantizationError("the calibration text has no windows")
    return caught, inputs_NTH


def _split(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, _Arguments]:
    """The hidden states, and the other arguments without anything that a pass would leave behind for the next one."""
    others = {key: False if key == "use_cache" else value for key, value in named.items() if key not in _CACHES}
    if positional:
        return positional[0], _Arguments(tuple(None if isinstance(value, Cache) else value for value in positional[1:]), others)
    first = next(iter(inspect.signature(module.forward).parameters))
    return named[first], _Arguments((), {key: value for key, value in others.items() if key != first})


def _equal(one: _Arguments, other: _Arguments) -> bool:
    ones, others = [*one.positional, *one.named.values()], [*other.positional, *other.named.values()]
    return len(ones) == len(others) and all(map(_same, ones, others))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one is other or one == other)
