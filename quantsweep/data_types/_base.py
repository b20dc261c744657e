"""What every number format can do: choose parameters for blocks, encode, decode, and say what it stores.

    choose_qparams   blocks -> QParams       one scale a block (zero points, codebook where the format has them)
    quantize         values, QParams -> codes       uint8, one a value
    dequantize       codes, QParams -> values       computed in float32
    fake_quantize    weight -> weight               both, cut into blocks and joined again

A format is a module of this package with a `DATA_TYPE`, and a yaml of the same name in
`conf/data_type/` that declares its options and capabilities for planning, which imports no torch.
The code refuses by itself what it cannot do: `check_spec`.

    stored bits = k·elements + (scale_bits + zero_bits)·N + tensor_scale_bits + codebook_bits          (N blocks)

Codes are counted at k bits although they are held in a byte here.  Codebooks count only where they
depend on the tensor; padding of short blocks is not stored, their scales are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantsweep.errors import ConfigurationError
from quantsweep.numerics import codebook
from quantsweep.numerics.blocks import BlockLayout, Blocks
from quantsweep.numerics.minifloat import MiniFloat
from quantsweep.numerics.scales import absmax, round_scale, storage_bits
from quantsweep.trial.specs import DTYPES, Option, QuantizationSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class QParams:
    """What is stored beside the codes, or fixed by the format.

    bit_width: k, bits of one code.
    scale_N1: (N, 1) float32, already rounded to its storage type; 0 for an all-zero block, where that type has a 0.
    tensor_scale: () float32, a second scale that all blocks share, for formats that have one.
    zero_N1: (N, 1) the code that decodes to 0, for affine formats.
    levels_L: sorted levels that codes index, for codebook formats.
    element: the format whose bit patterns the codes are, for minifloat formats.
    divisor, lowest_code: of affine formats; see the module `int`.
    scale_bits, zero_bits: stored bits a block; tensor_scale_bits, codebook_bits: stored bits a tensor.
    """

    bit_width: int
    scale_N1: Tensor
    scale_bits: int
    zero_N1: Tensor | None = None
    zero_bits: int = 0
    levels_L: Tensor | None = None
    codebook_bits: int = 0
    divisor: int = 1
    lowest_code: int = 0
    tensor_scale: Tensor | None = None
    tensor_scale_bits: int = 0
    element: MiniFloat | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A quantized weight: codes_NB (uint8, padded as its blocks are), parameters, and how it was cut."""

    codes_NB: Tensor
    qparams: QParams
    layout: BlockLayout

    @property
    def stored_bits(self) -> int:
        """Bits that a file would need: codes, scales, zero points, tensor-dependent codebook."""
        per_block = self.qparams.scale_bits + self.qparams.zero_bits
        per_tensor = self.qparams.tensor_scale_bits + self.qparams.codebook_bits
        return self.qparams.bit_width * self.layout.num_elements + per_block * self.layout.num_blocks + per_tensor


