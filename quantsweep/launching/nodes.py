"""Bad nodes: a machine on which trial after trial fails for the machine's own fault gets no more of this sweep.

A *strike* is a failed attempt whose cause is the machine (bad_node: its GPU or driver is broken; node_failure:
Slurm lost it).  A node with STRIKES of them within STRIKE_HOURS, and no trial that succeeded on it since the
last, is excluded from new arrays.  Nothing is stored: the attempts themselves are the record, so a node
that is mended comes back by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from quantsweep import failures, records
from quantsweep.paths import SweepFolder

STRIKES = 2
STRIKE_HOURS = 24.0
CAUSES = frozenset({failures.BAD_NODE, failures.NODE_FAILURE})


def broken_nodes(folder: SweepFolder) -> dict[str, int]:
    """Nodes to exclude, with their strikes."""
    columns = ["host", "status", "failure_class", "finished_at"]
    since = datetime.now(UTC) - timedelta(hours=STRIKE_HOURS)
    rows = records.read_table(folder.path, "trials", columns).to_pylist()
    return find_broken(row for row in rows if row["finished_at"] > since)


def find_broken(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Nodes with STRIKES strikes since their last success; pure."""
    strikes: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["finished_at"]):
        if row["status"] == "done":
            strikes.pop(row["host"], None)
        elif row["failure_class"] in CAUSES and row["host"]:
            strikes[row["host"]] = strikes.get(row["host"], 0) + 1
    return {host: count for host, count in strikes.items() if count >= STRIKES}
