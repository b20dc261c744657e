"""`quantsweep compare A [B]`: is A better than B on the same examples, and how sure is that?

A and B are each one word (in quotes where it has spaces), made of any of

    SWEEP                  all trials of a sweep, by name or folder
    TRIAL                  one trial, by its id or the beginning of it
    column=value …         the trials that these filters name: 'model=mini-* bit_width=3'
    baseline               the unquantized trials; what B is when it is not given

    quantsweep compare 'quickstart bit_width=3' 'quickstart bit_width=4'
    quantsweep compare 'data_type=int bit_width=4' 'data_type=fp bit_width=4' --sweep quickstart
    quantsweep compare 6efb6e77 a4eb0448 --margin 0.02 --flips
    quantsweep compare quickstart                           every trial against the baseline of its model

A trial of A is set against the trial of B that agrees in all that the two arms have in common, and every quantized trial against the
baseline of its model (as it was planted, in its dtype); then answer against answer. Trials without a partner are named, with the reason.
Both saw the same examples, so what counts is where they differ: answers that only one has right (McNemar's test, exact), or
documents of which one has the smaller loss (on the log scale, weighted by bytes). Of several models the interval is about other models too.

--margin M asks whether the difference is smaller than M: without it "equal" is never said, since not to see a difference is not to see
that there is none. Where it is undecided, the number of examples that would decide is shown (limit=…), and the smallest difference that
these could have shown.

Questions about one text, windows of one page, are no separate examples: --clusters FILE (csv or parquet: task, document, cluster) says
what belongs together. --replicates SWEEP names sweeps that ran the same trials under other batch sizes or on other cards: a difference that
these make too is no finding.

Exit status: 0 A is better in each task; 11 worse in one; else 12 undecided in one; else 10 equal within the margin.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantsweep.cli._sweep import add_results_dir, find_sweep, sweep_names
from quantsweep.errors import ConfigurationError, ResultsError
from quantsweep.exit_status import of_verdicts
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables.filters import PLAN_COLUMNS, RUN_COLUMNS, Filter, parse
from quantsweep.words import count

if TYPE_CHECKING:
    import pandas as pd

BASELINE, BASELINE_METHOD = "baseline", "none"
_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What one word means: trials of a sweep."""

    words: str
    folder: SweepFolder
    trial: str
    chosen: Filter
    is_baseline: bool


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("a", metavar="A", help="a sweep, a trial, or filters in quotes: 'quickstart bit_width=3'")
    parser.add_argument("b", metavar="B", nargs="?", default=BASELINE, help="the same; default: the baseline of each model of A")
    parser.add_argument("--sweep", default=None, help="the sweep of arms that name none (default: the other's, or the only one there is)")
    add_results_dir(parser)
    parser.add_argument("--task", action="append", default=[], help="this task (or task_key) only; may be repeated")
    parser.add_argument(
        "--metric", default=None, help="instead of each task's headline metric: acc, acc_norm, bits_per_byte, perplexity, …"
    )
    parser.add_argument(
        "--margin", type=float, default=None, help="a difference (share, bits a byte, log of a ratio) that would not matter"
    )
    parser.add_argument("--clusters", type=Path, default=None, help="csv or parquet: which documents of a task belong together")
    parser.add_argument(
        "--replicates", action="append", default=[], metavar="SWEEP", help="the same trials under other batch sizes or cards"
    )
    parser.add_argument("--flips", action="store_true", help="list the documents that only A, only B has right")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.epilog = __doc__.partition("\n\n")[2] if __doc__ else None


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; the exit status is the verdict's."""
    import quantsweep
    from analysis.comparison import arms, noise, partners, text
    from analysis.comparison.outcomes import METRICS, clusters_of, with_tokens

    left, right = read_arms(arguments)
    folders = list(dict.fromkeys(arm.folder.path for arm in (left, right)))
    own = quantsweep.load_results(folders)
    samples = with_tokens(_of_tasks(quantsweep.load_samples(folders), arguments.task), own)
    a, b = (_rows(samples, arm) for arm in (left, right))
    if right.is_baseline:
        a = a[~a["trial_id"].isin(set(b["trial_id"]))]
    replicates = [_folder(arguments, name).path for name in arguments.replicates]
    headline = own[own["is_primary"] & own["metric"].isin(list(METRICS))]
    metrics = arguments.metric or dict(zip(headline["task_key"], headline["metric"], strict=True))
    found = arms.compare(
        a,
        b,
        metrics=metrics,
        margin=arguments.margin,
        clusters=None if arguments.clusters is None else clusters_of(_table(arguments.clusters)),
        ranges=noise.replicate_ranges(quantsweep.load_results([*folders, *replicates])) if replicates else None,
        on_progress=_progress(),
    )
    flips = arms.flips(a, b, metrics=metrics) if arguments.flips else None
    pairs = sorted({(str(one["trial_id"]), str(other["trial_id"])) for same in arms.pairs_by_task(a, b).values() for one, other in same})
    about = _about((left, right), (a, b), partners.without_partner(a, b, pairs))
    used = [rows[rows["trial_id"].isin(ids)] for rows, ids in zip((a, b), zip(*pairs, strict=True), strict=True)]
    about |= {"differ_in": partners.differing_axes(a, b, pairs), "other_versions": partners.differing_versions(*used)}
    if arguments.json:
        listed = {} if flips is None else {"flips": flips.to_dict("records")}
        print(json.dumps({**about, "comparisons": [text.as_json(one) for one in found], **listed}))
    else:
        print(_head(about, text.axes_text))
        print("\n\n".join(text.text(one) for one in found))
        if flips is not None:
            print(f"\nanswers that differ (documents of a task, from 0)\n{text.flips_text(flips)}")
    return of_verdicts(one.verdict for one in found)


