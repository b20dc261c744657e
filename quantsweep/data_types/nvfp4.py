"""NVFP4: 4-bit E2M1 numbers, an E4M3 scale for each block of 16, and one float32 scale for the tensor.

    σ   = max |T| / (448 · 6)                                 float32, 32 bits a tensor
    s_b = E4M3(clip((max |T_b| / 6) / σ, 2^-6, 448))          8 bits a block
    code = E2M1(x / (σ · s_b)),   decoded = value(code) · (σ · s_b)

Numbers are rounded to nearest, ties to even, and saturate.  The scales have 3 bits of mantissa where MX
has none, and so blocks use their numbers better; σ brings them into E4M3's range: the block with the
tensor's largest weight has s_b = 448.  Blocks more than 2^14.8 times smaller than that get the least
scale, 2^-6, and lose precision.  A tensor of zeros decodes to zeros.

Blocks are of 16 along the input by default; other sizes are not NVFP4, and the row's block size says so.

Sources: Pretraining Large Language Models with NVFP4, arXiv:2509.25149; clipping of the block scales as
in torchao's nvfp4_tensor.
"""

from __future__ import annotations

from quantsweep.data_types._base import QParams, Support
from quantsweep.data_types._minifloat import MiniFloatDataType
from quantsweep.numerics.blocks import Blocks
from quantsweep.numerics.minifloat import E2M1, E4M3, nearest
from quantsweep.numerics.scales import absmax, divide, round_scale, storage_bits, without_zeros
from quantsweep.trial.specs import QuantizationSpec

LEAST_BLOCK_SCALE = 2.0**-6  # E4M3's smallest normal number
_TENSOR_SCALE_DTYPE = "float32"


class NvidiaFloat4(MiniFloatDataType):
    """E2M1 with scales of two levels; see the module."""

    name = "nvfp4"
    support = Support(bit_widths=(4,), options={}, scale_dtypes=("e4m3",))

    def choose_qparams(self, blocks: Blocks, spec: QuantizationSpec) -> QParams:
        """Block scales (N, 1) and the tensor's scale ()."""
        self.check_spec(spec)
        absmax_N1 = absmax(blocks.values_NB)
        tensor_scale = round_scale(divide(absmax_N1.amax(), E4M3.largest * E2M1.largest), _TENSOR_SCALE_DTYPE)
        block_scale_N1 = divide(absmax_N1, E2M1.largest) / without_zeros(tensor_scale)
        return QParams(
            bit_width=E2M1.bits,
            scale_N1=nearest(block_scale_N1.clamp(LEAST_BLOCK_SCALE, E4M3.largest), E4M3),
            scale_bits=E4M3.bits,
            tensor_scale=tensor_scale,
            tensor_scale_bits=storage_bits(_TENSOR_SCALE_DTYPE),
            element=E2M1,
        )


DATA_TYPE = NvidiaFloat4()
