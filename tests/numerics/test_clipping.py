"""Ranges that look at weights alone, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gptq_reference import mse_levels
from make_spec import make_spec

from quantsweep.clipping.mse import shrunk_limits
from quantsweep.clipping.percentile import percentile_limits
from quantsweep.trial.registry import data_type_of


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_mse_equals_numpy(bits: int, symmetric: bool) -> None:
    """The share of the range that each row keeps; all of the 80 are distinct, so that a tie is improbable."""
    weight = np.random.default_rng(bits).standard_t(4, size=(12, 48)).astype(np.float32)
    spec = make_spec("int", bits, None, block_axis="input", symmetric=symmetric, scale_dtype="float32", convention="gptq")
    low, high = shrunk_limits(torch.tensor(weight), spec, data_type_of(spec))
    _, shares = mse_levels(weight.astype(np.float64), bits, symmetric=symmetric)
    np.testing.assert_allclose(high[:, 0].numpy() / np.maximum(weight.max(axis=1), 0), shares, rtol=1e-5)
    np.testing.assert_allclose(low[:, 0].numpy() / np.minimum(weight.min(axis=1), 0), shares, rtol=1e-5)
    assert len(set(shares)) > 4


def test_mse_cuts_an_outlier_and_mirrors() -> None:
    """A weight that stands out is cut; the negative of a row has the negative limits, also where no weight is below 0."""
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    rows[0, 5] = 2 * rows[0].abs().max()
    rows[1] = rows[1].abs() + 1
    spec = make_spec("int", 3, None, block_axis="input", symmetric=False, convention="gptq")
    low, high = shrunk_limits(rows, spec, data_type_of(spec))
    assert float(high[0]) < 0.9 * float(rows[0].max())
    mirrored_low, mirrored_high = shrunk_limits(-rows, spec, data_type_of(spec))
    assert torch.equal(mirrored_high, -low)
    assert torch.equal(mirrored_low, -high)


@pytest.mark.parametrize("percentile", [99.0, 97.3, 100.0])
def test_percentile_equals_numpy(percentile: float) -> None:
    rows = torch.randn(5, 77, generator=torch.Generator().manual_seed(2))
    values = rows.double().numpy()
    low, high = percentile_limits(rows, percentile, symmetric=False)
    np.testing.assert_allclose(low[:, 0].numpy(), np.percentile(values, 100 - percentile, axis=1), rtol=1e-5)
    np.testing.assert_allclose(high[:, 0].numpy(), np.percentile(values, percentile, axis=1), rtol=1e-5)
    low, high = percentile_limits(rows, percentile, symmetric=True)
    np.testing.assert_allclose(high[:, 0].numpy(), np.percentile(np.abs(values), percentile, axis=1), rtol=1e-5)
    assert torch.equal(low, -high)
