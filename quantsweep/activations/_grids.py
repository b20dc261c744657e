"""The numbers that activations are rounded to, within a range that is given.

    grid(values, low, high)    values → the nearest numbers of the format; what lies beyond the range saturates

`low` and `high` are of any shape that broadcasts to the values: one for each token, sequence, block or channel.
All is float32, the scales too: they are computed on the fly and never stored.  Formats are those of weights
(`quantsweep.data_types`), which tests hold these against; here they are plain tensor operations whose numbers are buffers, so that
modules which differ in bit width alone share compiled code.

    int      all conventions, symmetric or not      fp8     e4m3, e5m2
    mxfp     blocks of 32, four scale modes         nvfp4   blocks of 16 under one scale for each sequence
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from quantsweep.data_types.fp8 import ELEMENTS as FP8_ELEMENTS
from quantsweep.data_types.int import CONVENTIONS, Codes, Range
from quantsweep.data_types.mxfp import ELEMENTS as MX_ELEMENTS
from quantsweep.data_types.mxfp import LARGEST_SCALE_EXPONENT, scale_exponent
from quantsweep.data_types.nvfp4 import LEAST_BLOCK_SCALE
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.minifloat import E2M1, E4M3, MiniFloat, nearest, power_of_two
from quantsweep.numerics.scales import without_zeros
from quantsweep.trial.specs import ActivationSpec


class Grid(nn.Module, ABC):
    """Rounds values within a range.

    needs_sequence: the format has a second scale, of the largest magnitude of the whole sequence (`largest`).
    """

    needs_sequence = False

    @abstractmethod
    def forward(self, values: Tensor, low: Tensor, high: Tensor, largest: Tensor | None = None) -> Tensor:
        """float32 in and out, same shape."""


class IntegerGrid(Grid):
    """Equally spaced levels, by the conventions of `quantsweep.data_types.int`."""

    number: Tensor
    largest_code: Tensor
    largest_signed: Tensor
    lowest_code: Tensor
    middle: Tensor

    def __init__(self, bit_width: int, *, symmetric: bool, convention: str) -> None:
        super().__init__()
        self._convention = CONVENTIONS[convention]
        self._symmetric = symmetric
        step = self._convention.symmetric if symmetric else self._convention.asymmetric
        if step is None:
            able = ", ".join(name for name, other in CONVENTIONS.items() if other.asymmetric)
            raise ConfigurationError(f"activations as integers with convention={convention} are symmetric only; use one of {able}")
        self._step = step
        half = 1 << (bit_width - 1)
        numbers = {"number": 2 * half, "largest_code": 2 * half - 1, "largest_signed": half - 1, "middle": half}
        for name, value in {**numbers, "lowest_code": int(self._convention.stores_absmax)}.items():
            self.register_buffer(name, torch.tensor(float(value)))

    def forward(self, values: Tensor, low: Tensor, high: Tensor, largest: Tensor | None = None) -> Tensor:
        """Nearest levels: (round(x / s) + z, clipped, - z) · s."""
        codes = Codes(number=self.number, largest=self.largest_code, largest_signed=self.largest_signed)
        scale = self._step(Range(low=low, high=high), codes)
        scale = scale / self.largest_signed if self._convention.stores_absmax else scale
        divisor = without_zeros(scale)
        zero = self.middle if self._symmetric else self._zero(low, divisor)
        return (values / divisor).round_().add_(zero).clamp_(self.lowest_code, self.largest_code).sub_(zero).mul_(scale)

    def _zero(self, low: Tensor, divisor: Tensor) -> Tensor:
        zero = (low / divisor).round().neg()
        return torch.minimum(zero.clamp(min=0), self.largest_code) if self._convention.clips_zero else zero


class Float8Grid(Grid):
    """8-bit floating point with the largest magnitude at the format's largest number."""

    largest_number: Tensor

    def __init__(self, element: MiniFloat) -> None:
        super().__init__()
        self._element = element
        self.register_buffer("largest_number", torch.tensor(element.largest))

    def forward(self, values: Tensor, low: Tensor, high: Tensor, largest: Tensor | None = None) -> Tensor:
        """Nearest numbers times the scale."""
        scale = _magnitude(low, high) / self.largest_number
        return nearest(values / without_zeros(scale), self._element) * scale


