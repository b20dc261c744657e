"""From the shell: the table and the figure of a sweep, or a study.

    python -m analysis results/quickstart                           any sweep: one metric
    python -m analysis k_bit_inference results/k_bit_inference      a study: its tables, claims and figures

Figures are written into the sweep's folder, as PNG and SVG.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import quantsweep
from analysis import k_bit_report
from analysis.figures import bits_against_size, save
from analysis.selection import HEADLINE
from analysis.tables import by_bit_width
from quantsweep.errors import ConfigurationError, QuantsweepError, did_you_mean
from quantsweep.words import count

STUDIES = {"k_bit_inference": k_bit_report.show}


def main(argv: list[str] | None = None) -> int:
    """Print the table and write `<metric>.png` and `.svg` beside the results; or what the named study prints and writes."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments and arguments[0] in STUDIES:
            STUDIES[arguments[0]](arguments[1:])
        elif _names_a_study(arguments):
            raise ConfigurationError(f"{did_you_mean('study', arguments[0], STUDIES)} (there is no folder {arguments[0]} either)")
        else:
            asked = _parser().parse_args(arguments)
            _show(asked.sweep, asked.metric, asked.task, asked.block_size)
    except QuantsweepError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _names_a_study(arguments: Sequence[str]) -> bool:
    """True for two words of which the first is no folder: `<study> <folder>`, since of a sweep one folder is shown."""
    return len(arguments) > 1 and not any(word.startswith("-") for word in arguments[:2]) and not Path(arguments[0]).is_dir()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Print a sweep's table and draw its figure.",
        epilog=f"Studies: python -m analysis {{{','.join(STUDIES)}}} <folders of sweeps>",
    )
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
    print(table.round(4).to_string(line_width=shutil.get_terminal_size((120, 24)).columns))
    figure = bits_against_size(results, metric=metric, task=task, block_size=block_size)
    save(figure, sweep / metric)
    print(f"\nfigure: {sweep / metric}.png, .svg   data: quantsweep.load_results('{sweep}')")


if __name__ == "__main__":
    sys.exit(main())
