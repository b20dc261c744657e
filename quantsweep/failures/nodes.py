"""Bad nodes: a machine on which trial after trial fails for the machine's own fault gets no more of this sweep.

A *strike* is a failed attempt whose cause is the machine (bad_node: its GPU or driver is broken; node_failure:
Slurm lost it), or a job that could not even begin there while others can elsewhere (not_started: a mount or an
interpreter is missing).  A job that began no trial is one strike, however many it was to run.  A node with STRIKES
of them within STRIKE_HOURS, and no trial that succeeded on it since the last, is excluded from new arrays and from
those that wait; where that would be every node of the partition, none is, since then nothing could show that one has
been mended.
Nothing is stored: the attempts themselves are the record, so a node that is mended comes back by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from quantsweep.failures import classes
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records

STRIKES = 2
STRIKE_HOURS = 24.0
COLUMNS = ("host", "status", "failure_class", "finished_at", "attempt", "slurm_job", "log")
CAUSES = frozenset({classes.BAD_NODE, classes.NODE_FAILURE})
ELSEWHERE = frozenset({classes.NOT_STARTED, classes.NO_ANSWER})
"""The machine's fault only where other machines do better."""


def broken_nodes(folder: SweepFolder) -> dict[str, int]:
    """Nodes to exclude, with their strikes."""
    return find_broken(records.read_table(folder.path, "trials", list(COLUMNS)).to_pylist(), datetime.now(UTC))


def find_broken(rows: Iterable[Mapping[str, Any]], now: datetime) -> dict[str, int]:
    """Nodes with STRIKES strikes in the STRIKE_HOURS before `now` and since their last success; pure."""
    since = now - timedelta(hours=STRIKE_HOURS)
    ordered = sorted((row for row in rows if row["finished_at"] > since), key=lambda row: row["finished_at"])
    works = {row["host"] for row in ordered if row["status"] == "done"}
    strikes: dict[str, set[str]] = {}
    for row in ordered:
        host, cause = row["host"], row["failure_class"]
        if row["status"] == "done":
            strikes.pop(host, None)
        elif host and cause in CAUSES:
            strikes.setdefault(host, set()).add(_strike(row))
        elif host and cause in ELSEWHERE and works - {host}:
            strikes.setdefault(host, set()).add(str(row["slurm_job"]))
    return {host: len(found) for host, found in strikes.items() if len(found) >= STRIKES}


def _strike(row: Mapping[str, Any]) -> str:
    """A lost node strikes once for each attempt that ran there, and once for all trials of a job that had no worker yet (no log)."""
    is_of_job = row["failure_class"] == classes.NODE_FAILURE and not row.get("log")
    return str(row["slurm_job"]) if is_of_job else str(row["attempt"])
