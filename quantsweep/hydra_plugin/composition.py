"""From a command line to base configuration, options and grids: all that needs Hydra, done once a launch.

Hydra composes the base configuration with everything that was typed as a single value.  The axes (of
the command line and of the study) stay out of it: their values are parsed with Hydra's own grammar
(`3,4,8`, `range(3,9)`, `glob(mini-*)`), and the yaml of each option that an axis names is read once.
What a candidate's configuration then is (`quantsweep.schema`) equals what Hydra would compose for it.

Mistakes in names and keys are found here before Hydra meets them, all at once, with the nearest name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from quantsweep.errors import ConfigurationError, ConfigurationErrors, did_you_mean
from quantsweep.grid import Axis, Grid, refine
from quantsweep.paths import product_root
from quantsweep.pins import read_pins
from quantsweep.schema import AXIS_KEYS, SECTIONS, TASK_KEYS, Schema, suite_members, unknown_key

GROUPS = (*SECTIONS, "cluster", "tracking")
CONFIG_NAME = "config"
FIXED_KEYS = dict.fromkeys(("method", "data_type"), ("name", "version", "capabilities"))
"""What a component is, as opposed to what may be chosen."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command line asks for: the composed base, and the grids over it."""

    base: Mapping[str, Any]
    schema: Schema
    grids: tuple[Grid, ...]
    typed: Mapping[str, Any]


# --- the command line -----------------------------------------------------------------------------------------------------


def expand_shorthand(arguments: Sequence[str]) -> list[str]:
    """`model=/a/folder` and `model=organisation/name`, which no yaml is named after, as overrides that Hydra understands.

    >>> expand_shorthand(["model=org/name", "bit_width=4"])
    ['model=hub', 'model.hub_id=org/name', 'bit_width=4']
    """
    expanded: list[str] = []
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        value = _unquoted(value)
        if key == "model" and _is_source(value):
            option, field = _source(value)
            expanded += [f"model={option}", f"model.{field}={_quoted(value)}"]
        else:
            expanded.append(argument)
    return expanded


def spread_options(arguments: Sequence[str]) -> list[str]:
    """In a sweep over methods or data types, one value of an option becomes an axis: it reaches the components that have the option.

    Hydra would look for it in the default component, which may have no such option, and advise to add it there.  The value is said
    twice since Hydra's grammar has no sweep of one (equal values of an axis are one).

    >>> spread_options(["method=centering,outlier_dependent", "method.options.fraction=0.05"])
    ['method=centering,outlier_dependent', 'method.options.fraction=0.05,0.05']
    """
    parsed = [None if a.startswith("-") else OverridesParser.create().parse_override(a) for a in arguments]
    is_study = any(o is not None and o.key_or_group == "sweeps" for o in parsed)
    swept = {o.key_or_group for o in parsed if o is not None and o.is_sweep_override()}
    spread: list[str] = []
    for argument, override in zip(arguments, parsed, strict=True):
        key, _, value = argument.lstrip("+").partition("=")
        section, _, rest = key.partition(".")
        is_option = section in ("method", "data_type") and rest.startswith("options.") and (is_study or section in swept)
        if override is None or not is_option or override.is_sweep_override() or override.is_delete():
            spread.append(argument)
        else:
            spread.append(f"{key}={value},{value}")
    return spread


def _is_source(value: Any) -> bool:
    """True for a path or a hub id, as opposed to the name of a yaml."""
    return isinstance(value, str) and ("/" in value or value.startswith(("~", "package:"))) and not any(c in value for c in ",()[]{}")


def _source(value: str) -> tuple[str, str]:
    is_path = value.startswith(("/", "~", ".", "package:")) or Path(value).is_dir()
    return ("local", "path") if is_path else ("hub", "hub_id")


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def _quoted(value: str) -> str:
    plain = all(c.isalnum() or c in "/._-" for c in value)
    return value if plain else "'" + value.replace("'", "\\'") + "'"


