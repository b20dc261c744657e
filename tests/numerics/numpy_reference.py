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
    """One block in the conventions gptq, awq, absmax_full and deepspeed, as their sources compute it.

    The step is computed in float32, as in the sources.  In float64 about one tensor in 4,000 has a step just beside the middle of
    two float16 numbers that float32 rounds to that middle, and then to the other float16 number.
    """
    single = np.float32
    low, high = single(block.min()), single(block.max())
    largest = max(-low, high)
    if convention == "gptq":
        low, high = min(low, single(0)), max(high, single(0))
        if symmetric:
            low, high = (-largest if low < 0 else low), largest
        step = (high - low) / single(2**k - 1)
    elif convention == "awq" and not symmetric:
        step = max(high - low, single(1e-5)) / single(2**k - 1)
    elif convention in ("awq", "absmax_full"):
        step = max(largest, single(1e-5 if convention == "awq" else 0)) / single(2 ** (k - 1) - 1)
    else:
        step = (single(2) * largest if symmetric else max(high - low, largest * single(2.0 ** (k - 14)))) / single(2**k)
    scale = stored(float(step), dtype)
    if scale == 0:
        return np.zeros_like(block)
    if symmetric:
        return np.asarray(scale * np.clip(np.rint(block / scale), -(2 ** (k - 1)), 2 ** (k - 1) - 1))
    zero = -float(np.rint(low / single(scale)))
    if convention in ("awq", "gptq"):
        zero = float(np.clip(zero, 0, 2**k - 1))
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


def element_values(exponent_bits: int, mantissa_bits: int, largest: float) -> Array:
    """Non-negative numbers of an element format of OCP MX, by pattern, up to its largest."""
    bias = 2 ** (exponent_bits - 1) - 1
    patterns = range(2 ** (exponent_bits + mantissa_bits))
    pairs = [divmod(pattern, 2**mantissa_bits) for pattern in patterns]
    values = [(m / 2**mantissa_bits + (e > 0)) * 2.0 ** (max(e, 1) - bias) for e, m in pairs]
    return np.array([value for value in values if value <= largest])


def to_element(values: Array, numbers: Array) -> Array:
    """The nearest of `numbers` (by pattern) with the sign kept; of two that are equally near the even pattern; the largest beyond."""
    distance = np.abs(np.minimum(np.abs(values), numbers[-1])[:, None] - numbers[None, :])
    odd = np.arange(numbers.size) % 2
    nearest = np.lexsort((np.broadcast_to(odd, distance.shape), distance), axis=1)[:, 0]
    return np.asarray(np.sign(values) * numbers[nearest])


def mx_exponent(largest_weight: float, numbers: Array, mode: str) -> int:
    """The shared exponent of a block, before it is clamped."""
    largest = float(numbers[-1])
    emax = int(np.floor(np.log2(largest)))
    if mode == "rceil":
        return int(np.ceil(np.log2(largest_weight / largest)))
    if mode == "ceil":
        return int(np.ceil(np.log2(largest_weight))) - emax
    exponent = int(np.floor(np.log2(largest_weight)))
    if mode == "even":
        step = 2.0**exponent * float(numbers[-1] - numbers[-2]) / 2.0**emax
        exponent = int(np.floor(np.log2(np.floor(largest_weight / step + 0.5) * step)))
    return exponent - emax


def mx(weight: Array, numbers: Array, block_size: int | str | None, axis: str, mode: str) -> Array:
    """OCP MX: a power of two for each block."""
    flat, result = weight.ravel(), np.zeros(weight.size)
    for block in block_slices(weight.shape, block_size, axis):
        largest = float(np.abs(flat[block]).max())
        if largest > 0:
            scale = 2.0 ** float(np.clip(mx_exponent(largest, numbers, mode), -127, 127))
            result[block] = to_element(flat[block] / scale, numbers) * scale
    return result.reshape(weight.shape)


def nvfp4(weight: Array, block_size: int | str | None, axis: str) -> Array:
    """NVFP4: E2M1 with E4M3 block scales below one float32 scale."""
    flat, result = weight.ravel(), np.zeros(weight.size)
    e2m1, e4m3 = element_values(2, 1, 6), element_values(4, 3, 448)
    tensor_scale = np.float32(np.abs(flat).max()) / np.float32(448 * 6)
    for block in block_slices(weight.shape, block_size, axis):
        wanted = np.float32(np.abs(flat[block]).max()) / np.float32(6) / (tensor_scale or np.float32(1))
        block_scale = np.float32(to_element(np.array([np.clip(wanted, 2.0**-6, 448)], dtype=np.float64), e4m3)[0])
        scale = float(block_scale * tensor_scale)
        result[block] = to_element(flat[block] / (scale or 1.0), e2m1) * scale
    return result.reshape(weight.shape)
