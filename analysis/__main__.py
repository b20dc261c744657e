"""`python -m analysis results/quickstart`: the table and the figure of a finished sweep."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import quantsweep
from analysis.figures import bits_against_size
from analysis.tables import HEADLINE, by_bit_width
from quantsweep.errors import QuantsweepError


def main(argv: list[str] | None = None) -> int:
    """Print the table and write `<metric>.png` and `.svg` beside the results."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description="Print a sweep's table and draw its figure.")
    parser.add_argument("sweep", type=Path, help="folder of the sweep, such as results/quickstart")
    parser.add_argument("--metric", default=HEADLINE, help=f"metric to show (default: {HEADLINE})")
    arguments = parser.parse_args(argv)
    try:
        results = quantsweep.load_results(arguments.sweep)
    except QuantsweepError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.metric not in set(results["metric"]):
        print(f"no rows with metric '{arguments.metric}'. There are: {', '.join(sorted(set(results['metric'])))}", file=sys.stderr)
        return 1
    table = by_bit_width(results, metric=arguments.metric)
    print(f"\n{arguments.metric.replace('_', ' ')}, mean over {table.attrs['num_models']} models\n")
    print(table.round(4).to_string())
    figure = bits_against_size(results, metric=arguments.metric)
    for suffix in ("png", "svg"):
        figure.savefig(arguments.sweep / f"{arguments.metric}.{suffix}", dpi=150)
    print(f"\nfigure: {arguments.sweep / arguments.metric}.png   data: quantsweep.load_results('{arguments.sweep}')")
    return 0


if __name__ == "__main__":
    sys.exit(main())
