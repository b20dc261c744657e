"""A GPU gives the same codes and weights as a CPU, to the last bit: division, rounding and comparison are IEEE on both."""

from __future__ import annotations

import pytest
import torch

from quantsweep.data_types._base import dequantize_weight, quantize_weight
from quantsweep.numerics.blocks import TILE
from quantsweep.registry import DATA_TYPES
from quantsweep.specs import QuantizationSpec, options_tuple

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CASES = [
    ("int", True, {}),
    *(("int", symmetric, {"convention": convention}) for convention in ("gptq", "awq", "deepspeed") for symmetric in (True, False)),
    ("fp", True, {}),
    ("dynamic", True, {}),
    ("quantile", True, {}),
]


@pytest.mark.parametrize("shape", [(33, 77), (TILE // 64, 130)])
@pytest.mark.parametrize("bit_width", [3, 4, 8])
@pytest.mark.parametrize(("data_type", "symmetric", "options"), CASES)
def test_gpu_equals_cpu(data_type: str, symmetric: bool, options: dict[str, str], bit_width: int, shape: tuple[int, int]) -> None:
    """Small tensors (searched) and large ones (table, several tiles)."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spec = QuantizationSpec(
        method="round_to_nearest",
        method_version=1,
        data_type=data_type,
        data_type_version=1,
        data_type_options=options_tuple(options),
        bit_width=bit_width,
        block_size=64,
        block_axis="flat",
        symmetric=symmetric,
        scale_dtype="float16",
    )
    here, there = (quantize_weight(DATA_TYPES[data_type], weight.to(device), spec) for device in ("cpu", "cuda"))
    assert torch.equal(there.codes_NB.cpu(), here.codes_NB)
    assert torch.equal(there.qparams.scale_N1.cpu(), here.qparams.scale_N1)
    for dtype in (torch.float32, torch.float16):
        decoded = dequantize_weight(DATA_TYPES[data_type], there, dtype).cpu()
        assert torch.equal(decoded, dequantize_weight(DATA_TYPES[data_type], here, dtype))
