"""What enters the linear layers of a model while it reads: heard layer by layer, and summed up in bounded memory.

Sums are plain sums over tokens, divided once at the end: however the text is cut into batches, each token has
the same weight.  Of an expert only the tokens count that were sent to it.  Products are taken in float32 (or
float64), also where the model computes in 16 bit; TF32 is off (`models/loading.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantsweep.errors import QuantizationError
from quantsweep.models.blocks import DOWN, GATE_UP
from quantsweep.models.layers import LinearLayer

Hear = Callable[[str, Tensor], None]
"""Told a layer's name and what enters it, (…, I)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerInputs:
    """What entered one linear layer while the calibration text was read; on the layer's device.

    hessian_II: 2/n Σ x xᵀ over n tokens, float32 or, where that was asked for, float64; zeros for no token; None if not asked for.
    num_tokens: n; of an expert those that were sent to it.
    sample_TI: some of the inputs, float32, evenly spaced over the text; no rows where none were asked for.
    mean_abs_I, min_I, max_I: mean of |x|, minimum and maximum of x, float32; zeros for no token.
    """

    hessian_II: Tensor | None
    num_tokens: int
    sample_TI: Tensor
    mean_abs_I: Tensor
    min_I: Tensor
    max_I: Tensor

    @property
    def max_abs_I(self) -> Tensor:
        """Largest magnitude of each channel, float32."""
        return torch.maximum(self.max_I, -self.min_I)

    def on_host(self) -> LayerInputs:
        """The same in host memory."""
        return LayerInputs(
            hessian_II=None if self.hessian_II is None else self.hessian_II.cpu(),
            num_tokens=self.num_tokens,
            sample_TI=self.sample_TI.cpu(),
            mean_abs_I=self.mean_abs_I.cpu(),
            min_I=self.min_I.cpu(),
            max_I=self.max_I.cpu(),
        )


class InputSums:
    """Sums what enters a layer, chunk by chunk.

    hessian: the dtype of the sum of x xᵀ, or None for no such sum.
    sample_every: of so many tokens one is kept as a sample; 0 for none.
    """

    def __init__(self, in_features: int, device: torch.device, *, hessian: torch.dtype | None = None, sample_every: int = 0) -> None:
        self._hessian_II = None if hessian is None else torch.zeros(in_features, in_features, dtype=hessian, device=device)
        self._abs_I = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._min_I, self._max_I = torch.zeros(2, in_features, device=device).unbind()
        self._sample_every = sample_every
        self._samples = [torch.zeros(0, in_features, device=device)]
        self.num_tokens = 0

    def add(self, values: Tensor) -> None:
        """Take (…, I) into the sums; no rows change nothing."""
        rows_TI = values.detach().reshape(-1, values.shape[-1])
        if not len(rows_TI):
            return
        rows_TI = rows_TI.to(torch.float32) if rows_TI.dtype != torch.float64 else rows_TI
        if self._hessian_II is not None:
            exact_TI = rows_TI.to(self._hessian_II.dtype)
            self._hessian_II.addmm_(exact_TI.T, exact_TI)
        low_I, high_I = (extreme.to(torch.float32) for extreme in torch.aminmax(rows_TI, dim=0))
        first = self.num_tokens == 0
        self._min_I = low_I if first else torch.minimum(self._min_I, low_I)
        self._max_I = high_I if first else torch.maximum(self._max_I, high_I)
        self._abs_I += rows_TI.abs().sum(dim=0, dtype=torch.float64)
        if self._sample_every:
            self._samples.append(rows_TI[-self.num_tokens % self._sample_every :: self._sample_every].to(torch.float32))
        self.num_tokens += len(rows_TI)

    def total(self, name: str) -> LayerInputs:
        """What the sums come to; raises QuantizationError naming the layer where NaN or infinity came in."""
        if not bool(self._abs_I.isfinite().all()):
            raise QuantizationError(
                f"layer {name}: what enters it on the calibration text is NaN or infinite; the compute dtype is too narrow for "
                "this model: use model.dtype=bfloat16 or float32"
            )
        count = max(1, self.num_tokens)
        return LayerInputs(
            hessian_II=None if self._hessian_II is None else self._hessian_II.mul_(2 / count),
            num_tokens=self.num_tokens,
            sample_TI=torch.cat(self._samples),
            mean_abs_I=(self._abs_I / count).to(torch.float32),
            min_I=self._min_I,
            max_I=self._max_I,
        )


@contextmanager
def listening(layers: Mapping[str, LinearLayer], hear: Hear) -> Iterator[None]:
    """Call `hear` with whatever enters these layers, in the order in which they run, while the block lasts.

    Several experts in one module are heard when that module is: each with its own tokens, none among them.
    """
    with ExitStack() as stack:
        for module, names in _by_module(layers).items():
            handle = module.register_forward_pre_hook(_listener(layers, names, hear), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _by_module(layers: Mapping[str, LinearLayer]) -> dict[nn.Module, list[str]]:
    found: dict[nn.Module, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault(layer.module, []).append(name)
    return found


def _listener(layers: Mapping[str, LinearLayer], names: list[str], hear: Hear) -> Callable[..., None]:
    def of_linear(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        hear(names[0], arguments[0] if arguments else next(iter(options.values())))

    def of_experts(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        tokens_TH, chosen_TK = (*arguments, *options.values())[:2]
        for name in names:
            hear(name, _expert_inputs(module, layers[name], tokens_TH, chosen_TK))

    return of_linear if layers[names[0]].expert is None else of_experts


def _expert_inputs(module: nn.Module, layer: LinearLayer, tokens_TH: Tensor, chosen_TK: Tensor) -> Tensor:
    """What enters one layer of one expert; its second layer's inputs are computed anew, by the module's own gate."""
    rows_TH = tokens_TH[torch.eq(chosen_TK, layer.expert or 0).any(dim=-1)]
    if layer.parameter is module.get_parameter(GATE_UP):
        return rows_TH
    apply_gate = getattr(module, "_apply_gate", None)  # of all experts that transformers stores so
    if layer.parameter is not module.get_parameter(DOWN) or not callable(apply_gate):
        raise QuantizationError(f"layer {layer.name}: how {type(module).__name__} computes is not known; it cannot be calibrated")
    inner_TI: Tensor = apply_gate(nn.functional.linear(rows_TH, module.get_parameter(GATE_UP)[layer.expert]))
    return inner_TI
