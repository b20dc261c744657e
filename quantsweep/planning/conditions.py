"""What a study leaves out on purpose: combinations named by a condition, with the reason that its author gives.

    where:
      - exclude: {data_type: quantile, block_size: [16, 32]}
        because: a codebook for so few weights costs more bits than it saves

A condition is a mapping of keys to values, as in a grid; a trial is left out when it has one of the values of every key.
Keys are looked up in the trial itself, with defaults filled in (`block_size` is a number, not `auto`); the baseline has
16 bits and no format, so that no condition on a format leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from quantsweep.trial.constraints import place_of
from quantsweep.trial.quantization import BASELINE_BITS, DEFAULT_STEPS, FACTORS
from quantsweep.trial.specs import TrialSpec

FORMAT = ("data_type", "bit_width", "block_size", "block_axis", "symmetric", "scale_dtype")
FACTS = ("model", "method", *FACTORS, "calibration", "seed", *FORMAT)
"""Keys of a condition, beside dotted ones such as model.dtype, data_type.options.exponent_bits and model.plant_outliers.scale."""


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """Trials that are left out.

    values: for each key the values of which a trial must have one.  because: the author's reason.  origin: where it stands.
    """

    values: tuple[tuple[str, tuple[Any, ...]], ...]
    because: str
    origin: str

    @property
    def reason(self) -> str:
        """Why a trial is not run, in words."""
        return f"left out by {self.origin}: {self.because}"

    def holds(self, facts: dict[str, Any]) -> bool:
        """True for a trial of these facts (`facts_of`)."""
        return all(key in facts and facts[key] in values for key, values in self.values)


def facts_of(trial: TrialSpec) -> dict[str, Any]:
    """What conditions may ask of a trial, by key; what the trial does not have is absent.

    >>> facts_of(baseline)["bit_width"], "data_type" in facts_of(baseline)
    (16, False)
    """
    model, quantization, calibration = trial.model, trial.quantization, trial.calibration
    planted = model.plant_outliers
    facts: dict[str, Any] = {f"model.{field.name}": getattr(model, field.name) for field in fields(model)}
    facts |= {**DEFAULT_STEPS, "model": model.name, "method": quantization.method, "model.plant_outliers.scale": 1}
    for factor, steps in quantization.steps.items():
        facts[factor] = tuple(step.name for step in steps) if len(steps) > 1 else steps[0].name
        facts |= {f"{place_of(factor, step.name)}.options.{key}": value for step in steps for key, value in step.options}
    for factor, activation in (("activation", quantization.activation), ("kv_cache", quantization.kv_cache)):
        if activation is not None:
            facts |= {f"{factor}.{field.name}": getattr(activation, field.name) for field in fields(activation)}
    if planted is not None:
        facts |= {f"model.plant_outliers.{field.name}": getattr(planted, field.name) for field in fields(planted)}
    if quantization.is_baseline:
        facts["bit_width"] = BASELINE_BITS
    if quantization.data_type is not None:
        facts |= {key: getattr(quantization, key) for key in FORMAT}
        facts |= {f"data_type.options.{key}": value for key, value in quantization.data_type_options}
    if calibration is not None:
        facts |= {"calibration": calibration.name}
        facts |= {f"calibration.{field.name}": getattr(calibration, field.name) for field in fields(calibration)}
    return facts if trial.seed is None else facts | {"seed": trial.seed}
