"""Holds: trials that are not run for now, because the breaker or a person says so.

    holds/<name>.json      {"by": "breaker" | "cancel", "filters": ["family=falcon", "method=gptq"], "because": …}

Workers look before each trial, retries and the submitting of waiting shards look too.  Whoever types the
launch command lifts all holds: they have mended something, or want it after all.  A folder of its
own, nearly always empty, so that looking costs one listing.
"""

from __future__ import annotations

import errno
import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from quantsweep import filters
from quantsweep.errors import ResultsError
from quantsweep.files import write_text
from quantsweep.paths import SweepFolder
from quantsweep.specs import PlannedTrial


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Trials that pass `filters` (quantsweep.filters; none: every trial) are held.

    because: the reason, for people.  count: trials whose failure led to it (0 where a person asked).
    """

    name: str
    by: Literal["breaker", "cancel"]
    filters: tuple[str, ...]
    because: str
    count: int = 0

    def holds(self, planned: PlannedTrial) -> bool:
        """True if this trial must not run now."""
        return filters.parse(self.filters, filters.PLAN_COLUMNS).matches_planned(planned)

    @property
    def words(self) -> str:
        """What is held."""
        return " ".join(self.filters) or "every trial"

    def save(self, folder: SweepFolder) -> None:
        """Put it in force."""
        write_text(folder.holds / f"{self.name}.json", json.dumps(asdict(self)))


def cancelled(texts: Iterable[str]) -> Hold:
    """A hold that a person asked for."""
    return Hold(name=f"cancel-{secrets.token_hex(4)}", by="cancel", filters=tuple(texts), because="cancelled by hand")


def read_holds(folder: SweepFolder) -> list[Hold]:
    """Every hold in force; raises ResultsError for a damaged file (what it held would run)."""
    found = []
    for path in sorted(folder.holds.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            found.append(Hold(**{**content, "filters": tuple(content["filters"])}))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # lifted between the listing and now
                raise
        except (ValueError, TypeError, KeyError) as error:
            raise ResultsError(f"hold {path} cannot be read: {error}. Delete it, or launch again, which lifts all holds") from error
    return found


def holding(holds: Iterable[Hold], planned: PlannedTrial) -> Hold | None:
    """The first hold that holds a trial."""
    return next((hold for hold in holds if hold.holds(planned)), None)


def release(folder: SweepFolder) -> int:
    """Lift every hold; returns how many there were."""
    paths = list(folder.holds.glob("*.json"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)
