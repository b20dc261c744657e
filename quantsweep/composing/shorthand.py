"""What people type, written out as Hydra's grammar reads it: each rewriting says the same thing in other signs.

    model=/a/folder                  model=local model.path=/a/folder
    model=organisation/name          model=hub model.hub_id=organisation/name
    bit_width=[3,4]                  bit_width=3,4
    bit_width='4'                    bit_width=4
    method.options.fraction=0.1      rounding.options.fraction=0.1
    task.limit=3                     limit=3                  (they mean the same, and a suite has no limit of its own)
    sweep=1e5  cluster.partition=3   sweep='1e5'  cluster.partition='3'
    +tag=3                           tag='3'
    results_dir=/größe (alt)/x       results_dir='/größe (alt)/x'
    task_path=/my/tasks              the same, and its tasks are options of the group `task`

Written out twice is the same as once.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from quantsweep.checkpoints.sources import is_source, source_of
from quantsweep.composing.command_line import search_folder
from quantsweep.composing.components import OLD_OPTIONS, find_yaml, has_option, option_key
from quantsweep.composing.own_tasks import options_folder, write_options
from quantsweep.planning.schema import AXIS_KEYS, LIST_KEY, SECTIONS, TASK_KEYS
from quantsweep.storage.paths import is_folder, product_root

TEXT_KEYS = frozenset(
    {
        *("sweep", "results_dir", "task_path", "tag", "model.name"),
        *(f"cluster.{key}" for key in ("partition", "account", "qos", "constraint", "exclude", "python")),
    }
)
"""Keys whose value is text whatever it looks like: a name of digits is no number, a comma in it makes no list."""
NUMBER_KEYS = frozenset({*AXIS_KEYS} - {*SECTIONS})
"""Keys of numbers and single words, which quotes do not change."""
WORDS = ("null", "true", "false")
_PLAIN = re.compile(r"[\w/.@%~+:-]+", re.ASCII)


def expand_shorthand(arguments: Sequence[str]) -> list[str]:
    """A command line as Hydra understands it; flags and what cannot be read are left as they are.

    >>> expand_shorthand(["model=org/name", "bit_width=[3,4]"])
    ['model=hub', 'model.hub_id=org/name', 'bit_width=3,4']
    """
    return _with_own_tasks([written for argument in arguments for written in _written_out(argument)])


def _with_own_tasks(arguments: list[str]) -> list[str]:
    """The same words with the yamls of the user's own tasks on Hydra's search path."""
    folder = _task_path(arguments)
    if folder is None or not is_folder(folder):
        return arguments
    number = next((n for n, argument in enumerate(arguments) if argument.startswith("hydra.searchpath=[")), None)
    places = [] if number is None else yaml.safe_load(arguments[number].partition("=")[2]) or []
    own = [found for entry in places if (found := search_folder(str(entry))) is not None]
    known = [product_root() / "conf", *(each for each in own if not each.is_relative_to(options_folder()))]
    place = write_options(folder, known, _typed_tasks(arguments))
    if place is None or place in own:
        return arguments
    written = ",".join(quoted(str(entry)) for entry in (*places, f"file://{place}"))
    search = f"hydra.searchpath=[{written}]"
    return [*arguments, search] if number is None else [*arguments[:number], search, *arguments[number + 1 :]]


def _typed_tasks(arguments: Sequence[str]) -> list[str]:
    """The names that are typed for the task, or within its suite."""
    values = (value for key, _, value in (argument.partition("=") for argument in arguments) if key in ("task", "task.suite"))
    return [unquoted(name.strip()) for value in values for name in value.strip("[]").split(",") if name]


def _task_path(arguments: Sequence[str]) -> Path | None:
    """The folder of the user's own tasks, as it is typed, or as the study's file has it."""
    words = {key.lstrip("+"): unquoted(value) for key, _, value in (argument.partition("=") for argument in arguments)}
    folders = [product_root() / "conf", product_root()]
    path: object = words.get("task_path")
    if path is None and has_option(folders, "sweeps", name := words.get("sweeps", "")):
        with contextlib.suppress(yaml.YAMLError):  # said where the file is checked
            content = yaml.safe_load(find_yaml(folders, f"sweeps/{name}").read_text(errors="replace"))
            path = content.get("task_path") if isinstance(content, dict) else None
    return Path(path).expanduser() if isinstance(path, str) and path else None


def _written_out(argument: str) -> list[str]:
    typed, sign, value = argument.partition("=")
    key = typed.lstrip("+")
    if not sign or typed.startswith(("-", "~")):
        return [argument]
    if key.startswith(OLD_OPTIONS):
        return _written_out(f"{option_key(key)}={value}")
    if key in AXIS_KEYS and key != LIST_KEY and value.startswith("[") and value.endswith("]") and len(value) > 2:
        value = ",".join(item.strip() for item in split_list(value[1:-1]))
    if key in ("model", "model.path"):
        return _model(key, value, typed)
    if key.removeprefix("task.") in TASK_KEYS and key.startswith("task.") and value != "null":
        return _written_out(f"{key.removeprefix('task.')}={value}")
    if key in NUMBER_KEYS:
        return [f"{typed}={','.join(unquoted(item) for item in split_list(value))}"]
    if key == "tag":
        typed = key  # a plus does no harm, also where a study's file has a tag already
    if key in TEXT_KEYS:
        return [f"{typed}={quoted(value)}"]
    if key == "hydra.searchpath" and value.startswith("[") and value.endswith("]"):
        return [f"{typed}=[{','.join(quoted(item.strip()) for item in split_list(value[1:-1]))}]"]
    return [f"{typed}={value}"]


def _model(key: str, value: str, typed: str) -> list[str]:
    """One source becomes the yaml and the key that takes it; of several each is put in quotes if it needs them."""
    items = [value] if is_folder(Path(value).expanduser()) or value.startswith("glob(") else split_list(value)
    if len(items) == 1 and key == "model" and is_source(source := unquoted(value)) and not value.startswith("glob("):
        option, field = source_of(source)
        return [f"model={option}", f"model.{field}={quoted(source)}"]
    return [f"{typed}={','.join(quoted(item) if is_source(item) and not item.startswith('glob(') else item for item in items)}"]


def split_list(text: str) -> list[str]:
    """The parts between commas, except those in quotes or brackets.

    >>> split_list("a,'b,c',d(e,f)")
    ['a', "'b,c'", 'd(e,f)']
    """
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def unquoted(value: str) -> str:
    """A text without the quotes around it."""
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def quoted(value: str) -> str:
    """A text in quotes, unless Hydra reads it as the same text without; quoted text, null and truth values stay."""
    if value in (*WORDS, "") or unquoted(value) != value:
        return value
    if _PLAIN.fullmatch(value) and _is_text(value):
        return value
    quote = "'" if "'" not in value else '"'
    return f"{quote}{value.replace(quote, chr(92) + quote)}{quote}"


def _is_text(value: str) -> bool:
    try:
        return isinstance(OverridesParser.create().parse_override(f"key={value}").value(), str)
    except HydraException:
        return False
