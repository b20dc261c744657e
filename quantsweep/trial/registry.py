"""Components by module name: the registry *is* the folder.

`DATA_TYPES["int"]` imports `quantsweep/data_types/int.py` and takes its `DATA_TYPE`.  Nothing is
registered anywhere: adding a component is adding one file (and its yaml in `conf/`).  Names are
listed without importing anything, so a misspelt name is answered in microseconds.

A data type may also be a yaml alone: if its options list `levels`, the module `codebook` does the work
under the yaml's name.  `data_type_of(spec)` finds either.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.trial.quantization import LEVELS, QuantizationSpec


@dataclass(frozen=True)
class Registry:
    """Lazy lookup of one kind of component.

    kind: what error messages call it, e.g. "rounding".
    package: dotted name of the folder, e.g. "quantsweep.rounding".
    attribute: the module attribute that holds the component, e.g. "ROUNDING".
    Modules whose name begins with an underscore are helpers, not components.
    """

    kind: str
    package: str
    attribute: str

    def names(self) -> tuple[str, ...]:
        """All names, sorted; imports none of the components."""
        return _module_names(self.package)

    def __getitem__(self, name: str) -> Any:
        """The component called `name`; raises ConfigurationError with the nearest name when there is none."""
        if name not in self.names():
            raise ConfigurationError(did_you_mean(self.kind, name, self.names()))
        return getattr(importlib.import_module(f"{self.package}.{name}"), self.attribute)


@cache
def _module_names(package: str) -> tuple[str, ...]:
    root = Path(__file__).parents[1].joinpath(*package.split(".")[1:])
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(root)]) if not m.name.startswith("_")))


DATA_TYPES = Registry(kind="data_type", package="quantsweep.data_types", attribute="DATA_TYPE")
ROUNDINGS = Registry(kind="rounding", package="quantsweep.rounding", attribute="ROUNDING")
TRANSFORMS = Registry(kind="transform", package="quantsweep.transforms", attribute="TRANSFORM")
CLIPPINGS = Registry(kind="clipping", package="quantsweep.clipping", attribute="CLIPPING")
CORRECTIONS = Registry(kind="correction", package="quantsweep.corrections", attribute="CORRECTION")
TUNINGS = Registry(kind="tuning", package="quantsweep.tuning", attribute="TUNING")
COMPENSATIONS = Registry(kind="compensation", package="quantsweep.compensations", attribute="COMPENSATION")
ACTIVATIONS = Registry(kind="activation", package="quantsweep.activations", attribute="ACTIVATION")
STEPS = {
    **{"rounding": ROUNDINGS, "transform": TRANSFORMS, "clipping": CLIPPINGS, "correction": CORRECTIONS, "tuning": TUNINGS},
    **{"compensation": COMPENSATIONS, "activation": ACTIVATIONS, "kv_cache": ACTIVATIONS},
}
"""The steps of each factor.  What does nothing (none, absmax) has no code, but for the rounding `none`."""


def data_type_of(spec: QuantizationSpec) -> Any:
    """The data type of a spec: the module of that name, or `codebook` where the options list levels.

    Raises ConfigurationError where the spec has none, or one that is unknown.
    """
    if spec.data_type is None:
        raise ConfigurationError(f"rounding {spec.rounding.name} needs a data_type, and was given none")
    return DATA_TYPES["codebook" if is_codebook(spec) else spec.data_type]


def is_codebook(spec: QuantizationSpec) -> bool:
    """True for a data type whose yaml lists its levels, so that it needs no code."""
    return any(key == LEVELS for key, _ in spec.data_type_options)
