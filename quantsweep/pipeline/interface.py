"""What a step of the pipeline is given, and what it gives back.

    Transform      rewrites the model exactly, through its session                   transforms/
    Clipping       chooses the range that scales are made from                       clipping/
    Rounding       a weight → what is stored of it → the weight computed with        rounding/
    Compensation   adds something stored beside the codes                            compensations/
    Activation     makes the module that quantizes what enters a layer               activations/

A step looks at one layer, one range or one model at a time, and never at files or tasks; `pipeline/run.py` calls the
steps in the one order and writes the records.  Each has `check`, which refuses in words before any layer is touched.

Shapes: O output channels, I input channels, N blocks of B weights that share a scale, T tokens.  Weights are float32, out × in.

What a step may rely on:

* `decode` is given the spec, since a code means nothing without its data type.
* `limits` is given blocks and not their values alone, and which input columns they are: a range may be judged on inputs.  A rounding
  meets it already bound to its layer (`LayerContext.clipping`, called by `pipeline/ranges.py`).
* The options of a step come with the spec (`spec.rounding`, `spec.clipping`, …); a transform is given its own: a trial may have several.
* What a step wants to know of inputs it says beforehand (`needs`); a step that needs none is given None.
* What an earlier layer leaves for later ones lies in `LayerContext.kept`, which lives as long as the trial.
* A fallback (a raised damping, an expert without tokens) is words in what `encode` returns, so that it cannot be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from quantsweep.calibration.inputs import LayerInputs
from quantsweep.calibration.statistics import StatisticsStore
from quantsweep.calibration.streams import Stream
from quantsweep.data_types._base import Quantized
from quantsweep.models.session import Session
from quantsweep.numerics.blocks import Blocks
from quantsweep.signs import OnProgress
from quantsweep.trial.specs import ActivationSpec, QuantizationSpec, StepSpec

KEPT, KEPT_INDEX = "kept", "kept_index"
"""Names in `Stored.extras` of columns that stay at 16 bit, and of their indices."""


RANGE_TOKENS = 1024
"""Tokens whose activations a calibrated range that ends at a percentile is taken from."""


class InputSource(Protocol):
    """Which units of which earlier layer make a layer's inputs."""

    @property
    def layer(self) -> str:
        """Name of the earlier layer."""

    @property
    def unit_of_column(self) -> Tensor:
        """For each input column of the later layer the row of the earlier weight that makes it: (I,) int64."""


class Layer(Protocol):
    """One linear layer, whatever way its module stores the weight."""

    @property
    def name(self) -> str:
        """Its dotted name in the model; of an expert with its number at the end."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""

    @property
    def inputs_from(self) -> InputSource | None:
        """Where its inputs come from; None in the first block, and where no single layer makes them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Help:
    """What every step of one trial may use.

    tokens_NT: the calibration text, int64 on the host; None where no chosen step needs one.
    generator: seeded with the trial's seed (0 where it has none), on the host.
    progress: to be called at least every few seconds; costs microseconds.
    statistics: of the model as it was before rounding; shared by the trials of a shard.
    """

    tokens_NT: Tensor | None
    generator: torch.Generator
    progress: OnProgress
    statistics: StatisticsStore


@dataclass(frozen=True, kw_only=True, slots=True)
class InputNeeds:
    """What a step wants to know of the inputs of each layer.

    hessian: dtype of 2/n Σ x xᵀ, or None.  sample_tokens: about so many inputs themselves.
    stream: what they have been through (`quantsweep.calibration.streams`).
    granularity: taken anew for each group of layers that run on one input (true-sequential), or once for the whole block.
    """

    hessian: torch.dtype | None = None
    sample_tokens: int = 0
    stream: Stream = "weights"
    granularity: Literal["group", "block"] = "group"


Limits = Callable[[Blocks, Tensor | None], tuple[Tensor, Tensor]]
"""Blocks of a layer's weight, and which input columns they are (None: all, in order) -> lowest and highest value (N,), (N,)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerContext:
    """What a step may know about one layer beside its weight.

    inputs: what entered it, as the step's `needs` asked; None where it asked for nothing.
    clipping: chooses the range of each block; None for its extremes.
    kept: what this trial's rounding left behind at earlier layers, by their names.
    """

    help: Help
    inputs: LayerInputs | None = None
    clipping: Limits | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What a file of one weight would hold: quantized blocks, and by name what the step keeps beside them, as it is stored.

    quantized: None for a rounding whose format is its own: then all of it lies in `extras`.
    fallbacks: what was done otherwise than asked, in words ("damping 0.1", "no tokens: rounded to nearest").
    `quantsweep.data_types._packed` makes bytes of the blocks.
    """

    quantized: Quantized | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()

    @property
    def bits_by_part(self) -> dict[str, int]:
        """Stored bits of the quantized blocks ("blocks") and of each of the extras."""
        blocks = {} if self.quantized is None else {"blocks": self.quantized.stored_bits}
        return blocks | extras_bits(self.extras)

    @property
    def blocks(self) -> Quantized:
        """The quantized blocks, of a rounding that stores them; raises TypeError for one that does not."""
        if self.quantized is None:
            raise TypeError("nothing is stored in blocks here")
        return self.quantized

    @property
    def bits(self) -> int:
        """All of it."""
        return sum(self.bits_by_part.values())

    @property
    def num_kept_columns(self) -> int:
        """Input columns that stayed at 16 bit."""
        return self.extras[KEPT_INDEX].numel() if KEPT_INDEX in self.extras else 0


