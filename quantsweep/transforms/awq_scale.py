"""AWQ's scales: input columns that meet large activations are magnified before rounding, as far as outputs like it.

    a_j = mean |x_j|,      s = max(a^r, 1e-4),  r = i / 20,  i = 0 … 19,      s ← s / √(max s · min s)
    keep the r with the least mean (f(x) - f̂(x))²,   f̂ computed with Q(W · s) / s in place of the weights that read x

A magnified column is rounded more finely relative to itself, at the cost of its block's range.  f is the part of the model
that the weights work in: the whole attention for queries, keys and values, the whole gated MLP for gate and up, the
linear itself otherwise.  r = 0 is s = 1, round to nearest as it is; r = 1 is never tried.

The winner is folded (`models/folding.py`): what makes x is divided by s, the weights that read it are multiplied.  In exact
arithmetic the model computes what it did.  All of it looks at the model as it was before rounding; the scales of a block are
chosen on the block as it was, and folded together.

Where the scales go: norms → what reads them; values → attention output; up → down.  A pair that cannot carry them (a GELU
between up and down, norms after the residual sum) is left out, and a record says why; `unfoldable: refuse` refuses instead.  The
published code puts a division after such an activation, which is no folding; it leaves out values that several query heads
share, and so does this.  For BLOOM it looks at the whole block's output, here at that of the attention or the MLP.

Source: Lin et al., arXiv:2306.00978 (AWQ), section 3.2; awq/quantize/auto_scale.py of mit-han-lab/llm-awq.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantsweep.calibration.inputs import LayerInputs
from quantsweep.calibration.streams import BlockPass, walk
from quantsweep.data_types._base import DataType, fake_quantize
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.models.folding import Kind, Pair, fold, obstacle, pairs
from quantsweep.models.session import Session
from quantsweep.pipeline.interface import Help, TransformRecord
from quantsweep.pipeline.ranges import check_data_type
from quantsweep.transforms._parts import Part
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec, StepSpec

_LEAST = 1e-4
_KINDS: tuple[Kind, ...] = ("norm", "value", "up")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleChoice:
    """scale_I: s, float32.  ratio: the r it came from.  losses: of each r that was tried, in order; the first is of s = 1."""

    scale_I: Tensor
    ratio: float
    losses: tuple[float, ...]


def search_scale(
    mean_abs_I: Tensor,
    weights: Sequence[Tensor],
    fake_quantize: Callable[[Tensor], Tensor],
    loss: Callable[[Sequence[Tensor]], float],
    grid: int = 20,
) -> ScaleChoice:
    """The best of `grid` scales.

    mean_abs_I: mean |x_j| over tokens.  weights: all that read x, (O, I) each.  fake_quantize: (O, I) -> (O, I).  loss: of the
    model's part with these weights in place of the original ones.  Raises QuantizationError where no loss is a number.
    """
    tried: list[tuple[float, float, Tensor]] = []
    for ratio, scale_I in candidates(mean_abs_I, grid):
        tried.append((loss([fake_quantize(weight_OI * scale_I) / scale_I for weight_OI in weights]), ratio, scale_I))
    finite = [trial for trial in tried if trial[0] < float("inf")]
    if not finite:
        raise QuantizationError(
            f"none of {grid} scales of AWQ has a finite loss: activations overflow; use model.dtype=bfloat16 or float32"
        )
    _, ratio, scale_I = min(finite, key=lambda trial: trial[0])
    return ScaleChoice(scale_I=scale_I, ratio=ratio, losses=tuple(trial[0] for trial in tried))


def candidates(mean_abs_I: Tensor, grid: int = 20) -> Iterator[tuple[float, Tensor]]:
    """(r, s) for r = 0, 1/grid, … below 1."""
    for step in range(grid):
        ratio = step / grid
        scale_I = mean_abs_I.pow(ratio).clamp(min=_LEAST)
        yield ratio, scale_I / (scale_I.max() * scale_I.min()).sqrt()


class AwqScale:
    """AWQ's scales; see the module."""

    def check(self, spec: QuantizationSpec, step: StepSpec) -> None:
        """Raises ConfigurationError where no weights are quantized: there would be nothing to choose scales by."""
        if not spec.quantizes_weights or spec.data_type is None:
            raise ConfigurationError(
                "transform 'awq_scale' chooses scales by what quantized weights do to outputs; it needs a rounding and a data_type"
            )
        check_data_type(spec)

    def apply(self, session: Session, spec: QuantizationSpec, step: StepSpec, help: Help) -> tuple[TransformRecord, ...]:
        """Search and fold, block by block."""
        if help.tokens_NT is None:
            raise QuantizationError("transform 'awq_scale' looks at calibration text, and the trial has none")
        of_block, records = _pairs_by_block(session, refuse=step.option("unfoldable") == "refuse")
        grid = int(step.number("grid"))
        for number, block in enumerate(walk(session, help.tokens_NT, on_progress=help.progress)):
            chosen = [(pair, _search(session, block, pair, spec, grid, help)) for pair in of_block[number]]
            for pair, choice in chosen:
                records.append(TransformRecord(name=pair.source, detail=_detail(choice)))
                if choice is not None:
                    fold(session.model, pair, choice.scale_I, session.write)
        return tuple(records)


