"""LoRC: a low-rank piece of the rounding error is stored beside the codes.

    E = W - Ŵ = U Σ Vᵀ,      L = U_m √Σ_m,   R = √Σ_m V_mᵀ,      Ŵ + L R

the best rank-m piece of E in the Frobenius norm: what is left is √(Σ_{i>m} σ_i²).  E is taken from the weight that is really in
use (decoded, in the compute dtype).  The √Σ on both sides gives the two factors the same range.

    stored bits = m · (O + I) · 16,      or m · (O + I) · 8 + 2m · 16 for 8-bit factors

8-bit factors are symmetric integers with a float16 scale for each component (a column of L, a row of R); they are rounded before
the sum is formed.  m of 4 to 8 is the paper's advice.  The sum is computed densely here; kept apart, the two factors cost
2m(O + I) operations a token more.

The singular values are exact: a randomized decomposition would shift what rank seems best.

Source: Yao et al., arXiv:2303.08302 (ZeroQuant-V2), section 5.  How 8-bit factors are scaled is ours; the paper's code is not public.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantsweep.numerics.scales import absmax, divide, round_scale, without_zeros
from quantsweep.pipeline.interface import Compensated, InputNeeds, Layer, LayerContext
from quantsweep.trial.specs import QuantizationSpec

_SCALE_DTYPE = "float16"
_LARGEST = 127


class LowRank:
    """LoRC; see the module."""

    def check(self, spec: QuantizationSpec) -> None:
        """Every weight has a low-rank error."""

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """It looks at no text."""
        return None

    def compensate(
        self, layer: Layer, weight_OI: Tensor, quantized_OI: Tensor, spec: QuantizationSpec, context: LayerContext
    ) -> Compensated:
        """Two factors, and the weight with their product added."""
        if spec.compensation is None:
            raise TypeError("a compensation runs where one was chosen")
        rank, bits = (int(spec.compensation.number(name)) for name in ("rank", "factor_bits"))
        context.help.progress()
        left, right = (store_factor(factor_MX, bits, layer.dtype) for factor_MX in low_rank(weight_OI - quantized_OI, rank))
        extras = left.arrays("lorc_left") | right.arrays("lorc_right")
        return Compensated(weight_OI=quantized_OI.addmm(left.decode().t(), right.decode()), extras=extras)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFactor:
    """One factor as stored, a component a row.  values_MX: (m, O or I) float16, bfloat16, or int8 with scale_M (m,) float16."""

    values_MX: Tensor
    scale_M: Tensor | None = None

    def arrays(self, name: str) -> dict[str, Tensor]:
        """What is stored, by names that begin with `name`."""
        return {name: self.values_MX} | ({} if self.scale_M is None else {f"{name}_scale": self.scale_M})

    def decode(self) -> Tensor:
        """(m, X) float32."""
        values_MX = self.values_MX.to(torch.float32)
        return values_MX if self.scale_M is None else values_MX * self.scale_M.to(torch.float32)[:, None]


def low_rank(error_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L transposed (m, O) and R (m, I), m the smaller of `rank` and the weight's sides; computed in the error's type."""
    left_OK, values_K, right_KI = torch.linalg.svd(error_OI, full_matrices=False)
    root_M1 = values_K[:rank, None].sqrt()
    return left_OK.t()[:rank] * root_M1, right_KI[:rank] * root_M1


def store_factor(factor_MX: Tensor, bits: int, dtype: torch.dtype) -> StoredFactor:
    """Round a factor (m, X) to 16 bits (bfloat16 where the model computes so) or to 8."""
    if bits != 8:
        return StoredFactor(values_MX=factor_MX.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16))
    scale_M1 = round_scale(divide(absmax(factor_MX), _LARGEST), _SCALE_DTYPE)
    codes_MX = (factor_MX / without_zeros(scale_M1)).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return StoredFactor(values_MX=codes_MX, scale_M=scale_M1.view(-1).to(torch.float16))


COMPENSATION = LowRank()
