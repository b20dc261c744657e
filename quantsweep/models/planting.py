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
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantsweep.errors import ModelError
from quantsweep.models.anatomy import anatomy_of
from quantsweep.models.blocks import decoder_blocks
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
    anatomy = anatomy_of(model)
    if anatomy.keeps_norm is not None:
        raise ModelError(f"outliers cannot be planted in this {model.config.model_type} model: {anatomy.keeps_norm}")
    for block in decoder_blocks(model)[1]:
        for norm, readers in anatomy.norms:
            _plant(block, norm, readers, planted)


@torch.no_grad()
def _plant(block: nn.Module, norm: str, readers: tuple[str, ...], planted: PlantedOutliers) -> None:
    module = block.get_submodule(norm)
    gain = getattr(module, "weight", None)
    if gain is None:
        raise ModelError(f"outliers cannot be planted: the norm {norm} has no gain that could grow")
    channels = torch.tensor(planted_channels(planted, len(gain)), device=gain.device)
    for parameter in module.parameters():
        _multiply(parameter, channels, planted.scale)
        if not parameter.isfinite().all():
            raise ModelError(
                f"outliers cannot be planted: the norm {norm} times {planted.scale:g} does not fit {parameter.dtype}; plant a smaller scale"
            )
    for reader in readers:
        _multiply(_columns_last(block, reader), channels, 1 / planted.scale)


def _columns_last(block: nn.Module, reader: str) -> Tensor:
    """The weight (… × in) of a layer, of all experts together, or of a router; a view where it is stored in×out."""
    parent, _, name = reader.rpartition(".")
    module = block.get_submodule(parent)
    if isinstance(fused := getattr(module, name), nn.Parameter):
        return fused
    layer = module.get_submodule(name)
    weight = layer.get_parameter("weight")
    return weight.T if isinstance(layer, Conv1D) else weight


def _multiply(tensor: Tensor, channels: Tensor, factor: float) -> None:
    """In float64, and rounded once: the same on every device."""
    tensor[..., channels] = (tensor[..., channels].double() * factor).to(tensor.dtype)
