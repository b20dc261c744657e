"""Scales: one number a block, rounded to the type it is stored in before anything is computed with it.

    absmax_b = max |T_b|            scale_b = stored(absmax_b / steps)

Ranges.  float16 holds 2^-24 (subnormal) … 65504.  Three cases are decided here, once:

* all-zero block (or range zero): scale 0, and the block decodes to zeros;
* a positive scale that would round to 0: the smallest positive number of the type instead, so that
  a scale of 0 always means a range of 0.  Below 2^-14 float16 has fewer than 11 significant bits,
  so scales down there are coarse; that is what storing float16 scales costs;
* a scale beyond the largest number: refused, as an infinite scale would decode to infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.errors import ConfigurationError, QuantizationError

STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def storage_bits(dtype: str) -> int:
    """Bits of one stored number: `storage_bits("float16") == 16`."""
    return torch.finfo(_stored(dtype)).bits


def smallest_positive(dtype: str) -> float:
    """The smallest scale that is stored as such: float16's smallest subnormal, the others' smallest normal.

    bfloat16 and float32 subnormals lie below 1.2e-38, where processors may flush float32 to zero.
    """
    info = torch.finfo(_stored(dtype))
    return info.tiny * info.eps if dtype == "float16" else info.tiny


def to_storage(values: Tensor, dtype: str) -> Tensor:
    """Round to what `dtype` can hold; float32 in, float32 out, same shape."""
    return values.to(_stored(dtype)).to(torch.float32)


def round_scale(scale_N1: Tensor, dtype: str) -> Tensor:
    """Round non-negative scales (N, 1) as the module says."""
    stored_N1 = to_storage(scale_N1, dtype)
    if not bool(torch.isfinite(stored_N1).all()):
        largest, limit = float(scale_N1.max()), torch.finfo(_stored(dtype)).max
        raise QuantizationError(
            f"a block needs a scale of {largest:.6g}, beyond the largest {dtype} number ({limit:.6g}); use scale_dtype=bfloat16 or float32"
        )
    return torch.where(scale_N1 > 0, stored_N1.clamp(min=smallest_positive(dtype)), 0.0)


def absmax(values_NB: Tensor) -> Tensor:
    """Largest magnitude of each block: (N, B) -> (N, 1).  Two reductions, so that no copy of |values| is made."""
    return torch.maximum(values_NB.amax(dim=1, keepdim=True), values_NB.amin(dim=1, keepdim=True).neg())


def divide(values: Tensor, divisor: float) -> Tensor:
    """A division, rounded once, on every device: by a Python number, CUDA multiplies with the rounded inverse instead."""
    return values / values.new_tensor(divisor)


def without_zeros(scale_N1: Tensor) -> Tensor:
    """The scales as divisors: 0 becomes 1, so that the zeros of an all-zero block stay zeros."""
    return torch.where(scale_N1 == 0, 1.0, scale_N1)


def _stored(dtype: str) -> torch.dtype:
    if dtype not in STORED:
        raise ConfigurationError(f"scale_dtype {dtype!r} is not one of {', '.join(STORED)}")
    return STORED[dtype]
