"""Outlier-dependent ("proxy") quantization: input columns where outliers are expected stay at 16 bit.

A feature that is an outlier comes from a unit whose weights vary more than others'.  So the layer that
makes a layer's inputs foretells, without data, which of them need precision:

    σ_j = std of the weights of unit j of the earlier layer        (over its inputs)
    J   = the `fraction` of the input columns with the largest σ   (at least one column)

The columns J are kept in 16 bits and left out of the blocks: the rest is cut and quantized as a weight
of its own, so that no kept weight sets a block's scale.  Pairs of layers (`Layer.inputs_from`): values → attention
output → first MLP layer → second MLP layer → queries, keys and values of the next block.  A
layer without an earlier one (in the first block) has no such columns.

    stored bits = those of the rest + 16·O·|J| + 16·|J| for their indices

which is p·(16 - k) bits a weight more, less the p·16/B of scales that kept weights do not need, and 16·p/O for
the indices.  Kept columns are float16, or bfloat16 where the model computes so.

Source: Dettmers & Zettlemoyer, arXiv:2212.09720, "outlier-dependent quantization"; top 2 % there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantsweep.data_types._base import dequantize_weight
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.pipeline.interface import KEPT, KEPT_INDEX, InputNeeds, InputSource, Layer, LayerContext, Stored
from quantsweep.pipeline.ranges import check_data_type, quantize_in_range
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec

MOST_COLUMNS = 1 << 16


class OutlierDependent:
    """Round to nearest of all but the columns that are expected to meet outliers."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raises ConfigurationError for a fraction that is none, and where the data type cannot do it."""
        check_data_type(spec)
        _fraction(spec)

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """It looks at no text."""
        return None

    def encode(self, layer: Layer, weight_OI: Tensor, spec: QuantizationSpec, context: LayerContext) -> Stored:
        """The kept columns, their indices, and the codes of the rest; leaves σ of its units for later layers."""
        context.kept[layer.name] = weight_OI.std(dim=1, correction=0)
        source = layer.inputs_from
        if source is None:
            kept_I = weight_OI.new_zeros(weight_OI.shape[1], dtype=torch.bool)
        else:
            # Of a model that is spread over GPUs the earlier layer may lie on another one.
            kept_I = outlier_columns(_spread_of(source, context.kept), source, _fraction(spec)).to(weight_OI.device)
        return _encode(weight_OI, kept_I, layer.dtype, spec, context)

    def decode(self, stored: Stored, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) from what is stored of it."""
        rest_OI = dequantize_weight(data_type_of(spec), stored.blocks, dtype)
        kept, index = stored.extras[KEPT].to(dtype), stored.extras[KEPT_INDEX].to(torch.int64)
        values_OI = rest_OI.new_empty(rest_OI.shape[0], rest_OI.shape[1] + kept.shape[1])
        is_rest_I = torch.ones(values_OI.shape[1], dtype=torch.bool, device=values_OI.device)
        is_rest_I[index] = False
        values_OI[:, is_rest_I] = rest_OI
        values_OI[:, index] = kept
        return values_OI


def outlier_columns(spread_U: Tensor, source: InputSource, fraction: float) -> Tensor:
    """Which input columns stay at 16 bit: (I,) bool.  spread_U: σ of each unit of the earlier layer; of equal ones the first is taken."""
    spread_I = spread_U[source.unit_of_column.to(spread_U.device)]
    count = max(1, round(fraction * spread_I.numel()))
    kept_I = torch.zeros_like(spread_I, dtype=torch.bool)
    kept_I[torch.sort(spread_I, descending=True, stable=True).indices[:count]] = True
    return kept_I


def _spread_of(source: InputSource, known: Mapping[str, Tensor]) -> Tensor:
    """σ of the earlier layer, which the model has before the later one."""
    if source.layer not in known:
        raise QuantizationError(
            f"its inputs come from {source.layer}, which is not quantized; its outliers cannot be foretold. "
            "Take one of the two out of the model's `unquantized`, or put the other in"
        )
    return known[source.layer]


def _encode(weight_OI: Tensor, kept_I: Tensor, dtype: torch.dtype, spec: QuantizationSpec, context: LayerContext) -> Stored:
    if bool(kept_I.all()):
        raise QuantizationError(f"all {kept_I.numel()} input columns would stay at 16 bit; use a smaller method.options.fraction")
    if kept_I.numel() > MOST_COLUMNS:
        raise QuantizationError(f"{kept_I.numel()} input columns are more than indices of 16 bits can tell apart ({MOST_COLUMNS})")
    quantized = quantize_in_range(weight_OI[:, ~kept_I], spec, context, (~kept_I).nonzero().view(-1))
    index = kept_I.nonzero().view(-1).to(torch.uint16)
    return Stored(quantized=quantized, extras={KEPT: _stored(weight_OI[:, kept_I], dtype), KEPT_INDEX: index})


def _stored(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Kept columns as 16-bit numbers."""
    stored = columns.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    if not bool(stored.isfinite().all()):
        raise QuantizationError(
            f"a weight of {float(columns.abs().max()):.6g} in a kept column is beyond float16; use model.dtype=bfloat16"
        )
    return stored


def _fraction(spec: QuantizationSpec) -> float:
    fraction = dict(spec.rounding.options).get("fraction")
    if not isinstance(fraction, float) or not 0 < fraction < 1:
        raise ConfigurationError(f"method {spec.method}: method.options.fraction must be a number between 0 and 1, got {fraction!r}")
    return fraction


ROUNDING = OutlierDependent()
