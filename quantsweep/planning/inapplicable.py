"""What was typed and would change nothing: refused in words, since whoever types a setting means something by it.

A setting that means nothing for some trials of a grid is merged there, and counted.  Here are those that no trial of a
launch has: the block size of baselines alone, a seed where nothing is drawn, calibration text that nobody looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quantsweep.errors import ConfigurationErrors
from quantsweep.planning.quantizations import AUTO
from quantsweep.planning.schema import NO_CALIBRATION
from quantsweep.trial.quantization import BASELINE_BITS, DEFAULT_STEPS, FACTORS, FORMAT, NONE
from quantsweep.trial.specs import TrialSpec

UNSET = ("", "null", "[]", AUTO)
"""Typed values that ask for nothing."""
DEFAULT_SEED = "0"
KEPT_AS_TYPED = ("block_axis", "symmetric", "scale_dtype")
"""Keys of a format whose value stands in the trial as it was typed, or not at all."""


def refuse_inapplicable(trials: Sequence[TrialSpec], typed: Mapping[str, str]) -> None:
    """Raise ConfigurationErrors with what was typed (text by key) and no trial has."""
    asked = {key: value for key, value in typed.items() if value not in UNSET}
    problems = [problem for find in (_formats, _axes, _steps, _seeds, _calibrations, _kept_layers) for problem in find(trials, asked)]
    if trials and problems:
        raise ConfigurationErrors(problems)


def _formats(trials: Sequence[TrialSpec], typed: Mapping[str, str]) -> Iterable[str]:
    """A data type, and what belongs to one, where no trial has any."""
    if any(trial.quantization.data_type is not None for trial in trials):
        return
    baselines = all(trial.quantization.is_baseline for trial in trials)
    wide = not any(trial.quantization.quantizes_weights for trial in trials)
    said = {"bit_width": str(BASELINE_BITS)} if wide else {}  # 16 bit is how weights that stay are asked for
    if keys := [key for key in typed if _group(key) in ("data_type", *FORMAT) and typed[key] != said.get(key)]:
        methods = sorted({trial.quantization.method for trial in trials if not trial.quantization.is_baseline})
        alone = f"method {' and '.join(methods)} works without a data type and has"
        whom = "the 16-bit baseline has" if baselines else "weights that stay at 16 bit have" if wide else alone
        yield (
            f"{whom} no {', '.join(keys)}: {_shown(keys, typed)} would change nothing. "
            f"Leave it out, or give {'a method and a bit_width below 16' if baselines else 'a method that has a data type'}"
        )


def _axes(trials: Sequence[TrialSpec], typed: Mapping[str, str]) -> Iterable[str]:
    """A value of the format that every trial has written otherwise: one scale for the whole tensor has no direction."""
    formats = [trial.quantization for trial in trials if trial.quantization.data_type is not None]
    for key in KEPT_AS_TYPED:
        values = typed.get(key, "").split(",")
        found = {str(getattr(quantization, key)).lower() for quantization in formats}
        if key in typed and formats and not any(value.strip("'\"").lower() in found for value in values):
            yield f"{key}={typed[key]} would change nothing: every trial has {' or '.join(sorted(found))} whatever is typed. Leave it out"


def _steps(trials: Sequence[TrialSpec], typed: Mapping[str, str]) -> Iterable[str]:
    """Steps that are in no trial: they move nothing with the options that they have, or belong to weights that stay."""
    found = {(factor, step.name) for trial in trials for factor, steps in trial.quantization.steps.items() for step in steps}
    for factor in FACTORS:
        names = {name.strip(" []'\"") for name in typed.get(factor, "").split(",")} - {"", NONE, DEFAULT_STEPS[factor]}
        if factor != "scope" and names and "(" not in typed[factor] and not any((factor, name) in found for name in names):
            wide = f"{factor}.bit_width"
            if typed.get(wide) == str(BASELINE_BITS):
                yield (
                    f"{factor}={typed[factor]} would change nothing: {wide}={BASELINE_BITS} leaves them as they are. "
                    f"Leave both out, or give a {wide} below {BASELINE_BITS}"
                )
                continue
            yield (
                f"{factor}={typed[factor]} would change nothing: with these options, or where weights stay at 16 bit, "
                f"{' and '.join(sorted(names))} does nothing. Leave it out"
            )


def _seeds(trials: Sequence[TrialSpec], typed: Mapping[str, str]) -> Iterable[str]:
    if typed.get("seed", DEFAULT_SEED) != DEFAULT_SEED and all(trial.seed is None for trial in trials):
        yield f"seed={typed['seed']} would change nothing: {_methods(trials)} draw nothing at random. Leave it out"


def _calibrations(trials: Sequence[TrialSpec], typed: Mapping[str, str]) -> Iterable[str]:
    keys = [key for key in typed if _group(key) == "calibration" and typed[key] != NO_CALIBRATION]
    if keys and all(trial.calibration is None for trial in trials):
        yield f"{_shown(keys, typed)} would change nothing: {_methods(trials)} look at no calibration text. Leave it out"


def _kept_layers(trials: Sequence[TrialSpec], typed: Mapping[str, str]) -> Iterable[str]:
    if "model.unquantized" in typed and all(trial.quantization.is_baseline for trial in trials):
        yield f"model.unquantized={typed['model.unquantized']} would change nothing: the 16-bit baseline quantizes no layer. Leave it out"


def _group(key: str) -> str:
    return key.partition(".")[0]


def _shown(keys: Iterable[str], typed: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={typed[key]}" for key in keys)


def _methods(trials: Iterable[TrialSpec]) -> str:
    return f"the methods asked for ({', '.join(sorted({trial.quantization.method for trial in trials}))})"
