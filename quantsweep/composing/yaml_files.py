"""One yaml file as plain keys and values; whatever is wrong with it is one sentence that names the file, the line and the remedy.

People write these files by hand, in any editor.  What YAML, OmegaConf or Python's decoder would raise from their depths is
caught here, where the file's name is still known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quantsweep.errors import ConfigurationError

INTERPOLATION = re.compile(r"(?<!\\)\$\{([^{}]*)\}")
"""`${…}` where it is not written `\\${…}`."""


def read_mapping(path: Path, *, resolve: bool = True) -> dict[Any, Any]:
    """What a yaml holds, interpolations resolved where asked for; raises ConfigurationError for every way in which it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start + 1} is no part of a letter): save it as UTF-8") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    try:
        config = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        held = OmegaConf.to_container(config, resolve=resolve)
    except yaml.MarkedYAMLError as error:
        raise ConfigurationError(f"{path}{_line(error)}: {error.problem or error}; it cannot be read") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigurationError(f"{path} refers to itself") from error
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{path}: {in_words(error)}") from error
    if not isinstance(held, dict):
        raise ConfigurationError(f"{path} must hold keys and values (KEY: VALUE), got {type(held).__name__}")
    odd = next((key for key in held if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigurationError(f"{path}: {odd_key(odd)}")
    return held


def odd_key(key: object) -> str:
    """What is said of a key that YAML reads as something else: `on:` is true, `4:` is a number."""
    return f"YAML reads one of its keys as {key!r} ({type(key).__name__}); keys are names: on, off, yes and no stand in quotes"


def in_words(error: OmegaConfBaseException) -> str:
    """What OmegaConf says of a value that it cannot resolve, with the key and the remedy, in one line."""
    first = str(error.msg or error).strip().splitlines()[0]
    key = f"{error.full_key}: " if error.full_key else ""
    named = re.search(r"Environment variable '([^']*)' not found", first)
    if named:
        return f"{key}the environment variable {named[1]} is not set: set it, or write the value out"
    named = re.search(r"Interpolation key '([^']*)' not found", first)
    if named:
        return f"{key}${{{named[1]}}} is no key of the configuration; a variable of the environment is ${{oc.env:{named[1]}}}"
    return f"{key}{first}"


def problem_of_interpolation(key: str, value: object, roots: Collection[str]) -> str | None:
    """What is wrong with a `${…}` in a value; None if nothing is.  roots: the first words that may stand in one."""
    for inner in INTERPOLATION.findall(value) if isinstance(value, str) else ():
        name, _, argument = inner.partition(":")
        variable, _, default = argument.partition(",")
        if name == "oc.env" and not default and variable.strip() not in os.environ:
            return f"{key}: the environment variable {variable.strip()} is not set: set it, or write the value out"
        if not argument and name.split(".")[0].strip() not in roots:
            return f"{key}: ${{{inner}}} is no key of the configuration; a variable of the environment is ${{oc.env:{inner}}}"
    return None


def _line(error: yaml.MarkedYAMLError) -> str:
    return f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
