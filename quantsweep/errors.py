"""Every exception that quantsweep raises on purpose, in one tree.

    QuantsweepError
    ├── ConfigurationError      what was asked cannot be: unknown name, misspelt key, wrong type, impossible value
    │   └── ConfigurationErrors several of them, reported together
    ├── ResultsError            the results folder cannot be used or holds something it should not
    ├── LockedError             another launch of the same sweep is at work
    ├── SlurmError              Slurm was asked and did not answer, or said no
    ├── ModelError              a model cannot be loaded, or is not what the configuration says
    ├── EvaluationError         a task cannot be loaded or scored, or is not the version that was asked for
    │   └── TextError           a text, for calibration or a perplexity, cannot be read or is not the one that was planned
    └── QuantizationError       weights cannot be quantized as asked (NaN, Inf, a shape the method cannot do)

Messages are written for the person who typed the command: they name the thing, the value, the
choices and the remedy.  Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from quantsweep.words import count


class QuantsweepError(Exception):
    """Base of all errors raised on purpose; its message is meant to be shown without a traceback."""


class ConfigurationError(QuantsweepError):
    """What was asked for cannot be done; nothing was submitted."""


class ComponentError(ConfigurationError):
    """The yaml of a component is not whole; kind: the group that it is in."""

    def __init__(self, kind: str, problem: str) -> None:
        self.kind = kind
        super().__init__(problem)


class ConfigurationErrors(ConfigurationError):
    """Several configuration errors, so that a user can mend all of them at once."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(dict.fromkeys(problems))
        head = count(len(self.problems), "configuration error")
        super().__init__("\n".join([f"{head}; nothing was submitted:", *(f"  - {p}" for p in self.problems)]))


class ResultsError(QuantsweepError):
    """The results folder cannot be used, or a file in it is not what it should be."""


class LockedError(QuantsweepError):
    """Another process holds the launch lock of the same sweep."""


class SlurmError(QuantsweepError):
    """Slurm did not answer, or refused; what is known of the jobs is therefore unknown, not empty."""


class ModelError(QuantsweepError):
    """A model cannot be loaded, or its files are not what the configuration says."""


class EvaluationError(QuantsweepError):
    """A task cannot be loaded or scored, or is not the version that the trial asked for."""


class TextError(EvaluationError):
    """A text cannot be read, is too short for what is cut out of it, or is not the one that was planned."""


class QuantizationError(QuantsweepError):
    """Weights that cannot be quantized as asked; the message names the layer."""


def did_you_mean(kind: str, name: object, choices: Iterable[str], *, limit: int = 12) -> str:
    """One sentence for an unknown name: the name, the nearest choice, and the choices.

    >>> did_you_mean("data_type", "quantil", ["int", "fp", "quantile"])
    "unknown data_type 'quantil'. Did you mean 'quantile'? Available: fp, int, quantile"
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    shown = (
        known if len(known) <= limit else [*difflib.get_close_matches(str(name), known, n=limit, cutoff=0.0), f"… ({len(known)} in all)"]
    )
    return f"unknown {kind} '{name}'.{hint} Available: {', '.join(shown) or '(none)'}"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that the configuration does not have."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    hint = (
        f" Did you mean {' or '.join(repr(n) for n in near)}?"
        if near
        else f" Top-level keys: {', '.join(n for n in names if '.' not in n)}"
    )
    return f"unknown key '{key}'.{hint}"
