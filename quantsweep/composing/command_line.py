"""What was typed: shorthand written out, and mistakes found before Hydra meets them, all at once, with the nearest name.

Hydra drops what it has no use for: lists of keys that are no axis are split off before it composes, of a key given twice one
value stays, keys of a study's file that no component has are added beside them.  Whatever nothing would read is refused here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Sweep
from hydra.errors import HydraException

from quantsweep.checkpoints.sources import is_source, source_of
from quantsweep.checks import shown
from quantsweep.composing.axis_values import override_values, plain_element
from quantsweep.composing.cluster import file_problems as yaml_problems
from quantsweep.composing.components import (
    CONFIG_NAME,
    GROUPS,
    OLD_OPTIONS,
    dotted_keys,
    factors_of,
    find_yaml,
    group_of,
    has_option,
    leaf_settings,
    load_component,
    load_yaml,
    option_key,
    option_names,
)
from quantsweep.composing.yaml_files import problem_of_interpolation, read_mapping
from quantsweep.errors import ConfigurationError, ConfigurationErrors, did_you_mean, unknown_key
from quantsweep.planning.compositions import step_names
from quantsweep.planning.schema import AXIS_KEYS, LIST_KEY, SECTIONS, TASK_KEYS
from quantsweep.storage.paths import is_folder, product_root
from quantsweep.trial.constraints import place_of
from quantsweep.trial.quantization import FACTORS

STUDIES = "studies"
"""The scheme of the product's own place on Hydra's search path: its root, of which Hydra sees `sweeps/` alone."""
FREE_KEYS = "cluster.additional_parameters"
"""Below it anything goes: sbatch knows more options than we do."""
_PLACE = "results, plans and logs go to results_dir/sweep; give results_dir=FOLDER and sweep=NAME"
_BY_SWEEPER = "this is how our sweeper names a shard to a launcher; `quantsweep resume SWEEP` types a launch again"
INSTEAD = {
    **dict.fromkeys(("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir", "hydra.output_subdir"), _PLACE),
    **dict.fromkeys(("plan_path", "shard_id"), _BY_SWEEPER),
}
"""Keys that are there and that nobody's value would reach, and what to do instead."""
FIXED_KEYS = {
    **dict.fromkeys((*FACTORS, "data_type"), ("name", "version", "capabilities", "no_op")),
    "method": ("name", "source", "factors"),
}
"""What a component is, as opposed to what may be chosen."""


def spread_options(arguments: Sequence[str]) -> list[str]:
    """One value becomes an axis where Hydra would put it where it does not belong; it is said twice, since a sweep of one is none.

    A factor and its options are always axes: options reach the steps that have them, whoever chose these, and a list of transforms is
    one value; Hydra would look for an option in the default step.  Options of data types are, in a sweep over these.  In a study, a
    component, or a value of one of its axes, replaces that axis; Hydra would also change the grids without it.

    >>> spread_options(["method=centering,outlier_dependent", "rounding.options.fraction=0.05"])
    ['method=centering,outlier_dependent', 'rounding.options.fraction=0.05,0.05']
    """
    parsed = [None if a.startswith("-") else OverridesParser.create().parse_override(a) for a in arguments]
    axes = _spread_keys([override for override in parsed if override is not None])
    spread: list[str] = []
    for argument, override in zip(arguments, parsed, strict=True):
        is_one = override is not None and not override.is_sweep_override() and not override.is_delete()
        settings = _texts(argument, override) if override is not None and is_one else {}
        spread += [f"{key}={value},{value}" for key, value in settings.items()] if any(map(axes, settings)) else [argument]
    return spread


def as_one_trial(arguments: Sequence[str]) -> list[str]:
    """The words of one trial, which Hydra composes by itself: an option of a factor is no mistake where its default step lacks it.

    >>> as_one_trial(["method=gptq", "rounding.options.damping=0.1"])
    ['method=gptq', '++rounding.options.damping=0.1']
    """
    keys = [argument.lstrip("+").partition("=")[0] for argument in arguments]
    return [
        f"++{argument.lstrip('+')}" if "." in key and _of_factor(key) else argument for key, argument in zip(keys, arguments, strict=True)
    ]


def _texts(argument: str, override: Override) -> dict[str, str]:
    """What one override sets, as it would be typed: `model.resources={gpus: 1, cpus: 4}` sets two keys."""
    if isinstance(override.value(), dict):
        return {key: shown(plain_element(value)) for key, value in dotted_settings(override) if not isinstance(value, dict)}
    key, _, value = argument.lstrip("+").partition("=")
    return {key: value}


