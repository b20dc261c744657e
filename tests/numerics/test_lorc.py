"""Low-rank compensation against numpy's truncated singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from make_spec import make_spec

from quantsweep.compensations.lorc import low_rank, store_factor
from quantsweep.data_types._base import fake_quantize
from quantsweep.trial.registry import data_type_of


def weight_and_error(rows: int = 24, columns: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    spec = make_spec("int", 3, 16, block_axis="input")
    return weight, weight - fake_quantize(data_type_of(spec), weight, spec)


@pytest.mark.parametrize("rank", [1, 4, 16, 24, 99])
def test_what_is_left_is_the_tail(rank: int) -> None:
    """‖E - LR‖ = √Σ σ² of what is left out, LR the truncated decomposition; a full rank leaves nothing."""
    error = weight_and_error()[1].double()
    left, right = low_rank(error, rank)
    assert left.shape == (min(rank, 24), 24)
    u, s, v = np.linalg.svd(error.numpy(), full_matrices=False)
    np.testing.assert_allclose((left.T @ right).numpy(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-12)
    assert float((error - left.T @ right).norm()) == pytest.approx(float(np.sqrt((s[rank:] ** 2).sum())), abs=1e-10)
    np.testing.assert_allclose(left.norm(dim=1).numpy(), np.sqrt(s[:rank]), atol=1e-12)
    np.testing.assert_allclose(right.norm(dim=1).numpy(), np.sqrt(s[:rank]), atol=1e-12)


def test_stored_factors_still_help() -> None:
    """Each rank leaves less, 16-bit factors as good as exact ones, 8-bit ones within half a step of 1/127 of the largest."""
    weight, error = weight_and_error()
    for bits, tolerance in ((16, 1e-3), (8, 0.03)):
        left_over = [float(error.norm())]
        for rank in (2, 8, 24):
            exact = low_rank(error, rank)
            stored = [store_factor(factor, bits, torch.float32) for factor in exact]
            for factor, kept in zip(exact, stored, strict=True):
                half_step = factor.abs().amax(dim=1, keepdim=True) * (2**-11 if bits == 16 else 0.51 / 127)
                assert bool(((kept.decode() - factor).abs() <= half_step + 1e-7).all())
            left_over.append(float((error - stored[0].decode().T @ stored[1].decode()).norm()))
        assert left_over == sorted(left_over, reverse=True)
        assert left_over[-1] < tolerance * float(weight.norm())


def test_bits_of_factors() -> None:
    """m · X numbers of 16 or 8 bits, and a float16 scale a component for the latter; bfloat16 where the model computes so."""
    factor = torch.randn(4, 30)
    half, brain, byte = (
        store_factor(factor, bits, dtype) for bits, dtype in ((16, torch.float32), (16, torch.bfloat16), (8, torch.float32))
    )
    assert (half.values_MX.dtype, brain.values_MX.dtype, byte.values_MX.dtype) == (torch.float16, torch.bfloat16, torch.int8)
    assert half.scale_M is None
    assert byte.scale_M is not None
    assert (byte.scale_M.dtype, byte.scale_M.shape) == (torch.float16, (4,))
    assert not store_factor(torch.zeros(2, 3), 8, torch.float32).decode().any()
