"""The forms of scaling laws: what a loss, or what quantizing adds to it, is said to be of size N, training tokens D and bits P.

    loss_of_size          L = E + A N^−α                              with tokens: + B D^−β  (Hoffmann et al. 2022, arXiv:2203.15556)
    effective_parameters  the same with N (1 − e^(−P/γ)) for N: weights of P bits count as fewer (Kumar et al. 2024, arXiv:2411.04330)
    post_training         δ = C N^−γN e^(−P/γ)                        with tokens: × D^γD  (the same paper: what quantizing adds)
    offsets               ln L = ln (E + A N^−α) + o_P                one number o_P a precision, 0 for the baseline: no form in P at all

Constants depend on the unit of the loss and on the tokenizer: fit them anew, never carry them over.

A law is fitted in the logarithm of what it predicts, and constants that are above 0 by their logarithm: `log A` is fitted, A is reported.
Predictions are built of exp and log alone, so that they can be differentiated by a complex step (exactly, and without a second formula).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
"""Floats, or complex numbers while a derivative is taken."""
Columns = Mapping[str, Numbers]
"""parameters, tokens, bits: one number a point."""
Names = tuple[str, ...]
Starts = tuple[tuple[float, ...], ...]
Bounds = tuple[tuple[float, float], ...]
Predict = Callable[[Numbers, Columns], Numbers]

LOSS, DEGRADATION = "loss", "degradation"
_SIZES, _TOKENS, _BITS = "parameters", "tokens", "bits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """A form with the names of its constants.

    response: what it predicts, `loss` or `degradation`.  constants: as fitted; those that begin with "log " are logarithms.
    starts: values to begin with, a few a constant.  bounds: (low, high) of each; a fit that ends at one is none.
    least: {column of the points: different values that are needed}.
    predict: (constants, points) → logarithm of the response, one a point.
    """

    name: str
    formula: str
    response: str
    constants: Names
    starts: Starts
    bounds: Bounds
    least: dict[str, int]
    predict: Predict

    @property
    def names(self) -> tuple[str, ...]:
        """Of the constants, as reported."""
        return tuple(name.removeprefix("log ") for name in self.constants)

    def reported(self, constants: Numbers) -> Numbers:
        """(…, constants) as fitted → as reported: logarithms undone."""
        is_log = np.array([name.startswith("log ") for name in self.constants])
        return np.where(is_log, np.exp(np.where(is_log, constants, 0.0)), constants)


_EXPONENTS = (0.1, 0.3, 0.6)
_FACTORS = (0.0, 4.0, 8.0)
_FLOORS = (-1.0, 0.0, 1.0)
_DECAYS = (-0.5, 0.5, 1.5)
_POWER, _LOG, _DECAY, _SIGNED = (0.0, 5.0), (-60.0, 60.0), (-3.0, 4.0), (-5.0, 5.0)
"""Bounds of exponents, of logarithms of factors, of log γ (γ from 0.05 to 55 bits), and of constants of either sign."""


def _base(constants: Numbers, log_size: Numbers, points: Columns, *, tokens: bool) -> Numbers:
    """ln (E + A N^−α [+ B D^−β]) of constants (log E, log A, α, [log B, β, …])."""
    total = np.exp(constants[0]) + np.exp(constants[1] - constants[2] * log_size)
    if tokens:
        total = total + np.exp(constants[3] - constants[4] * _log(points, _TOKENS))
    return np.asarray(np.log(total))


def _log(points: Columns, column: str) -> Numbers:
    return np.asarray(np.log(points[column]))


def _base_constants(*, tokens: bool) -> tuple[Names, Starts, Bounds, dict[str, int]]:
    names: Names = ("log E", "log A", "alpha")
    starts: Starts = (_FLOORS, _FACTORS, _EXPONENTS)
    bounds: Bounds = (_LOG, _LOG, _POWER)
    if tokens:
        return (*names, "log B", "beta"), (*starts, _FACTORS, _EXPONENTS), (*bounds, _LOG, _POWER), {_SIZES: 3, _TOKENS: 3}
    return names, starts, bounds, {_SIZES: 3}


def _sum(*, tokens: bool, size: str = "N") -> str:
    return f"E + A {size}^−alpha" + (" + B D^−beta" if tokens else "")


def loss_of_size(*, tokens: bool = False) -> Law:
    """L = E + A N^−α [+ B D^−β]."""
    names, starts, bounds, least = _base_constants(tokens=tokens)

    def predict(constants: Numbers, points: Columns) -> Numbers:
        return _base(constants, _log(points, _SIZES), points, tokens=tokens)

    return Law(
        name="loss of size",
        formula=f"L = {_sum(tokens=tokens)}",
        response=LOSS,
        constants=names,
        starts=starts,
        bounds=bounds,
        least=least,
        predict=predict,
    )


def effective_parameters(*, tokens: bool = False) -> Law:
    """L = E + A N_eff^−α [+ B D^−β] with N_eff = N (1 − e^(−P/γ))."""
    names, starts, bounds, least = _base_constants(tokens=tokens)

    def predict(constants: Numbers, points: Columns) -> Numbers:
        share = np.log1p(-np.exp(-points[_BITS] * np.exp(-constants[-1])))
        return _base(constants, _log(points, _SIZES) + share, points, tokens=tokens)

    return Law(
        name="effective parameters",
        formula=f"L = {_sum(tokens=tokens, size='N_eff')}, N_eff = N (1 − exp(−P/gamma))",
        response=LOSS,
        constants=(*names, "log gamma"),
        starts=(*starts, _DECAYS),
        bounds=(*bounds, _DECAY),
        least=least | {_BITS: 2},
        predict=predict,
    )


def offsets(bits: Sequence[float], *, baseline: float = 16.0) -> Law:
    """ln L = ln (E + A N^−α) + o_P: one offset a precision of `bits`, none for `baseline`.

    An offset of 0.05 is 5 % more loss at every size; that it is the same at every size is what the law claims.
    """
    widths = tuple(sorted({float(width) for width in bits} - {baseline}))
    names, starts, bounds, least = _base_constants(tokens=False)

    def predict(constants: Numbers, points: Columns) -> Numbers:
        at = points[_BITS]
        added = sum((constants[len(names) + place] * (at == width) for place, width in enumerate(widths)), np.zeros(len(at)))
        return _base(constants, _log(points, _SIZES), points, tokens=False) + added

    return Law(
        name="offsets",
        formula=f"ln L = ln ({_sum(tokens=False)}) + o_P",
        response=LOSS,
        constants=(*names, *(f"offset {width:g}" for width in widths)),
        starts=(*starts, *((0.05,) for _ in widths)),
        bounds=(*bounds, *(_SIGNED for _ in widths)),
        least=least | {_BITS: 2},
        predict=predict,
    )


def post_training(*, tokens: bool = False) -> Law:
    """δ = C N^−γN [D^γD] e^(−P/γ): what quantizing a trained model to P bits adds to its loss."""
    names: Names = ("log C", "gamma_N", "log gamma")
    starts: Starts = ((-4.0, 0.0, 4.0), (0.0, 0.3, 0.6), _DECAYS)

    def predict(constants: Numbers, points: Columns) -> Numbers:
        found = constants[0] - constants[1] * _log(points, _SIZES) - points[_BITS] * np.exp(-constants[2])
        return np.asarray(found + constants[3] * _log(points, _TOKENS) if tokens else found)

    return Law(
        name="post-training quantization",
        formula=f"delta = C N^−gamma_N{' D^gamma_D' if tokens else ''} exp(−P/gamma)",
        response=DEGRADATION,
        constants=(*names, "gamma_D") if tokens else names,
        starts=(*starts, (0.0, 0.3, 0.6)) if tokens else starts,
        bounds=(_LOG, _SIGNED, _DECAY, _SIGNED) if tokens else (_LOG, _SIGNED, _DECAY),
        least={_SIZES: 2, _BITS: 2} | ({_TOKENS: 2} if tokens else {}),
        predict=predict,
    )
