"""From a command line to base configuration, options and grids: all that needs Hydra, done once a launch.

Hydra composes the base configuration with everything that was typed as a single value.  The axes (of
the command line and of the study) stay out of it: their values are parsed with Hydra's own grammar,
and the yaml of each option that an axis names is read once.
What a candidate's configuration then is (`quantsweep.planning.schema`) equals what Hydra would compose for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quantsweep.checkpoints.pins import read_pins
from quantsweep.checks import shown
from quantsweep.composing.axis_values import hashable, override_values
from quantsweep.composing.command_line import (
    check_command_line,
    dotted_settings,
    search_folder,
    spread_options,
    study_files,
    study_names,
)
from quantsweep.composing.components import CONFIG_NAME, NAMED, group_of, leaf_settings, load_options, option_names, refuse_other_name
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.composing.studies import changes, refine_study, study_grids
from quantsweep.composing.yaml_files import in_words
from quantsweep.errors import ConfigurationError, ConfigurationErrors
from quantsweep.planning.grid import Axis, Grid
from quantsweep.planning.schema import AXIS_KEYS, SECTIONS, TASK_KEYS, Schema
from quantsweep.storage.paths import product_root
from quantsweep.trial.quantization import FACTORS

WHICH_MODEL = frozenset(
    f"model.{key}" for key in ("name", "family", "path", "hub_id", "revision", "gguf_file", "parameters", "unavailable")
)
"""Keys of one model and of no other."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command line asks for: the composed base, and the grids over it."""

    base: Mapping[str, Any]
    schema: Schema
    grids: tuple[Grid, ...]
    changes: tuple[str, ...] = ()
    """What was typed over a study, in words, grid by grid."""


def compose_base(arguments: Sequence[str]) -> DictConfig:
    """Compose the base configuration outside of a Hydra application (for the command line tool)."""
    arguments = expand_shorthand(arguments)
    check_command_line(arguments)
    arguments = spread_options(arguments)
    fixed = [a for a in arguments if not OverridesParser.create().parse_override(a).is_sweep_override()]
    with initialize_config_dir(config_dir=str(product_root() / "conf"), version_base="1.3"):
        try:
            return compose(CONFIG_NAME, overrides=fixed, return_hydra_config=True)
        except OmegaConfBaseException as error:
            raise ConfigurationError(in_words(error)) from error
        except HydraException as error:
            raise ConfigurationError(str(error)) from error


def search_folders(hydra: Any) -> list[Path]:
    """The folders in which Hydra finds yaml files, in order; `hydra` is Hydra's own node of a composed configuration."""
    found = [search_folder(f"{source.schema}://{source.path}") for source in hydra.runtime.config_sources]
    return [folder for folder in found if folder is not None]


def make_request(cfg: DictConfig, folders: Sequence[Path], arguments: Sequence[str]) -> Request:
    """The request behind a composed configuration and the overrides that were typed."""
    base = plain(cfg)
    parsed = OverridesParser.create().parse_overrides(spread_options(arguments))
    overrides = [o for o in parsed if o.key_or_group != "sweeps" and not o.is_hydra_override()]
    problems: list[str] = []
    axes, typed = _split(overrides, folders, problems)
    study = next((name for override in parsed for name in study_names(override)), None)
    words: tuple[str, ...] = ()
    files: list[dict[str, Any]] = []
    if study is None and base["study"] is None:
        grids: tuple[Grid, ...] = (Grid(axes=tuple(axes), origin="command line"),)
    else:
        origin = "study" if study is None else f"sweeps/{study}.yaml"
        grids = refine_study(study_grids(base["study"], origin, folders, problems), axes, base["method"]["name"])
        words = changes(grids, {key: shown(value).strip("'") for key, value in typed.items() if key.split(".")[0] in AXIS_KEYS})
        files = [] if study is None else study_files(study, folders)
        grids = _with_settings(grids, base, files)
    problems += _tasks_set_twice(base, {*typed, *(key for grid in grids for key in grid.keys)})
    if problems:
        raise ConfigurationErrors(problems)
    options = load_options(grids, base, folders)
    for section in ({*NAMED} - {*FACTORS}) & {*typed}:
        refuse_other_name(section, typed[section], base[section])
    pins = read_pins(str(base["results_dir"]))
    return Request(base=base, schema=Schema(base, options, typed, pins, {*typed, *_settled(files)}), grids=grids, changes=words)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration without Hydra's own node, as plain values."""
    without = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        return OmegaConf.to_container(without, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigurationError(in_words(error)) from error


def _split(overrides: Iterable[Override], folders: Sequence[Path], problems: list[str]) -> tuple[list[Axis], dict[str, Any]]:
    """Sweeps become axes; single values are `typed` (Hydra has composed them already)."""
    axes: list[Axis] = []
    typed: dict[str, Any] = {}
    for override in overrides:
        key = override.key_or_group
        if not override.is_sweep_override():
            typed |= dotted_settings(override)
            continue
        try:
            values = override_values(override, option_names(key, folders))
            axes.append(Axis(key=key, values=values, is_found=isinstance(override.value(), Glob)))
        except ConfigurationError as error:
            problems.append(str(error))
    return axes, typed


def _with_settings(grids: tuple[Grid, ...], base: Mapping[str, Any], files: Iterable[Mapping[str, Any]]) -> tuple[Grid, ...]:
    """What a study's file sets of components holds for those that an axis names too, as an axis of one value in grids that do not vary it.

    The value is the composed one: what was typed for the same key has replaced the file's.  What says which weights a model is
    stays with the model that the file chose.
    """
    found = (key for file in files for key, _ in leaf_settings(file) if "." in key and key.split(".")[0] in SECTIONS)
    keys = dict.fromkeys(key for key in found if key not in WHICH_MODEL)
    fixed = [Axis(key=key, values=(hashable(OmegaConf.select(OmegaConf.create(dict(base)), key)),)) for key in keys]
    return tuple(replace(grid, axes=(*grid.axes, *(axis for axis in fixed if axis.key not in grid.keys))) for grid in grids)


def _settled(files: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Keys that a study's file gives a value: those of components on its defaults list, and all that it sets."""
    for file in files:
        entries = [entry for entry in file.get("defaults") or () if isinstance(entry, Mapping)]
        yield from (group_of(key) for entry in entries for key in entry)
        yield from (key for key, _ in leaf_settings(file))


def _tasks_set_twice(base: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """`limit` wins over a task's own limit, which would be dropped without a word."""
    return [
        f"task.{key} and {key} are both given, and {key} holds for every task: give one of them"
        for key in TASK_KEYS
        if f"task.{key}" in keys and (key in keys or base[key] is not None)
    ]
