"""Hydra's own flags (`-m`, `--cfg job`, `--info`, `-sc install=bash`): told apart from the words of a launch, wherever they stand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

MULTIRUN = frozenset({"-m", "--multirun"})
SHOWS = frozenset({"--cfg", "-c", "--info", "-i"})
"""Flags that show the configuration of the words beside them, and run nothing."""
AS_THEY_ARE = frozenset({"--shell-completion", "-sc", "--hydra-help", "--version"})
"""Flags whose words are none of a launch."""
_WITH_VALUE = frozenset({"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"})
_WITH_VALUE_OR_NONE = frozenset({"--info", "-i", "--experimental-rerun"})


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words, flags with their values), each in order.

    >>> split_flags(["bit_width=4", "--cfg", "job", "limit=3"])
    (['bit_width=4', 'limit=3'], ['--cfg', 'job'])
    """
    words: list[str] = []
    flags: list[str] = []
    takes = ""
    for argument in arguments:
        is_flag = argument.startswith("-") and len(argument) > 1
        if takes in _WITH_VALUE or is_flag or (takes in _WITH_VALUE_OR_NONE and "=" not in argument):
            flags.append(argument)
        else:
            words.append(argument)
        takes = argument if is_flag and takes not in _WITH_VALUE else ""
    return words, flags


def without_axes(words: Sequence[str]) -> list[str]:
    """The words that one configuration can show; axes are said on stderr, so that what is shown stays plain yaml."""
    axes = [word for word in words if OverridesParser.create().parse_override(word).is_sweep_override()]
    if axes:
        print(f"not shown, being axes: {' '.join(axes)} (`quantsweep plan` says what they come to)", file=sys.stderr)
    return [word for word in words if word not in axes]
