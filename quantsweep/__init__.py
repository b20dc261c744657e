"""quantsweep: sweeps of language-model quantization, from one command to a table in pandas.

    import quantsweep
    df = quantsweep.load_results("results/quickstart")      one row a trial, task and metric

Importing this package loads neither torch nor hydra nor pandas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantsweep.tables.results import load_layers, load_results, load_samples, load_trials

__version__ = "0.1.0"
__all__ = ["__version__", "load_layers", "load_results", "load_samples", "load_trials"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("quantsweep.tables.results"), name)
    raise AttributeError(f"module 'quantsweep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
