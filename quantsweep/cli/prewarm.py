"""`quantsweep prewarm +sweeps=k_bit_inference [--update]`: fetch and pin what a study needs, on a machine with a network."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

from rich.console import Console

from quantsweep.checkpoints.pins import Pins, pins_path
from quantsweep.composing.composition import Request, compose_base, make_request, search_folders
from quantsweep.composing.prepare import results_dir, task_path
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.operations.prewarm import Outcome, prewarm
from quantsweep.planning.schema import NO_CALIBRATION, TASK_KEYS, build_calibration, build_model
from quantsweep.trial.specs import CalibrationSpec, ModelSpec, TaskSpec

_WORDS = {"here": "here already", "fetched": "fetched", "skipped": "cannot be had", "failed": "FAILED"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("overrides", nargs="*", help="as after `python launch.py -m`: +sweeps=quickstart, model=…, task=…")
    parser.add_argument(
        "--update", action="store_true", help="ask the hub again what names stand for (trials of models that moved are new ones)"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="taken as at a launch")
    parser.add_argument("--json", action="store_true", help="print what became of each as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fetch everything; 1 if something that was asked for could not be had."""
    overrides = expand_shorthand(arguments.overrides)
    cfg = compose_base(overrides)
    request = make_request(cfg, search_folders(cfg.hydra), overrides)
    models, tasks, calibrations = wanted(request)
    folder, own_tasks = results_dir(request.base), task_path(request.base)
    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    outcomes: list[Outcome] = []
    words = sys.stderr if arguments.json else sys.stdout
    with console.status("looking") as status:

        def report(text: str) -> None:
            status.update(text) if console.is_terminal else print(f"  … {text}", flush=True, file=words)

        outcomes_of = partial(prewarm, models, tasks, folder, calibrations=calibrations, task_path=own_tasks)
        for outcome in outcomes_of(update=arguments.update, report=report):
            outcomes.append(outcome)
            print(outcome_text(outcome), flush=True, file=words)
            counts[outcome.state] += 1
    summary = "   ".join(f"{_WORDS[state]} {counts[state]}" for state in _WORDS if counts[state])
    print(f"{summary or 'nothing is asked for'}   pins: {pins_path(folder)}", file=words)
    if arguments.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    return 1 if counts["failed"] else 0


def outcome_text(outcome: Outcome) -> str:
    """One line for one model, task or calibration text."""
    return f"{outcome.kind:<6} {outcome.name:<24} {_WORDS[outcome.state]}: {outcome.text}"


def wanted(request: Request) -> tuple[list[ModelSpec], list[TaskSpec], list[CalibrationSpec]]:
    """Each model (its revision as the yaml has it, not as it is pinned), task and calibration text of a request, once.

    Raises ConfigurationError for values that cannot be.
    """
    models: dict[ModelSpec, None] = {}
    tasks: dict[TaskSpec, None] = {}
    calibrations: dict[str, CalibrationSpec] = {}
    for candidate in _narrowed(request):
        models[build_model(request.schema.section("model", candidate))] = None
        tasks |= dict.fromkeys(request.schema.tasks(candidate))
        calibration = request.schema.section("calibration", candidate)
        if calibration["name"] != NO_CALIBRATION:
            spec = build_calibration(calibration, Pins())
            calibrations.setdefault(spec.text_source, spec)  # samples, lengths and seeds share their text
    named: dict[str, TaskSpec] = {}
    for task in tasks:  # limits and few-shot counts share their data
        named.setdefault(task.name, task)
    distinct = {(model.hub_id, model.revision, model.path, model.name): model for model in models}
    return list(distinct.values()), list(named.values()), list(calibrations.values())


def _narrowed(request: Request) -> Iterator[dict[str, object]]:
    """Candidates of the grids, reduced to the axes that say which model, which tasks and which text."""
    for grid in request.grids:
        axes = tuple(axis for axis in grid.axes if axis.key.split(".")[0] in ("model", "task", "calibration", *TASK_KEYS))
        yield from replace(grid, axes=axes).candidates()
