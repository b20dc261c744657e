"""What the steps that quantize activations have in common: which sites there are, and that all computing is float32.

16-bit activations are widened first: in their own dtype scales would round, and codes with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from quantsweep.activations._grids import Grid, grid_of
from quantsweep.activations._ranges import Extremes
from quantsweep.errors import ConfigurationError
from quantsweep.trial.specs import ActivationSpec

SITES = ("linear", "head")
"""Inputs of the quantized linear layers, and of the output head."""
OF_ATTENTION = ("q", "k", "v", "probabilities")
"""What enters attention's own products: values (…, T, d) of each head, probabilities (…, T, T)."""
BLOCK_FORMATS = ("mxfp", "nvfp4")
"""Formats that are nothing without blocks."""


class Inputs(Protocol):
    """What entered a layer while the calibration text was read: extremes of each channel, and some of the inputs."""

    @property
    def num_tokens(self) -> int:
        """How many tokens these are of."""

    @property
    def min_I(self) -> Tensor:
        """(I,) float32."""

    @property
    def max_I(self) -> Tensor:
        """(I,) float32."""

    @property
    def sample_TI(self) -> Tensor:
        """(T, I) float32; T = 0 where no sample was taken."""


class Quantizer(nn.Module, ABC):
    """Replaces values (…, I) by the nearest ones of a format, in their own dtype; a subclass says which values share a range."""

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__()
        self.grid: Grid = grid_of(spec)
        self.extremes = Extremes(spec.clip_percentile, symmetric=spec.symmetric)

    def forward(self, values: Tensor) -> Tensor:
        """Same shape and dtype."""
        return self.quantized(values.float()).to(values.dtype)

    @abstractmethod
    def quantized(self, values: Tensor) -> Tensor:
        """float32 in and out."""


class Step:
    """What a step does unless it says otherwise (`quantsweep.pipeline.interface.Activation`)."""

    needs_ranges = False
    sites: tuple[str, ...] = SITES

    def check(self, spec: ActivationSpec) -> None:
        """Raise ConfigurationError for what it cannot do."""
        check(spec, self.sites)

    def keeps_weights(self, spec: ActivationSpec) -> bool:
        """Whether some inputs are multiplied by weights as they were before rounding, so that `linear` has to take a layer's place."""
        return False

    def linear(self, spec: ActivationSpec, linear: nn.Module, original_OI: Tensor) -> nn.Module:
        """What takes the place of a layer, given the weight before rounding; raises TypeError where `keeps_weights` is false."""
        raise TypeError(f"activation={spec.step.name} leaves layers in their place")


def check(spec: ActivationSpec, sites: tuple[str, ...], *, has_blocks: bool = False) -> None:
    """Raise ConfigurationError for a site, a format or blocks that the step does not have."""
    name = spec.step.name
    if others := [site for site in spec.sites if site not in sites]:
        raise ConfigurationError(f"activation={name} does not quantize {', '.join(others)}; activation.sites are {', '.join(sites)}")
    if (spec.block_size is not None) != has_blocks:
        remedy = "activation.block_size must be a number" if has_blocks else "leave activation.block_size out, or use activation=per_block"
        raise ConfigurationError(f"activation={name} has {'blocks' if has_blocks else 'no blocks'}: {remedy}")
    if spec.data_type in BLOCK_FORMATS and not has_blocks:
        raise ConfigurationError(f"activation={name} has no blocks, which {spec.data_type} is made of; use activation=per_block")
    grid_of(spec)
