"""Weights & Biases, if asked for: one run a shard, its trials as rows of a table.

A run a trial would be 35,000 runs in a project; a run a shard is a few hundred, grouped by sweep.
Tracking is a courtesy: whatever goes wrong in it is said once in the log and never fails a trial.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from quantsweep.paths import SweepFolder
from quantsweep.specs import RunSettings

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


class Tracker(Protocol):
    """What a worker tells a tracking service."""

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """One row of the metrics table, as written."""

    def finish(self) -> None:
        """The shard is over."""


class NoTracker:
    """The default: the Parquet tables are the record."""

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class WandbTracker:
    """One wandb run a shard; each metric is logged as it comes, the table at the end."""

    def __init__(self, config: Mapping[str, Any], folder: SweepFolder, shard_id: int) -> None:
        self._rows: list[list[Any]] = []
        self._run: Any = None
        self._guard(lambda: self._start(config, folder, shard_id))

    def _start(self, config: Mapping[str, Any], folder: SweepFolder, shard_id: int) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=config["project"],
            entity=config["entity"],
            mode=config["mode"],
            group=folder.name,
            name=f"{folder.name}-shard-{shard_id}",
            dir=str(folder.logs),
            config={"sweep": folder.name, "shard_id": shard_id},
            settings=wandb.Settings(save_code=False, disable_git=True, console="off"),
            reinit="create_new",
        )

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Log one metric with the axes that led to it."""
        if self._run is None:
            return
        self._rows.append([row[column] for column in TABLE_COLUMNS])
        axes = {key: row[key] for key in TABLE_COLUMNS[:10] if row[key] is not None}
        self._guard(lambda: self._run.log({f"{row['task']}/{row['metric']}": row["value"], **axes}))

    def finish(self) -> None:
        """Write the table and close the run."""
        if self._run is None:
            return
        self._guard(lambda: self._run.log({"evaluations": self._wandb.Table(columns=list(TABLE_COLUMNS), data=self._rows)}))
        self._guard(lambda: self._run.finish() if self._run is not None else None)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the promise of this module: tracking never fails a trial
            log.warning("wandb failed and is left out for the rest of this shard: %s", error)
            self._run = None


def make_tracker(settings: RunSettings, folder: SweepFolder, shard_id: int) -> Tracker:
    """The tracker that the configuration asks for."""
    config = dict(settings.tracking)
    return WandbTracker(config, folder, shard_id) if config.get("kind") == "wandb" else NoTracker()
