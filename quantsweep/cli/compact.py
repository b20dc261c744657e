"""`quantsweep compact SWEEP`: fold its many small files into few; safe while workers write, safe to kill."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial

from quantsweep.cli._sweep import add_sweep, find_sweep
from quantsweep.tables.compaction import CompactSummary, compact
from quantsweep.words import count


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sweep(parser)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fold the files and say what came of it."""
    folder = find_sweep(arguments)
    summary = compact(folder, say=partial(print, file=sys.stderr))
    print(json.dumps({"sweep": folder.name, **asdict(summary)}) if arguments.json else f"{folder.name}: {summary_text(summary)}")
    return 0


def summary_text(summary: CompactSummary) -> str:
    """What compaction did, in a line or two."""
    before, after = summary.total("files_before"), summary.total("files_after")
    parts = [f"{count(before, 'file')}, now {after}" if after != before else f"{count(after, 'file')}, nothing to fold"]
    parts += [f"{count(number, what)} removed" for name, what in _LEFT_OUT.items() if (number := summary.total(name))]
    text = "; ".join(parts)
    if left := summary.total("forgotten_left"):
        text += (
            f"\n{count(left, 'forgotten row stands', 'forgotten rows stand')} in files that workers may still write. quantsweep leaves "
            "such rows out, plain read_parquet shows them; they go with the next compaction after these workers have ended"
        )
    return text


_LEFT_OUT = {"forgotten": "forgotten row", "copies": "doubled row"}
