"""Integers: equally spaced levels, in five conventions that differ in more than name.

    decoded = s · (code - z),    code = clip(round(x / s) + z, lowest, 2^k - 1)        (round half to even)

With lo = min x, hi = max x and m = max |x| of a block; s is rounded to its storage type first:

    convention    symmetric s                                asymmetric s                     z
    kbit          m / (2^(k-1) - 1), m stored, lowest = 1    -
    absmax_full   m / (2^(k-1) - 1), lowest = 0              -
    awq           the same, m at least 1e-5                  max(hi - lo, 1e-5) / (2^k - 1)   clip(-round(lo / s))
    gptq          2m / (2^k - 1), or m / (2^k - 1) if lo>=0  (hi - lo) / (2^k - 1)            clip(-round(lo / s))
                                                             with lo <= 0 <= hi enforced
    deepspeed     2m / 2^k                                   (hi - lo) / 2^k                  -round(lo / s)

Symmetric means z = 2^(k-1), which is not stored; asymmetric zero points are stored in k bits, or in
16 where they are not clipped (`deepspeed`).

Sources: `kbit` is Integer of the k-bit inference scaling laws (arXiv:2212.09720, section 2): 2^k - 1
levels, the most negative two's complement value unused.  `gptq` is quant.py of IST-DASLab/gptq
(arXiv:2210.17323), `awq` quantizer.py of mit-han-lab/llm-awq (arXiv:2306.00978), `deepspeed` the
quantizers of DeepSpeed's compression (ZeroQuant, arXiv:2206.01861); `absmax_full` is the usual
absolute maximum over the full two's complement range (SmoothQuant's fake quantizer).

Peculiarities kept, because published numbers have them: symmetric `gptq` halves the range of a block
without negative values; `deepspeed` clips the largest value by one step; `awq` clips blocks that do
not straddle zero.  Not kept: DeepSpeed divides 0 by 0 in a constant block.  Here its step is at least
m · 2^-14, so that a constant block decodes to itself and zero points fit 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantsweep.data_types._base import QParams, Support, bit_width, scale_dtype
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.blocks import Blocks, tiles_of
from quantsweep.numerics.scales import divide, round_scale, storage_bits, without_zeros
from quantsweep.trial.specs import QuantizationSpec

_AWQ_LEAST_RANGE = 1e-5
_DEEPSPEED_LEAST_STEP = 2.0**-14  # of the block's absolute maximum
_UNCLIPPED_ZERO_BITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Extremes of each block, (N, 1) each."""

    low: Tensor
    high: Tensor

    @property
    def magnitude(self) -> Tensor:
        """max |x|."""
        return torch.maximum(self.high, self.low.neg())


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """Of k bits: how many codes there are, the largest, and the largest of signed ones; () float32 each."""

    number: Tensor
    largest: Tensor
    largest_signed: Tensor

    @classmethod
    def of(cls, k: int, like: Tensor) -> Codes:
        """On the device of `like`."""
        number, largest, largest_signed = (like.new_tensor(value) for value in (1 << k, _largest_code(k), _largest_signed(k)))
        return cls(number=number, largest=largest, largest_signed=largest_signed)


