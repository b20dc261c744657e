"""What enters the layers of a model before anything is rounded: taken once, shared by all trials of a shard.

Trials that differ in how they round look at the same original model.  So what one of them has measured is
kept, under a key of all that could change it: the model's content and dtype, the tokens, and what was
rewritten before (`Session.rewritten`).  A few sets are kept, each of three numbers an input channel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantsweep.calibration.inputs import InputSums, LayerInputs, listening
from quantsweep.models.checksums import checksum
from quantsweep.models.session import Session
from quantsweep.signs import OnProgress
from quantsweep.trial.specs import content_hash

MOST_SETS = 16


class StatisticsStore:
    """Statistics of the model that one process holds."""

    def __init__(self) -> None:
        self._held: dict[str, Mapping[str, LayerInputs]] = {}
        self.passes = 0
        """How often a model was run for them."""

    def inputs(self, session: Session, tokens_NT: Tensor, on_progress: OnProgress, *, sample_tokens: int = 0) -> Mapping[str, LayerInputs]:
        """What enters each quantizable layer, without Hessians, on the host; inputs are taken as they come, unquantized.

        sample_tokens: about so many inputs themselves are kept (of an expert its share of them).
        Raises QuantizationError for inputs that are no numbers.
        """
        # A checksum is of values alone: one stream of tokens in windows of another length is another text.
        tokens = [checksum(tokens_NT), *tokens_NT.shape]
        key = content_hash([session.loaded.spec.identity(), tokens, sample_tokens, session.rewritten()])
        if key not in self._held:
            self.passes += 1
            if len(self._held) >= MOST_SETS:
                del self._held[next(iter(self._held))]
            self._held[key] = _measure(session, tokens_NT, on_progress, sample_tokens)
        return self._held[key]


@torch.no_grad()
def read(session: Session, tokens_NT: Tensor, on_progress: OnProgress) -> None:
    """Let the model read the text, window by window, with its inputs as they come: for whoever listens at its modules."""
    model = session.model
    device = model.get_input_embeddings().get_parameter("weight").device
    with session.plain_inputs():
        for tokens_T in tokens_NT:
            model.base_model(tokens_T[None].to(device), use_cache=False)  # without the head, whose outputs would be the largest tensor
            on_progress()


def _measure(session: Session, tokens_NT: Tensor, on_progress: OnProgress, sample_tokens: int) -> Mapping[str, LayerInputs]:
    every = 0 if not sample_tokens else max(1, tokens_NT.numel() // sample_tokens)
    sums: dict[str, InputSums] = {}

    def hear(name: str, values: Tensor) -> None:
        if name not in sums:
            sums[name] = InputSums(session.layers[name].in_features, values.device, sample_every=every)
        sums[name].add(values)

    with listening(session.layers, hear):
        read(session, tokens_NT, on_progress)
    return {name: sums[name].total(name).on_host() for name in session.layers if name in sums}
