"""`quantsweep <command>`: one module a subcommand (COMMANDS).

Each command is a module of this package with `HELP`, `configure(parser)` and `run(arguments)`; it is
imported only when it is asked for, so that `quantsweep status` starts fast.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from importlib import metadata

from quantsweep.errors import QuantsweepError
from quantsweep.exit_status import ExitStatus
from quantsweep.program import as_program
from quantsweep.running.environment import git_state
from quantsweep.storage.files import own_umask
from quantsweep.storage.paths import product_root

COMMANDS = {
    "plan": "what a launch would run, submit and skip; changes nothing",
    "status": "how far a sweep is, and why trials failed",
    "watch": "the same, live, until nothing is left to happen",
    "list": "the sweeps here, and how much of each is done",
    "show": "what a sweep asked, in the words that were typed",
    "resume": "the same words again: what is missing, failed or held runs",
    "compare": "whether one configuration is better than another, on the same examples, and how sure that is",
    "logs": "the log of one trial",
    "cancel": "take a sweep's jobs out of the Slurm queue",
    "rerun": "forget results, so that the launch command runs them again",
    "compact": "fold a sweep's many small files into few",
    "prewarm": "fetch and pin a study's models and data, so that workers need no network",
    "completion": "complete words of this command in a shell",
    "doctor": "what this machine or cluster lacks, and the limits it has",
}
WORDS = ("overrides", "filters")
"""Arguments of commands that take any number of key=value."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status.  Errors of the user are one message, not a traceback."""
    own_umask()
    with as_program():
        return _run(argv)


def _run(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="quantsweep",
        description="Plan and watch sweeps of language-model quantization. Launching is `python launch.py …`; "
        "reading results is `quantsweep.load_results` in Python.",
    )
    parser.add_argument("--version", action="version", version=product_version() if argv[:1] == ["--version"] else "")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in argv[:1]:
            importlib.import_module(f"quantsweep.cli.{name}").configure(sub)
    arguments, rest = parser.parse_known_args(argv)
    words = next((getattr(arguments, name) for name in WORDS if hasattr(arguments, name)), None)
    if rest and (words is None or any(r.startswith("-") for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:  # words after an option: argparse gives up on them, people do not
        words += rest
    try:
        return int(importlib.import_module(f"quantsweep.cli.{arguments.command}").run(arguments))
    except QuantsweepError as error:
        print(error, file=sys.stderr)
    except OSError as error:  # a name that is too long, a file that may not be read: the surroundings, not the program
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"{error.filename or arguments.command}: {error.strerror or error}", file=sys.stderr)
    return ExitStatus.REFUSED


def product_version() -> str:
    """The version of the product, and the commit where it runs from a checkout."""
    commit, changes = git_state(product_root())
    return f"quantsweep {metadata.version('quantsweep')}" + (f" (commit {commit[:12]}{', changed' if changes else ''})" if commit else "")


if __name__ == "__main__":
    sys.exit(main())
