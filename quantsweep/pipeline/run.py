"""The one order in which the chosen steps of a trial run on a model.

    transforms, in their order
    → ranges of activations that are fixed beforehand, and the modules that quantize activations
    → layer by layer: rounding, within the range of the clipping          (block by block where a step looks at calibration text)
    → compensation

Without calibration layers are read, rounded and written one after the other, and the model never runs.  With it blocks are
walked (`calibration/streams.py`): a layer meets what the layers before it, rounded already, make of the text.  Compensated
weights are written when their block has been passed: what later layers are rounded on has been through rounding alone.

Errors are measured on what the model computes with, after the cast to the compute dtype; for 8-bit
formats and a bfloat16 model that cast is a sizeable part of the error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantsweep.calibration.inputs import LayerInputs
from quantsweep.calibration.streams import BlockPass, Stream, walk
from quantsweep.errors import QuantizationError
from quantsweep.models.layers import LinearLayer
from quantsweep.models.session import Session
from quantsweep.numerics.error import weight_error
from quantsweep.pipeline.interface import (
    RANGE_TOKENS,
    Activation,
    Clipping,
    Compensation,
    Help,
    InputNeeds,
    LayerContext,
    LayerRecord,
    Limits,
    Rounding,
    Transform,
    TransformRecord,
    extras_bits,
)
from quantsweep.trial import registry
from quantsweep.trial.specs import QuantizationSpec

MOST_FALLBACKS = 0.5
"""If more of the layers than this were done otherwise than asked, the trial is another one than its name says."""
NOT_BUILT = ("correction", "tuning", "kv_cache", "scope")
"""Factors that specs know and no step is there for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a trial did to a model."""

    layers: tuple[LayerRecord, ...]
    transforms: tuple[TransformRecord, ...] = ()

    @property
    def num_fallbacks(self) -> int:
        """Layers that were done otherwise than asked."""
        return sum(bool(layer.fallbacks) for layer in self.layers)


def quantize(session: Session, spec: QuantizationSpec, help: Help) -> Outcome:
    """Run the steps of `spec` on the session's model.

    Raises ConfigurationError before anything is touched where a step cannot do what is asked, later QuantizationError naming the layer.
    """
    steps = _Steps.of(spec)
    transforms = tuple(
        record
        for transform, step in zip(steps.transforms, spec.transforms, strict=True)
        for record in transform.apply(session, spec, step, help)
    )
    originals = _kept_weights(session, spec, steps)
    _hang_activations(session, spec, steps, help, set(session.layers) - set(originals))
    layers = () if not spec.quantizes_weights else _Layers(session, spec, steps, help).round()
    layers = tuple(_at_16_bits(layer) if layer.layer in originals else layer for layer in layers)
    _replace_layers(session, spec, steps, originals)
    outcome = Outcome(layers=layers, transforms=transforms)
    if outcome.num_fallbacks > MOST_FALLBACKS * max(1, len(layers)):
        first = next(layer for layer in layers if layer.fallbacks)
        raise QuantizationError(
            f"{outcome.num_fallbacks} of {len(layers)} layers were quantized otherwise than asked ({first.layer}: "
            f"{'; '.join(first.fallbacks)}): that is another method; give more calibration text, or other options"
        )
    return outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    """The code of the chosen steps, each of which can do what is asked."""

    rounding: Rounding
    transforms: tuple[Transform, ...]
    clipping: Clipping | None
    compensation: Compensation | None
    activation: Activation | None

    @classmethod
    def of(cls, spec: QuantizationSpec) -> _Steps:
        if unknown := [name for name in NOT_BUILT if getattr(spec, name)]:
            raise QuantizationError(f"nothing is there yet that does {unknown[0]}={getattr(spec, unknown[0])}: leave it at none")
        rounding: Rounding = registry.ROUNDINGS[spec.rounding.name]
        rounding.check(spec)
        transforms: tuple[Transform, ...] = tuple(registry.TRANSFORMS[step.name] for step in spec.transforms)
        for transform, step in zip(transforms, spec.transforms, strict=True):
            transform.check(spec, step)
        clipping: Clipping | None = None if spec.clipping is None else registry.CLIPPINGS[spec.clipping.name]
        compensation: Compensation | None = None if spec.compensation is None else registry.COMPENSATIONS[spec.compensation.name]
        for chosen in (clipping, compensation):
            if chosen is not None:
                chosen.check(spec)
        activation: Activation | None = None
        if spec.activation is not None:
            activation = registry.ACTIVATIONS[spec.activation.step.name]
            activation.check(spec.activation)
        steps = cls(rounding=rounding, transforms=transforms, clipping=clipping, compensation=compensation, activation=activation)
        if spec.activation is not None and activation is not None and activation.keeps_weights(spec.activation):
            steps._refuse_stream_of_activations(spec)
        return steps

    def _refuse_stream_of_activations(self, spec: QuantizationSpec) -> None:
        """Layers are replaced once all weights are rounded: till then their inputs are not quantized."""
        if any(needs.stream == "activations" for needs in self.needs(spec)):
            raise QuantizationError(
                f"activation {spec.activation and spec.activation.step.name} with outlier_weights=fp16 replaces layers after rounding, so "
                "that no step sees inputs that it has quantized: use rounding.options.stream=weights, or outlier_weights=int8"
            )

    def needs(self, spec: QuantizationSpec) -> list[InputNeeds]:
        """What the steps that work layer by layer want to know of inputs."""
        chosen = (self.rounding, self.clipping, self.compensation)
        return [needs for step in chosen if step is not None and (needs := step.needs(spec)) is not None]


def _kept_weights(session: Session, spec: QuantizationSpec, steps: _Steps) -> dict[str, Tensor]:
    """The weights (O, I) before rounding, in the compute dtype, where the activation's step multiplies some inputs by them."""
    if spec.activation is None or steps.activation is None or not steps.activation.keeps_weights(spec.activation):
        return {}
    if not spec.quantizes_weights:
        return {}
    if experts := [name for name, layer in session.layers.items() if layer.expert is not None]:
        raise QuantizationError(f"layer {experts[0]} is one of several experts in one module: it cannot be replaced by itself")
    return {name: session.to_round(layer).to(layer.dtype) for name, layer in session.layers.items()}


