"""The circuit breaker: a bug that fails trial after trial holds those that share its cause; the rest goes on.

What trials that failed in one place (one fingerprint: same exception, same functions) have in common
is taken for the cause: all of `falcon` with `gptq`, say.  Once k of them have failed, and no trial that
has the same in common has succeeded, the trials that have it too are held (`quantsweep.failures.holds`) until the
launch command is typed again.  As more fail elsewhere, less is in common, and the hold widens by itself.

Only failures that the same input repeats are counted: a full disk or a lost node says nothing of the next trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantsweep.failures import classes
from quantsweep.failures.holds import Hold, read_holds
from quantsweep.planning.plan_files import plan_sequence, read_headers
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records

COUNTED = frozenset(
    {
        classes.BUG,
        classes.CRASHED,
        classes.QUANTIZATION,
        classes.MODEL_OR_DATA,
        classes.CONFIGURATION,
        classes.CODE_CHANGED,
        classes.NO_ACCESS,
    }
)
SHARED_COLUMNS = ("method", "family", "model", "data_type", "bit_width", "granularity", "block_size")


def find_holds(failed: Iterable[Mapping[str, Any]], succeeded: Sequence[Mapping[str, Any]], threshold: int, root: str) -> list[Hold]:
    """The holds that some attempts of the launch `root` call for; pure.

    failed, succeeded: rows of `trials` (SHARED_COLUMNS, and of failed ones the failure's columns); a trial counts once.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in failed:
        if row["failure_class"] in COUNTED:
            groups.setdefault(row["failure_fingerprint"], {})[row["trial_id"]] = row
    holds = []
    for fingerprint, rows in groups.items():
        if len(rows) < threshold:
            continue
        members = list(rows.values())
        first = members[0]
        shared = {key: first[key] for key in SHARED_COLUMNS if all(row[key] == first[key] for row in members)}
        if not any(all(row[key] == value for key, value in shared.items()) for row in succeeded):
            holds.append(_hold(fingerprint, shared, first, len(rows), plan_sequence(root)))
    return holds


def _hold(fingerprint: str, shared: Mapping[str, Any], example: Mapping[str, Any], count: int, up_to: int) -> Hold:
    return Hold(
        name=f"breaker-{up_to:05d}-{fingerprint}",
        by="breaker",
        filters=tuple(f"{key}={'null' if value is None else value}" for key, value in shared.items()),
        because=f"{example['failure_class']} [{fingerprint}]: {example['failure_message']}",
        count=count,
        up_to=up_to,
    )


def check(folder: SweepFolder, root: str, threshold: int | None) -> None:
    """Look at all attempts since the launch `root` (a plan's name) and put in force what they call for."""
    if threshold is None:
        return
    columns = ["trial_id", "status", "plan", "failure_class", "failure_message", "failure_fingerprint", *SHARED_COLUMNS]
    roots = {name: header.root for name, header in read_headers(folder.plan).items()}
    rows = [row for row in records.read_table(folder.path, "trials", columns).to_pylist() if roots.get(row["plan"]) == root]
    known = {hold.name: hold for hold in read_holds(folder)}
    failed = [row for row in rows if row["status"] == "failed"]
    for hold in find_holds(failed, [row for row in rows if row["status"] == "done"], threshold, root):
        if known.get(hold.name) != hold:
            hold.save(folder)