Step = Callable[[Range, Codes], Tensor]
"""(range, codes) -> the number that is stored as the scale, (N, 1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """How a range becomes a step; asymmetric: None where zero points are not known.  The sentences above say the rest."""

    symmetric: Step
    asymmetric: Step | None = None
    clips_zero: bool = True
    stores_absmax: bool = False  # then the scale is m, and the lowest code is left unused


def _absmax(of: Range, codes: Codes) -> Tensor:
    return of.magnitude


def _absmax_step(of: Range, codes: Codes) -> Tensor:
    return of.magnitude / codes.largest_signed


def _awq_symmetric(of: Range, codes: Codes) -> Tensor:
    return of.magnitude.clamp(min=_AWQ_LEAST_RANGE) / codes.largest_signed


def _awq_asymmetric(of: Range, codes: Codes) -> Tensor:
    return (of.high - of.low).clamp(min=_AWQ_LEAST_RANGE) / codes.largest


def _gptq_symmetric(of: Range, codes: Codes) -> Tensor:
    return torch.where(of.low < 0, 2 * of.magnitude, of.magnitude) / codes.largest


def _gptq_asymmetric(of: Range, codes: Codes) -> Tensor:
    return (of.high.clamp(min=0) - of.low.clamp(max=0)) / codes.largest


def _deepspeed_symmetric(of: Range, codes: Codes) -> Tensor:
    return 2 * of.magnitude / codes.number


def _deepspeed_asymmetric(of: Range, codes: Codes) -> Tensor:
    return torch.maximum((of.high - of.low) / codes.number, of.magnitude * _DEEPSPEED_LEAST_STEP)


def _largest_code(k: int) -> int:
    return (1 << k) - 1


def _largest_signed(k: int) -> int:
    return (1 << (k - 1)) - 1


CONVENTIONS: dict[Any, Convention] = {
    "kbit": Convention(symmetric=_absmax, stores_absmax=True),
    "gptq": Convention(symmetric=_gptq_symmetric, asymmetric=_gptq_asymmetric),
    "awq": Convention(symmetric=_awq_symmetric, asymmetric=_awq_asymmetric),
    "absmax_full": Convention(symmetric=_absmax_step),
    "deepspeed": Convention(symmetric=_deepspeed_symmetric, asymmetric=_deepspeed_asymmetric, clips_zero=False),
}


class Integer:
    """Equally spaced levels; see the module."""

    name = "int"
    support = Support(bit_widths=range(2, 9), symmetric=(True, False), options={"convention": tuple(CONVENTIONS)})

    def check_spec(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where the convention cannot do what `spec` asks."""
        self._convention(spec)

    def _convention(self, spec: QuantizationSpec) -> tuple[Convention, Step]:
        name = self.support.check(self.name, spec)["convention"]
        convention = CONVENTIONS[name]
        step = convention.symmetric if spec.symmetric else convention.asymmetric
        if step is None:
            able = ", ".join(key for key, other in CONVENTIONS.items() if other.asymmetric)
            raise ConfigurationError(f"data_type 'int' with convention={name!r} is symmetric only; symmetric=false needs one of {able}")
        return convention, step

    def choose_qparams(self, blocks: Blocks, spec: QuantizationSpec) -> QParams:
        """Scales (N, 1), and zero points (N, 1) of which symmetric ones are all 2^(k-1)."""
        convention, step = self._convention(spec)
        k, dtype = bit_width(spec), scale_dtype(spec)
        extremes = Range(low=blocks.values_NB.amin(dim=1, keepdim=True), high=blocks.values_NB.amax(dim=1, keepdim=True))
        scale_N1 = round_scale(step(extremes, Codes.of(k, extremes.low)), dtype)
        zero_N1 = torch.full_like(scale_N1, 1 << (k - 1))
        if not spec.symmetric:
            zero_N1 = (extremes.low / without_zeros(scale_N1)).round().neg()
            zero_N1 = zero_N1.clamp(0, _largest_code(k)) if convention.clips_zero else zero_N1
        return QParams(
            bit_width=k,
            scale_N1=scale_N1,
            scale_bits=storage_bits(dtype),
            zero_N1=zero_N1,
            zero_bits=0 if spec.symmetric else k if convention.clips_zero else _UNCLIPPED_ZERO_BITS,
            divisor=_largest_signed(k) if convention.stores_absmax else 1,
            lowest_code=1 if convention.stores_absmax else 0,
        )

    def quantize(self, values_NB: Tensor, qparams: QParams) -> Tensor:
        """Codes (N, B) uint8 in lowest_code … 2^k - 1."""
        zero_N1, divisor_N1 = _zero(qparams), without_zeros(qparams.scale_N1)
        codes_NB = torch.empty(values_NB.shape, dtype=torch.uint8, device=values_NB.device)
        for rows, columns in tiles_of(values_NB):
            steps = values_NB[rows, columns] / divisor_N1[rows]
            if qparams.divisor != 1:
                steps.mul_(qparams.divisor)
            codes_NB[rows, columns] = steps.round_().add_(zero_N1[rows]).clamp_(qparams.lowest_code, _largest_code(qparams.bit_width))
        return codes_NB

    def dequantize(self, codes_NB: Tensor, qparams: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
        """(code - z) / divisor · scale, (N, B); dividing first makes the outermost level exactly the scale."""
        zero_N1 = _zero(qparams)
        values_NB = torch.empty(codes_NB.shape, dtype=dtype, device=codes_NB.device)
        for rows, columns in tiles_of(codes_NB):
            steps = codes_NB[rows, columns] - zero_N1[rows]
            if qparams.divisor != 1:  # (a division by 1 costs a transfer to the device)
                steps = divide(steps, qparams.divisor)
            torch.mul(steps, qparams.scale_N1[rows], out=values_NB[rows, columns])
        return values_NB


def _zero(qparams: QParams) -> Tensor:
    if qparams.zero_N1 is None:
        raise TypeError("these parameters belong to a format without zero points")
    return qparams.zero_N1


DATA_TYPE = Integer()
