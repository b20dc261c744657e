"""What GPTQ of one weight costs: its loop beside a plain one, and the floor of what any loop of kernels can do.

    python -m tests.benchmarks.gptq_cost [--shape 2048x2048] [--group 128] [--tokens 16384] [--repeats 3] [--output FILE]

Random weights and inputs (numbers do not matter for time), 4 bit, asymmetric, on the GPU if there is one.  All in one run:

    Hessian       2/n X Xᵀ in float32
    factor        damping, Cholesky and triangular inverse, in float64
    ours          the loop with lazy updates, through the data type's own quantize and dequantize
    plain         the same steps written out, updates not put off; sums in another order move near ties
    floor         the far updates' products at the rate that a product reaches here, and one started kernel a column

The floor leaves out all but one kernel of each column's step; what is above it is the latency of the others (on a GPU some
twenty a column: the sweep's cost, and why one kernel a chunk of columns is the way).

One H200, torch 2.11, groups of 128: 2,048 × 2,048 ours .47 s, plain .26, floor .016; 2,048 × 8,192 2.36, 1.19, .094; 8,192 × 2,048
.44, .28, .017; 98 to 99.8 % of the codes the same.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from quantsweep.data_types._base import DataType, QParams, dequantize_weight
from quantsweep.numerics.blocks import Blocks
from quantsweep.rounding._feedback import FeedbackOptions, quantize_with_feedback
from quantsweep.rounding._inverse import inverse_factor
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec, StepSpec
from tests.benchmarks.measure import output_parser, say

T = TypeVar("T")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = FeedbackOptions(damping=0.01)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = output_parser(__doc__)
    parser.add_argument("--shape", default="2048x2048" if DEVICE.type == "cuda" else "256x256", help="out × in")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale")
    parser.add_argument("--tokens", type=int, default=16_384, help="rows of the inputs")
    parser.add_argument("--repeats", type=int, default=3, help="each time is the median of so many")
    arguments = parser.parse_args(argv)
    rows, columns = map(int, arguments.shape.split("x"))
    say("\n".join(run(rows, columns, arguments.group, arguments.tokens, arguments.repeats)), arguments.output)
    return 0


def run(rows: int, columns: int, group: int, tokens: int, repeats: int) -> list[str]:
    """The table, line by line."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=generator, device=DEVICE)
    inputs_TI = torch.randn(tokens, columns, generator=generator, device=DEVICE) @ torch.randn(
        columns, columns, generator=generator, device=DEVICE
    )
    spec = QuantizationSpec(
        rounding=StepSpec("gptq", 1), data_type="int", data_type_version=1, data_type_options=(("convention", "gptq"),),
        bit_width=4, block_size=group, block_axis="input", symmetric=False, scale_dtype="float16",
    )  # fmt: skip
    data_type: DataType = data_type_of(spec)

    def choose(blocks: Blocks, _columns_J: Tensor | None) -> QParams:
        return data_type.choose_qparams(blocks, spec)

    hessian_s, hessian_II = timed(lambda: 2 / tokens * inputs_TI.T @ inputs_TI, repeats)
    factor_s, factor = timed(lambda: inverse_factor(hessian_II, OPTIONS.damping), repeats)
    upper_II = factor.upper_II.to(torch.float32)
    whole_s, found = timed(lambda: quantize_with_feedback(weight_OI, hessian_II, spec, OPTIONS, data_type, choose), repeats)
    plain_s, plain_OI = timed(lambda: plain_loop(weight_OI, upper_II, group), repeats)
    ours_s, ours_OI = whole_s - factor_s, dequantize_weight(data_type, found.quantized)
    floor_s = far_updates(rows, columns) + columns * started_kernel(rows)
    same = float((ours_OI - plain_OI).abs().lt(1e-3 * weight_OI.abs().max()).float().mean())
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return [
        f"{rows} × {columns}, groups of {group}, {tokens:,} tokens, torch {torch.__version__}, {where}",
        f"{'Hessian':<10}{hessian_s:>10.4f} s",
        f"{'factor':<10}{factor_s:>10.4f} s",
        f"{'ours':<10}{ours_s:>10.4f} s   {1e6 * ours_s / columns:.0f} µs a column, {ours_s / floor_s:.1f} × the floor",
        f"{'plain':<10}{plain_s:>10.4f} s   {plain_s / ours_s:.2f} × ours; {100 * same:.2f} % of the codes are the same",
        f"{'floor':<10}{floor_s:>10.4f} s",
    ]


def plain_loop(weight_OI: Tensor, upper_II: Tensor, group: int) -> Tensor:
    """Decoded weight: each step written out, without laziness or data types; scales rounded to float16 as stored."""
    current_OI, decoded_OI = weight_OI.clone(), torch.empty_like(weight_OI)
    for j in range(weight_OI.shape[1]):
        if j % group == 0:
            part = current_OI[:, j : j + group]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = ((high - low) / 15).half().float()
            zero = (-low / scale).round().clamp(0, 15)
        column = current_OI[:, j]
        decoded_OI[:, j] = scale * ((column / scale).round().add(zero).clamp(0, 15) - zero)
        error = (column - decoded_OI[:, j]) / upper_II[j, j]
        current_OI[:, j:] -= error[:, None] * upper_II[j, None, j:]
    return decoded_OI


def far_updates(rows: int, columns: int) -> float:
    """Seconds of all products of one chunk's errors with the factor's rows."""
    errors, factor = torch.randn(rows, OPTIONS.update_columns, device=DEVICE), torch.randn(OPTIONS.update_columns, columns, device=DEVICE)
    each, _ = timed(lambda: errors @ factor, 5)
    return each * (columns / OPTIONS.update_columns) / 2  # on average half of the columns are left


def started_kernel(rows: int) -> float:
    """Seconds of one elementwise step on a column, in a row of many."""
    column = torch.randn(rows, device=DEVICE)

    def many() -> None:
        for _ in range(200):
            column.mul_(1.0)

    return timed(many, 5)[0] / 200


def timed(work: Callable[[], T], repeats: int) -> tuple[float, T]:
    """Median seconds, and what the work gave the last time."""
    seconds, found = [], work()
    for _ in range(repeats):
        _wait()
        started = time.perf_counter()
        found = work()
        _wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), found


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
