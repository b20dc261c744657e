"""From a command line to base configuration, options and grids: all that needs Hydra, done once a launch.

Hydra composes the base configuration with everything that was typed as a single value.  The axes (of
the command line and of the study) stay out of it: their values are parsed with Hydra's own grammar
(`3,4,8`, `range(3,9)`, `glob(mini-*)`), and the yaml of each option that an axis names is read once.
What a candidate's configuration then is (`quantsweep.schema`) equals what Hydra would compose for it.

Mistakes in names and keys are found here before Hydra meets them, all at once, with the nearest name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from quantsweep.errors import ConfigurationError, ConfigurationErrors, did_you_mean
from quantsweep.grid import Axis, Grid, refine
from quantsweep.paths import product_root
from quantsweep.pins import read_pins
from quantsweep.schema import AXIS_KEYS, SECTIONS, Schema, unknown_key

GROUPS = (*SECTIONS, "cluster", "tracking")
LAUNCH_KEYS = (
    "sweep",
    "results_dir",
    "task_path",
    "device",
    "batch_size",
    "workers",
    "shard_minutes",
    "max_retries",
    "breaker_trials",
    "budget",
    "assume_dead",
    "trial_timeout_minutes",
    "cluster",
    "tracking",
)
"""Set once a launch; sweeping over them is refused."""
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
        key, _, value = argument.partition("=")
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
    """Raise ConfigurationErrors with every unknown group option and key that was typed, and the nearest names."""
    folders = folders or [product_root() / "conf", product_root()]
    problems: list[str] = []
    chosen: dict[str, list[str]] = {}
    studies: list[str] = []
    overrides: list[Override] = []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            overrides.append(OverridesParser.create().parse_override(argument))
        except HydraException as error:
            problems.append(_unreadable(argument, error))
    for override in overrides:
        if override.key_or_group == "hydra.searchpath":
            own = _own_folders(override.value())
            if own is None:
                return  # not plain folders: Hydra and the schema check what is typed
            problems += [f"hydra.searchpath: {folder} is not a folder" for folder in own if not folder.is_dir()]
            folders = [*folders, *own]
    for override in overrides:
        key = override.key_or_group
        if key not in (*GROUPS, "sweeps") or override.is_delete():
            continue
        known = _option_names(key, folders)
        try:
            names = [str(value) for value in _values(override, known)]
        except ConfigurationError as error:
            problems.append(str(error))
            continue
        chosen[key] = [name for name in names if name in known]
        if key == "sweeps":
            studies += names
            problems += [problem for name in chosen[key] for problem in _study_file_problems(name, folders)]
        problems += [did_you_mean(key, name, known) for name in names if name not in known and not _is_source(name)]
    if len(studies) > 1:
        problems.append(f"one launch runs one study, got {' and '.join(studies)}: launch them one after the other")
    known_keys = _known_keys(folders, chosen)
    for override in overrides:
        key = override.key_or_group
        if key in (*GROUPS, "sweeps") or override.is_hydra_override():
            continue
        if key not in known_keys and not any(key.startswith(f"{free}.") for free in ("cluster", "tracking", "study")):
            problems.append(unknown_key(key, known_keys))
    if problems:
        raise ConfigurationErrors(problems)


def _unreadable(argument: str, error: HydraException) -> str:
    if argument.endswith(",") or "=" not in argument:
        return f"cannot read '{argument}': settings are key=value, and lists have no spaces (bit_width=3,4) or stand in quotes"
    return f"cannot read '{argument}': {str(error).splitlines()[0]}"


def _own_folders(places: Any) -> list[Path] | None:
    """The folders of `hydra.searchpath=[file:///my/conf]`; None where it names something else."""
    if not isinstance(places, list):
        return None
    texts = [str(_element(place)) for place in places]
    plain_paths = [text.removeprefix("file://") for text in texts]
    return None if any("://" in text for text in plain_paths) else [Path(text) for text in plain_paths]


def _study_file_problems(name: str, folders: Sequence[Path]) -> list[str]:
    """What Hydra would say of a study's file in words that do not help."""
    path = next(folder / "sweeps" / f"{name}.yaml" for folder in folders if (folder / "sweeps" / f"{name}.yaml").is_file())
    text = path.read_text(errors="replace")
    try:
        yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        return [f"{path}, line {line}: {error.problem or error}"]
    if not text.lstrip().startswith("# @package _global_"):
        return [f"{path} must begin with the line `# @package _global_`: a study sets keys of the whole configuration"]
    return []


