"""What a file of a quantized weight holds: codes at k bits, scales, zero points and codebooks in the types they are stored in.

    pack    Quantized -> PackedWeight       arrays of real bytes
    unpack  PackedWeight -> Quantized       the same codes and parameters, bit for bit

`PackedWeight.num_bytes` is measured on the arrays; it is `Quantized.stored_bits`, up to the bits that fill the last byte of
the codes and of the zero points.  What the format fixes for every tensor (levels that do not depend on it, the zero
point of symmetric integers) is not stored: it comes back from `form`.  Scales lose nothing, since they were
rounded to their stored type before they were used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantsweep.data_types._base import QParams, Quantized
from quantsweep.numerics.blocks import BlockLayout
from quantsweep.numerics.packing import pack_bits, unpack_bits
from quantsweep.numerics.scales import STORED

_SCALES = {**STORED, "e4m3": torch.float8_e4m3fn}
_EXPONENTS = "e8m0"
_EXPONENT_BIAS = 127
_UNPACKED_ZERO_BITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """arrays: what is stored, by name: codes, scale, and where the format has them zero, levels, tensor_scale.

    form: what is the same for every tensor of the format, with the stored parts left out.  scale_dtype: see QuantizationSpec.
    """

    arrays: Mapping[str, Tensor]
    form: QParams
    layout: BlockLayout
    scale_dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.numel() * array.element_size() for array in self.arrays.values())


def pack(quantized: Quantized, scale_dtype: str) -> PackedWeight:
    """Bytes of a quantized weight.  scale_dtype: that of the spec it was made with."""
    qparams, layout = quantized.qparams, quantized.layout
    codes_n = layout.join(quantized.codes_NB).reshape(-1)
    arrays = {"codes": pack_bits(codes_n, qparams.bit_width), "scale": _stored_scale(qparams.scale_N1.reshape(-1), scale_dtype)}
    form = replace(qparams, scale_N1=qparams.scale_N1.new_empty(0))
    if qparams.zero_N1 is not None:
        if qparams.zero_bits:
            arrays["zero"] = _stored_zero(qparams.zero_N1.reshape(-1), qparams.zero_bits)
        form = replace(form, zero_N1=qparams.zero_N1[:1])
    if qparams.levels_L is not None and qparams.codebook_bits:
        arrays["levels"] = qparams.levels_L.to(_SCALES[scale_dtype])
        form = replace(form, levels_L=None)
    if qparams.tensor_scale is not None:
        arrays["tensor_scale"] = qparams.tensor_scale
        form = replace(form, tensor_scale=None)
    return PackedWeight(arrays=arrays, form=form, layout=layout, scale_dtype=scale_dtype)


def unpack(packed: PackedWeight) -> Quantized:
    """The quantized weight that `pack` was given."""
    arrays, form, layout = packed.arrays, packed.form, packed.layout
    codes_n = unpack_bits(arrays["codes"], form.bit_width, layout.num_elements)
    codes_NB = layout.split(codes_n.view(layout.out_features, layout.in_features))
    qparams = replace(form, scale_N1=_scale(arrays["scale"], packed.scale_dtype))
    if form.zero_N1 is not None:
        zero_N1 = form.zero_N1.expand(layout.num_blocks, 1)  # the same for all blocks where none is stored
        if "zero" in arrays:
            zero_N1 = _zero(arrays["zero"], form.zero_bits, layout.num_blocks)
        qparams = replace(qparams, zero_N1=zero_N1)
    if "levels" in arrays:
        qparams = replace(qparams, levels_L=arrays["levels"].to(torch.float32))
    if "tensor_scale" in arrays:
        qparams = replace(qparams, tensor_scale=arrays["tensor_scale"])
    return Quantized(codes_NB=codes_NB, qparams=qparams, layout=layout)


def _stored_scale(scale_N: Tensor, dtype: str) -> Tensor:
    if dtype == _EXPONENTS:
        return (torch.frexp(scale_N).exponent - 1 + _EXPONENT_BIAS).to(torch.uint8)
    return scale_N.to(_SCALES[dtype])


def _scale(stored_N: Tensor, dtype: str) -> Tensor:
    """(N,) as stored -> (N, 1) float32."""
    if dtype == _EXPONENTS:
        return torch.ldexp(stored_N.new_ones(stored_N.shape, dtype=torch.float32), stored_N.to(torch.int32) - _EXPONENT_BIAS)[:, None]
    return stored_N.to(torch.float32)[:, None]


def _stored_zero(zero_N: Tensor, bits: int) -> Tensor:
    return zero_N.to(torch.int16) if bits == _UNPACKED_ZERO_BITS else pack_bits(zero_N.to(torch.uint8), bits)


def _zero(stored: Tensor, bits: int, num_blocks: int) -> Tensor:
    """As stored -> (N, 1) float32."""
    zeros = stored if bits == _UNPACKED_ZERO_BITS else unpack_bits(stored, bits, num_blocks)
    return zeros.to(torch.float32)[:, None]