def _replace_layers(session: Session, spec: QuantizationSpec, steps: _Steps, originals: Mapping[str, Tensor]) -> None:
    if spec.activation is not None and steps.activation is not None:
        for name, original_OI in originals.items():
            session.replace(name, steps.activation.linear(spec.activation, session.layers[name].module, original_OI))


def _at_16_bits(layer: LayerRecord) -> LayerRecord:
    """Whichever columns are outliers, their weights before rounding must be at hand: all are kept, and the codes are made from them."""
    bits = 16 * layer.out_features * layer.in_features
    return replace(layer, bits=bits, bits_by_part=(("weights", bits),))


def _hang_activations(session: Session, spec: QuantizationSpec, steps: _Steps, help: Help, layers: Set[str]) -> None:
    if spec.activation is None or steps.activation is None:
        return
    ranges: Mapping[str, LayerInputs] = {}
    if steps.activation.needs_ranges:
        sampled = 0 if spec.activation.clip_percentile is None else RANGE_TOKENS
        ranges = help.statistics.inputs(session, _tokens(help), help.progress, sample_tokens=sampled)
    for site in spec.activation.sites:
        if site == "linear":
            for name in (name for name in session.layers if name in layers):
                session.on_input(name, steps.activation.module(spec.activation, ranges.get(name)))
        elif site == "head" and not steps.activation.needs_ranges:
            session.on_input(session.head_name, steps.activation.module(spec.activation, None))
        elif steps.activation.needs_ranges:
            raise QuantizationError(f"ranges that are fixed beforehand are known for the inputs of linear layers, not at site {site}")
        else:
            session.on_attention(site, steps.activation.module(spec.activation, None))


