"""From the shell: what results say.

    python -m analysis                                      what there is to ask
    python -m analysis quickstart                           any sweep (or several), by name or folder: table and figure of one metric
    python -m analysis k_bit_inference k_bit_inference      a study on a sweep (or several): tables, claims and figures
    python -m analysis table results.csv --metric acc       any table, ours or anybody's: degradation, equal bits, frontier, effects
    python -m analysis law results.csv --metric loss        a scaling law fitted to it

Figures are written into the sweep's folder, as PNG and SVG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import quantsweep
from analysis import k_bit_report, table_report
from analysis.command import in_full, results_of, sweep_folder
from analysis.figures import bits_against_size, blocks_of, save
from analysis.selection import BASELINE, HEADLINE, select
from analysis.tables import against_baseline, by_bit_width
from quantsweep.errors import ConfigurationError, QuantsweepError, did_you_mean
from quantsweep.program import as_program
from quantsweep.words import count

STUDIES = {"k_bit_inference": k_bit_report.show}
DEFAULT_BLOCK = "64"
QUESTIONS = {"table": table_report.show_table, "law": table_report.show_law}


def main(argv: list[str] | None = None) -> int:
    """Print the table and write `<metric>.png` and `.svg` beside the results; or what the named study prints and writes."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if not arguments:
            _parser().print_help()
        elif arguments[0] in QUESTIONS and not _is_sweep(arguments):
            QUESTIONS[arguments[0]](arguments[1:])
        elif arguments[0] in STUDIES and not _is_sweep(arguments):
            STUDIES[arguments[0]](arguments[1:])
        elif _names_a_study(arguments):
            known = did_you_mean("study", arguments[0], STUDIES)
            raise ConfigurationError(f"{known} (a sweep {arguments[0]} is not there either, in results/ or as a folder)")
        else:
            asked = _parser().parse_args(arguments)
            _show(asked.sweeps, asked.metric, asked.task, asked.block_size)
    except QuantsweepError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _is_sweep(arguments: Sequence[str]) -> bool:
    """True for one word that is a sweep's name, which may be that of its study."""
    return len(arguments) == 1 and (sweep_folder(arguments[0]) / "plan").is_dir()


def _names_a_study(arguments: Sequence[str]) -> bool:
    """True for two words of which the first is neither a sweep nor a folder: `<study> <sweep>`."""
    return len(arguments) > 1 and not any(word.startswith("-") for word in arguments[:2]) and not sweep_folder(arguments[0]).is_dir()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Print a sweep's table and draw its figure.",
        epilog=__doc__.partition("\n\n")[2] if __doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sweeps",
        type=sweep_folder,
        nargs="+",
        metavar="sweep",
        help="name of the sweep, or its folder: quickstart, results/quickstart; of several the figure goes to the first",
    )
    parser.add_argument("--metric", default=HEADLINE, help=f"metric to show (default: {HEADLINE})")
    parser.add_argument("--task", help="task, or its task_key; needed where several have the metric")
    parser.add_argument(
        "--block-size", help="block size of the figure (the table has all): a number, channel or tensor (default: 64, or the only one)"
    )
    return parser


def _show(sweeps: Sequence[Path], metric: str, task: str | None, block_size: str | None) -> None:
    results = _each_once(results_of(sweeps))
    table = by_bit_width(results, metric=metric, task=task)
    blocks = blocks_of(select(results, metric=metric, task=task))
    block = block_size or (blocks[0] if len(blocks) == 1 else DEFAULT_BLOCK)
    can_draw = block_size is not None or not blocks or block in blocks
    figure = bits_against_size(results, metric=metric, task=task, block_size=block) if can_draw else None
    about = table.attrs
    print(f"\n{metric.replace('_', ' ')} of {about['task']}, mean over {count(about['num_models'], 'model')}, {about['documents']}")
    print("NaN: a model is missing there, or has no number\n")
    print(in_full(table.round(4)))
    samples = quantsweep.load_samples(sweeps)
    _show_differences(results, samples if len(sweeps) == 1 else samples.drop_duplicates(["trial_id", "task_key"]), metric, task)
    if figure is None:
        print(f"\nno figure: it is of one block size, and there are {', '.join(blocks)}. Choose one: --block-size {blocks[0]}")
    else:
        save(figure, sweeps[0] / metric)
        of_block = f" (block size {block})" if blocks else ""
        print(f"\nfigure{of_block}: {sweeps[0] / metric}.png, .svg")
    paths = [str(folder) for folder in sweeps]
    print(f"data: quantsweep.load_results({(paths[0] if len(paths) == 1 else paths)!r})")


def _each_once(results: pd.DataFrame) -> pd.DataFrame:
    """One row a trial, task and metric: sweeps that are shown together may share trials (baselines); the first sweep's stay."""
    key = ["trial_id", "task_key", "metric"]
    twice = results.duplicated(key)
    if twice.any():
        values = results[results.duplicated(key, keep=False)].groupby(key)["value"]
        differ = int((values.nunique(dropna=False) > 1).sum())
        number = count(int(results[twice]["trial_id"].nunique()), "trial")
        print(
            f"\n{number} in several of these sweeps: the first sweep's values are shown ({count(differ, 'value')} of another sweep differ)"
        )
    return results[~twice]


def _show_differences(results: pd.DataFrame, samples: pd.DataFrame, metric: str, task: str | None) -> None:
    """The table of differences to the baseline, or the reason why there is none."""
    if not (results["method"] == BASELINE).any() or (results["method"] == BASELINE).all():
        return
    try:
        difference, margin = against_baseline(results, samples, metric=metric, task=task)
    except QuantsweepError as error:
        print(f"\nno differences to the baseline: {error}")
        return
    cells = difference.map("{:+.4f}".format) + margin.map(" ± {:.4f}".format)
    print("\ndifference to the 16-bit baseline ± half its 95 % interval, document by document (not over models)\n")
    print(in_full(cells.where(difference.notna(), "")))


if __name__ == "__main__":
    with as_program():
        sys.exit(main())