def extras_bits(extras: Mapping[str, Tensor]) -> dict[str, int]:
    """Bits of tensors as they are stored, by name."""
    return {name: 8 * array.numel() * array.element_size() for name, array in extras.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compensated:
    """What a compensation stores beside the codes, and the weight (O, I) float32 that the layer then computes with."""

    weight_OI: Tensor
    extras: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """What a trial did to one layer.

    bits: stored bits of the whole weight, overhead counted.
    relative_error: ‖W - Ŵ‖² / ‖W‖², W the weight after exact rewriting.  max_abs_error: max |W - Ŵ|.  Ŵ in the compute dtype.
    num_kept_columns: input columns that stayed at 16 bit.
    bits_by_part: `bits`, part by part: blocks (codes and scales), indices, factors, ….
    output_error: tr(Δ H Δᵀ) / tr(W H Wᵀ), Δ = W - Ŵ: the error of the layer's output on its calibration inputs; None without them.
    num_tokens: calibration tokens that the layer saw; None without calibration.
    seconds: from reading the weight to writing it; the shared passes of calibration are not in it.
    fallbacks: what was done otherwise than asked.
    """

    layer: str
    out_features: int
    in_features: int
    bits: float
    relative_error: float
    max_abs_error: float
    num_kept_columns: int = 0
    bits_by_part: tuple[tuple[str, int], ...] = ()
    output_error: float | None = None
    num_tokens: int | None = None
    seconds: float | None = None
    fallbacks: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """As columns of the table `layers`."""
        texts = {"bits_by_part": " ".join(f"{part}={bits}" for part, bits in self.bits_by_part), "fallbacks": "; ".join(self.fallbacks)}
        return {name: getattr(self, name) for name in self.__slots__} | texts


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformRecord:
    """What an exact rewriting did at one place: `name` of the layer or norm, numbers in words ("alpha 0.5"), extra stored bits.

    Folded into weights it costs nothing; what has to be computed while the model runs (a rotation) is counted in `bits`.
    """

    name: str
    detail: str = ""
    bits: int = 0


class Rounding(Protocol):
    """How a weight becomes codes."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where it cannot do what `spec` asks."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """What it wants to know of each layer's inputs; None: it looks at no calibration text."""

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """What is stored of a weight, which is finite and not to be changed; raises QuantizationError without the layer's name."""

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) that the layer computes with: from what is stored and nothing else."""


class Clipping(Protocol):
    """Which range scales are made from; codes of what lies beyond it saturate."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where it cannot do what `spec` asks."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """What it wants to know of each layer's inputs; None: it looks at no calibration text."""

    def limits(
        self, layer: Layer, blocks: Blocks, spec: QuantizationSpec, context: LayerContext, columns_J: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each block: (N,) and (N,) float32.

        columns_J: which input columns the blocks' columns are, (J,) int64; None for all in their order.
        """


class Transform(Protocol):
    """An exact rewriting: what the model computes in float64 stays what it was."""

    def check(self, spec: QuantizationSpec, step: StepSpec) -> None:
        """Raise ConfigurationError where it cannot do what the options of `step` ask."""

    def apply(self, session: Session, spec: QuantizationSpec, step: StepSpec, help: Help) -> tuple[TransformRecord, ...]:
        """Rewrite through `session.write` alone.  Raises QuantizationError naming what cannot be folded."""


class Compensation(Protocol):
    """What is stored beside the codes so that the layer comes nearer to what it was."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where it cannot do what `spec` asks."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """What it wants to know of each layer's inputs; None: it looks at no calibration text."""

    def compensate(
        self, layer: Layer, weight_OI: Tensor, quantized_OI: Tensor, spec: QuantizationSpec, context: LayerContext
    ) -> Compensated:
        """From the weight that was rounded and the one that its codes decode to, both float32."""


class Activation(Protocol):
    """How values that enter a layer are quantized, as a module of plain tensor operations whose numbers are buffers."""

    @property
    def needs_ranges(self) -> bool:
        """Whether `module` must be given the range on the calibration text."""

    def check(self, spec: ActivationSpec) -> None:
        """Raise ConfigurationError where it cannot do what `spec` asks."""

    def module(self, spec: ActivationSpec, ranges: LayerInputs | None) -> nn.Module:
        """A module that maps inputs (…, I) to what they are after quantization, same shape and dtype.

        ranges: minimum, maximum and mean magnitude of each channel on the calibration text, where they are needed.
        """

    def keeps_weights(self, spec: ActivationSpec) -> bool:
        """Whether some inputs are multiplied by the weight before rounding; then `linear` takes the place of each rounded layer."""

    def linear(self, spec: ActivationSpec, linear: nn.Module, original_OI: Tensor) -> nn.Module:
        """A layer that quantizes its inputs itself, made of the rounded one and the weight (O, I) before rounding, in the compute dtype."""
