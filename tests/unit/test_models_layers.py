"""LinearLayer and its checksum, on single modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantsweep.errors import ModelError, QuantizationError
from quantsweep.models.checksums import checksum
from quantsweep.models.layers import LinearLayer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (64, 65), (130, 2048)])
def test_checksum_notices_every_kind_of_change(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    reference = checksum(weight)
    assert checksum(weight.clone()) == reference
    assert checksum(weight.T) == checksum(weight.T.contiguous())
    for index in (0, weight.numel() // 2, weight.numel() - 1):
        changed = weight.clone()
        changed.view(-1)[index] *= -1
        assert checksum(changed) != reference
    swapped = weight.clone()
    swapped.view(-1)[[0, 1]] = weight.view(-1)[[1, 0]]
    assert checksum(swapped) != reference


def test_checksum_tells_negative_zero_and_nan_payloads_apart() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    other = (nan.view(torch.int32) + 1).view(torch.float32)
    assert checksum(nan) != checksum(other)


def linear_layer(*, transposed: bool = False) -> LinearLayer:
    module = Conv1D(3, 5) if transposed else nn.Linear(5, 3)
    return LinearLayer("a.b", module.requires_grad_(False), module.weight.detach().clone(), transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_read_write_and_restore_speak_out_times_in(transposed: bool) -> None:
    layer = linear_layer(transposed=transposed)
    original = layer.read()
    assert (layer.out_features, layer.in_features) == original.shape == (3, 5)
    weight_OI = torch.arange(15.0).reshape(3, 5)
    inputs = torch.randn(2, 5)
    layer.write(weight_OI)
    assert layer.is_written
    torch.testing.assert_close(layer.module(inputs), inputs @ weight_OI.T + layer.module.bias)
    assert torch.equal(layer.read(), original)  # the original, whatever was written
    layer.restore()
    assert not layer.is_written
    torch.testing.assert_close(layer.module(inputs), inputs @ original.T + layer.module.bias)


def test_what_read_returns_may_be_changed() -> None:
    layer = linear_layer()
    layer.read().zero_()
    assert layer.read().abs().sum() > 0


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"layer a\.b: a weight of shape \(5, 3\) does not fit \(3, 5\)"):
        linear_layer().write(torch.zeros(5, 3))


def test_nan_is_written_as_it_is() -> None:
    layer = linear_layer()
    layer.write(torch.full((3, 5), float("nan")))
    assert layer.module.weight.isnan().all()
    layer.restore()


def test_an_original_that_changed_underneath_is_noticed() -> None:
    module = nn.Linear(5, 3).requires_grad_(False)
    original = module.weight.detach().clone()
    layer = LinearLayer("a.b", module, original, transposed=False)
    original[0, 0] += 1  # as when the mapped file is overwritten
    with pytest.raises(ModelError, match=r"layer a\.b: the original weight is not the one that was loaded"):
        layer.restore()


def test_a_layer_without_a_weight_parameter_is_refused() -> None:
    module = nn.Linear(5, 3)
    weight = module.weight.detach()
    del module.weight
    module.weight = weight
    with pytest.raises(ModelError, match="has no weight parameter"):
        LinearLayer("a.b", module, weight, transposed=False)
