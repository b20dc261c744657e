"""`python -m analysis results/quickstart`: the table and the figure of a finished sweep."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import quantsweep
from analysis.figures import bits_against_size
from analysis.selection import HEADLINE
from analysis.tables import by_bit_width
from quantsweep.errors import QuantsweepError
from quantsweep.words import count


def main(argv: list[str] | None = None) -> int:
    """Print the table and write `<metric>.png` and `.svg` beside the results."""
    arguments = _parser().parse_args(argv)
    try:
        _show(arguments.sweep, arguments.metric, arguments.task, arguments.block_size)
    except QuantsweepError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis", description="Print a sweep's table and draw its figure.")
    parser.add_argument("sweep", type=Path, help="folder of the sweep, such as results/quickstart")
    parser.add_argument("--metric", default=HEADLINE, help=f"metric to show (default: {HEADLINE})")
    parser.add_argument("--task", help="task, or its task_key; needed where several have the metric")
    parser.add_argument("--block-size", default="64", help="block size of the figure: a number, channel or tensor (default: 64)")
    return parser


def _show(sweep: Path, metric: str, task: str | None, block_size: str) -> None:
    results = quantsweep.load_results(sweep)
    table = by_bit_width(results, metric=metric, task=task)
    about = table.attrs
    print(f"\n{metric.replace('_', ' ')} of {about['task']}, mean over {count(about['num_models'], 'model')}, {about['documents']}")
    print(f"standard error of a single row over the documents: {about['mean_stderr']:.2g} on average (column stderr of the results)")
    print("NaN: a model is missing there, or has no number\n")
    print(table.round(4).to_string())
    figure = bits_against_size(results, metric=metric, task=task, block_size=block_size)
    for suffix in ("png", "svg"):
        figure.savefig(sweep / f"{metric}.{suffix}", dpi=150)
    print(f"\nfigure: {sweep / metric}.png   data: quantsweep.load_results('{sweep}')")


if __name__ == "__main__":
    sys.exit(main())
