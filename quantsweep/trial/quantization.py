"""How a trial quantizes: a pipeline of factors, each a chosen step or none.

    transforms → rounding (with its clipping, corrected for earlier layers' errors) → tuning → compensation      of the weights
    activation, kv_cache                                                                                         of what flows between them

A step is a name, a version and all of its options; a factor at its default (none; for clipping the largest magnitude) leaves no
trace in a trial's identity.  The rounding step stands in the identity under the words `method`, as it did when it was all there was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from quantsweep.checks import whole_number
from quantsweep.errors import ConfigurationError
from quantsweep.trial.canonical import Option, Options, set_fields

BlockSize = int | Literal["tensor"] | None
"""Weights that share a scale: a count, "tensor" (all of them), or None (one scale an output channel)."""
BlockAxis = Literal["flat", "input"]
"""The direction in which blocks run."""
BLOCK_AXES = get_args(BlockAxis)
DTYPES = ("float16", "bfloat16", "float32")
SCALE_DTYPES = (*DTYPES, "e8m0", "e4m3")
"""What scales may be stored in: a dtype, or one of the 8-bit types of MX (powers of two) and NVFP4."""
LEVELS = "levels"
"""The option that makes a data type a codebook: see `quantsweep.trial.registry.data_type_of`."""
CHANNEL_NEEDS_INPUT = (
    "block_size=null means one scale an output channel, which needs block_axis=input; with block_axis=flat give a number or 'tensor'"
)
BASELINE_BITS = 16
"""The bit width that means no quantization, and that is counted for what is not quantized."""
NONE = "none"
"""The step of a factor that does nothing; as a method, the 16-bit baseline."""
BASELINE = NONE
ROUND_TO_NEAREST = "round_to_nearest"
"""The rounding that changes nothing either once its codes have 16 bits."""
ABSMAX = "absmax"
"""The clipping that clips nothing: scales come from the largest magnitude."""
DEFAULT_STEPS = {
    **{"rounding": ROUND_TO_NEAREST, "transform": NONE, "clipping": ABSMAX, "correction": NONE, "tuning": NONE, "compensation": NONE},
    **{"activation": NONE, "kv_cache": NONE, "scope": NONE},
}
"""The factors of a trial, and the step of each where nobody chooses one."""
FACTORS = tuple(DEFAULT_STEPS)
FORMAT = ("bit_width", "block_size", "block_axis", "symmetric", "scale_dtype")
"""What is said of the weights' format beside its data type."""
OF_WEIGHTS = ("clipping", "correction", "tuning", "compensation")
"""Factors that belong to a rounding: without one there is nothing for them to do."""


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A chosen step.  version: raised by hand when its numbers change.  options: all of them, defaults written out."""

    name: str
    version: int
    options: Options = ()

    def option(self, name: str) -> Option:
        """The value of one option; raises ConfigurationError if the step has none of that name."""
        for key, value in self.options:
            if key == name:
                return value
        raise ConfigurationError(f"step {self.name} has no option {name}; it has {', '.join(key for key, _ in self.options) or 'none'}")

    def number(self, name: str) -> float:
        """The value of an option that is a number; raises ConfigurationError for another."""
        value = self.option(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigurationError(f"step {self.name} needs a number as its option {name}, got {value!r}")
        return value

    def identity(self) -> dict[str, Any]:
        """All of it."""
        return {"name": self.name, "version": self.version, "options": self.options}

    @property
    def label(self) -> str:
        """A short text for people: `smooth alpha=0.5`."""
        return self.name + "".join(f" {key}={value}" for key, value in self.options if value is not None)


_ACTIVATION_ALWAYS = frozenset({"step", "data_type", "data_type_version", "data_type_options", "bit_width", "symmetric", "block_size"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSpec:
    """How activations (or keys and values as they are cached) become codes.

    block_size: values that share a scale where the step has blocks, else None.  clip_percentile: ranges end at this percentile of
    magnitudes, None for the largest.  sites: where (`linear`: the inputs of quantized linear layers).
    """

    step: StepSpec
    data_type: str
    data_type_version: int
    data_type_options: Options = ()
    bit_width: int
    symmetric: bool
    block_size: int | None = None
    clip_percentile: float | None = None
    sites: tuple[str, ...] = ("linear",)

    def __post_init__(self) -> None:
        whole_number("activation bit_width", self.bit_width)
        whole_number("activation block_size", self.block_size, 2, otherwise=", or null")
        if self.clip_percentile is not None and not 0 < self.clip_percentile <= 100:
            raise ConfigurationError(f"activation clip_percentile must be above 0 and at most 100, or null; got {self.clip_percentile:g}")
        if not self.sites:
            raise ConfigurationError("activation sites must name at least one place, got none; activation=none quantizes no activations")

    def identity(self) -> dict[str, Any]:
        """All of it, what came later where it is set."""
        return set_fields(self, _ACTIVATION_ALWAYS) | {"step": self.step.identity()}

    @property
    def label(self) -> str:
        """A short text for people: `per_token int 8-bit`."""
        block = "" if self.block_size is None else f" block {self.block_size}"
        clip = "" if self.clip_percentile is None else f" clip {self.clip_percentile:g}%"
        where = "" if self.sites == ("linear",) else f" at {'+'.join(self.sites)}"
        way = "" if self.symmetric else " asymmetric"
        return f"{self.step.label} {self.data_type} {self.bit_width}-bit{way}{block}{clip}{where}"


_FORMAT = frozenset({"data_type", "data_type_version", "data_type_options", *FORMAT})
_STEPS = ("clipping", "correction", "tuning", "compensation", "activation", "kv_cache")


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """What becomes of a model's weights and activations; every factor at none is the baseline.

    method: the name that people typed, with the steps that differ from what it stands for; a label, no part of the identity
    (default: the rounding's name).
    rounding: how weights become codes; `none` leaves them, and then there is no format.
    data_type … scale_dtype: the format of the weights.  block_size, block_axis: see the module `quantsweep.numerics.blocks`;
    scale_dtype: what scales are stored in (and rounded to before use); data_type_options: with defaults written out.
    transforms: exact rewritings before it, in their order.  clipping: None for the largest magnitude.  scope: (pattern, format) pairs.
    """

    method: str = ""
    rounding: StepSpec
    data_type: str | None = None
    data_type_version: int | None = None
    data_type_options: Options = ()
    bit_width: int | None = None
    block_size: BlockSize = None
    block_axis: str | None = None
    symmetric: bool | None = None
    scale_dtype: str | None = None
    transforms: tuple[StepSpec, ...] = ()
    clipping: StepSpec | None = None
    correction: StepSpec | None = None
    tuning: StepSpec | None = None
    compensation: StepSpec | None = None
    activation: ActivationSpec | None = None
    kv_cache: ActivationSpec | None = None
    scope: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.method:
            object.__setattr__(self, "method", self.rounding.name)
        if self.rounding.name == NONE and (needless := [key for key in OF_WEIGHTS if getattr(self, key) is not None]):
            raise ConfigurationError(f"rounding none leaves the weights as they are: there is nothing for {', '.join(needless)} to do")
        if self.rounding.name == NONE or self.data_type is None:
            self._check_without_format()
        else:
            self._check_format()

    def _check_without_format(self) -> None:
        format_values = (self.data_type, self.bit_width, self.block_size, self.block_axis, self.symmetric, self.scale_dtype)
        if any(value is not None for value in format_values):
            whom = "is the unquantized baseline" if self.rounding.name == NONE else "needs a data_type, or is one that has none"
            raise ConfigurationError(
                f"rounding {self.rounding.name} {whom}: without one there is no bit_width, block_size, block_axis, symmetric or scale_dtype"
            )

    def _check_format(self) -> None:
        if self.bit_width is None:
            raise ConfigurationError(f"rounding {self.rounding.name} needs a bit_width beside its data_type")
        if self.bit_width < 1:
            raise ConfigurationError(f"bit_width must be at least 1, got {self.bit_width}")
        if self.block_axis not in BLOCK_AXES:
            raise ConfigurationError(f"block_axis {self.block_axis!r} is not one of {', '.join(BLOCK_AXES)}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ConfigurationError(f"scale_dtype {self.scale_dtype!r} is not one of {', '.join(SCALE_DTYPES)}")
        if isinstance(self.block_size, int):
            whole_number("block_size", self.block_size, 2, otherwise=", or 'tensor', or null (one scale an output channel)")
        if isinstance(self.block_size, str) and self.block_size != "tensor":
            raise ConfigurationError(f"block_size {self.block_size!r} is neither a number, nor 'tensor', nor null")
        if self.block_size is None and self.block_axis == "flat":
            raise ConfigurationError(CHANNEL_NEEDS_INPUT)

    @property
    def is_baseline(self) -> bool:
        """True for the unquantized baseline: every factor at none."""
        chosen = (self.transforms, self.scope, *(getattr(self, key) for key in _STEPS))
        return self.rounding.name == NONE and not any(chosen)

    @property
    def quantizes_weights(self) -> bool:
        """True unless weights stay as they were loaded."""
        return self.rounding.name != NONE

    @property
    def steps(self) -> dict[str, tuple[StepSpec, ...]]:
        """The steps of each factor that has any, rounding included; `scope` has none."""
        found: dict[str, tuple[StepSpec, ...]] = {"rounding": (self.rounding,), "transform": self.transforms}
        for key in _STEPS:
            chosen = getattr(self, key)
            found[key] = () if chosen is None else (chosen.step if isinstance(chosen, ActivationSpec) else chosen,)
        return {key: steps for key, steps in found.items() if steps}

    def identity(self) -> dict[str, Any]:
        """All of it but the label; a factor where it is set."""
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Any]:
        found = set_fields(self, _FORMAT, frozenset({"method", "rounding", "transforms", *_STEPS}))
        found |= {"method": self.rounding.name, "method_version": self.rounding.version, "method_options": self.rounding.options}
        if self.transforms:
            found["transforms"] = [step.identity() for step in self.transforms]
        return found | {key: step.identity() for key in _STEPS if (step := getattr(self, key)) is not None}

    @property
    def label(self) -> str:
        """A short text for people: `round_to_nearest int 4-bit block 64 convention=kbit, activation per_token int 8-bit`."""
        if self.is_baseline:
            return "baseline"
        words = [self.method + self.rounding.label.removeprefix(self.rounding.name)]
        if self.data_type is not None:
            block = "channel" if self.block_size is None else self.block_size
            options = "".join(f" {key}={value}" for key, value in self.data_type_options if value is not None and key != LEVELS)
            words.append(f"{self.data_type} {self.bit_width}-bit block {block}{options}")
        others = [step.label for step in self.transforms]
        others += [f"{key.replace('_', ' ')} {step.label}" for key in _STEPS if (step := getattr(self, key)) is not None]
        others += [f"{pattern} {kept}" for pattern, kept in self.scope]
        return ", ".join([" ".join(words), *others])

    def named(self, method: str) -> QuantizationSpec:
        """The same under another label."""
        return replace(self, method=method)
