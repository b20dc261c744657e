"""How far a quantized weight is from the original.

    relative error = ‖W - Ŵ‖² / ‖W‖²   (Frobenius; 0 for a weight of zeros kept as zeros, inf for zeros that became something)
    max abs error  = max |W - Ŵ|

Sums run in float64, tile by tile, so that the size of the tensor does not cost accuracy or memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantsweep.numerics.blocks import tile_size


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightError:
    """relative: squared and relative to ‖W‖²; max_abs: in the units of the weight."""

    relative: float
    max_abs: float


def weight_error(weight_OI: Tensor, quantized_OI: Tensor) -> WeightError:
    """Compare two (O, I) tensors of any floating type; both are read as float32."""
    squared, norm, largest = torch.zeros(3, dtype=torch.float64, device=weight_OI.device)
    size = tile_size(weight_OI.device)
    for original, quantized in zip(torch.split(weight_OI.reshape(-1), size), torch.split(quantized_OI.reshape(-1), size), strict=True):
        original = original.to(torch.float32)
        difference = original - quantized.to(torch.float32)
        squared += difference.square().sum(dtype=torch.float64)
        norm += original.square().sum(dtype=torch.float64)
        largest = torch.maximum(largest, difference.abs().max().to(torch.float64))
    return WeightError(relative=_ratio(float(squared), float(norm)), max_abs=float(largest))


def _ratio(squared: float, norm: float) -> float:
    if norm > 0:
        return squared / norm
    return 0.0 if squared == 0 else math.inf
