"""How a command ends, as a number that scripts can act on; the README lists them.

Where several are true at once the first of STOPPED, FAILED, HELD and BUDGET_SPENT is said.  What was submitted to Slurm and left
there counts as done: `quantsweep status SWEEP` says how it goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class ExitStatus(IntEnum):
    """The exit status of `launch.py` and of `quantsweep`."""

    DONE = 0
    """Everything that was asked for is done, or submitted."""
    REFUSED = 1
    """A mistake in what was asked, or a surrounding that does not allow it: nothing ran.  `quantsweep doctor`, `prewarm`: a problem."""
    USAGE = 2
    """Words that the command does not have."""
    FAILED = 3
    """Trials failed, or could not be run."""
    HELD = 4
    """No trial failed, but some are held: by the breaker, or cancelled."""
    BUDGET_SPENT = 5
    """The budget ended before the work did."""
    SUPERSEDED = 6
    """A worker left its trials to a newer launch, or to whoever has them now."""
    EQUAL = 10
    """`quantsweep compare`: A and B are equal within the margin.  (Better is DONE.)"""
    WORSE = 11
    """`quantsweep compare`: A is worse."""
    UNDECIDED = 12
    """`quantsweep compare`: the examples do not tell."""
    OUTPUT_LOST = 74
    """The work was done, and something that was to be printed could not be (EX_IOERR of sysexits.h)."""
    STOPPED = 130
    """Somebody asked it to stop: Ctrl-C, TERM, or a terminal that closed."""


def of_trials(*, failed: int, held: int, budget_spent: bool = False) -> ExitStatus:
    """How a run ended whose trials did all that they could.

    >>> of_trials(failed=2, held=1).name, of_trials(failed=0, held=0).name
    ('FAILED', 'DONE')
    """
    if failed:
        return ExitStatus.FAILED
    if held:
        return ExitStatus.HELD
    return ExitStatus.BUDGET_SPENT if budget_spent else ExitStatus.DONE


def of_verdicts(verdicts: Iterable[str]) -> ExitStatus:
    """How a comparison of several tasks ended: the first of WORSE, UNDECIDED and EQUAL that one of them is; DONE where all are better.

    >>> of_verdicts(["better", "equal"]).name, of_verdicts(["undecided", "worse"]).name
    ('EQUAL', 'WORSE')
    """
    found = set(verdicts)
    return next((ExitStatus[name.upper()] for name in ("worse", "undecided", "equal") if name in found), ExitStatus.DONE)