class _Layers:
    """Rounds the layers of one model, one after the other."""

    def __init__(self, session: Session, spec: QuantizationSpec, steps: _Steps, help: Help) -> None:
        self._session, self._spec, self._steps, self._help = session, spec, steps, help
        self._needs = steps.needs(spec)
        self._kept: dict[str, Tensor] = {}
        self._compensated: dict[str, Tensor] = {}

    def round(self) -> tuple[LayerRecord, ...]:
        """All layers in the order of the model."""
        records = {record.layer: record for record in (self._by_blocks() if self._needs else self._at_once())}
        return tuple(records[name] for name in self._session.layers)

    def _at_once(self) -> Iterator[LayerRecord]:
        for layer in self._session.layers.values():
            self._help.progress()
            yield self._layer(layer, {})
            self._write_compensated()

    def _by_blocks(self) -> Iterator[LayerRecord]:
        streams = sorted({needs.stream for needs in self._needs})
        blocks = walk(
            self._session,
            _tokens(self._help),
            original="original" in streams,
            activations="activations" in streams,
            on_progress=self._help.progress,
        )
        for block in blocks:
            self._write_compensated()  # of the block before, which has been passed
            for group in self._groups(block):
                inputs = {stream: self._capture(block, group, stream) for stream in streams}
                for name in group:
                    self._help.progress()
                    yield self._layer(block.layers[name], {stream: found[name] for stream, found in inputs.items()})
        self._write_compensated()

    def _groups(self, block: BlockPass) -> Sequence[Sequence[str]]:
        changing = [needs for needs in self._needs if needs.stream != "original"]  # the original's inputs are the same at any time
        together = not changing or any(needs.granularity == "block" for needs in changing)
        return [[name for group in block.groups for name in group]] if together else block.groups

    def _capture(self, block: BlockPass, group: Sequence[str], stream: Stream) -> dict[str, LayerInputs]:
        asked = [needs for needs in self._needs if needs.stream == stream]
        exact = any(needs.hessian == torch.float64 for needs in asked)
        wants_hessian = any(needs.hessian is not None for needs in asked)
        hessian = (torch.float64 if exact else torch.float32) if wants_hessian else None
        return block.capture(group, stream, hessian=hessian, sample_tokens=max(needs.sample_tokens for needs in asked))

    def _write_compensated(self) -> None:
        for name, weight_OI in self._compensated.items():
            self._session.write(name, weight_OI)
        self._compensated.clear()

    def _layer(self, layer: LinearLayer, inputs: Mapping[Stream, LayerInputs]) -> LayerRecord:
        try:
            return self._round_one(layer, inputs)
        except QuantizationError as error:
            raise QuantizationError(str(error) if str(error).startswith("layer ") else f"layer {layer.name}: {error}") from error

    def _round_one(self, layer: LinearLayer, inputs: Mapping[Stream, LayerInputs]) -> LayerRecord:
        started = time.perf_counter()
        spec, rounding = self._spec, self._steps.rounding
        weight_OI = _finite(self._session.to_round(layer))
        context = self._context(rounding, inputs, self._limits(layer, inputs))
        stored = rounding.encode(layer, weight_OI, spec, context)
        used_OI = rounding.decode(stored, spec, layer.dtype)
        self._session.write(layer.name, used_OI)
        parts = stored.bits_by_part
        if (compensation := self._steps.compensation) is not None:
            context = self._context(compensation, inputs, None)
            compensated = compensation.compensate(layer, weight_OI, used_OI.to(torch.float32), spec, context)
            used_OI = compensated.weight_OI.to(layer.dtype)
            parts |= extras_bits(compensated.extras)
            self._compensated[layer.name] = used_OI
        error = weight_error(weight_OI, used_OI)
        if not math.isfinite(error.relative):
            raise QuantizationError(f"its quantized weight does not fit {layer.dtype}; use model.dtype=bfloat16 or float32")
        seen = next(iter(inputs.values()), None)
        return LayerRecord(
            layer=layer.name,
            out_features=layer.out_features,
            in_features=layer.in_features,
            bits=sum(parts.values()),
            bits_by_part=tuple(parts.items()),
            num_kept_columns=stored.num_kept_columns,
            relative_error=error.relative,
            max_abs_error=error.max_abs,
            output_error=None if seen is None else _output_error(weight_OI, used_OI, seen),
            num_tokens=None if seen is None else seen.num_tokens,
            seconds=time.perf_counter() - started,
            fallbacks=stored.fallbacks if seen is None or seen.num_tokens else (*stored.fallbacks, "no calibration token came here"),
        )

    def _limits(self, layer: LinearLayer, inputs: Mapping[Stream, LayerInputs]) -> Limits | None:
        clipping = self._steps.clipping
        if clipping is None:
            return None
        context = self._context(clipping, inputs, None)
        return lambda blocks, columns_J: clipping.limits(layer, blocks, self._spec, context, columns_J)

    def _context(
        self, step: Rounding | Clipping | Compensation, inputs: Mapping[Stream, LayerInputs], limits: Limits | None
    ) -> LayerContext:
        needs = step.needs(self._spec)
        return LayerContext(help=self._help, inputs=None if needs is None else inputs[needs.stream], clipping=limits, kept=self._kept)


def _tokens(help: Help) -> Tensor:
    if help.tokens_NT is None:
        raise QuantizationError("a step looks at calibration text, and the trial has none; its yaml must say needs_calibration: true")
    return help.tokens_NT


def _finite(weight_OI: Tensor) -> Tensor:
    """The weight itself; raises QuantizationError when it holds NaN or infinity, or is no matrix."""
    if weight_OI.ndim != 2 or weight_OI.numel() == 0:
        raise QuantizationError(f"a weight of shape {tuple(weight_OI.shape)} is not a matrix with elements")
    if not all(math.isfinite(extreme) for extreme in (float(weight_OI.amin()), float(weight_OI.amax()))):
        count = int(weight_OI.isfinite().logical_not().sum())
        raise QuantizationError(f"{count} of {weight_OI.numel()} weights are NaN or infinite; is the checkpoint whole?")
    return weight_OI


def _output_error(weight_OI: Tensor, used_OI: Tensor, inputs: LayerInputs) -> float | None:
    """tr(Δ H Δᵀ) / tr(W H Wᵀ); None without a Hessian, and where the layer's outputs are zero."""
    if inputs.hessian_II is None:
        return None
    difference_OI = (weight_OI - used_OI.to(torch.float32)).to(inputs.hessian_II.dtype)
    exact_OI = weight_OI.to(inputs.hessian_II.dtype)
    error, size = (float(((matrix @ inputs.hessian_II) * matrix).sum(dtype=torch.float64)) for matrix in (difference_OI, exact_OI))
    return error / size if size > 0 else None
