"""AWQ's clipping: each block's range is shrunk as far as the layer's own outputs like it.

    limits = ∓ (1 - i / 20) · max |T_b|,   i = 0 … 9;      keep the i with the least mean over tokens of (Σ_c x_c (ŵ_c - w_c))²

where the sum runs over the input columns of the block: the error of the block's part of the output, which is a sum over
blocks.  Ranges down to .55 are tried; the whole range is tried first and kept in a tie.  Unlike AWQ's scales it changes the
function: the weights beyond the limits are cut.

Queries and keys are left alone: their product decides, and an error of theirs apart says little of it.

Source: Lin et al., arXiv:2306.00978 (AWQ); awq/quantize/auto_clip.py of mit-han-lab/llm-awq (grid 20, shrink .5, 512 tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsweep.clipping._parts import OF_WHOLE_TENSOR, clipping_of
from quantsweep.data_types._base import DataType
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.blocks import BlockLayout, Blocks, tile_size
from quantsweep.numerics.scales import absmax
from quantsweep.pipeline.interface import InputNeeds, Layer, LayerContext
from quantsweep.trial.registry import data_type_of
from quantsweep.trial.specs import QuantizationSpec

QUERIES_OR_KEYS = ("q_proj", "k_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv")
"""Layers that make queries or keys, by the end of their names."""


class AwqClip:
    """The best of ten ranges by the layer's outputs; see the module."""

    def check(self, spec: QuantizationSpec) -> None:
        """Raises ConfigurationError where blocks lie across rows, or share their levels."""
        if spec.block_axis != "input" or spec.block_size == "tensor":
            raise ConfigurationError(
                "clipping 'awq_clip' judges a block by its part of the outputs: it needs block_axis=input and another block_size than "
                f"'tensor', got {spec.block_axis} and {spec.block_size}"
            )
        if spec.data_type in OF_WHOLE_TENSOR:
            raise ConfigurationError(
                f"clipping 'awq_clip' tries the range of each block by itself; of data_type {spec.data_type!r} the levels, or a scale, "
                "are of the whole tensor, so that one block's range changes the others: use clipping=percentile or absmax"
            )

    def needs(self, spec: QuantizationSpec) -> InputNeeds | None:
        """Some tokens' inputs in the original model."""
        return InputNeeds(sample_tokens=_sample_tokens(spec), stream="original", granularity="block")

    def limits(
        self, layer: Layer, blocks: Blocks, spec: QuantizationSpec, context: LayerContext, columns_J: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(N,) each; the extremes for queries and keys, and where no token came."""
        if context.inputs is None:
            raise TypeError("the pipeline gives the inputs that `needs` asks for")
        sample_TI = context.inputs.sample_TI
        if layer.name.endswith(QUERIES_OR_KEYS) or not len(sample_TI):
            return blocks.values_NB.amin(dim=1), blocks.values_NB.amax(dim=1)
        context.help.progress()
        sample_TJ = evenly_spaced(sample_TI if columns_J is None else sample_TI[:, columns_J], _sample_tokens(spec))
        low_N1, high_N1 = output_limits(blocks, sample_TJ, spec, data_type_of(spec))
        return low_N1.view(-1), high_N1.view(-1)


def output_limits(
    blocks: Blocks, sample_TI: Tensor, spec: QuantizationSpec, data_type: DataType, *, grid: int = 20, largest_shrink: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Limits (N, 1) each of the blocks of a weight (O, I), cut along the input.  sample_TI: inputs of some tokens."""
    values_NB, layout = blocks.values_NB, blocks.layout
    inputs_GTB = _inputs(sample_TI.to(torch.float32), layout)
    absmax_N1 = absmax(values_NB)
    best_N1, share_N1 = torch.full_like(absmax_N1, torch.inf), torch.ones_like(absmax_N1)
    for step in range(int(largest_shrink * grid)):
        share = 1 - step / grid
        limited = Blocks(values_NB=values_NB.clamp(-share * absmax_N1, share * absmax_N1), layout=layout)
        qparams = data_type.choose_qparams(limited, spec)
        decoded_NB = data_type.dequantize(data_type.quantize(limited.values_NB, qparams), qparams)
        error_N1 = _output_error(decoded_NB - values_NB, inputs_GTB, layout)
        share_N1 = torch.where(error_N1 < best_N1, share, share_N1)
        best_N1 = torch.minimum(error_N1, best_N1)
    return -share_N1 * absmax_N1, share_N1 * absmax_N1


def evenly_spaced(sample_TI: Tensor, num_tokens: int) -> Tensor:
    """Every n-th token, at least `num_tokens` of them where there are so many."""
    return sample_TI[:: max(1, sample_TI.shape[0] // num_tokens)]


def _inputs(sample_TI: Tensor, layout: BlockLayout) -> Tensor:
    """(T, I) -> (G, T, B): the columns of each group; zeros where the last is short."""
    padded_TI = torch.nn.functional.pad(sample_TI, (0, layout.padding))
    return padded_TI.view(-1, layout.blocks_per_run, layout.width).transpose(0, 1)


def _output_error(difference_NB: Tensor, inputs_GTB: Tensor, layout: BlockLayout) -> Tensor:
    """Mean squared error of each block's part of the output, (N, 1)."""
    difference_GOB = difference_NB.view(layout.out_features, layout.blocks_per_run, layout.width).transpose(0, 1)
    rows = max(1, tile_size(difference_NB.device) // (inputs_GTB.shape[0] * inputs_GTB.shape[1]))
    parts = [torch.bmm(part_GOB, inputs_GTB.mT).square_().mean(dim=2) for part_GOB in torch.split(difference_GOB, rows, dim=1)]
    return torch.cat(parts, dim=1).t().reshape(-1, 1)


def _sample_tokens(spec: QuantizationSpec) -> int:
    return int(clipping_of(spec).number("sample_tokens"))


CLIPPING = AwqClip()
