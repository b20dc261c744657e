"""A codebook that a yaml lists: any levels, no code.

    options: {levels: [-1.0, -0.4, 0.0, 0.3, 1.0]}         in conf/data_type/<name>.yaml, or in a folder of one's own

The data type is called as its yaml is; this module does the work for all of them.  Levels are scaled by
the absolute maximum of each block, as in every codebook format.  They must

* rise from one to the next, contain 0 (zeros stay zeros), and have 1 as their largest magnitude: a block's
  maximum is then a level, at least with one of the signs;
* be as many as codes of k bits can tell apart, and more than those of k - 1: 5 to 8 of them at k = 3.

They are part of a trial's identity, and fixed for all tensors, so that they cost no stored bits.  The
specification of blocks and scales is that of Dettmers & Zettlemoyer, arXiv:2212.09720, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantsweep.data_types._base import CodebookDataType, Support
from quantsweep.errors import ConfigurationError
from quantsweep.numerics.blocks import Blocks
from quantsweep.trial.constraints import problem_of_levels
from quantsweep.trial.specs import LEVELS, QuantizationSpec


class Codebook(CodebookDataType):
    """Levels from the options; see the module."""

    name = "codebook"
    support = Support(bit_widths=range(1, 9), options={LEVELS: None})

    def check_spec(self, spec: QuantizationSpec) -> None:
        """Raise ConfigurationError under the yaml's name where the levels are no codebook of this bit width."""
        self._checked_levels(spec)

    def _checked_levels(self, spec: QuantizationSpec) -> Any:
        name = str(spec.data_type)
        levels = self.support.check(name, spec)[LEVELS]
        if problem := problem_of_levels(levels, spec.bit_width):
            raise ConfigurationError(f"data_type {name!r}: {problem}")
        return levels

    def levels(self, blocks: Blocks, spec: QuantizationSpec) -> Tensor:
        """The levels as listed."""
        return torch.tensor(self._checked_levels(spec), dtype=torch.float32, device=blocks.values_NB.device)


DATA_TYPE = Codebook()
