"""A second, independent implementation of the formats: numpy, float64, one block after the other, no cleverness.

Levels are found by comparing with all of them; scales are rounded with numpy's own float16.  It is
written from the papers' formulas and shares no code with the package.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def block_slices(shape: tuple[int, int], block_size: int | str | None, axis: str) -> list[slice]:
    """Slices of the flattened tensor, one a block."""
    rows, columns = shape
    if block_size == "tensor":
        return [slice(0, rows * columns)]
    run = rows * columns if axis == "flat" else columns
    width = run if block_size is None else int(block_size)
    return [slice(r + b, min(r + b + width, r + run)) for r in range(0, rows * columns, run) for b in range(0, run, width)]


def stored(scale: float, dtype: str) -> float:
    """A scale as float16 or float32 would hold it."""
    rounded = float(np.float16(scale)) if dtype == "float16" else float(np.float32(scale))
    return 2.0**-24 if dtype == "float16" and scale > 0 and rounded == 0 else rounded


def codebook(weight: Array, levels: Array, block_size: int | str | None, axis: str, dtype: str = "float16") -> Array:
    """Nearest level of each element, with the absolute maximum of each block as scale."""
    flat, result = weight.ravel(), np.zeros(weight.size)
    for block in block_slices(weight.shape, block_size, axis):
        scale = stored(float(np.abs(flat[block]).max()), dtype)
        if scale > 0:
            nearest = np.abs(flat[block, None] / scale - levels[None, :]).argmin(axis=1)
            result[block] = levels[nearest] * scale
    return result.reshape(weight.shape)


def int_levels(k: int) -> Array:
    """i / (2^(k-1) - 1), 2^k - 1 of them."""
    largest = 2 ** (k - 1) - 1
    return np.arange(-largest, largest + 1) / largest


def affine(block: Array, convention: str, k: int, symmetric: bool, dtype: str = "float16") -> Array:
    """One block in the conventions gptq, awq, absmax_full and deepspeed, as their sources compute it."""
    low, high = float(block.min()), float(block.max())
    largest = max(-low, high)
    if convention == "gptq":
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            low, high = (-largest if low < 0 else low), largest
        scale = (high - low) / (2**k - 1)
    elif convention == "awq" and not symmetric:
        scale = max(high - low, 1e-5) / (2**k - 1)
    elif convention in ("awq", "absmax_full"):
        scale = max(largest, 1e-5 if convention == "awq" else 0.0) / (2 ** (k - 1) - 1)
    else:
        scale = (2 * largest if symmetric else max(high - low, largest * 2.0 ** (k - 14))) / 2**k
    scale = stored(scale, dtype)
    if scale == 0:
        return np.zeros_like(block)
    if symmetric:
        return np.asarray(scale * np.clip(np.rint(block / scale), -(2 ** (k - 1)), 2 ** (k - 1) - 1))
    zero = -np.rint(low / scale)
    if convention in ("awq", "gptq"):
        zero = np.clip(zero, 0, 2**k - 1)
    return np.asarray(scale * (np.clip(np.rint(block / scale) + zero, 0, 2**k - 1) - zero))


def float_levels(exponent_bits: int, mantissa_bits: int, subnormal: str) -> Array:
    """Sign, exponent, mantissa, one bit pattern after the other."""
    bias = 2 ** (exponent_bits - 1) + (subnormal != "body")
    positive = []
    for pattern in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, fraction = pattern >> mantissa_bits, (pattern % 2**mantissa_bits) / 2**mantissa_bits
        if exponent > 0:
            positive.append((1 + fraction) * 2.0 ** -(exponent - 1 - bias))
        elif subnormal == "ieee":
            positive.append(fraction * 2.0 ** -(2**exponent_bits - 2 - bias))
        else:
            positive.append(fraction * 2.0**-bias)
    values = np.array(positive) / max(positive)
    return np.unique(np.concatenate([-values, values]))


def quantile_levels(weight: Array, k: int, dtype: str = "float16") -> Array:
    """bitsandbytes' create_quantile_map on exact quantiles, rounded as stored."""
    count = 2**k - 1
    estimates = np.quantile(weight.ravel(), np.linspace(1 / (2 * count), 1 - 1 / (2 * count), 256))
    picked = estimates[np.linspace(0, 255, count).astype(np.int64)]
    levels = np.sort(np.append(picked, 0.0))
    return np.array([np.sign(v) * stored(abs(v), dtype) for v in levels / np.abs(levels).max()])