class DataType(Protocol):
    """A number format.  Weights are float32 and finite; callers check that."""

    def check_spec(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where the format cannot do what `spec` asks."""

    def choose_qparams(self, blocks: Blocks, spec: QuantizationSpec) -> QParams:
        """Scales (and zero points, codebook) for the blocks: (N, B) -> (N, 1)."""

    def quantize(self, values_NB: Tensor, qparams: QParams) -> Tensor:
        """Codes (N, B) uint8.  The values need not be those that the parameters were chosen from."""

    def dequantize(self, codes_NB: Tensor, qparams: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values (N, B), computed in float32 and cast to `dtype`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """What a format accepts; `options` maps each option to its allowed values, the default first (None: left to the format)."""

    bit_widths: Sequence[int]
    options: Mapping[str, Sequence[Option] | None]
    symmetric: Sequence[bool] = (True,)
    block_axes: Sequence[str] = ("flat", "input")
    scale_dtypes: Sequence[str] = DTYPES

    def check(self, name: str, spec: QuantizationSpec) -> dict[str, Any]:
        """The options of `spec` as a mapping; raises ConfigurationError with the choices."""
        values = options_of(name, spec, self.options)
        checks: list[tuple[str, Option, Sequence[Option]]] = [
            ("bit_width", spec.bit_width, self.bit_widths),
            ("symmetric", spec.symmetric, self.symmetric),
            ("block_axis", spec.block_axis, self.block_axes),
            ("scale_dtype", spec.scale_dtype, self.scale_dtypes),
            *((option, values[option], allowed) for option, allowed in self.options.items() if allowed is not None),
        ]
        for what, value, allowed in checks:
            if value not in allowed:
                raise ConfigurationError(f"data_type {name!r} has no {what}={value!r}; choose from {', '.join(map(repr, allowed))}")
        return values


def options_of(name: str, spec: QuantizationSpec, known: Mapping[str, Sequence[Option] | None]) -> dict[str, Any]:
    """Options of `spec`, the first of the allowed values where one is not given; unknown names are refused."""
    given = dict(spec.data_type_options)
    for option in given:
        if option not in known:
            raise ConfigurationError(f"data_type {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return {option: given.get(option, allowed[0] if allowed else None) for option, allowed in known.items()}


class CodebookDataType(ABC):
    """Formats that are a list of levels within [-1, 1], scaled by the absolute maximum of each block.

        m_b = stored(max |T_b|),   code = argmin_j |c_j - T_bi / m_b|,   decoded = c_code · m_b

    (arXiv:2212.09720, section 2.)  A subclass gives its name, what it supports, and its levels.
    """

    name: str
    support: Support

    @abstractmethod
    def levels(self, blocks: Blocks, spec: QuantizationSpec) -> Tensor:
        """Sorted levels (L,), L <= 2^k, float32 on the device of the blocks; 0 is one of them."""

    def codebook_bits(self, spec: QuantizationSpec) -> int:
        """Stored bits of the levels: none where they are the same for every tensor."""
        return 0

    def check_spec(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError where the format cannot do what `spec` asks."""
        self.support.check(self.name, spec)

    def choose_qparams(self, blocks: Blocks, spec: QuantizationSpec) -> QParams:
        """Absolute maxima (N, 1) and the levels."""
        self.check_spec(spec)
        dtype = scale_dtype(spec)
        return QParams(
            bit_width=bit_width(spec),
            scale_N1=round_scale(absmax(blocks.values_NB), dtype),
            scale_bits=storage_bits(dtype),
            levels_L=self.levels(blocks, spec),
            codebook_bits=self.codebook_bits(spec),
        )

    def quantize(self, values_NB: Tensor, qparams: QParams) -> Tensor:
        """Index of the nearest level, (N, B) uint8."""
        return codebook.encode(values_NB, qparams.scale_N1, _levels(qparams))

    def dequantize(self, codes_NB: Tensor, qparams: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels times scale, (N, B), computed in float32 and cast to `dtype`."""
        return codebook.decode(codes_NB, qparams.scale_N1, _levels(qparams), dtype)


def quantize_weight(data_type: DataType, weight_OI: Tensor, spec: QuantizationSpec) -> Quantized:
    """Cut a weight (O, I) as `spec` says, choose parameters and encode."""
    data_type.check_spec(spec)
    return quantize_blocks(data_type, Blocks.of(weight_OI, spec.block_size, spec.block_axis or "flat"), spec)


def quantize_blocks(data_type: DataType, blocks: Blocks, spec: QuantizationSpec) -> Quantized:
    """The same for a weight that is cut already."""
    qparams = data_type.choose_qparams(blocks, spec)
    return Quantized(codes_NB=data_type.quantize(blocks.values_NB, qparams), qparams=qparams, layout=blocks.layout)


def dequantize_weight(data_type: DataType, quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode to (O, I), computed in float32 and cast to `dtype`: no whole float32 copy where that is a 16-bit one."""
    return quantized.layout.join(data_type.dequantize(quantized.codes_NB, quantized.qparams, dtype))


def fake_quantize(data_type: DataType, weight_OI: Tensor, spec: QuantizationSpec) -> Tensor:
    """The weight (O, I) as it is after quantization, in float32."""
    return dequantize_weight(data_type, quantize_weight(data_type, weight_OI, spec))


def bit_width(spec: QuantizationSpec) -> int:
    """k; a quantized spec always has one."""
    if spec.bit_width is None:
        raise ConfigurationError(f"method {spec.method} has no bit_width: there is nothing to quantize")
    return spec.bit_width


def scale_dtype(spec: QuantizationSpec) -> str:
    """Storage type of scales; a quantized spec always has one."""
    if spec.scale_dtype is None:
        raise ConfigurationError(f"method {spec.method} has no scale_dtype: there is nothing to quantize")
    return spec.scale_dtype


def _levels(qparams: QParams) -> Tensor:
    if qparams.levels_L is None:
        raise TypeError("these parameters belong to a format without a codebook")
    return qparams.levels_L