def _pairs_by_block(session: Session, *, refuse: bool) -> tuple[Mapping[int, list[Pair]], list[TransformRecord]]:
    """Pairs that can carry scales, by number of their block, and a record for each kind that cannot."""
    found: dict[int, list[Pair]] = defaultdict(list)
    left_out = {kind: reason for kind in _KINDS if (reason := obstacle(session.model, kind)) is not None}
    for kind in (kind for kind in _KINDS if kind not in left_out):
        for pair in pairs(session.model, kind):
            if len(torch.unique(pair.unit_of_column)) < len(pair.unit_of_column):
                left_out[kind] = "several query heads share a value head"
            elif any(reader in session.layers for reader in pair.readers):
                found[pair.block].append(pair)
    if left_out and (refuse or not found):
        kind, reason = next(iter(left_out.items()))
        raise QuantizationError(f"AWQ's scales cannot be folded ({kind}) in this {session.model.config.model_type} model: {reason}")
    return found, [TransformRecord(name=kind, detail=f"left out: {reason}") for kind, reason in left_out.items()]


def _search(session: Session, block: BlockPass, pair: Pair, spec: QuantizationSpec, grid: int, help: Help) -> ScaleChoice | None:
    """The best scales of a pair; None where no token came to its layers."""
    readers = [name for name in pair.readers if name in session.layers]
    inspected = _inspected(block.name, pair)
    inputs = block.capture(readers, "weights", hessian=torch.float32 if inspected is None else None)
    if not any(each.num_tokens for each in inputs.values()):
        return None
    weights = [session.read(name).to(torch.float32) for name in readers]
    data_type: DataType = data_type_of(spec)

    def quantized(weight_OI: Tensor) -> Tensor:
        help.progress()
        return fake_quantize(data_type, weight_OI, spec)

    if inspected is None:
        return search_scale(_mean_abs(inputs), weights, quantized, _loss_of_linear(weights[0], inputs[readers[0]]), grid)
    part = Part(block, session.model.get_submodule(inspected))

    def loss(candidate: Sequence[Tensor]) -> float:
        for name, weight_OI in zip(readers, candidate, strict=True):
            session.write(name, weight_OI)
        return part.mean_squared_error()

    choice = search_scale(_mean_abs(inputs), weights, quantized, loss, grid)
    for name, weight_OI in zip(readers, weights, strict=True):
        session.write(name, weight_OI)
    return choice


def _inspected(block: str, pair: Pair) -> str | None:
    """The part of the model whose output decides; None for the only reader itself."""
    if len(pair.readers) > 1:
        parts = list(zip(*(reader.split(".") for reader in pair.readers), strict=False))
        return ".".join(names[0] for names in parts[: next((i for i, names in enumerate(parts) if len(set(names)) > 1), len(parts))])
    parent = pair.readers[0].rpartition(".")[0]
    return None if pair.kind != "norm" or parent == block else parent


def _mean_abs(inputs: Mapping[str, LayerInputs]) -> Tensor:
    """Mean |x_j| over all tokens of all layers: experts see some of them each."""
    seen = [each for each in inputs.values() if each.num_tokens]
    total = sum(each.num_tokens for each in seen)
    return torch.stack([each.mean_abs_I.double() * (each.num_tokens / total) for each in seen]).sum(dim=0).to(torch.float32)


def _loss_of_linear(weight_OI: Tensor, inputs: LayerInputs) -> Callable[[Sequence[Tensor]], float]:
    """Mean over tokens and outputs of (x (W - Ŵ)ᵀ)², from H = 2/n Σ x xᵀ."""
    hessian_II = inputs.hessian_II
    if hessian_II is None:
        raise TypeError("the Hessian was asked for")

    def loss(candidate: Sequence[Tensor]) -> float:
        difference_OI = candidate[0] - weight_OI
        return float(((difference_OI @ hessian_II) * difference_OI).sum(dtype=torch.float64)) / (2 * len(weight_OI))

    return loss


def _detail(choice: ScaleChoice | None) -> str:
    if choice is None:
        return "left out: no calibration token came here"
    return f"r {choice.ratio:g}, loss {min(choice.losses):.6g} (r 0: {choice.losses[0]:.6g})"


TRANSFORM = AwqScale()
