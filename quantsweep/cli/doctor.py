"""`quantsweep doctor [cluster=…] [results_dir=…] [--json]`: what this machine or cluster lacks, and the limits it has."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from quantsweep.composing.cluster import cluster_spec
from quantsweep.composing.composition import compose_base, plain
from quantsweep.composing.prepare import results_dir
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.operations.doctor import Check, examine


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("overrides", nargs="*", help="as for a launch: cluster=mycluster, results_dir=…, cluster.partition=…")
    parser.add_argument("-m", "--multirun", action="store_true", help="taken as at a launch")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print every check; 1 if there is a problem."""
    base = plain(compose_base(expand_shorthand(arguments.overrides)))
    checks = examine(cluster_spec(base["cluster"]), Path(results_dir(base)))
    if arguments.json:
        seen = list(checks)
        print(json.dumps([asdict(check) for check in seen], indent=2))
    else:
        seen = []
        for line in doctor_lines(_kept(checks, seen)):
            print(line, flush=True)
    return 1 if any(check.state == "problem" for check in seen) else 0


def _kept(checks: Iterable[Check], seen: list[Check]) -> Iterator[Check]:
    for check in checks:
        seen.append(check)
        yield check


def doctor_lines(checks: Iterable[Check]) -> Iterator[str]:
    """The checks as text, section by section, and a summary; lines come as the checks are made."""
    section = ""
    counts: Counter[str] = Counter()
    for check in checks:
        if check.section != section:
            section = check.section
            yield section
        counts[check.state] += 1
        yield f"  {check.state if check.state != 'problem' else 'PROBLEM':<8} {check.name:<24} {check.found}"
        if check.remedy and check.state != "ok":
            yield f"  {'':<8} {'':<24} → {check.remedy}"
    yield ", ".join(f"{counts[state]} {state}" for state in ("problem", "warning", "unknown", "ok") if counts[state])
