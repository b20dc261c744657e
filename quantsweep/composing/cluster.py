"""A cluster of the configuration as a ClusterSpec: what a person wrote, taken as it was meant, or refused in words.

YAML 1.1, which Hydra reads, has three traps for what Slurm wants: `24:00:00` is 86,400 (base 60), `0123` is 83
(octal), and NO is false.  Once loaded nothing shows what was written, so the chosen cluster's file is looked at as text.
`${NAME}` is the shell's to its author, and a setting of that name to Hydra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from quantsweep.composing.yaml_files import read_mapping
from quantsweep.convert import convert
from quantsweep.errors import ConfigurationError
from quantsweep.redaction import TOKENS
from quantsweep.trial.specs import ClusterSpec, options_tuple

TEXTS = frozenset({"partition", "account", "qos", "constraint", "exclude", "python"})
TRUTHS = frozenset({"submit_from_nodes"})
SBATCH_VARIABLES = {"SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos", "SBATCH_CONSTRAINT": "constraint"}
"""What sbatch would read from a person's environment, and the setting that it stands for where that is null."""
_SET = ("array", "output", "error", "open_mode", "wrap", "job_name", "dependency", "parsable", "wait", "test_only", "clusters")
ENGINES_OWN = {
    **dict.fromkeys(_SET, "it is set by the engine"),
    **dict.fromkeys(("nodes", "ntasks", "ntasks_per_node"), "one job is one task on one node (see cluster.allocation)"),
    "time": "give cluster.minutes",
    "cpus_per_task": "give cluster.cpus",
    **{name: f"give cluster.{name}" for name in ("partition", "account", "qos", "constraint", "exclude")},
}
"""Options of sbatch that `additional_parameters` must not override, and what to do instead."""
_INTERPOLATION = re.compile(r"(?<!\\)\$\{([^{}]*)\}")
_NAMED = r"(?i:(?:\b\w*|--[\w-]*)(?:token|secret|passw(?:or)?d|api[-_]?key|access[-_]?key)\s*(?:=\s*|(?<=--token)\s|(?<=--password)\s))"
_LITERAL = r"""(?!['"]?[$`/~]|['"]{2}|[\s;]|$|(?:true|false|[01])\b)\S+"""
_SECRET = re.compile(f"{TOKENS}|{_NAMED}{_LITERAL}")
"""Tokens by their makers' own beginnings, and values (not variables, commands or files) given to a name that says what it is."""


# --- the file as text ---------------------------------------------------------------------------------------------------


def file_problems(path: Path, roots: Collection[str] | None) -> list[str]:
    """What a yaml says that YAML or Hydra would take for something else.

    roots: the first words that interpolations of a cluster's yaml may have; None for another kind, of which only numbers are read.
    """
    try:
        read_mapping(path, resolve=False)
    except ConfigurationError as error:
        return [str(error)]
    node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    found = (_problem_of(key, scalar, roots) for key, scalar in (() if node is None else _scalars(node)))
    return [f"{path}: {problem}" for problem in found if problem is not None]


def _scalars(node: yaml.Node, key: str = "") -> Iterator[tuple[str, yaml.ScalarNode]]:
    if isinstance(node, yaml.ScalarNode):
        yield key, node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item, key)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _scalars(value, f"{key}.{name.value}" if key else str(name.value))


def _problem_of(key: str, scalar: yaml.ScalarNode, roots: Collection[str] | None) -> str | None:
    text, kind = scalar.value, scalar.tag.rpartition(":")[2]
    if kind in ("int", "float") and ":" in text:
        value = yaml.safe_load(text)
        remedy = "write minutes as a number, or quote it as Slurm takes it: '24:00:00' (12:00 is 12 minutes to Slurm)"
        return f"{key}: {text} is {value:,} to YAML (base 60); {remedy if 'minutes' in key else 'quote it'}"
    if kind == "int" and re.fullmatch(r"[-+]?0[0-7_]+", text):
        return f"{key}: {text} is {yaml.safe_load(text)} to YAML (an octal number); quote it: {key}: '{text}'"
    if roots is None:
        return None
    if kind == "bool" and text.lower() not in ("true", "false") and key not in TRUTHS:
        return f"{key}: {text} is {str(yaml.safe_load(text)).lower()} to YAML; quote it ({key}: '{text}'), or write true or false"
    unknown = next((inner for inner in _INTERPOLATION.findall(text) if not _is_setting(inner, roots)), None)
    if unknown is not None:
        return f"{key}: ${{{unknown}}} is read as a setting of that name, and there is none; for the shell write {_for_shell(unknown)}"
    return None


