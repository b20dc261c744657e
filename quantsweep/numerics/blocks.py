"""Cut a weight into blocks that share a scale, and put it together again, exactly.

A weight W_OI (out_features × in_features, row-major) is seen as R runs of L elements, and each run
is cut into consecutive blocks of B:

    block_axis  block_size   R    L     B          one scale for
    flat        64           1    O·I   64         64 neighbours in the flattened tensor
    input       64           O    I     64         64 neighbours of one output channel
    input       null         O    I     I          one output channel
    either      "tensor"     1    O·I   O·I        the whole tensor

`flat` is the blocking of the k-bit inference scaling laws (Dettmers & Zettlemoyer, arXiv:2212.09720,
section 2) and of bitsandbytes; `input` that of GPTQ's groups and of OCP MX.  The two coincide where
B divides I.  A B larger than L is taken as L.

Short blocks.  Where B does not divide L, the last block of each run is short.  It is padded to B
with copies of its own last element: minimum, maximum and absolute maximum of the block cannot see
that, and `join` drops the copies.  A short block counts as a block: it stores a whole scale.

Shape letters, used everywhere below this package: O output channels, I input channels, N blocks,
B elements of a block, L levels of a codebook.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantsweep.errors import QuantizationError
from quantsweep.trial.specs import BlockSize

TILE = 1 << 18
"""Elements that elementwise work takes at a time: fits a CPU's cache, and bounds temporaries."""
GPU_TILE = 1 << 24
"""The same on a GPU, where many small tiles are many kernels to start: 64 MB of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """How a weight of a given shape is cut.

    >>> layout = BlockLayout(out_features=2, in_features=5, block_size=4, block_axis="flat")
    >>> (layout.num_blocks, layout.width, layout.num_elements)
    (3, 4, 10)
    """

    out_features: int
    in_features: int
    block_size: BlockSize
    block_axis: str

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise QuantizationError(f"a weight of shape {self.out_features} × {self.in_features} has no elements to quantize")
        if self.block_size is None and self.block_axis == "flat":
            raise QuantizationError("block_size=null means one scale an output channel: it needs block_axis=input")

    @property
    def num_elements(self) -> int:
        """Elements of the weight, without padding."""
        return self.out_features * self.in_features

    @property
    def num_runs(self) -> int:
        """R: stretches of memory that are cut independently."""
        return 1 if self.block_axis == "flat" or self.block_size == "tensor" else self.out_features

    @property
    def run_length(self) -> int:
        """L: elements of one run."""
        return self.num_elements // self.num_runs

    @property
    def width(self) -> int:
        """B: elements of a full block."""
        return min(self.block_size, self.run_length) if isinstance(self.block_size, int) else self.run_length

    @property
    def blocks_per_run(self) -> int:
        """Blocks of one run, the short one included."""
        return -(-self.run_length // self.width)

    @property
    def num_blocks(self) -> int:
        """N: blocks, and so scales, of the whole weight."""
        return self.num_runs * self.blocks_per_run

    @property
    def padding(self) -> int:
        """Elements that the last block of each run lacks."""
        return self.blocks_per_run * self.width - self.run_length

    def split(self, weight_OI: Tensor) -> Tensor:
        """(O, I) -> (N, B): a view where no block is short, otherwise a padded copy."""
        runs_RL = weight_OI.reshape(self.num_runs, self.run_length)
        if self.padding:
            runs_RL = torch.cat([runs_RL, runs_RL[:, -1:].expand(-1, self.padding)], dim=1)
        return runs_RL.reshape(self.num_blocks, self.width)

    def join(self, values_NB: Tensor) -> Tensor:
        """(N, B) -> (O, I): undoes `split`, dropping the padding."""
        runs_RL = values_NB.reshape(self.num_runs, self.blocks_per_run * self.width)[:, : self.run_length]
        return runs_RL.reshape(self.out_features, self.in_features)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The blocks of one weight: values_NB (padded, float32), and how they were cut."""

    values_NB: Tensor
    layout: BlockLayout

    @classmethod
    def of(cls, weight_OI: Tensor, block_size: BlockSize, block_axis: str) -> Blocks:
        """Cut a weight (O, I): `Blocks.of(weight, 64, "flat")`."""
        out_features, in_features = weight_OI.shape
        layout = BlockLayout(out_features=out_features, in_features=in_features, block_size=block_size, block_axis=block_axis)
        return cls(values_NB=layout.split(weight_OI), layout=layout)

    def means(self) -> Tensor:
        """Mean of each block, its padding left out: (N, 1) float32, summed in float64."""
        values_NB, layout = self.values_NB, self.layout
        sums_N1 = values_NB.sum(dim=1, keepdim=True, dtype=torch.float64)
        counts_N1 = torch.full_like(sums_N1, layout.width)
        last = slice(layout.blocks_per_run - 1, None, layout.blocks_per_run)
        sums_N1[last] -= layout.padding * values_NB[last, -1:].to(torch.float64)
        counts_N1[last] -= layout.padding
        return (sums_N1 / counts_N1).to(torch.float32)

    def elements(self) -> Tensor:
        """All elements in order, without padding: (O·I,)."""
        return self.layout.join(self.values_NB).reshape(-1)


def tile_size(device: torch.device) -> int:
    """Elements that elementwise work takes at a time on this device."""
    return TILE if device.type == "cpu" else GPU_TILE


def tiles_of(values_NB: Tensor) -> Iterator[tuple[slice, slice]]:
    """Tiles that cover a matrix once, of the size that suits its device."""
    rows, columns = values_NB.shape
    return tiles(rows, columns, tile_size(values_NB.device))


def tiles(num_rows: int, num_columns: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of at most about `limit` elements that cover a (num_rows, num_columns) matrix once.

    >>> list(tiles(2, 5, limit=3))[0]
    (slice(0, 1, None), slice(0, 3, None))
    """
    columns = min(num_columns, limit)
    rows = max(1, limit // columns)
    for row in range(0, num_rows, rows):
        for column in range(0, num_columns, columns):
            yield slice(row, min(row + rows, num_rows)), slice(column, min(column + columns, num_columns))
