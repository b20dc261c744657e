"""The yaml files behind a launch: which there are, and what is in them, read as Hydra would merge them.

A component is one option of a group (`conf/data_type/int.yaml`); a grid composes each that its axes name once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from quantsweep.checkpoints.sources import is_source, names_of, source_of
from quantsweep.composing.yaml_files import read_mapping
from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.planning.compositions import step_names
from quantsweep.planning.grid import Axis, Grid
from quantsweep.planning.quantizations import ACTIVATIONS
from quantsweep.planning.schema import SECTIONS, suite_members
from quantsweep.trial.quantization import FACTORS, NONE

GROUPS = (*SECTIONS, "cluster", "tracking")
CONFIG_NAME = "config"
NAMED = (*FACTORS, "method", "data_type", "calibration", "task")
"""Groups whose yamls say the name that they are called by; a model may have none, or another."""
ACTIVATION_TYPES = tuple(f"{factor}.data_type" for factor in ACTIVATIONS)
OLD_OPTIONS = "method.options."
"""Options of a method, from when a method was its rounding: another word for those of the rounding."""


def load_options(grids: Iterable[Grid], base: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The yaml of every option that an axis or a method names, of the rounding `none`, and of every member of a suite."""
    wanted: dict[str, set[str]] = {section: set() for section in SECTIONS}
    wanted["rounding"].add(NONE)
    axes = [axis for grid in grids for axis in grid.axes]
    for axis in axes:
        if axis.key in SECTIONS:
            wanted[axis.key] |= {name for value in axis.values for name in step_names(axis.key, value)}
    primary = load_yaml(folders, CONFIG_NAME)
    labels = names_of(name for axis in axes if axis.key == "model" for name in axis.values if is_source(name))
    options = {
        section: {name: _load_option(folders, section, name, primary, labels.get(name)) for name in sorted(names)}
        for section, names in wanted.items()
    }
    for section, name in _implied(base, options, axes):
        if name not in options[section]:
            options[section][name] = _load_option(folders, section, name, primary)
    for config in (base["task"], *list(options["task"].values())):
        for member in suite_members(config):
            options["task"].setdefault(member, found := _load_option(folders, "task", member, primary))
            if "suite" in found:
                raise ConfigurationError(f"task {member} is a suite itself: a suite lists tasks ({', '.join(suite_members(config))})")
    return options


def _implied(base: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]], axes: Sequence[Axis]) -> Iterator[tuple[str, str]]:
    """(section, option) of all that methods name, and the data types of activations, which no axis need name."""
    factors = [(key, value) for config in (base["method"], *options["method"].values()) for key, value in factors_of(config).items()]
    yield from ((key, name) for key, value in factors if key in SECTIONS for name in step_names(key, value))
    settings = [*factors, *((axis.key, value) for axis in axes for value in axis.values)]
    yield from (("data_type", str(value)) for key, value in settings if key in ACTIVATION_TYPES)
    for section in ACTIVATIONS:  # after the steps of methods, which are there by now
        for config in (base[section], *list(options[section].values())):
            if "data_type" in config:
                yield "data_type", str(config["data_type"])


def factors_of(method: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the yaml of a method chooses; nothing where it is not whole, which is said elsewhere."""
    factors = method.get("factors")
    return factors if isinstance(factors, Mapping) else {}


def group_of(entry: object) -> str:
    """The group that an entry of a defaults list chooses from: `override /task` is `task`."""
    return str(entry).removeprefix("override ").lstrip("/")


def option_key(key: str) -> str:
    """The key of an option as it is now: `method.options.fraction` is `rounding.options.fraction`."""
    return f"rounding.options.{key.removeprefix(OLD_OPTIONS)}" if key.startswith(OLD_OPTIONS) else key


def dotted_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a nested mapping with its path, and its value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found[str(key)] = value
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in dotted_keys(value).items()}
    return found


def leaf_settings(value: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a nested mapping: dotted keys and values; of a study's file those that are neither its list nor its axes."""
    for name, inner in value.items():
        key = f"{above}.{name}" if above else str(name)
        if key in ("defaults", "study"):
            continue
        if isinstance(inner, Mapping):
            yield from leaf_settings(inner, key)
        else:
            yield key, inner


def _load_option(folders: Sequence[Path], section: str, name: str, primary: Mapping[str, Any], label: str | None = None) -> dict[str, Any]:
    """`label`: what a model is called that is typed as a folder or a hub id."""
    if section == "model" and is_source(name):
        option, field = source_of(name)
        return {**load_component(folders, "model", option, primary), field: name, "name": label}
    known = option_names(section, folders)
    if name not in known:
        raise ConfigurationError(did_you_mean(section, name, known))
    config = load_component(folders, section, name, primary)
    refuse_other_name(section, name, config)
    if "defaults" in config:
        raise ConfigurationError(
            f"conf/{section}/{name}.yaml has a defaults list; components are plain files, so that a grid composes each of them once"
        )
    return config


def load_component(folders: Sequence[Path], section: str, name: str, primary: Mapping[str, Any]) -> dict[str, Any]:
    """The yaml of one option over what the primary config says of all options of its section, as Hydra merges them."""
    config = load_yaml(folders, f"{section}/{name}")
    common = primary.get(section)
    return OmegaConf.to_container(OmegaConf.merge(common, config)) if common else config  # type: ignore[return-value]


def refuse_other_name(section: str, stem: str, config: Mapping[str, Any]) -> None:
    """A copied yaml that kept its old name would label its rows as the original's, and run the original's code."""
    if section in NAMED and "suite" not in config and config.get("name") != stem:
        raise ConfigurationError(
            f"{section}/{stem}.yaml says name: {config.get('name')}; write name: {stem}, which its rows are labelled with"
        )


def load_yaml(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """What one yaml holds; the first of the folders that has it."""
    # The primary config refers to Hydra's own keys, and a cluster may refer to the sweep's.
    resolve = name != CONFIG_NAME and not name.startswith(("cluster/", "tracking/"))
    return read_mapping(find_yaml(folders, name), resolve=resolve)


def find_yaml(folders: Sequence[Path], name: str) -> Path:
    """Where a yaml lies; raises ConfigurationError if none of the folders has it."""
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    group, _, stem = name.rpartition("/")
    if group:
        raise ConfigurationError(did_you_mean(group, stem, option_names(group, folders)))
    raise ConfigurationError(f"no file {name}.yaml in {', '.join(str(f) for f in folders)}")


def option_names(group: str, folders: Sequence[Path]) -> list[str]:
    """Names of a group's options in all folders of the search path; empty for a key that is no group."""
    if not group.replace("_", "").isalnum():
        return []
    found = {path.stem for folder in folders for path in (folder / group).glob("*.yaml") if path.is_file()}
    return sorted(found)


def has_option(folders: Sequence[Path], group: str, name: str) -> bool:
    """True if a group has a yaml of this name."""
    return any((folder / group / f"{name}.yaml").is_file() for folder in folders)