def _is_setting(inner: str, roots: Collection[str]) -> bool:
    name, colon, _ = inner.partition(":")
    if colon:
        return OmegaConf.has_resolver(name.strip())
    return name.startswith(".") or re.split(r"[.\[]", name)[0] in roots


def _for_shell(inner: str) -> str:
    return f"${inner} or \\${{{inner}}}" if inner.isidentifier() else f"\\${{{inner}}}"


# --- the composed values ------------------------------------------------------------------------------------------------


def cluster_spec(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> ClusterSpec:
    """The cluster of the composed configuration, completed by what sbatch would read from the environment (`SBATCH_VARIABLES`)."""
    environment = os.environ if environment is None else environment
    values = {key: _as_meant(key, value) for key, value in config.items() if key != "additional_parameters"}
    if values.get("kind") == "slurm":
        set_there = {key: environment[name] for name, key in SBATCH_VARIABLES.items() if environment.get(name)}
        values |= {key: value for key, value in set_there.items() if values.get(key) is None}
    spec = convert(ClusterSpec, values, "cluster")
    parameters = _parameters(config.get("additional_parameters") or {})
    for line in spec.setup:
        _refuse_secret("cluster.setup", line)
    made = {key: getattr(spec, key) for key in values}
    return ClusterSpec(**made, additional_parameters=options_tuple(parameters))


def unused_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Variables that sbatch would obey and that jobs of a sweep do not: what belongs to one sbatch must not steer thousands unseen."""
    names = os.environ if environment is None else environment
    return sorted(name for name in names if name.startswith("SBATCH_") and name not in SBATCH_VARIABLES)


def _as_meant(key: str, value: Any) -> Any:
    """Numbers are names too (partition=3), and a time in Slurm's own words is minutes."""
    if key in TEXTS and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if key in TEXTS and isinstance(value, (bool, float)):
        raise ConfigurationError(
            f"cluster.{key} must be text, got {str(value).lower()}: quote it in the yaml, or type it as \"cluster.{key}='…'\""
        )
    if key == "minutes" and isinstance(value, str):
        return minutes_of(value)
    return value


def minutes_of(text: str) -> int:
    """Whole minutes, rounded up, of a time as sbatch takes it.

    >>> [minutes_of(text) for text in ("90", "24:00:00", "1-00:00:00", "1-12", "10:30")]
    [90, 1440, 1440, 2160, 11]
    """
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(?:(\d+):)?(\d+):(\d+)|(\d+))", text.strip())
    if match is None:
        raise ConfigurationError(
            f"cluster.minutes={text} is no time: write minutes as a number, or quote hours:minutes:seconds or days-hours:minutes:seconds"
        )
    days, day_hours, day_minutes, day_seconds, hours, minutes, seconds, plain = (int(part or 0) for part in match.groups())
    whole = ((days * 24 + day_hours + hours) * 60 + day_minutes + minutes + plain) * 60 + day_seconds + seconds
    return -(-whole // 60)


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """`additional_parameters` by sbatch's names with `_`; null and false leave an option out."""
    parameters: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name in ENGINES_OWN:
            raise ConfigurationError(f"cluster.additional_parameters: {key} cannot be given there: {ENGINES_OWN[name]}")
        if not (value is None or isinstance(value, (str, int, float))):
            raise ConfigurationError(f"cluster.additional_parameters.{key} must be one value, got {value!r}")
        _refuse_secret(f"cluster.additional_parameters.{key}", f"{key}={value}")
        parameters[name] = value
    return parameters


def _refuse_secret(where: str, text: str) -> None:
    """Settings are written into the plan, which others may read."""
    if _SECRET.search(text):
        raise ConfigurationError(
            f"{where} holds what looks like a secret, and settings are written into the plan. Set the variable in your own "
            "environment, which jobs inherit, or read it from a file of yours: export NAME=$(cat ~/.name)"
        )