def as_typed(argument: str) -> str:
    """Undo `spread_options` for people: `bit_width=4,4` is `bit_width=4`."""
    key, _, value = argument.partition("=")
    half = value[: len(value) // 2]
    return f"{key}={half}" if value == f"{half},{half}" else argument


def _spread_keys(overrides: Sequence[Override]) -> Callable[[str], bool]:
    """Which keys are to be axes though one value of them is typed."""
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    studies = [name for override in overrides for name in study_names(override)]
    if not studies:
        return lambda key: _of_factor(key) or (_is_option(key) and "data_type" in swept)
    folders = [product_root() / "conf", product_root(), *_own_folders(overrides)[0]]
    whole = [name for name in studies if has_option(folders, "sweeps", name) and not _study_file_problems(name, folders)]
    files = [file for name in whole for file in study_files(name, folders)]
    axes = {str(key) for file in files for axes in _grids_of(file) for key in axes}
    chosen = {override.key_or_group for override in overrides} & set(SECTIONS)  # what is said of these is not for the file's
    return lambda key: _of_factor(key) or _is_option(key) or key in axes or key == "method" or key.partition(".")[0] in chosen


def _is_option(key: str) -> bool:
    return key.startswith("data_type.options.")


def _of_factor(key: str) -> bool:
    return key.partition(".")[0] in FACTORS


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
    groups = [f"  {group:<12} {', '.join(option_names(group, folders))}" for group in (*GROUPS, "sweeps")]
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
    roots = {*load_yaml(folders, CONFIG_NAME), *GROUPS, "sweeps"}
    problems += [problem for override in overrides if (problem := _problem_of_form(override, roots)) is not None]
    problems += _given_twice(overrides)
    problems += [
        problem
        for override in overrides
        if (problem := problem_of_interpolation(override.key_or_group, str(override.input_line).partition("=")[2], {*roots, "hydra"}))
    ]
    own, missing = _own_folders(overrides)
    studies = [name for override in overrides for name in study_names(override)]
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
    if key in INSTEAD:
        return f"{line}: {INSTEAD[key]}"
    if override.is_sweep_override():
        is_once = root in roots and root not in AXIS_KEYS and not study_names(override)
        text = line.partition("=")[2] if line is not None else ""
        hint = f" (a text with a comma: '{key}=\"{text}\"')" if root == "cluster" and "," in text else ""
        return f"{key} is set once a launch and cannot be a list; got '{line}'{hint}" if is_once else None
    if root == "hydra":
        return None
    if override.package is not None:
        return f"{line}: a group is chosen without a package ({key}=…)"
    if override.is_delete() and not f"{key}.".startswith(f"{FREE_KEYS}."):
        return f"{line}: keys of conf/config.yaml cannot be deleted; leave it out for the default"
    if root == "study":
        return f"{line}: study is set by a file in sweeps/ (+sweeps=NAME), and its axes are replaced by their own keys (bit_width=3,4)"
    if key in (*AXIS_KEYS, "sweeps") and isinstance(override.value(), dict if key == LIST_KEY else (list, dict)):
        return f"{line}: values of an axis are written as in bit_width=3,4"
    return None


def _given_twice(overrides: Iterable[Override]) -> list[str]:
    """Of a key that is typed twice, one value would be dropped."""
    typed: dict[str, list[str]] = {}
    for override in overrides:
        if override.key_or_group != "sweeps":  # said in words of its own
            text = str(override.input_line).partition("=")[2]
            for key, value in dotted_settings(override):
                typed.setdefault(key, []).append(text if key == override.key_or_group else str(value))
    return [
        f"{key} is given {'twice' if len(values) == 2 else f'{len(values)} times'} ({' and '.join(values)}): "
        + ("write its values with commas" if key.split(".")[0] in AXIS_KEYS else "give it once")
        for key, values in typed.items()
        if len(values) > 1
    ]


def dotted_settings(override: Override) -> list[tuple[str, Any]]:
    """The keys that an override sets, and their values: `budget={gpu_hours: 5}` is `budget.gpu_hours=5`, since Hydra merges mappings."""
    key, value = override.key_or_group, override.value()
    is_mapping = isinstance(value, dict) and key not in AXIS_KEYS
    return list(leaf_settings(value, key)) if is_mapping else [(key, value)]  # type: ignore[arg-type]


def _own_folders(overrides: Iterable[Override]) -> tuple[list[Path], list[str]]:
    """The folders of `hydra.searchpath=[file:///my/conf]`, and what is wrong with them."""
    found: dict[str, Path | None] = {}
    for override in overrides:
        if override.key_or_group == "hydra.searchpath" and not override.is_sweep_override():
            places = override.value()
            if not isinstance(places, list):
                return [], ["hydra.searchpath must be a list: 'hydra.searchpath=[file:///my/conf]'"]
            found |= {str(place): search_folder(str(place)) for place in places}
    folders = [folder for folder in found.values() if folder is not None and is_folder(folder)]
    return folders, [
        f"hydra.searchpath: {text.removeprefix('file://')} is not a folder"
        for text, folder in found.items()
        if folder is None or not is_folder(folder)
    ]


def search_folder(place: str) -> Path | None:
    """The folder of an entry of Hydra's search path; None for one that is no folder."""
    scheme, _, rest = place.rpartition("://")
    if scheme != "pkg":
        return Path(rest) if scheme in ("", "file", STUDIES) else None
    try:
        spec = importlib.util.find_spec(rest.replace("/", "."))
    except (ImportError, ValueError):
        return None
    return None if spec is None or not spec.submodule_search_locations else Path(next(iter(spec.submodule_search_locations)))


# --- names and keys, typed or in a study's file -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """What each group may come to.

    base: the option of each group that Hydra composes.  options: those that its axes name, or the base's.
    """

    base: Mapping[str, str]
    options: Mapping[str, Sequence[str]]


def _unknown_names(overrides: Sequence[Override], studies: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Every choice and every key that does not exist or that nothing would read, typed or in the study's file."""
    there = option_names("sweeps", folders)
    problems = [did_you_mean("sweeps", name, there) for name in studies if not has_option(folders, "sweeps", name)]
    files: list[dict[str, Any]] = []
    for name in studies:
        if has_option(folders, "sweeps", name):
            broken = _study_file_problems(name, folders)
            problems += broken
            files += [] if broken else study_files(name, folders)
    typed = _typed_choices(overrides, folders, problems)
    choices = _choices(typed, files, load_yaml(folders, CONFIG_NAME), folders)
    broken = _yaml_problems(choices, folders)
    if broken:
        return [*problems, *broken]
    known = _known_keys(folders, choices.options)
    for override in overrides:
        key = override.key_or_group
        if key in (*GROUPS, "sweeps") or key.split(".")[0] == "study" or override.is_hydra_override() or override.package is not None:
            continue
        found = (_problem_of_key(leaf, value, known, choices, folders) for leaf, value in dotted_settings(override))
        problems += [problem for problem in found if problem is not None]
    for number in range(len(files)):
        problems += [f"sweeps/{studies[0]}.yaml: {problem}" for problem in _problems_of_settings(files[number:], folders)]
    return problems


def _yaml_problems(choices: _Choices, folders: Sequence[Path]) -> list[str]:
    """What the chosen files say that YAML would take for something else: numbers in all of them, everything in the cluster's."""
    roots = {*load_yaml(folders, CONFIG_NAME), *GROUPS, "hydra"}
    chosen = {group: names for group, names in choices.options.items() if group != "cluster"} | {"cluster": [choices.base["cluster"]]}
    return [
        problem
        for group, names in chosen.items()
        for name in names
        for problem in yaml_problems(find_yaml(folders, f"{group}/{name}"), roots if group == "cluster" else None)
    ]


def _problems_of_settings(files: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> list[str]:
    """What the first of a study's files sets to no effect in the components that it, or what it stands on, has chosen.

    Whoever types others on top leaves behind what these do not have.
    """
    choices = _choices({}, files, load_yaml(folders, CONFIG_NAME), folders)
    supplied = _supplied([choices.base["method"]], folders)
    known = _known_keys(folders, {group: [option, *supplied.get(group, ())] for group, option in choices.base.items()})
    found = (_problem_of_setting(key, value, known, choices, folders) for key, value in leaf_settings(files[0]))
    return [problem for problem in found if problem is not None]


def _typed_choices(overrides: Iterable[Override], folders: Sequence[Path], problems: list[str]) -> dict[str, list[str]]:
    """The options that were typed for each group; unknown ones are `problems`."""
    chosen: dict[str, list[str]] = {}
    for override in overrides:
        key = override.key_or_group
        unusual = dict if key == LIST_KEY else (list, dict)
        if key not in GROUPS or override.is_delete() or override.package is not None or isinstance(override.value(), unusual):
            continue
        if key not in SECTIONS and override.is_sweep_override():
            continue
        known = option_names(key, folders)
        try:
            values = override_values(override, known)
            names = [
                "null" if name is None else str(name) for value in values for name in (value if isinstance(value, tuple) else (value,))
            ]
        except ConfigurationError as error:
            problems.append(str(error))
            continue
        options = [source_of(name)[0] if key == "model" and is_source(name) else name for name in names]
        problems += [did_you_mean(key, name, known) for name in options if not has_option(folders, key, name)]
        chosen[key] = [name for name in options if has_option(folders, key, name)]
    return chosen


def _choices(
    typed: Mapping[str, Sequence[str]], files: Sequence[Mapping[str, Any]], config: Mapping[str, Any], folders: Sequence[Path]
) -> _Choices:
    """What each group may come to: typed, else on the study's defaults list, else on that of config.yaml."""
    base: dict[str, str] = {}
    for file in (config, *reversed(files)):
        entries = [entry for entry in file.get("defaults") or () if isinstance(entry, Mapping)]
        base |= {group_of(key): str(value) for entry in entries for key, value in entry.items()}
    base = {group: base[group] for group in GROUPS} | {group: names[0] for group, names in typed.items() if len(names) == 1}
    axes = {str(key) for file in files for grid in _grids_of(file) for key in grid}
    options = {group: list(typed.get(group, () if group in axes else (base[group],))) for group in GROUPS}
    for group, names in _supplied(options["method"], folders).items():
        if group not in typed and options[group]:
            options[group] += names
    if files:  # grids without the axis keep the base's
        options = {group: [*names, base[group]] if names else [] for group, names in options.items()}
    return _Choices(base=base, options=options)


def _supplied(methods: Sequence[str], folders: Sequence[Path]) -> dict[str, list[str]]:
    """The options of each group that methods may choose: those of all methods, where an axis may name any."""
    found: dict[str, list[str]] = {}
    for method in methods or option_names("method", folders):
        for content in _readable(folders, f"method/{method}"):
            for key, value in factors_of(content).items():
                if key in SECTIONS:
                    found.setdefault(key, []).extend(name for name in step_names(key, value) if has_option(folders, key, name))
    return found


def _grids_of(file: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The axes of each grid of a study's file, as far as it is well formed."""
    study = file.get("study")
    grids = study.get("grids") if isinstance(study, Mapping) else None
    axes = [grid.get("axes") for grid in grids if isinstance(grid, Mapping)] if isinstance(grids, list) else []
    return [each for each in axes if isinstance(each, Mapping)]


def _known_keys(folders: Sequence[Path], options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Each key that may be set, with a value that it has in a yaml; a group without `options` may come to any."""
    config = load_yaml(folders, CONFIG_NAME)
    known = dict.fromkeys(AXIS_KEYS) | {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
    known |= {f"budget.{key}": value for key, value in config["budget"].items()}
    for group in GROUPS:
        for option in options[group] or option_names(group, folders):
            for component in _components(folders, group, option, config) if options[group] else _of_any(folders, group, option, config):
                fixed = FIXED_KEYS.get(group, ())
                place = place_of(group, option)
                known |= {f"{place}.{key}": value for key, value in dotted_keys(component).items() if key.split(".")[0] not in fixed}
    return known


def _of_any(folders: Sequence[Path], group: str, option: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same of an option that nobody chose: a file that cannot be read is no concern of this launch."""
    return _components(folders, group, option, config) if _readable(folders, f"{group}/{option}") else []


def _readable(folders: Sequence[Path], name: str) -> list[dict[str, Any]]:
    """What a yaml holds that nobody chose; nothing where it cannot be read."""
    try:
        content = load_yaml(folders, name)
    except ConfigurationError:
        return []
    return [content]


def _components(folders: Sequence[Path], group: str, option: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The yaml of an option; a cluster or tracking of one's own may leave keys of its kind at their defaults, or stand on another."""
    own = load_component(folders, group, option, config)
    if group in SECTIONS:
        return [own]
    if "kind" in own:
        return [own, *(load_yaml(folders, f"{group}/{kind}") for kind in [own["kind"]] if has_option(folders, group, kind))]
    return [
        own,
        *(component for other in option_names(group, folders) if other != option for component in _readable(folders, f"{group}/{other}")),
    ]


def _problem_of_key(key: str, value: Any, known: Mapping[str, Any], choices: _Choices, folders: Sequence[Path]) -> str | None:
    """Why a key cannot be set to a value; None if it can."""
    group, _, name = key.partition(".")
    if key.startswith(f"{FREE_KEYS}.") or (key == FREE_KEYS and value is None):  # null: none of those that the yaml has
        group, name, key, value = "cluster", "additional_parameters", FREE_KEYS, {}
    if group == "task" and "task.suite" in known and name != "suite":
        instead = f"use {name}=…, which holds for all its tasks" if name in TASK_KEYS else "set it in the yaml of each task"
        return f"a suite of tasks has no {name}: {instead} (task={choices.base['task']})"
    if key.startswith(OLD_OPTIONS):  # typed ones are rewritten; a study's file is a person's own
        return f"{key} is {option_key(key)} now, since a method names its rounding"
    if key not in known:
        return _no_such_key(group, name, known, choices, folders) if name and group in GROUPS else unknown_key(key, known)
    if isinstance(value, (Mapping, Sweep, Glob)):
        return None
    if isinstance(known[key], Mapping):
        inner = next(iter(known[key]), "NAME")
        return f"{key} has keys of its own: {key}.{inner}=…; got {shown(value)}"
    if isinstance(known[key], list) and not isinstance(value, list):
        return f"{key} must be a list: '{key}=[…,…]'; got {value!r}"
    return None


def _no_such_key(group: str, name: str, known: Mapping[str, Any], choices: _Choices, folders: Sequence[Path]) -> str:
    """The message for a key that the chosen option of a group does not have: who has it, or the nearest."""
    chosen = choices.base[group]
    key = f"{group}.{name}"
    if group in SECTIONS:
        return unknown_key(key, known)
    having = [
        option
        for option in option_names(group, folders)
        if any(
            key.partition(".")[2] in dotted_keys(component)
            for component in _of_any(folders, group, option, load_yaml(folders, CONFIG_NAME))
        )
    ]
    if having:
        return f"{group}={chosen} has no {name}; give {group}={' or '.join(having)} first"
    message = did_you_mean(f"key of {group}={chosen}", name, [each.partition(".")[2] for each in known if each.startswith(f"{group}.")])
    return f"{message}. Keys and passwords belong into wandb's own login" if group == "tracking" else message


# --- the file of a study ----------------------------------------------------------------------------------------------


def study_names(override: Override) -> list[str]:
    """The studies that an override names: one, or several by comma (which is refused in words of its own)."""
    value = override.value()
    if override.key_or_group != "sweeps" or override.is_delete() or isinstance(value, (list, dict)):
        return []
    if not override.is_sweep_override():
        return [str(value)]
    return [str(plain_element(name)) for name in value.list] if isinstance(value, ChoiceSweep) and len(value.list) > 1 else []


def study_files(name: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What a study's file says, and before it comes what the studies on its defaults list say."""
    return _study_files(name, folders, ())


def _study_files(name: str, folders: Sequence[Path], below: tuple[str, ...]) -> list[dict[str, Any]]:
    path = find_yaml(folders, f"sweeps/{name}")
    if name in below:
        raise ConfigurationError(f"{path} stands on itself ({' → '.join((*below, name))}): take it off the defaults list")
    own = read_mapping(path, resolve=False)
    defaults = own.get("defaults") or []
    if not isinstance(defaults, list):
        raise ConfigurationError(f"{path}: defaults is a list (- override /task: mini), got {defaults!r}")
    above = [entry.rpartition("/")[2] for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    return [own, *(file for entry in above for file in _study_files(entry, folders, (*below, name)))]


def _study_file_problems(name: str, folders: Sequence[Path]) -> list[str]:
    """What Hydra would say of a study's file in words that do not help, or not at all."""
    path = find_yaml(folders, f"sweeps/{name}")
    try:
        files = study_files(name, folders)
    except ConfigurationError as error:
        return [str(error)]
    if not path.read_text().lstrip("\ufeff").lstrip().startswith("# @package _global_"):
        return [f"{path} must begin with the line `# @package _global_`: a study sets keys of the whole configuration"]
    content = files[0]
    known = {*load_yaml(folders, CONFIG_NAME), *GROUPS} - {"plan_path", "shard_id"}
    problems = [f"{path}: {did_you_mean('key', key, known)}" for key in content if key not in known]
    problems += [
        f"{path}: {problem}"
        for key, value in leaf_settings(content)
        if (problem := problem_of_interpolation(key, value, {*known, "hydra"})) is not None
    ]
    if not problems and all(file.get("study") is None for file in files):
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
