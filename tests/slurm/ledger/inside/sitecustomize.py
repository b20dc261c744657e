"""Runs first in every Python process that has this folder on PYTHONPATH; does what the environment asks for.

    QS_TEST_LEDGER       file: one line for each evaluation's begin and end, appended with one write
    QS_TEST_FAULTS       file: the faults of trials (qs_faults)
    QS_TEST_KILL         points at which the process dies (qs_hooks.KillPoint), separated by spaces
    QS_TEST_KILL_STATE   folder: which of them have fired

    begin|end|error|fault <time> <pid> <slurm job or -> <trial id> <task_key> [<kind of the fault>]

The record is the test's own: it says what was evaluated, whatever the product's tables say.  An
evaluation is `Evaluator.evaluate`; which trial it belongs to is known from the trial that the process
read last (`PlannedTrial.from_json`), since the class that runs trials lives in `__main__` and cannot be reached.

A setting that makes no sense ends the process: Python itself would only print a line and go on.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import qs_faults
import qs_hooks


def _slurm_job() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "-")


class _Watch:
    """Writes the ledger of this process, and lets faults strike."""

    def __init__(self, ledger: Path | None, faults: qs_faults.FaultPlan | None) -> None:
        self._ledger, self._faults = ledger, faults
        self._planned: Any = None

    def install(self) -> None:
        qs_hooks.on_import("quantsweep.trial.specs", self._watch_trials)
        qs_hooks.on_import("quantsweep.evaluation.evaluator", self._watch_evaluations)

    def _watch_trials(self, module: ModuleType) -> None:
        read = module.PlannedTrial.from_json.__func__

        @functools.wraps(read)
        def from_json(cls: Any, *arguments: Any, **options: Any) -> Any:
            self._planned = read(cls, *arguments, **options)
            return self._planned

        module.PlannedTrial.from_json = classmethod(from_json)

    def _watch_evaluations(self, module: ModuleType) -> None:
        evaluate = module.Evaluator.evaluate

        @functools.wraps(evaluate)
        def watched(evaluator: Any, spec: Any, *arguments: Any, **options: Any) -> Any:
            trial = "unknown" if self._planned is None else self._planned.trial.trial_id
            self._note("begin", trial, spec.task_key)
            try:
                self._strike(trial, spec.task_key, "begin")
                result = evaluate(evaluator, spec, *arguments, **options)
            except BaseException:
                self._note("error", trial, spec.task_key)
                raise
            self._note("end", trial, spec.task_key)
            self._strike(trial, spec.task_key, "end")
            return result

        module.Evaluator.evaluate = watched

    def _strike(self, trial: str, task: str, moment: str) -> None:
        fault = None if self._faults is None else self._faults.due(trial, moment)
        if fault is not None:
            self._note("fault", trial, task, fault.kind)
            qs_faults.strike(fault)

    def _note(self, event: str, trial: str, task: str, *detail: str) -> None:
        if self._ledger is None:
            return
        line = " ".join([event, f"{time.time():.6f}", str(os.getpid()), _slurm_job(), trial, task, *detail]) + "\n"
        descriptor = os.open(self._ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def _start() -> None:
    ledger, faults = os.environ.get("QS_TEST_LEDGER"), os.environ.get("QS_TEST_FAULTS")
    if ledger or faults:
        _Watch(Path(ledger) if ledger else None, qs_faults.FaultPlan.read(Path(faults)) if faults else None).install()
    for text in os.environ.get("QS_TEST_KILL", "").split():
        point = qs_hooks.KillPoint.parse(text)
        if point.is_here:
            qs_hooks.arm(point, Path(os.environ["QS_TEST_KILL_STATE"]))


try:
    _start()
except Exception as error:
    raise SystemExit(f"tests/slurm/ledger: {type(error).__name__}: {error}") from error
