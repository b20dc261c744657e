"""GPTQ, LDLQ and the clipping grid once more: numpy, float64, written from the papers' formulas; shares no code with the package.

GPTQ here inverts the Hessian of the remaining columns anew for each column, as the derivation has it (arXiv:2210.17323,
section 3, equations 2 and 3): no Cholesky factor, no lazy chunks.  LDLQ is QuIP's form (arXiv:2307.13304, equation 2): each column
is rounded once, after a linear feedback of the errors before it, H = (V + 1) D (V + 1)ᵀ with V strictly upper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Levels:
    """Affine levels of each row: s · (clip(round(x / s) + z, 0, 2^k - 1) - z); s and z (O,)."""

    scale: Array
    zero: Array
    bits: int

    def codes(self, column: Array) -> Array:
        """Of one column (O,).  Divided in float32, as our formats do: the largest weight of a symmetric block lies between two levels."""
        steps = column.astype(np.float32) / self.scale.astype(np.float32)
        return np.clip(np.rint(steps) + self.zero, 0, 2**self.bits - 1).astype(np.float64)

    def round(self, column: Array) -> Array:
        """Nearest level of each element."""
        return self.scale * (self.codes(column) - self.zero)


def gptq_levels(weight: Array, bits: int, *, symmetric: bool) -> Levels:
    """quant.py's range of each row, its ends moved so that 0 lies within; float32 steps, as scales are stored."""
    low, high = np.minimum(weight.min(axis=1), 0), np.maximum(weight.max(axis=1), 0)
    return _levels(low, high, bits, symmetric)


def _levels(low: Array, high: Array, bits: int, symmetric: bool) -> Levels:
    if symmetric:
        high = np.maximum(-low, high)
        low = np.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    scale = ((high.astype(np.float32) - low.astype(np.float32)) / np.float32(2**bits - 1)).astype(np.float64)
    scale = np.where(empty, 1.0, scale)
    zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.clip(-np.rint(low / scale), 0, 2**bits - 1)
    return Levels(scale, zero, bits)


def mse_levels(weight: Array, bits: int, *, symmetric: bool, exponent: float = 2.4) -> tuple[Levels, Array]:
    """The range shrunk by 1, .99, … .21, whichever has the least Σ |error|^exponent, row by row; and the share."""
    shares = np.ones(weight.shape[0])
    for row, values in enumerate(weight):
        errors = []
        for step in range(80):
            share = 1 - step / 100
            low, high = share * min(values.min(), 0), share * max(values.max(), 0)
            levels = _levels(np.array([low]), np.array([high]), bits, symmetric)
            errors.append(float((np.abs(levels.round(values) - values) ** exponent).sum()))
        shares[row] = 1 - int(np.argmin(errors)) / 100
    low, high = shares * np.minimum(weight.min(axis=1), 0), shares * np.maximum(weight.max(axis=1), 0)
    return _levels(low, high, bits, symmetric), shares


def gptq(
    weight: Array,
    hessian: Array,
    bits: int,
    *,
    symmetric: bool = False,
    group: int | None = None,
    order: bool = False,
    static: bool = False,
    stale: int | None = None,
    damping: float = 0.01,
    fit: Callable[..., Levels] = gptq_levels,
) -> Array:
    """Quantized weight (O, I).  stale: groups are fitted on the columns as of the last multiple of so many columns; None: as they are."""
    weight, hessian = weight.copy(), hessian.copy()
    columns = weight.shape[1]
    whole = fit(weight, bits, symmetric=symmetric)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    fixed = [fit(weight[:, j : j + group], bits, symmetric=symmetric) for j in range(0, columns, group)] if group else []
    visit = np.argsort(-np.diag(hessian), kind="stable") if order else np.arange(columns)
    weight, hessian = weight[:, visit], hessian[np.ix_(visit, visit)]
    hessian += damping * np.diag(hessian).mean() * np.eye(columns)
    result, finished, levels = np.zeros_like(weight), weight.copy(), whole
    for j in range(columns):
        if stale and j % stale == 0:
            finished = weight.copy()
        if group and static:
            levels = fixed[visit[j] // group]
        elif group and j % group == 0:
            levels = fit((finished if stale else weight)[:, j : j + group], bits, symmetric=symmetric)
        result[:, j] = levels.round(weight[:, j])
        inverse = np.linalg.inv(hessian[j:, j:])
        weight[:, j:] -= np.outer((weight[:, j] - result[:, j]) / inverse[0, 0], inverse[0])
    back = np.empty_like(result)
    back[:, visit] = result
    return back


def ldlq(weight: Array, hessian: Array, levels: Levels, damping: float = 0.01) -> Array:
    """Quantized weight (O, I), columns from first to last."""
    columns = weight.shape[1]
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(columns)
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    feedback = upper / np.diag(upper) - np.eye(columns)
    result = np.zeros_like(weight)
    for k in range(columns):
        result[:, k] = levels.round(weight[:, k] + (weight - result)[:, :k] @ feedback[:k, k])
    return result


def correlated_inputs(generator: np.random.Generator, tokens: int, columns: int) -> Array:
    """Inputs (T, I) whose columns depend on each other and differ in size."""
    mixing = generator.normal(size=(columns, columns)) / np.sqrt(columns)
    return generator.normal(size=(tokens, columns)) @ mixing * np.exp(generator.normal(size=columns))


def hessian_of(inputs: Array) -> Array:
    """2/n Σ x xᵀ."""
    return 2 / len(inputs) * inputs.T @ inputs
