"""A part of a model, run again and again on what entered it: how a search over weights sees what they do to outputs.

What the part is called with is caught once, window by window; then the part alone runs.  What differs from one window to
the next lies on the host, what all share (masks, positions) stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from quantsweep.calibration.streams import BlockPass


class _Caught(Exception):
    """The part was about to run."""


class Part:
    """A module within a block (or the block), and its calls at all windows.

    Its outputs at the time of making are kept as what later ones are compared with: N × T × H, on the host.
    """

    def __init__(self, block: BlockPass, module: nn.Module) -> None:
        self._module = module
        self._device = next(module.parameters()).device
        self._calls = list(_calls(block, module))
        self._outputs = [output.cpu() for output in self._run()]

    def mean_squared_error(self) -> float:
        """Of the outputs as they are now, to those at the time of making: mean over all their elements, in float32."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        count = 0
        for output, original in zip(self._run(), self._outputs, strict=True):
            difference = output.to(torch.float32) - original.to(self._device, torch.float32)
            total += difference.square().sum(dtype=torch.float64)
            count += difference.numel()
        return float(total) / count

    @torch.no_grad()
    def _run(self) -> Iterator[Tensor]:
        for call in self._calls:
            positional, named = _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self._device, non_blocking=True), call)
            found = self._module(*positional, **named)
            yield found[0] if isinstance(found, (tuple, list)) else found


def _calls(block: BlockPass, module: nn.Module) -> Iterator[Any]:
    """(positional, named arguments) of the module at each window."""
    caught: list[Any] = []

    def catch(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append((positional, named))
        raise _Caught

    shared: list[Any] | None = None
    for window in range(block.num_windows):
        handle = module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.no_grad():
                block.run(block.hidden(window), "weights")
        except _Caught:
            pass
        finally:
            handle.remove()
        leaves, form = _pytree.tree_flatten(caught.pop())
        shared = leaves if shared is None else shared
        own = [leaf.cpu() if isinstance(leaf, Tensor) and leaf is not first else leaf for leaf, first in zip(leaves, shared, strict=True)]
        yield _pytree.tree_unflatten(own, form)
