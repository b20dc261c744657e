"""Holds: trials that are not run for now, because the breaker or a person says so.

    holds/<name>.json      {"by": "breaker" | "cancel" | "drop", "filters": ["family=falcon", "method=gptq"], "because": …}

Workers look before each trial, retries and the submitting of waiting shards look too.  A hold is in
force for the launches that there were when it was made (and for the retries that follow from them): who
types the launch command again has mended something, or wants it after all, and what they ask for is not
held.  What is dropped is held too, and no longer counted as something that is to be run.  A folder of its own, nearly always
empty, so that looking costs one listing.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from quantsweep.errors import ResultsError
from quantsweep.planning.plan_files import plan_files, plan_sequence
from quantsweep.storage.files import checked_file, write_text
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import filters
from quantsweep.trial.specs import PlannedTrial


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Trials that pass `filters` (quantsweep.tables.filters; none: every trial) are held.

    because: the reason, for people.  count: trials whose failure led to it (0 where a person asked).
    up_to: the number of the newest launch (the `sequence` of its plan) that it is in force for.
    """

    name: str
    by: Literal["breaker", "cancel", "drop"]
    filters: tuple[str, ...]
    because: str
    up_to: int
    count: int = 0

    def holds(self, planned: PlannedTrial, root: str) -> bool:
        """True if this trial must not run now for the launch whose plan is `root`."""
        return plan_sequence(root) <= self.up_to and self.names(planned)

    def names(self, planned: PlannedTrial) -> bool:
        """True if the filters name this trial."""
        return filters.parse(self.filters, filters.PLAN_COLUMNS).matches_planned(planned)

    @property
    def words(self) -> str:
        """What is held."""
        return " ".join(self.filters) or "every trial"

    def save(self, folder: SweepFolder) -> None:
        """Put it in force."""
        write_text(folder.holds / f"{self.name}.json", json.dumps(asdict(self)))


def cancelled(texts: Iterable[str], folder: SweepFolder, *, drop: bool = False) -> Hold:
    """A hold that a person asks for, on everything launched so far; drop: nobody wants it any more."""
    newest = max((plan_sequence(path.name) for path in plan_files(folder.plan)), default=0)
    by: Literal["cancel", "drop"] = "drop" if drop else "cancel"
    because = "dropped by hand" if drop else "cancelled by hand"
    return Hold(name=f"{by}-{secrets.token_hex(4)}", by=by, filters=tuple(texts), because=because, up_to=newest)


def read_holds(folder: SweepFolder) -> list[Hold]:
    """Every hold in force; raises ResultsError for a damaged file (what it held would run)."""
    found = []
    for path in sorted(folder.holds.glob("*.json")):
        try:
            content = json.loads(checked_file(path).read_text())
            found.append(Hold(**{**content, "filters": tuple(content["filters"])}))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # lifted between the listing and now
                raise ResultsError(f"hold {path} cannot be read: {error}. Move it away, or make it readable") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ResultsError(f"hold {path} cannot be read: {error}. Delete it") from error
    return found


def hold_files(folder: SweepFolder) -> frozenset[tuple[str, int, int]]:
    """The files of the holds in force, by name, inode and time: another set means that `read_holds` would say something else.

    The folder's own time does not say so: where a file system counts whole seconds, two changes in one second look like one.
    """
    found = set()
    with os.scandir(folder.holds) as entries:
        for entry in entries:
            if entry.name.endswith(".json"):
                try:
                    status = entry.stat()
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ESTALE):  # lifted between the listing and now
                        raise
                else:
                    found.add((entry.name, status.st_ino, status.st_mtime_ns))
    return frozenset(found)


def holding(holds: Iterable[Hold], planned: PlannedTrial, root: str) -> Hold | None:
    """The first hold that holds a trial of the launch whose plan is `root`."""
    return next((hold for hold in holds if hold.holds(planned, root)), None)
