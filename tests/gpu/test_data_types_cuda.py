"""A GPU gives the same scales as a CPU and the same codes, but for near-ties.

A float32 division may differ by one unit in the last place between CPU and CUDA; where a weight lies
that close to the middle of two levels, the code goes to the other neighbour.  On random weights this
is a few in a hundred thousand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from quantsweep.data_types._base import dequantize_weight, quantize_weight
from quantsweep.numerics import blocks
from quantsweep.numerics.blocks import TILE
from quantsweep.storage.paths import product_root
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec, StepSpec, options_tuple

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OWN_SCALES = {"mxfp": "e8m0", "nvfp4": "e4m3"}
WIDTHS = {"mxfp": (4, 6, 8), "nvfp4": (4,), "fp8": (8,), "af4": (4,)}
CASES = [
    ("int", True, {}),
    *(("int", symmetric, {"convention": convention}) for convention in ("gptq", "awq", "deepspeed") for symmetric in (True, False)),
    ("fp", True, {}),
    ("dynamic", True, {}),
    ("quantile", True, {}),
    ("nf", True, {}),
    ("af4", True, {"levels": yaml.safe_load((product_root() / "conf" / "data_type" / "af4.yaml").read_text())["options"]["levels"]}),
    *(("fp8", True, {"format": name}) for name in ("e4m3", "e5m2")),
    *(("mxfp", True, {"scale_mode": mode}) for mode in ("floor", "rceil", "ceil", "even")),
    ("nvfp4", True, {}),
]


@pytest.mark.parametrize("shape", [(33, 77), (TILE // 64, 130)])
@pytest.mark.parametrize(
    ("data_type", "symmetric", "options", "bit_width"), [(*case, k) for case in CASES for k in WIDTHS.get(case[0], (3, 4, 8))]
)
def test_gpu_equals_cpu(
    data_type: str, symmetric: bool, options: dict[str, Any], bit_width: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tensors (searched) and large ones (table, several tiles)."""
    monkeypatch.setattr(blocks, "GPU_TILE", TILE)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spec = QuantizationSpec(
        rounding=StepSpec("round_to_nearest", 1),
        data_type=data_type,
        data_type_version=1,
        data_type_options=options_tuple(options),
        bit_width=bit_width,
        block_size=64,
        block_axis="flat",
        symmetric=symmetric,
        scale_dtype=OWN_SCALES.get(data_type, "float16"),
    )
    code = data_type_of(spec)
    here, there = (quantize_weight(code, weight.to(device), spec) for device in ("cpu", "cuda"))
    assert torch.equal(there.qparams.scale_N1.cpu(), here.qparams.scale_N1)
    apart = (there.codes_NB.cpu().int() - here.codes_NB.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= 1e-4
    for dtype in (torch.float32, torch.float16):
        decoded = dequantize_weight(code, there, dtype).cpu()
        expected = dequantize_weight(code, here, dtype)
        assert (decoded != expected).float().mean() <= 1e-4 + (apart > 0).float().mean()
