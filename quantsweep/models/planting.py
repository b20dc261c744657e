"""Outlier channels of known place and size, planted into a model without changing what it computes.

Models beyond some billions of parameters grow a few channels whose activations are far larger than all
others (Dettmers et al., arXiv:2208.07339), which is what many methods are about; small models grow none.
Between a norm and the linear layers that read it there is a freedom (the one that SmoothQuant,
arXiv:2211.10438, uses to remove outliers) by which they can be put there:

    norm gain and bias of channel j      × s      activations of channel j grow by s
    column j of each weight that reads   ÷ s      and the products stay what they were

The same channels are planted in every norm of every block that feeds quantizable layers.  What else
reads such a norm is divided too (a router of experts).  A power of two changes exponents only and
leaves products exactly as they were; other scales round once, to the model's dtype.  In float16 the
small weights divided may become subnormal, and the activations may overflow: that is the experiment.
"""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

from quantsweep.errors import ModelError
from quantsweep.models.folding import Pair, obstacle, pairs, rescaled
from quantsweep.trial.specs import PlantedOutliers


def planted_channels(planted: PlantedOutliers, width: int) -> tuple[int, ...]:
    """The channels (of 0 … width − 1) that are planted, ascending; fewer channels of one seed are a subset of more.

    They are the first in the order of a hash, which is the same on every machine.
    Raises ModelError where there are not so many.
    """
    if planted.channels > width:
        raise ModelError(f"plant_outliers.channels is {planted.channels}, and the model has {width} channels; plant fewer")
    order = sorted(range(width), key=lambda channel: hashlib.sha256(f"{planted.seed}:{channel}".encode()).digest())
    return tuple(sorted(order[: planted.channels]))


def plant_outliers(model: PreTrainedModel, planted: PlantedOutliers) -> None:
    """Plant them in place, once, before anything takes the weights for the original ones.

    Raises ModelError for an architecture that is not described (`anatomy.py`), for one in which something
    besides linear layers reads the norms, and for gains that do not fit the dtype.
    """
    if (reason := obstacle(model, "norm")) is not None:
        raise ModelError(f"outliers cannot be planted in this {model.config.model_type} model: {reason}")
    for pair in pairs(model, "norm"):
        _plant(model, pair, planted)


@torch.no_grad()
def _plant(model: PreTrainedModel, pair: Pair, planted: PlantedOutliers) -> None:
    channels = list(planted_channels(planted, len(pair.unit_of_column)))
    grown_I, shrunk_I = torch.ones(2, len(pair.unit_of_column), dtype=torch.float64)
    grown_I[channels], shrunk_I[channels] = planted.scale, 1 / planted.scale
    for name, value in rescaled(model, pair, source_I=grown_I, readers_I=shrunk_I).items():
        if not value.isfinite().all():
            limits = f"{planted.scale:g} does not fit {value.dtype}; plant a smaller scale"
            raise ModelError(f"outliers cannot be planted: the norm {pair.source} times {limits}")
        model.get_parameter(name).copy_(value)