def read_arms(arguments: argparse.Namespace) -> tuple[Arm, Arm]:
    """What the two words mean; an arm that names no sweep is in that of --sweep, of the other arm, or the only one."""
    named = [_split(arguments, words) for words in (arguments.a, arguments.b)]
    folders = [folder for folder, _, _ in named]
    given = _folder(arguments, arguments.sweep) if arguments.sweep else None
    fallback = given or next((folder for folder in folders if folder), None)
    found = []
    for words, (folder, trial, terms) in zip((arguments.a, arguments.b), named, strict=True):
        is_baseline = BASELINE in words.split()
        place = folder or fallback or _place_of(arguments, trial)
        chosen = parse([*terms, *([f"method={BASELINE_METHOD}"] if is_baseline else [])], (*PLAN_COLUMNS, *RUN_COLUMNS))
        found.append(Arm(words=words, folder=place, trial=trial, chosen=chosen, is_baseline=is_baseline))
    return found[0], found[1]


def _split(arguments: argparse.Namespace, words: str) -> tuple[SweepFolder | None, str, list[str]]:
    """(the sweep that is named, the beginning of a trial's id or "", filters) of one arm."""
    terms = [word for word in words.split() if "=" in word]
    folder, trial = None, ""
    for word in words.split():
        if "=" in word or word == BASELINE:
            continue
        is_sweep = any((place / "plan").is_dir() for place in (Path(arguments.results_dir) / word, Path(word)))
        if is_sweep and folder is None:
            folder = _folder(arguments, word)
        elif not is_sweep and not trial and _is_id(word):
            trial = word
        else:
            _folder(arguments, word)  # raises with the nearest name
            raise ConfigurationError(f"'{words}' names two sweeps; an arm is of one: load_samples([…]) and analysis.compare take several")
    return folder, trial, terms


def _is_id(word: str) -> bool:
    return 4 <= len(word) <= 16 and set(word) <= set("0123456789abcdef")


def _place_of(arguments: argparse.Namespace, trial: str) -> SweepFolder:
    """The only sweep there is, or the only one that has such a trial."""
    from quantsweep.tables import records

    names = sweep_names(arguments)
    if trial:
        folders = [_folder(arguments, name) for name in names]
        having = [
            folder
            for folder in folders
            if any(one.startswith(trial) for one in set(records.read_table(folder.path, "metrics", ["trial_id"]).column(0).to_pylist()))
        ]
        names = [folder.name for folder in having]
    if len(names) == 1:
        return _folder(arguments, names[0])
    if not names:
        what = f"no trial that begins with '{trial}' is" if trial else "there is no sweep"
        raise ResultsError(f"{what} in {arguments.results_dir}. Name the sweep: --sweep NAME, or its place: --results-dir")
    raise ResultsError(f"several sweeps could be meant: {', '.join(names[:_MOST_NAMED])}. Name one: --sweep {names[0]}")