class MicroscalingGrid(Grid):
    """Small floating point under a power of two."""

    def __init__(self, element: MiniFloat, scale_mode: str) -> None:
        super().__init__()
        self._element, self._mode = element, scale_mode

    def forward(self, values: Tensor, low: Tensor, high: Tensor, largest: Tensor | None = None) -> Tensor:
        """Nearest numbers times the power of two."""
        exponent = scale_exponent(_magnitude(low, high), self._element, self._mode)
        scale = power_of_two(exponent.clamp(-LARGEST_SCALE_EXPONENT, LARGEST_SCALE_EXPONENT))
        return nearest(values / scale, self._element) * scale


class Nvfp4Grid(Grid):
    """E2M1 under an E4M3 scale a block and one float32 scale a sequence."""

    needs_sequence = True
    largest_scaled: Tensor
    largest_number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest_scaled", torch.tensor(E4M3.largest * E2M1.largest))
        self.register_buffer("largest_number", torch.tensor(E2M1.largest))

    def forward(self, values: Tensor, low: Tensor, high: Tensor, largest: Tensor | None = None) -> Tensor:
        """Nearest numbers times both scales; `largest`: of the sequence."""
        assert largest is not None
        of_sequence = largest / self.largest_scaled
        block = _magnitude(low, high) / self.largest_number / without_zeros(of_sequence)
        scale = nearest(block.clamp(LEAST_BLOCK_SCALE, E4M3.largest), E4M3) * of_sequence
        return nearest(values / without_zeros(scale), E2M1) * scale


def _magnitude(low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(high, low.neg())


def grid_of(spec: ActivationSpec) -> Grid:
    """The grid of an activation's format; raises ConfigurationError with the choices where there is none."""
    options: dict[str, Any] = dict(spec.data_type_options)
    match spec.data_type:
        case "int" if 2 <= spec.bit_width <= 8:
            convention = _chosen(spec, "convention", options, CONVENTIONS)
            return IntegerGrid(spec.bit_width, symmetric=spec.symmetric, convention=convention)
        case "fp8" if spec.bit_width == 8 and spec.symmetric:
            return Float8Grid(FP8_ELEMENTS[_chosen(spec, "format", options, FP8_ELEMENTS)])
        case "mxfp" if spec.bit_width in MX_ELEMENTS and spec.symmetric:
            elements = MX_ELEMENTS[spec.bit_width]
            exponent_bits = options.get("exponent_bits") or next(iter(elements))
            mode = options.get("scale_mode", "floor")
            return MicroscalingGrid(elements[_chosen(spec, "exponent_bits", {"exponent_bits": exponent_bits}, elements)], mode)
        case "nvfp4" if spec.bit_width == 4 and spec.symmetric:
            return Nvfp4Grid()
    way = "symmetric" if spec.symmetric else "asymmetric"
    raise ConfigurationError(
        f"activations have no {way} {spec.data_type} of {spec.bit_width} bits; choose int of 2 to 8 (asymmetric: convention gptq, awq or "
        "deepspeed), fp8 of 8, mxfp of 4, 6 or 8, or nvfp4 of 4, which are symmetric"
    )


def _chosen(spec: ActivationSpec, option: str, options: dict[str, Any], choices: dict[Any, Any]) -> Any:
    value = options.get(option, next(iter(choices)))
    if value not in choices:
        raise ConfigurationError(f"activation data_type {spec.data_type} of {spec.bit_width} bits has no {option}={value!r}; "
                                 f"choose from {', '.join(map(str, choices))}")  # fmt: skip
    return value
