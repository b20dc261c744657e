"""GPTQ's chunk as one kernel gives the codes of the loop that it stands for."""

from __future__ import annotations

import pytest
import torch

from quantsweep.data_types.int import DATA_TYPE
from quantsweep.numerics.blocks import Blocks
from quantsweep.rounding._columns import round_chunk
from tests.contract.component_cases import component, spec_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("convention", "symmetric"),
    [("gptq", False), ("gptq", True), ("awq", False), ("kbit", True), ("absmax_full", True), ("deepspeed", False)],
)
@pytest.mark.parametrize(("columns", "rows"), [(128, 512), (100, 37), (1, 5)])
def test_a_chunk_in_one_kernel_equals_the_loop(convention: str, symmetric: bool, bits: int, columns: int, rows: int) -> None:
    """A weight on the edge between two levels may fall to either side, and what comes after it in its row then differs too."""
    from quantsweep.rounding._columns_triton import round_chunk as in_one_kernel

    generator = torch.Generator("cuda").manual_seed(bits)
    spec = spec_of(component("data_type", "int"), bits, convention=convention, symmetric=symmetric, block_size=None, block_axis="input")
    chunk_CO = torch.randn(columns, rows, generator=generator, device="cuda")
    chunk_CO[:, 0] = 0  # a row whose scale is 0
    upper_CC = torch.randn(columns, columns, generator=generator, device="cuda").mul_(0.1).triu_(1) + torch.eye(columns, device="cuda")
    upper_CC = upper_CC.T.contiguous().T  # column by column, as a factor of Cholesky's lies
    halves = [Blocks.of(part.T.contiguous(), None, "input") for part in chunk_CO.split(max(1, columns // 2))]
    params = [DATA_TYPE.choose_qparams(half, spec) for half in halves for _ in range(half.values_NB.shape[1])]
    codes_CO, errors_CO = in_one_kernel(chunk_CO.clone(), upper_CC, params)
    expected_CO, expected_errors_CO = round_chunk(chunk_CO.clone(), upper_CC, params, DATA_TYPE)
    same_O = (codes_CO == expected_CO).all(dim=0)
    assert float(same_O.float().mean()) > 0.99
    torch.testing.assert_close(errors_CO[:, same_O], expected_errors_CO[:, same_O], rtol=1e-4, atol=1e-5)
