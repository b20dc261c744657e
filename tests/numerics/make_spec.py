"""Short way to write the QuantizationSpec of a test."""

from __future__ import annotations

from typing import Any

from quantsweep.trial.specs import BlockSize, QuantizationSpec, StepSpec, options_tuple


def make_spec(
    data_type: str,
    bit_width: int,
    block_size: BlockSize = 64,
    *,
    block_axis: str = "flat",
    symmetric: bool = True,
    scale_dtype: str = "float16",
    **options: Any,
) -> QuantizationSpec:
    """`make_spec("fp", 4, 64, subnormal="ieee")`: round to nearest, everything else as usual."""
    return QuantizationSpec(
        rounding=StepSpec("round_to_nearest", 1),
        data_type=data_type,
        data_type_version=1,
        data_type_options=options_tuple(options),
        bit_width=bit_width,
        block_size=block_size,
        block_axis=block_axis,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