def _folder(arguments: argparse.Namespace, name: str) -> SweepFolder:
    return find_sweep(argparse.Namespace(results_dir=arguments.results_dir, sweep=name))


def _of_tasks(samples: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    from quantsweep.errors import did_you_mean

    known = {*samples["task"], *samples["task_key"]}
    for task in tasks:
        if task not in known:
            raise ConfigurationError(did_you_mean("task", task, known))
    return samples[samples["task"].isin(list(tasks)) | samples["task_key"].isin(list(tasks))] if tasks else samples


def _rows(samples: pd.DataFrame, arm: Arm) -> pd.DataFrame:
    """The samples of an arm; raises ConfigurationError for filters that name nothing, and for a beginning that several trials have."""
    rows = samples[samples["sweep"] == arm.folder.name]
    if arm.is_baseline and not (rows["method"] == BASELINE_METHOD).any():
        raise ConfigurationError(
            f"{arm.folder.name} has no baseline: no trial of method={BASELINE_METHOD} has samples of the tasks asked for. Add it to the "
            f"sweep: launch the same words once more with method={BASELINE_METHOD} and without other steps "
            f"(… method={BASELINE_METHOD} sweep={arm.folder.name}). "
            "Or name what to compare with, as B"
        )
    rows = rows[rows["trial_id"].str.startswith(arm.trial)]
    arm.chosen.refuse_unmet({column: _values(rows[column]) for column in arm.chosen.columns}, f"{arm.folder.name}")
    for term in arm.chosen.terms:
        rows = rows[[term.accepts(value) for value in _values(rows[term.column])]]
    ids = sorted(set(rows["trial_id"]))
    if not ids:
        raise ConfigurationError(f"'{arm.words}' names no trial of {arm.folder.name} that has samples")
    if arm.trial and len(ids) > 1:
        raise ConfigurationError(f"{len(ids)} trials begin with '{arm.trial}': {', '.join(ids[:_MOST_NAMED])}. Give more of the id")
    return rows


def _values(column: pd.Series[Any]) -> list[Any]:
    import pandas as pd

    return [None if pd.isna(value) else value for value in column]


def _table(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"--clusters {path} cannot be read: {error}") from error


def _about(sides: tuple[Arm, Arm], frames: tuple[pd.DataFrame, pd.DataFrame], alone: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The arms: their words, sweeps, trials, and which of these have no partner, and why."""
    return {
        name: {
            "words": arm.words,
            "sweep": arm.folder.name,
            "trials": rows["trial_id"].nunique(),
            "without_partner": len(alone[name]),
            "alone": alone[name],
        }
        for name, arm, rows in zip("ab", sides, frames, strict=True)
    }


def _head(about: dict[str, Any], axes_text: Callable[..., str]) -> str:
    lines = []
    for name in "ab":
        arm = about[name]
        alone = f", {arm['without_partner']:,} of them without a partner" if arm["without_partner"] else ""
        words = arm["words"] if arm["sweep"] in arm["words"].split() else f"{arm['words']} of {arm['sweep']}"
        lines.append(f"{name.upper()}: {words} ({count(arm['trials'], 'trial')}{alone})")
        lines += _alone_lines(arm["alone"])
    lines.append(f"A and B differ in {axes_text(about['differ_in'])}")
    if about["other_versions"]:
        lines.append(f"made with other versions of {axes_text(about['other_versions'])}")
    return "\n".join([*lines, ""])


def _alone_lines(alone: Mapping[str, str]) -> list[str]:
    """The trials without a partner, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for trial, reason in alone.items():
        by_reason.setdefault(reason, []).append(trial)
    told = [f"   without a partner: {_some(trials)} ({reason})" for reason, trials in by_reason.items()]
    more = [f"   … and {count(len(told) - _MOST_NAMED, 'reason')} more (all with --json)"] if len(told) > _MOST_NAMED else []
    return [*told[:_MOST_NAMED], *more]


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_MOST_NAMED], *([f"… {len(names) - _MOST_NAMED:,} more"] if len(names) > _MOST_NAMED else [])])


def _progress() -> Callable[[float], None] | None:
    """Says how far a bootstrap is, where somebody looks."""
    if not sys.stderr.isatty():
        return None

    def say(share: float) -> None:
        print(f"\rbootstrap {share:4.0%}" if share < 1 else "\r              \r", end="", file=sys.stderr, flush=True)

    return say
