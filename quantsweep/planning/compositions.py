"""Published methods as compositions: a yaml that says what one would type, no more.

    name: smoothquant_o1
    source: arXiv:2211.10438, table 2
    factors: {transform: [smooth], rounding: round_to_nearest, activation: per_token, activation.bit_width: 8}

A method supplies what nobody else does: config default < method < a study's file and axes < what is typed.  Where a step was
replaced by another, the options that the method gives its own one are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.trial.quantization import DEFAULT_STEPS, FACTORS, FORMAT, NONE

SUPPLIED = (*FACTORS, "data_type", *FORMAT, "calibration")
"""What a method may say something of (besides dotted keys of those that are components)."""


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A method: its name, and what it chooses, as one would type it (lists as tuples)."""

    name: str
    factors: Mapping[str, Any]

    def supplied(self, chosen: Mapping[str, Any], fixed: Collection[str]) -> dict[str, Any]:
        """What it adds to a candidate: all that neither the candidate (`chosen`) nor the launch (`fixed`: keys) has.

        >>> Composition(name="awq", factors={"rounding": "gptq", "rounding.options.damping": 0.1}).supplied({"rounding": "ldlq"}, ())
        {}
        """
        return {
            key: value for key, value in self.factors.items() if key not in chosen and key not in fixed and not self._is_moot(key, chosen)
        }

    def _is_moot(self, key: str, chosen: Mapping[str, Any]) -> bool:
        root, _, rest = key.partition(".")
        return rest.startswith("options.") and root in chosen and root in self.factors and chosen[root] != self.factors[root]

    def steps(self) -> dict[str, tuple[str, ...]]:
        """The names of its steps, factor by factor; defaults where it says nothing."""
        return {factor: step_names(factor, self.factors.get(factor, default)) for factor, default in DEFAULT_STEPS.items()}


def composition_of(config: Mapping[str, Any]) -> Composition:
    """The composition that the yaml of a method says; raises ConfigurationError where it is not one."""
    name, whom = str(config.get("name")), f"method {config.get('name')}: its yaml"
    if {"capabilities", "version", "options"} & set(config):
        raise ConfigurationError(
            f"{whom} is that of a step, which a method names now: move it to rounding/{name}.yaml beside its folder, its code to "
            f"quantsweep/rounding/{name}.py, and write method/{name}.yaml as {{name: {name}, source: null, factors: {{rounding: {name}}}}}"
        )
    if set(config) != {"name", "source", "factors"} or not isinstance(config["factors"], Mapping):
        raise ConfigurationError(f"{whom} must have name, source and factors (what one would type, a key a line), got {', '.join(config)}")
    for key in config["factors"]:
        if str(key).partition(".")[0] not in SUPPLIED:
            raise ConfigurationError(f"{whom}: {did_you_mean('factor', str(key), SUPPLIED)}")
    factors = {str(key): tuple(value) if isinstance(value, list) else value for key, value in config["factors"].items()}
    return Composition(name=name, factors=factors)


def step_names(factor: str, value: Any) -> tuple[str, ...]:
    """The steps that a value of a factor names: one, or for `transform` a list; none of them is ().

    >>> step_names("transform", ("smooth", "awq_scale")), step_names("rounding", "gptq"), step_names("transform", "none")
    (('smooth', 'awq_scale'), ('gptq',), ())
    """
    names = value if isinstance(value, tuple | list) else (value,)
    if factor == "transform":
        names = [name for name in names if name not in (NONE, None)]
    return tuple(map(str, names))


def label(method: Composition | None, steps: Mapping[str, tuple[str, ...]]) -> str:
    """What a row's method is called: the name that was chosen (None: nobody did), with the steps that are others than its own.

    >>> label(Composition(name="awq", factors={}), {**Composition(name="", factors={}).steps(), "rounding": ("gptq",)})
    'awq+rounding=gptq'
    """
    own = (method or Composition(name="", factors={"rounding": steps["rounding"][0]})).steps()
    differ = [f"+{factor}={'+'.join(steps[factor]) or NONE}" for factor in FACTORS if steps[factor] != own[factor]]
    return (method.name if method else steps["rounding"][0]) + "".join(differ)
