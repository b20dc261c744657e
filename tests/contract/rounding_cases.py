"""Layers that are tensors, for tests of what roundings do to them; the runner is the product's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantsweep.calibration.statistics import StatisticsStore
from quantsweep.pipeline.interface import Help, Layer, LayerContext, LayerRecord, Rounding, Stored
from quantsweep.pipeline.run import quantize
from quantsweep.trial.specs import QuantizationSpec


@dataclass(frozen=True)
class Source:
    """The earlier layer, and which of its units makes which column."""

    layer: str
    unit_of_column: Tensor


class Remembering:
    """A rounding, and what it stored of each layer."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self.check, self.needs, self.decode = rounding.check, rounding.needs, rounding.decode
        self.stored: dict[str, Stored] = {}

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """As the rounding does it."""
        self.stored[layer.name] = self._rounding.encode(layer, weight_OI, spec, context)
        return self.stored[layer.name]


class FakeLayer:
    """A layer that is a tensor, and remembers what was written."""

    def __init__(self, original: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.name = ""
        self.original = original
        self.dtype = dtype
        self.inputs_from: Source | None = None
        self.written: Tensor | None = None

    @property
    def out_features(self) -> int:
        """O."""
        return len(self.original)

    @property
    def in_features(self) -> int:
        """I."""
        return self.original.shape[-1]


class FakeSession:
    """As much of a session as steps without calibration look at."""

    def __init__(self, layers: dict[str, FakeLayer]) -> None:
        self.layers = layers
        for name, layer in layers.items():
            layer.name = name

    def to_round(self, layer: FakeLayer) -> Tensor:
        """The original itself: roundings must not change it."""
        return layer.original

    def write(self, name: str, weight_OI: Tensor) -> None:
        """Cast and keep."""
        self.layers[name].written = weight_OI.to(self.layers[name].dtype)


def help_for_tests(tokens_NT: Tensor | None = None, seed: int = 0) -> Help:
    """Everything a step is given, with nobody who listens."""
    return Help(tokens_NT=tokens_NT, generator=torch.Generator().manual_seed(seed), progress=lambda: None, statistics=StatisticsStore())


def round_layers(layers: dict[str, FakeLayer], spec: QuantizationSpec) -> tuple[LayerRecord, ...]:
    """Run the steps of a spec on these layers."""
    return quantize(FakeSession(layers), spec, help_for_tests()).layers
