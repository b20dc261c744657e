"""The factor of a Hessian's inverse that error feedback walks along, with damping and dead columns.

    H = 2/n Σ x xᵀ,      H_jj = 0  →  1  (dead: the input is always 0, any weight will do)
    H + λ·mean(diag H)·I = M Mᵀ,     M upper triangular,     U = M⁻¹,     so that (H + …)⁻¹ = Uᵀ U

Row j of U is, up to its diagonal, the first row of the inverse of the *remaining* submatrix H[j:, j:]: what GPTQ needs once the
columns before j are fixed.  The published code factors the inverse; the factor is the same (it is unique), but one
factorization of the reversed matrix and one triangular inverse give it without inverting H, and fail only where H is not
positive definite.  Then λ is raised tenfold, from a fresh copy of H, and what was used is recorded.

All of it runs in float64 whatever the Hessian's type: near ties decide codes, and float32 factors of ill-conditioned
Hessians differ from one machine to the next.

Source: Frantar et al., arXiv:2210.17323 (GPTQ), section 3, steps 1 to 3; damping .01 as in IST-DASLab/gptq.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantsweep.errors import QuantizationError

_RAISE = 10
_MOST_RAISES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class InverseFactor:
    """upper_II: U, float64.  damping: λ that was used, a share of the mean diagonal.  raises: how often it was raised tenfold."""

    upper_II: Tensor
    damping: float
    raises: int


def dead_columns(hessian_II: Tensor) -> Tensor:
    """Input columns that are 0 for every token: (I,) bool."""
    return hessian_II.diagonal() == 0


def with_dead_columns_alive(hessian_II: Tensor) -> Tensor:
    """A copy in float64 whose zero diagonal elements are 1."""
    filled_II = hessian_II.to(torch.float64, copy=True)
    filled_II.diagonal()[dead_columns(hessian_II)] = 1
    return filled_II


def inverse_factor(hessian_II: Tensor, damping: float) -> InverseFactor:
    """U of H + λ·mean(diag H)·I, λ raised as often as it takes.

    hessian_II: symmetric, its diagonal above 0 (`with_dead_columns_alive`).  damping: λ > 0.  Raises QuantizationError where
    the Hessian holds NaN or infinity, or no damping makes it positive definite.
    """
    if not bool(hessian_II.isfinite().all()):
        raise QuantizationError("its Hessian holds NaN or infinity: the calibration overflows; use model.dtype=bfloat16 or float32")
    mean = hessian_II.diagonal().to(torch.float64).mean()
    for raises in range(_MOST_RAISES + 1):
        used = damping * _RAISE**raises
        reversed_II = hessian_II.to(torch.float64, copy=True).flip(0, 1)
        reversed_II.diagonal().add_(used * mean)
        lower_II, failed = torch.linalg.cholesky_ex(reversed_II)
        if int(failed) == 0:
            return InverseFactor(upper_II=_inverse_of_upper(lower_II.flip(0, 1)), damping=used, raises=raises)
    raise QuantizationError(f"its Hessian is not positive definite, not even with damping {used:g}; is the calibration text whole?")


def _inverse_of_upper(upper_II: Tensor) -> Tensor:
    identity_II = torch.eye(upper_II.shape[0], dtype=upper_II.dtype, device=upper_II.device)
    inverse_II: Tensor = torch.linalg.solve_triangular(upper_II, identity_II, upper=True)
    return inverse_II
