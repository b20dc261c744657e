"""Weights & Biases, if asked for: one run a shard, its trials as rows of a table.

A run a trial would be 35,000 runs in a project; a run a shard is a few hundred, grouped by sweep.
Tracking is a courtesy: it works in a thread of its own, so that a service that does not answer keeps no trial waiting, and
whatever goes wrong in it is said once and never fails a trial.  A service that could not be reached is not tried again before the
next launch.

Each evaluation stands in one table.  A shard's table is written at its end, from the results table; which rows it had is kept in
`logs/tracked/`.  Rows in no table whose worker is gone (a killed launch) are taken up by the next shard that ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import netrc
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from quantsweep.planning.plan_files import PlanHeader, read_headers
from quantsweep.storage.files import filesystem_now, write_text
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import read_records
from quantsweep.tables import order, records
from quantsweep.tables.effective import effective

log = logging.getLogger(__name__)

TABLE_COLUMNS = (
    "trial_id",
    "model",
    "plant_channels",
    "plant_scale",
    "plant_seed",
    "method",
    "data_type",
    "bit_width",
    "granularity",
    "block_size",
    "data_type_options",
    "bits_per_weight",
    "total_model_bits",
    "task",
    "metric",
    "value",
    "stderr",
    "num_samples",
)


CONNECT_SECONDS = 5.0
"""At a worker's end: how long a service that has not answered yet is waited for …"""
CLOSE_SECONDS = 25.0
"""… and one that has."""
CLAIM_SECONDS = 600.0


class Tracker(Protocol):
    """What a worker tells a tracking service."""

    def begin(self, shard_id: int) -> None:
        """A shard begins."""

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """One row of the metrics table, as written."""

    def end(self) -> None:
        """The shard is over."""

    def close(self) -> None:
        """The worker ends."""


class NoTracker:
    """The default: the Parquet tables are the record."""

    def begin(self, shard_id: int) -> None:
        """Nothing."""

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class WandbTracker:
    """One wandb run a shard; each metric is logged as it comes, the table at the end; all of it in a thread."""

    def __init__(self, folder: SweepFolder, header: PlanHeader) -> None:
        self._folder, self._header = folder, header
        self._config: dict[str, Any] = dict(header.settings.tracking)
        self._unreachable = folder.logs / "tracked" / f"unreachable-{header.root}.txt"
        self._shard_id = -1
        self._run: Any = None
        self._has_answered = self._is_left_out = False
        self._todo: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def begin(self, shard_id: int) -> None:
        """A run of its own for this shard."""
        self._todo.put(partial(self._start, shard_id))

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Log one metric with the axes that led to it."""
        self._todo.put(partial(self._log, row))

    def end(self) -> None:
        """Write the table and close the run."""
        self._todo.put(self._finish)

    def close(self) -> None:
        """Wait for what is under way, not for long if the service never answered."""
        self._todo.put(None)
        self._thread.join(CLOSE_SECONDS if self._has_answered else CONNECT_SECONDS)

    def _work(self) -> None:
        for action in iter(self._todo.get, None):
            try:
                if not self._is_left_out:
                    action()
            except BaseException as error:  # noqa: BLE001 - tracking never fails a trial, and the library may exit
                log.warning("wandb failed and is left out for the rest of this run: %s", error)
                self._is_left_out = True
                if not self._has_answered:
                    with contextlib.suppress(OSError):
                        _keep(self._unreachable, str(error))

    def _start(self, shard_id: int) -> None:
        self._shard_id = shard_id
        if self._unreachable.exists():
            self._is_left_out = True
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run = wandb.init(
            project=self._config["project"],
            entity=self._config["entity"],
            mode=self._config["mode"],
            group=self._folder.name,
            name=f"{self._folder.name}-shard-{shard_id}",
            dir=str(self._folder.logs),
            config={"sweep": self._folder.name, "shard_id": shard_id, "plan": self._header.name},
            settings=wandb.Settings(save_code=False, disable_git=True, console="off"),
            reinit="create_new",
        )
        self._has_answered = True

    def _log(self, row: Mapping[str, Any]) -> None:
        axes = {key: row[key] for key in TABLE_COLUMNS[:10] if row[key] is not None}
        self._run.log({f"{row['task']}/{row['metric']}": row["value"], **axes})

    def _finish(self) -> None:
        import wandb

        with _claim(self._folder) as is_ours_to_take:
            living = {(heard.record.plan, heard.record.shard_id) for heard in read_records(self._folder) if heard.is_alive}
            own = (self._header.name, self._shard_id)
            rows = [
                row
                for row in untracked(self._folder)
                if (place := (row["plan"], row["shard_id"])) == own or (is_ours_to_take and place not in living)
            ]
            data: list[Any] = [[row[name] for name in TABLE_COLUMNS] for row in rows]
            self._run.log({"evaluations": wandb.Table(columns=list(TABLE_COLUMNS), data=data)})
            self._run.finish()
            keys = sorted({(row["attempt"], row["task_key"]) for row in rows})
            _keep(self._folder.logs / "tracked" / f"{self._run.id}.json", json.dumps(keys))


def untracked(folder: SweepFolder) -> list[dict[str, Any]]:
    """Rows of `metrics` that count, that tracked launches made, and that stand in no table yet."""
    tracked = {(attempt, key) for path in (folder.logs / "tracked").glob("*.json") for attempt, key in json.loads(path.read_text())}
    plans = {name for name, header in read_headers(folder.plan).items() if dict(header.settings.tracking).get("kind") == "wandb"}
    columns = dict.fromkeys((*TABLE_COLUMNS, "task_key", "shard_id", *order.COLUMNS))
    rows = effective(folder.path, "metrics", records.read_encoded(folder.path, "metrics", columns))
    rows = rows.filter(pc.is_in(rows.column("plan").cast(pa.string()), value_set=pa.array(sorted(plans), pa.string())))
    return [row for row in rows.to_pylist() if (row["attempt"], row["task_key"]) not in tracked]


@contextlib.contextmanager
def _claim(folder: SweepFolder) -> Iterator[bool]:
    """Whether the rows of workers that are gone are this one's to take up; one at a time has them."""
    path = folder.logs / "tracked" / "claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if filesystem_now(path.parent) - path.stat().st_mtime > CLAIM_SECONDS:
            path.unlink()
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def make_tracker(folder: SweepFolder, header: PlanHeader) -> Tracker:
    """The tracker that the configuration asks for."""
    return WandbTracker(folder, header) if dict(header.settings.tracking).get("kind") == "wandb" else NoTracker()


def what_lacks(mode: str) -> str | None:
    """Why wandb cannot be used as asked, with the remedy; None if nothing is known to be missing."""
    if importlib.util.find_spec("wandb") is None:
        return "tracking=wandb: the Python package wandb is not installed; `pip install wandb`, or tracking=none"
    if mode == "online" and not _has_key():
        return (
            "tracking=wandb: no key for Weights & Biases is known on this machine. Run `wandb login` (or set WANDB_API_KEY), "
            "or tracking.mode=offline and `wandb sync` later"
        )
    return None


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host) is not None:
                return True
    return False
