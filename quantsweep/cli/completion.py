"""`quantsweep completion bash|zsh`: what a shell needs to complete commands, sweeps, groups and their choices.

    eval "$(quantsweep completion bash)"        in ~/.bashrc; zsh: in ~/.zshrc, after compinit

The shell then asks `quantsweep completion words` at each TAB, with the line in COMP_LINE, and is given one candidate a line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantsweep.cli._sweep import sweep_names
from quantsweep.composing.components import CONFIG_NAME, GROUPS, load_yaml, option_names
from quantsweep.storage.paths import product_root
from quantsweep.tables.filters import PLAN_COLUMNS

ASK = "complete -o nospace -C 'quantsweep completion words' quantsweep"
SCRIPTS = {"bash": ASK, "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{ASK}"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("shell", choices=(*SCRIPTS, "words"), help="the shell; words: the candidates for the line in COMP_LINE")
    parser.add_argument("word", nargs="*", help=argparse.SUPPRESS)  # what bash adds: the command, the word, the one before
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print a script, or candidates."""
    lines = [SCRIPTS[arguments.shell]] if arguments.shell in SCRIPTS else candidates(os.environ.get("COMP_LINE", ""))
    print(json.dumps(lines) if arguments.json else "\n".join(lines))
    return 0


def candidates(line: str) -> list[str]:
    """What the last word of a line may become.

    Shells complete what stands behind the last "=", since they break words there.
    """
    from quantsweep.cli.main import COMMANDS

    words = line.split()
    now = "" if line.endswith(" ") or not words else words.pop()
    if len(words) <= 1:
        return _beginning(now, (f"{name} " for name in COMMANDS))
    if words[1] not in COMMANDS:
        return []
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"quantsweep.cli.{words[1]}").configure(parser)
    names = {action.dest for action in parser._actions}
    if now.startswith("-"):
        return _beginning(now, (f"{option} " for action in parser._actions for option in action.option_strings))
    if "overrides" in names:
        return _overrides(now)
    if len(words) == 2 and "sweep" in names and "trial" not in names:
        return _beginning(now, (f"{name} " for name in sweep_names(argparse.Namespace(results_dir="results"))))
    return _beginning(now, (f"{column}=" for column in PLAN_COLUMNS)) if "filters" in names else []


def _overrides(now: str) -> list[str]:
    folders = [product_root() / "conf", product_root()]
    key, equals, value = now.partition("=")
    if not equals:
        keys: Mapping[str, object] = load_yaml(folders, CONFIG_NAME)
        return _beginning(now, ("+sweeps=", *(f"{name}=" for name in (*GROUPS, *keys) if name not in ("defaults", "hydra"))))
    first, comma, last = value.rpartition(",")
    return [first + comma + name for name in _beginning(last, _choices(key.lstrip("+"), folders))]


def _choices(group: str, folders: list[Path]) -> list[str]:
    return option_names(group, folders) if group in (*GROUPS, "sweeps") else []


def _beginning(start: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(start)})
