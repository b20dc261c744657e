"""One static range for each group of channels (per-embedding-group quantization, PEG).

    permute: true     channels in the order of their ranges, cut into `groups` of equal size: outliers share a group
    permute: false    neighbours

One group is `per_tensor_static`, as many groups as channels are one range a channel.  A layer's product is then a sum of as many partial
products.  Where the number of channels is no multiple of the groups, the first ones have one channel more.

Source: Bondarenko et al., Understanding and Overcoming the Challenges of Efficient Transformer Quantization, arXiv:2109.12948.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantsweep.activations._base import Inputs, Step, check
from quantsweep.activations.per_tensor_static import StaticQuantizer, calibrated
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.trial.specs import ActivationSpec


def group_ranges(low_I: Tensor, high_I: Tensor, groups: int, *, permute: bool) -> tuple[Tensor, Tensor]:
    """The range of each channel's group, (I,) each; raises QuantizationError for more groups than channels."""
    channels = len(low_I)
    if groups > channels:
        raise QuantizationError(f"activation.options.groups={groups} are more than the {channels} channels; use fewer")
    order_I = torch.argsort(high_I - low_I, stable=True) if permute else torch.arange(channels, device=low_I.device)
    low, high = torch.empty_like(low_I), torch.empty_like(high_I)
    for members in torch.tensor_split(order_I, groups):
        low[members], high[members] = low_I[members].min(), high_I[members].max()
    return low, high


class PerEmbeddingGroup(Step):
    """See the module."""

    needs_ranges = True
    sites = ("linear",)

    def check(self, spec: ActivationSpec) -> None:
        """Raise ConfigurationError for what it cannot do."""
        check(spec, self.sites)
        groups = spec.step.option("groups")
        if not isinstance(groups, int) or groups < 1:
            raise ConfigurationError(f"activation.options.groups must be a whole number of at least 1, got {groups!r}")
        if spec.clip_percentile is not None:
            raise ConfigurationError("activation=per_embedding_group has no clip_percentile: its ranges are the extremes of channels")

    def module(self, spec: ActivationSpec, inputs: Inputs | None) -> nn.Module:
        """inputs: of the calibration."""
        self.check(spec)
        seen = calibrated(inputs)
        groups, permute = spec.step.option("groups"), spec.step.option("permute")
        return StaticQuantizer(spec, *group_ranges(seen.min_I, seen.max_I, int(str(groups)), permute=bool(permute)))


ACTIVATION = PerEmbeddingGroup()
