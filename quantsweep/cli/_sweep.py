"""The argument that most commands share: which sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from quantsweep.errors import ResultsError, did_you_mean
from quantsweep.storage.paths import SweepFolder


def add_sweep(parser: argparse.ArgumentParser, *, option: bool = False) -> None:
    """Add `SWEEP` (or `--sweep`) and `--results-dir`."""
    if option:
        parser.add_argument("--sweep", default=None, help="name or folder of the sweep (default: look in all of them)")
    else:
        parser.add_argument("sweep", help="name or folder of the sweep")
    add_results_dir(parser)


def add_results_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--results-dir`."""
    parser.add_argument("--results-dir", default="results", help="where sweeps are (default: results)")


def find_sweep(arguments: argparse.Namespace) -> SweepFolder:
    """The folder of the sweep that was named; raises ResultsError with the nearest name."""
    for candidate in (Path(arguments.results_dir) / arguments.sweep, Path(arguments.sweep)):
        if (candidate / "plan").is_dir():
            return SweepFolder(candidate.resolve())
    place = f"in {arguments.results_dir}; give another place with --results-dir"
    raise ResultsError(f"{did_you_mean('sweep', arguments.sweep, sweep_names(arguments))} ({place})")


def sweep_names(arguments: argparse.Namespace) -> list[str]:
    """Names of all sweeps under the results folder."""
    return sorted(path.parent.name for path in Path(arguments.results_dir).glob("*/plan"))