def refuse_sweeps(arguments: Sequence[str]) -> None:
    """Without -m one trial is meant: several values are a slip that everybody makes once."""
    studies = [a for a in arguments if a.lstrip("+").startswith("sweeps=")]
    if studies:
        raise ConfigurationErrors([f"{argument} is a study of many trials: add -m (python launch.py -m …)" for argument in studies])
    swept = [a for a in arguments if not a.startswith("-") and OverridesParser.create().parse_override(a).is_sweep_override()]
    if swept:
        raise ConfigurationErrors(
            [f"{argument} has several values, which makes a sweep: add -m (python launch.py -m …)" for argument in swept]
        )


def help_text() -> str:
    """What can be typed: examples, the groups with their choices, and the keys with the comments of conf/config.yaml."""
    root = product_root()
    folders = [root / "conf", root]
    groups = [f"  {group:<12} {', '.join(_option_names(group, folders))}" for group in (*GROUPS, "sweeps")]
    lines = (root / "conf" / f"{CONFIG_NAME}.yaml").read_text().splitlines()
    keys = lines[next(n for n, line in enumerate(lines) if line.startswith("# --- the trial")) : lines.index("hydra:")]
    keys = keys[: next(n for n, line in enumerate(keys) if "set by the sweeper" in line)]
    return "\n".join(
        [
            "One trial here and now, a grid (-m), or a study (-m +sweeps=NAME).  The same command again runs only what is missing.",
            "",
            *(line.removeprefix("#   ") for line in lines if line.startswith("#   python")),
            "  quantsweep plan +sweeps=quickstart        the dry run: what would run, what is done, what is skipped and why",
            "",
            "Groups (GROUP=CHOICE; with -m several choices by comma, or glob(mini-*)):",
            *groups,
            "",
            "Keys (KEY=VALUE; with -m several values by comma, or range(3,9)):",
            *(f"  {line}" for line in keys),
            "Options of a choice: data_type.options.exponent_bits=3, model.dtype=float16, cluster.partition=gpu; see the file in conf/.",
        ]
    )


def check_command_line(arguments: Sequence[str], folders: Sequence[Path] | None = None) -> None:
    """Raise ConfigurationErrors with all that was typed which is unknown, which Hydra would drop, or which nothing would read."""
    folders = folders or [product_root() / "conf", product_root()]
    overrides, problems = _parsed(arguments)
    roots = {*_load(folders, CONFIG_NAME), *GROUPS, "sweeps"}
    problems += [problem for override in overrides if (problem := _problem_of_form(override, roots)) is not None]
    problems += _given_twice(overrides)
    own, missing = _own_folders(overrides)
    studies = [name for override in overrides for name in _study_names(override)]
    if len(studies) > 1:
        problems.append(f"one launch runs one study, got {' and '.join(studies)}: launch them one after the other")
    problems += missing + _unknown_names(overrides, studies, [*folders, *own])
    if problems:
        raise ConfigurationErrors(problems)