def _known_keys(folders: Sequence[Path], chosen: Mapping[str, list[str]]) -> set[str]:
    base = _load(folders, CONFIG_NAME)
    keys = set(AXIS_KEYS) | {key for key in base if key not in ("defaults", "hydra")}
    keys |= {f"budget.{key}" for key in base["budget"]}
    defaults = {key: value for entry in base["defaults"] if isinstance(entry, dict) for key, value in entry.items()}
    for section in SECTIONS:
        # A study brings axes of its own: any option may be met.
        options = chosen.get(section) or (_option_names(section, folders) if "sweeps" in chosen else [defaults[section]])
        for option in options:
            dotted = _dotted(_load_component(folders, section, option, base))
            keys |= {f"{section}.{key}" for key in dotted if key.split(".")[0] not in FIXED_KEYS.get(section, ())}
    return keys


def _dotted(config: Mapping[str, Any]) -> list[str]:
    found = []
    for key, value in config.items():
        found.append(str(key))
        if isinstance(value, Mapping):
            found += [f"{key}.{inner}" for inner in _dotted(value)]
    return found


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
    return [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]


def make_request(cfg: DictConfig, folders: Sequence[Path], arguments: Sequence[str]) -> Request:
    """The request behind a composed configuration and the overrides that were typed."""
    base = plain(cfg)
    parsed = OverridesParser.create().parse_overrides(spread_options(arguments))
    overrides = [o for o in parsed if o.key_or_group != "sweeps" and not o.is_hydra_override()]
    problems: list[str] = []
    axes, typed = _split(overrides, folders, problems)
    grids = refine(_study_grids(base, _study_origin(arguments), folders, problems), axes) if base["study"] else _command_line_grid(axes)
    if base["study"]:
        grids = _fix_typed(grids, typed)
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
            typed[key] = None if override.is_delete() else override.value()
            continue
        if key in LAUNCH_KEYS or key.split(".")[0] in ("cluster", "tracking", "budget"):
            problems.append(f"{key} is set once a launch and cannot be an axis; got '{override.input_line}'")
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


def _study_origin(arguments: Sequence[str]) -> str:
    names = [a.partition("=")[2] for a in arguments if a.lstrip("+").startswith("sweeps=")]
    return f"sweeps/{names[-1]}.yaml" if names else "study"


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
    if mixed := [value for value in values if isinstance(value, RangeSweep)]:
        step = f",{mixed[0].step}" if mixed[0].step != 1 else ""
        raise ConfigurationError(
            f"{override.input_line}: range({mixed[0].start},{mixed[0].stop}{step}) cannot stand in a list with other values "
            f"(Hydra's grammar); write the values out: {key}=16,32,…"
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
        for member in config.get("suite", ()):
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
    for folder in folders:
        path = folder / f"{name}.yaml"
        if path.is_file():
            resolve = name != CONFIG_NAME  # the primary config refers to Hydra's own keys
            return OmegaConf.to_container(OmegaConf.load(path), resolve=resolve)  # type: ignore[return-value]
    raise ConfigurationError(f"no file {name}.yaml in {', '.join(str(f) for f in folders)}")


def _option_names(group: str, folders: Sequence[Path]) -> list[str]:
    """Names of a group's options in all folders of the search path; empty for a key that is no group."""
    if not group.replace("_", "").isalnum():
        return []
    found = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    return sorted(found)