def _parsed(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides of a command line, and what cannot be read of it."""
    overrides: list[Override] = []
    problems: list[str] = []
    for argument in arguments:
        if argument.split("=")[0] in ("--config-dir", "-cd"):
            problems = [f"{argument}: name your folder with 'hydra.searchpath=[file:///my/conf]', which every command reads"]
            return [], problems
        if argument.startswith("-"):
            continue
        try:
            overrides.append(OverridesParser.create().parse_override(argument))
        except HydraException:
            problems.append(
                f"cannot read '{argument}': settings are key=value; lists have no spaces and no brackets (bit_width=3,4); "
                "text with other signs than letters, digits, _ - . / stands in quotes inside those of the shell (\"key='a, b'\")"
            )
    return overrides, problems


def _problem_of_form(override: Override, roots: Iterable[str]) -> str | None:
    """What is wrong with how something is set, whatever its value means; None if nothing is.

    Hydra splits lists off before it composes, so that a list of a key that is no axis would leave that key at its default.
    """
    key, line = override.key_or_group, override.input_line
    root = key.replace("/", ".").split(".")[0]
    if override.is_sweep_override():
        is_once = root in roots and root not in AXIS_KEYS and not _study_names(override)
        return f"{key} is set once a launch and cannot be a list; got '{line}'" if is_once else None
    if root == "hydra":
        return None
    if override.package is not None:
        return f"{line}: a group is chosen without a package ({key}=…)"
    if override.is_delete() and not key.startswith("cluster.additional_parameters."):
        return f"{line}: keys of conf/config.yaml cannot be deleted; leave it out for the default"
    if root == "study":
        return f"{line}: study is set by a file in sweeps/ (+sweeps=NAME), and its axes are replaced by their own keys (bit_width=3,4)"
    if key in (*AXIS_KEYS, "sweeps") and isinstance(override.value(), (list, dict)):
        return f"{line}: values of an axis are written without brackets, as in bit_width=3,4"
    return None


def _given_twice(overrides: Iterable[Override]) -> list[str]:
    """Of a key that is typed twice, one value would be dropped."""
    typed: dict[str, list[str]] = {}
    for override in overrides:
        if override.key_or_group != "sweeps":  # said in words of its own
            text = str(override.input_line).partition("=")[2]
            for key, value in _settings(override):
                typed.setdefault(key, []).append(text if key == override.key_or_group else str(value))
    return [
        f"{key} is given {'twice' if len(values) == 2 else f'{len(values)} times'} ({' and '.join(values)}): "
        + ("write its values with commas" if key.split(".")[0] in AXIS_KEYS else "give it once")
        for key, values in typed.items()
        if len(values) > 1
    ]


def _settings(override: Override) -> list[tuple[str, Any]]:
    """The keys that an override sets, and their values: `budget={gpu_hours: 5}` is `budget.gpu_hours=5`, since Hydra merges mappings."""
    key, value = override.key_or_group, override.value()
    is_mapping = isinstance(value, dict) and key not in AXIS_KEYS
    return list(_leaves(value, key)) if is_mapping else [(key, value)]  # type: ignore[arg-type]


def _own_folders(overrides: Iterable[Override]) -> tuple[list[Path], list[str]]:
    """The folders of `hydra.searchpath=[file:///my/conf]`, and what is wrong with them."""
    found: dict[str, Path | None] = {}
    for override in overrides:
        if override.key_or_group == "hydra.searchpath" and not override.is_sweep_override():
            places = override.value()
            if not isinstance(places, list):
                return [], ["hydra.searchpath must be a list: 'hydra.searchpath=[file:///my/conf]'"]
            found |= {str(place): _folder_of(str(place)) for place in places}
    folders = [folder for folder in found.values() if folder is not None and folder.is_dir()]
    return folders, [
        f"hydra.searchpath: {text.removeprefix('file://')} is not a folder"
        for text, folder in found.items()
        if folder is None or not folder.is_dir()
    ]


def _folder_of(place: str) -> Path | None:
    """The folder of an entry of Hydra's search path; None for one that is no folder."""
    scheme, _, rest = place.rpartition("://")
    if scheme != "pkg":
        return Path(rest) if scheme in ("", "file") else None
    try:
        spec = importlib.util.find_spec(rest.replace("/", "."))
    except (ImportError, ValueError):
        return None
    return None if spec is None or not spec.submodule_search_locations else Path(next(iter(spec.submodule_search_locations)))


# --- names and keys, typed or in a study's file -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """What each group may come to.

    base: the option of each group that Hydra composes.  options: those that its axes name, or the base's.
    """

    base: Mapping[str, str]
    options: Mapping[str, Sequence[str]]


def _unknown_names(overrides: Sequence[Override], studies: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Every choice and every key that does not exist or that nothing would read, typed or in the study's file."""
    problems = [did_you_mean("sweeps", name, _option_names("sweeps", folders)) for name in studies if not _exists(folders, "sweeps", name)]
    files: list[dict[str, Any]] = []
    for name in studies:
        if _exists(folders, "sweeps", name):
            broken = _study_file_problems(name, folders)
            problems += broken
            files += [] if broken else _study_files(name, folders)
    typed = _typed_choices(overrides, folders, problems)
    choices = _choices(typed, files, _load(folders, CONFIG_NAME))
    known = _known_keys(folders, choices.options)
    for override in overrides:
        key = override.key_or_group
        if key in (*GROUPS, "sweeps") or key.split(".")[0] == "study" or override.is_hydra_override() or override.package is not None:
            continue
        problems += [p for leaf, value in _settings(override) if (p := _problem_of_key(leaf, value, known, choices, folders)) is not None]
    in_base = _known_keys(folders, {group: [option] for group, option in choices.base.items()})
    for file in files:
        problems += [
            f"sweeps/{studies[0]}.yaml: {problem}"
            for key, value in _leaves(file)
            if (problem := _problem_of_setting(key, value, in_base, choices, folders)) is not None
        ]
    return problems


def _typed_choices(overrides: Iterable[Override], folders: Sequence[Path], problems: list[str]) -> dict[str, list[str]]:
    """The options that were typed for each group; unknown ones are `problems`."""
    chosen: dict[str, list[str]] = {}
    for override in overrides:
        key = override.key_or_group
        if key not in GROUPS or override.is_delete() or override.package is not None or isinstance(override.value(), (list, dict)):
            continue
        if key not in SECTIONS and override.is_sweep_override():
            continue
        known = _option_names(key, folders)
        try:
            names = ["null" if value is None else str(value) for value in _values(override, known)]
        except ConfigurationError as error:
            problems.append(str(error))
            continue
        options = [_source(name)[0] if key == "model" and _is_source(name) else name for name in names]
        problems += [did_you_mean(key, name, known) for name in options if not _exists(folders, key, name)]
        chosen[key] = [name for name in options if _exists(folders, key, name)]
    return chosen


def _choices(typed: Mapping[str, Sequence[str]], files: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> _Choices:
    """What each group may come to: typed, else on the study's defaults list, else on that of config.yaml."""
    base: dict[str, str] = {}
    for file in (config, *reversed(files)):
        entries = [entry for entry in file.get("defaults") or () if isinstance(entry, Mapping)]
        base |= {str(key).removeprefix("override ").lstrip("/"): str(value) for entry in entries for key, value in entry.items()}
    base = {group: base[group] for group in GROUPS} | {group: names[0] for group, names in typed.items() if len(names) == 1}
    axes = {str(key) for file in files for grid in _grids_of(file) for key in grid}
    options = {group: list(typed.get(group, () if group in axes else (base[group],))) for group in GROUPS}
    if files:  # grids without the axis keep the base's
        options = {group: [*names, base[group]] if names else [] for group, names in options.items()}
    return _Choices(base=base, options=options)


def _grids_of(file: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The axes of each grid of a study's file, as far as it is well formed."""
    study = file.get("study")
    grids = study.get("grids") if isinstance(study, Mapping) else None
    axes = [grid.get("axes") for grid in grids if isinstance(grid, Mapping)] if isinstance(grids, list) else []
    return [each for each in axes if isinstance(each, Mapping)]


def _known_keys(folders: Sequence[Path], options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Each key that may be set, with a value that it has in a yaml; a group without `options` may come to any."""
    config = _load(folders, CONFIG_NAME)
    known = dict.fromkeys(AXIS_KEYS) | {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
    known |= {f"budget.{key}": value for key, value in config["budget"].items()}
    for group in GROUPS:
        for option in options[group] or _option_names(group, folders):
            for component in _components(folders, group, option, config):
                fixed = FIXED_KEYS.get(group, ())
                known |= {f"{group}.{key}": value for key, value in _dotted(component).items() if key.split(".")[0] not in fixed}
    return known


def _components(folders: Sequence[Path], group: str, option: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The yaml of an option; a cluster or tracking of one's own may leave keys of its kind at their defaults, or stand on another."""
    own = _load_component(folders, group, option, config)
    if group in SECTIONS:
        return [own]
    kinds = [own["kind"]] if "kind" in own else _option_names(group, folders)
    return [own, *(_load(folders, f"{group}/{kind}") for kind in kinds if _exists(folders, group, kind))]


def _dotted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a nested mapping with its path, and its value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found[str(key)] = value
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in _dotted(value).items()}
    return found


def _leaves(value: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a nested mapping: dotted keys and values; of a study's file those that are neither its list nor its axes."""
    for name, inner in value.items():
        key = f"{above}.{name}" if above else str(name)
        if key in ("defaults", "study"):
            continue
        if isinstance(inner, Mapping):
            yield from _leaves(inner, key)
        else:
            yield key, inner


def _problem_of_key(key: str, value: Any, known: Mapping[str, Any], choices: _Choices, folders: Sequence[Path]) -> str | None:
    """Why a key cannot be set to a value; None if it can."""
    group, _, name = key.partition(".")
    if key.startswith("cluster.additional_parameters."):  # sbatch knows more options than we do
        group, name, key, value = "cluster", "additional_parameters", "cluster.additional_parameters", {}
    if group == "task" and "task.suite" in known and name != "suite":
        instead = f"use {name}=…, which holds for all its tasks" if name in TASK_KEYS else "set it in the yaml of each task"
        return f"a suite of tasks has no {name}: {instead} (task={choices.base['task']})"
    if key not in known:
        return _no_such_key(group, name, known, choices, folders) if name and group in GROUPS else unknown_key(key, known)
    if isinstance(value, (Mapping, Sweep, Glob)):
        return None
    if isinstance(known[key], Mapping):
        inner = next(iter(known[key]), "NAME")
        return f"{key} has keys of its own: {key}.{inner}=…; got {value!r}"
    if isinstance(known[key], list) and not isinstance(value, list):
        return f"{key} must be a list: '{key}=[…,…]'; got {value!r}"
    return None


def _no_such_key(group: str, name: str, known: Mapping[str, Any], choices: _Choices, folders: Sequence[Path]) -> str:
    """The message for a key that the chosen option of a group does not have: who has it, or the nearest."""
    chosen = choices.base[group]
    key = f"{group}.{name}"
    if group in SECTIONS:
        return unknown_key(key, known)
    having = [option for option in _option_names(group, folders) if key in _known_keys(folders, {**choices.options, group: [option]})]
    if having:
        return f"{group}={chosen} has no {name}; give {group}={' or '.join(having)} first"
    message = did_you_mean(f"key of {group}={chosen}", name, [each.partition(".")[2] for each in known if each.startswith(f"{group}.")])
    return f"{message}. Keys and passwords belong into wandb's own login" if group == "tracking" else message


# --- the file of a study ------------------------------------------------------------------------------------------------------


def _study_names(override: Override) -> list[str]:
    """The studies that an override names: one, or several by comma (which is refused in words of its own)."""
    value = override.value()
    if override.key_or_group != "sweeps" or override.is_delete() or isinstance(value, (list, dict)):
        return []
    if not override.is_sweep_override():
        return [str(value)]
    return [str(_element(name)) for name in value.list] if isinstance(value, ChoiceSweep) and len(value.list) > 1 else []


def _study_files(name: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What a study's file says, and before it comes what the studies on its defaults list say."""
    own = yaml.safe_load(_find(folders, f"sweeps/{name}").read_text())
    above = [entry for entry in own.get("defaults") or () if isinstance(entry, str) and entry != "_self_"]
    return [own, *(file for entry in above for file in _study_files(entry.rpartition("/")[2], folders))]


def _study_file_problems(name: str, folders: Sequence[Path]) -> list[str]:
    """What Hydra would say of a study's file in words that do not help, or not at all."""
    path = _find(folders, f"sweeps/{name}")
    text = path.read_text(errors="replace")
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        return [f"{path}, line {line}: {error.problem or error}"]
    if not text.lstrip().startswith("# @package _global_"):
        return [f"{path} must begin with the line `# @package _global_`: a study sets keys of the whole configuration"]
    if not isinstance(content, dict):
        return [f"{path} must hold keys and values: sweep, study, …"]
    known = {*_load(folders, CONFIG_NAME), *GROUPS} - {"plan_path", "shard_id"}
    problems = [f"{path}: {did_you_mean('key', key, known)}" for key in content if key not in known]
    if not problems and all(file.get("study") is None for file in _study_files(name, folders)):
        problems.append(f"{path} has no `study:` with its grids, so that it would be one trial")
    return problems


def _problem_of_setting(key: str, value: Any, known: Mapping[str, Any], choices: _Choices, folders: Sequence[Path]) -> str | None:
    """Why a study's file cannot set a key to a value; None if it can.  What the base's component lacks, Hydra would only add to that."""
    group = key.partition(".")[0]
    if group == "hydra":
        return None
    if key in GROUPS:
        return f"{key}: {value} is a choice, which stands on the defaults list: `- override /{key}: {value}`"
    if key in AXIS_KEYS and isinstance(value, list):
        return f"{key}: {value} is an axis, which stands in a grid of study.grids"
    is_suite = group == "task" and "task.suite" in known
    if key not in known and group in SECTIONS and not is_suite and key in _known_keys(folders, {each: [] for each in GROUPS}):
        return f"{group}={choices.base[group]} has no {key.partition('.')[2]}: write it as an axis, {key}: [{value}], where {group} varies"
    return _problem_of_key(key, value, known, choices, folders)


# --- the request ----------------------------------------------------------------------------------------------------------


def compose_base(arguments: Sequence[str]) -> DictConfig:
    """Compose the base configuration outside of a Hydra application (for the command line tool)."""
    arguments = expand_shorthand(arguments)
    check_command_line(arguments)
    arguments = spread_options(arguments)
    fixed = [a for a in arguments if not OverridesParser.create().parse_override(a).is_sweep_override()]
    with initialize_config_dir(config_dir=str(product_root() / "conf"), version_base="1.3"):
        try:
            return compose(CONFIG_NAME, overrides=fixed, return_hydra_config=True)
        except HydraException as error:
            raise ConfigurationError(str(error)) from error


def search_folders(hydra: Any) -> list[Path]:
    """The folders in which Hydra finds yaml files, in order; `hydra` is Hydra's own node of a composed configuration."""
    found = [_folder_of(f"{source.schema}://{source.path}") for source in hydra.runtime.config_sources]
    return [folder for folder in found if folder is not None]


def make_request(cfg: DictConfig, folders: Sequence[Path], arguments: Sequence[str]) -> Request:
    """The request behind a composed configuration and the overrides that were typed."""
    base = plain(cfg)
    parsed = OverridesParser.create().parse_overrides(spread_options(arguments))
    overrides = [o for o in parsed if o.key_or_group != "sweeps" and not o.is_hydra_override()]
    problems: list[str] = []
    axes, typed = _split(overrides, folders, problems)
    study = next((name for override in parsed for name in _study_names(override)), None)
    if study is None and base["study"] is None:
        grids = _command_line_grid(axes)
    else:
        origin = "study" if study is None else f"sweeps/{study}.yaml"
        grids = _fix_typed(refine(_study_grids(base, origin, folders, problems), axes), typed)
        grids = _with_settings(grids, base, [] if study is None else _study_files(study, folders))
    problems += _tasks_set_twice(base, {*typed, *(key for grid in grids for key in grid.keys)})
    if problems:
        raise ConfigurationErrors(problems)
    options = _options(grids, base, folders)
    if "data_type" in typed:
        _refuse_other_name("data_type", typed["data_type"], base["data_type"])
    pins = read_pins(str(base["results_dir"]))
    return Request(base=base, schema=Schema(base, options, typed, pins), grids=grids, typed=typed)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration without Hydra's own node, as plain values."""
    without = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return OmegaConf.to_container(without, resolve=True)  # type: ignore[return-value]


def _split(
    overrides: Iterable[Override], folders: Sequence[Path], problems: list[str]
) -> tuple[dict[str, tuple[Any, ...]], dict[str, Any]]:
    """Sweeps become axes; single values are `typed` (Hydra has composed them already)."""
    axes: dict[str, tuple[Any, ...]] = {}
    typed: dict[str, Any] = {}
    for override in overrides:
        key = override.key_or_group
        if not override.is_sweep_override():
            typed |= _settings(override)
            continue
        try:
            axes[key] = _values(override, _option_names(key, folders))
        except ConfigurationError as error:
            problems.append(str(error))
    return axes, typed


def _fix_typed(grids: tuple[Grid, ...], typed: Mapping[str, Any]) -> tuple[Grid, ...]:
    """A single value typed for an axis of the study replaces that axis (elsewhere Hydra has composed it already)."""
    axis_keys = {key for grid in grids for key in grid.keys}
    return refine(grids, {key: (_hashable(value),) for key, value in typed.items() if key in axis_keys})


def _command_line_grid(axes: Mapping[str, tuple[Any, ...]]) -> tuple[Grid, ...]:
    return (Grid(axes=tuple(Axis(key=key, values=values) for key, values in axes.items()), origin="command line"),)


def _with_settings(grids: tuple[Grid, ...], base: Mapping[str, Any], files: Iterable[Mapping[str, Any]]) -> tuple[Grid, ...]:
    """What a study's file sets of components holds for those that an axis names too, as an axis of one value in grids that do not vary it.

    The value is the composed one: what was typed for the same key has replaced the file's.
    """
    keys = dict.fromkeys(key for file in files for key, _ in _leaves(file) if "." in key and key.split(".")[0] in SECTIONS)
    fixed = [Axis(key=key, values=(_hashable(OmegaConf.select(OmegaConf.create(dict(base)), key)),)) for key in keys]
    return tuple(replace(grid, axes=(*grid.axes, *(axis for axis in fixed if axis.key not in grid.keys))) for grid in grids)


def _tasks_set_twice(base: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """`limit` wins over a task's own limit, which would be dropped without a word."""
    return [
        f"task.{key} and {key} are both given, and {key} holds for every task: give one of them"
        for key in TASK_KEYS
        if f"task.{key}" in keys and (key in keys or base[key] is not None)
    ]


def _study_grids(base: Mapping[str, Any], origin: str, folders: Sequence[Path], problems: list[str]) -> tuple[Grid, ...]:
    study = base["study"]
    if not isinstance(study, Mapping) or not isinstance(study.get("grids"), list) or not study["grids"]:
        problems.append(f"{origin}: study.grids must be a list of grids, each with its axes")
        return ()
    known = ("title", "paper", "grids")
    problems.extend(f"{origin}: {did_you_mean('key', key, known)}" for key in study if key not in known)
    return tuple(_study_grid(grid, f"{origin}, grid {number}", folders, problems) for number, grid in enumerate(study["grids"], 1))


def _study_grid(grid: Any, origin: str, folders: Sequence[Path], problems: list[str]) -> Grid:
    axes: list[Axis] = []
    if not isinstance(grid, Mapping) or set(grid) != {"axes"} or not isinstance(grid["axes"], Mapping):
        problems.append(f"{origin}: a grid has one key, `axes`, with an axis a line; got {grid!r}")
        return Grid(axes=(), origin=origin)
    for key, value in grid["axes"].items():
        if key.split(".")[0] not in AXIS_KEYS:
            problems.append(f"{origin}: {did_you_mean('axis', key, AXIS_KEYS)}")
            continue
        try:
            known = _option_names(key, folders)
            values = _yaml_values(key, value, known)
        except (ConfigurationError, HydraException) as error:
            problems.append(f"{origin}: {error}")
            continue
        if key in SECTIONS:
            problems.extend(f"{origin}: {did_you_mean(key, v, known)}" for v in values if v not in known and not _is_source(v))
        axes.append(Axis(key=str(key), values=values))
    return Grid(axes=tuple(axes), origin=origin)


def _yaml_values(key: str, value: Any, known: Sequence[str]) -> tuple[Any, ...]:
    """An axis in a study: a list, one value, or text in Hydra's sweep grammar."""
    if isinstance(value, str):
        return _values(OverridesParser.create().parse_override(f"{key}={value}"), known)
    values = value if isinstance(value, list) else [value]
    flat: list[Any] = []
    for item in values:
        is_sweep = isinstance(item, str) and "(" in item
        flat += _values(OverridesParser.create().parse_override(f"{key}={item}"), known) if is_sweep else [_hashable(item)]
    return _unique(key, flat)


def _values(override: Override, known: Iterable[str]) -> tuple[Any, ...]:
    """The values of one override, single or swept; a glob must match something."""
    key = override.key_or_group
    if not override.is_sweep_override():
        return (_hashable(override.value()),)
    if not override.is_discrete_sweep():
        raise ConfigurationError(f"{override.input_line}: an interval has no end of values; give a list or range(start,stop,step)")
    parsed = override.value()
    if isinstance(parsed, Glob):
        names = parsed.filter(sorted(known))
        if not names:
            raise ConfigurationError(f"{override.input_line} matches no {key}. Available: {', '.join(sorted(known)) or '(none)'}")
        return tuple(names)
    values = [_element(value) for value in override.sweep_iterator()]
    if any(isinstance(value, (Sweep, Glob)) for value in values):
        raise ConfigurationError(
            f"{override.input_line}: a range, a choice or a glob cannot stand in a list with other values (Hydra's grammar); "
            f"write the values out: {key}=…,…"
        )
    return _unique(key, values)


def _element(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else _hashable(value)


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_element(item) for item in value)
    if isinstance(value, dict):
        raise ConfigurationError(f"an axis value must be a number, a text, a truth value, null or a list; got {value!r}")
    return value


def _unique(key: str, values: Iterable[Any]) -> tuple[Any, ...]:
    found = tuple(dict.fromkeys(values))
    if not found:
        raise ConfigurationError(f"axis {key} has no values")
    return found


# --- yaml files -------------------------------------------------------------------------------------------------------------


def _options(grids: Iterable[Grid], base: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The yaml of every option that an axis names, of the baseline method, and of every member of a suite."""
    wanted: dict[str, set[str]] = {section: set() for section in SECTIONS}
    wanted["method"].add("none")
    for grid in grids:
        for axis in grid.axes:
            if axis.key in SECTIONS:
                wanted[axis.key] |= set(axis.values)
    primary = _load(folders, CONFIG_NAME)
    options = {
        section: {name: _load_option(folders, section, name, primary) for name in sorted(names)} for section, names in wanted.items()
    }
    for config in (base["task"], *list(options["task"].values())):
        for member in suite_members(config):
            options["task"].setdefault(member, _load_option(folders, "task", member, primary))
    return options


def _load_option(folders: Sequence[Path], section: str, name: str, primary: Mapping[str, Any]) -> dict[str, Any]:
    if section == "model" and _is_source(name):
        option, field = _source(name)
        return {**_load_component(folders, "model", option, primary), field: name}
    known = _option_names(section, folders)
    if name not in known:
        raise ConfigurationError(did_you_mean(section, name, known))
    config = _load_component(folders, section, name, primary)
    if section == "data_type":
        _refuse_other_name(section, name, config)
    if "defaults" in config:
        raise ConfigurationError(
            f"conf/{section}/{name}.yaml has a defaults list; components are plain files, so that a grid composes each of them once"
        )
    return config


def _load_component(folders: Sequence[Path], section: str, name: str, primary: Mapping[str, Any]) -> dict[str, Any]:
    """The yaml of one option over what the primary config says of all options of its section, as Hydra merges them."""
    config = _load(folders, f"{section}/{name}")
    common = primary.get(section)
    return OmegaConf.to_container(OmegaConf.merge(common, config)) if common else config  # type: ignore[return-value]


def _refuse_other_name(section: str, stem: str, config: Mapping[str, Any]) -> None:
    """A copied yaml that kept its old name would label its rows as the original's."""
    if config.get("name") != stem:
        raise ConfigurationError(
            f"{section}/{stem}.yaml says name: {config.get('name')}; write name: {stem}, which its rows are labelled with"
        )


def _load(folders: Sequence[Path], name: str) -> dict[str, Any]:
    resolve = name != CONFIG_NAME  # the primary config refers to Hydra's own keys
    return OmegaConf.to_container(OmegaConf.load(_find(folders, name)), resolve=resolve)  # type: ignore[return-value]


def _find(folders: Sequence[Path], name: str) -> Path:
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise ConfigurationError(f"no file {name}.yaml in {', '.join(str(f) for f in folders)}")


def _option_names(group: str, folders: Sequence[Path]) -> list[str]:
    """Names of a group's options in all folders of the search path; empty for a key that is no group."""
    if not group.replace("_", "").isalnum():
        return []
    found = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    return sorted(found)


def _exists(folders: Sequence[Path], group: str, name: str) -> bool:
    return any((folder / group / f"{name}.yaml").is_file() for folder in folders)
