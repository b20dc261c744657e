"""A sweep folder with plans, and a Slurm of paper: what the engine's tests share.

`Site` answers in place of `quantsweep.slurm._run` from a list of jobs, in the words of 22.05; sbatch is replaced where
it is called (`cluster.submit_array`, `cluster.submit_collector`).  Everything between is the product's.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from quantsweep import slurm
from quantsweep.launching import cluster as sbatch
from quantsweep.launching import refill
from quantsweep.launching.refill import SubmitSummary, submit_waiting
from quantsweep.launching.settle import settle
from quantsweep.launching.submissions import SubmittedArray, job_prefix, read_submissions
from quantsweep.planning.plan import Expansion, build_plan
from quantsweep.planning.plan_files import write_plan
from quantsweep.storage.lock import launch_lock
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import WorkerRecord, write_record
from quantsweep.tables import records
from quantsweep.tables.order import launch_number
from quantsweep.trial.specs import ClusterSpec, LaunchSettings, ModelSpec, PlannedTrial, Resources, RunSettings, TaskSpec, TrialSpec
from tests.unit.test_records import row
from tests.unit.test_specs import QUANTIZATION

TASKS = tuple(
    TaskSpec(name=name, lm_eval_task=name, folder="mini", version="1.0", primary_metric="acc", higher_is_better=True, limit=10)
    for name in ("t", "u")
)
SLURM = ClusterSpec(kind="slurm")


def trial(bits: int = 4, *, model: int = 0, tasks: tuple[TaskSpec, ...] = TASKS, block: int = 64, **resources: int) -> PlannedTrial:
    spec = ModelSpec(
        name=f"m{model}",
        family=f"f{model % 2}",
        path=f"/{model}",
        content=f"sha256:{model}",
        parameters=10**5,
        resources=Resources(**resources),
    )
    quantization = dataclasses.replace(QUANTIZATION, bit_width=bits, block_size=block)
    return PlannedTrial(trial=TrialSpec(model=spec, quantization=quantization), tasks=tasks)


def write(
    folder: SweepFolder,
    trials: Sequence[PlannedTrial],
    *,
    root: str | None = None,
    in_flight: frozenset[str] = frozenset(),
    shard_minutes: float = 1e-9,
    cluster: ClusterSpec = SLURM,
    **launch: Any,
) -> Path:
    """Write a plan, by default with one trial a shard."""
    plan = build_plan(
        Expansion(trials=tuple(trials), duplicates=0, skipped={}, candidates=len(trials)),
        sweep=folder.name,
        done=records.read_done(folder.path),
        in_flight=in_flight,
        settings=RunSettings(device="cpu"),
        launch=LaunchSettings(cluster=cluster, shard_minutes=shard_minutes, **launch),
        workers=None,
    )
    return write_plan(folder.plan, plan, root=root)


_numbers = itertools.count()


def finish(
    folder: SweepFolder,
    planned: PlannedTrial,
    tasks: Sequence[TaskSpec] | None = None,
    *,
    plan: str = "p",
    host: str = "n0",
    tag: str | None = None,
) -> None:
    """The rows of a trial that was done (or of some of its tasks)."""
    done = planned.tasks if tasks is None else tuple(tasks)
    identity = {**records.identity_columns(planned.trial), "launch": launch_number(folder.plan, plan), "life": 0, "tag": tag}
    when = datetime.now(UTC)
    rows = [row("metrics", **identity, **records.task_columns(task), plan=plan, finished_at=when) for task in done]
    writer = records.Writer(folder, f"w{next(_numbers)}")
    writer.add("metrics", rows)
    if done == planned.tasks:
        values = {"status": "done", "failure_class": None, "config": records.config_json(planned)}
        writer.add("trials", [row("trials", **identity, **values, plan=plan, host=host, finished_at=when)])


def fail(folder: SweepFolder, planned: PlannedTrial, cause: str, *, plan: str, fingerprint: str = "abc", host: str = "n0") -> None:
    """The row of a failed attempt."""
    number = next(_numbers)
    values = {
        **records.identity_columns(planned.trial),
        "status": "failed",
        "failure_class": cause,
        "failure_fingerprint": fingerprint,
        "failure_message": f"it was {cause}",
        "config": records.config_json(planned),
        "plan": plan,
        "launch": launch_number(folder.plan, plan),
        "life": 0,
        "attempt": f"a{number:06d}",
        "host": host,
        "finished_at": datetime.now(UTC),
    }
    records.Writer(folder, f"w{number}").add("trials", [row("trials", **values)])


def failed_rows(folder: SweepFolder) -> list[dict[str, Any]]:
    """Rows of failed attempts, as they stand."""
    return [r for r in records.read_table(folder.path, "trials").to_pylist() if r["status"] == "failed"]


def worker(folder: SweepFolder, *, age: float = 0.0, **values: Any) -> WorkerRecord:
    """A worker's record, last written `age` seconds ago, of another host unless told otherwise."""
    record = WorkerRecord(**{"worker": f"worker{next(_numbers)}", "host": "elsewhere", "pid": 1, "plan": "p", **values})
    write_record(folder, record)
    when = time.time() - age
    os.utime(folder.workers / f"{record.worker}.json", (when, when))
    return record


@dataclass
class Site:
    """A cluster on paper.

    jobs: (array job, index) → (name, state as squeue says it, node).  accounts: the same keys → state as sacct says it;
    None: no accounting.  reasons: why squeue says that a job waits (by default "None").  later: minutes after which
    collectors begin that wait for no job.  down: commands that give no answer.  refuse: what sbatch says to its n-th call (0, 1, …).
    partitions: the lines of `scontrol show partition` (by default one of two nodes).
    """

    folder: SweepFolder
    jobs: dict[tuple[int, int | None], tuple[str, str, str]] = field(default_factory=dict)
    accounts: dict[tuple[int, int | None], str] | None = field(default_factory=dict)
    down: set[str] = field(default_factory=set)
    asked: list[list[str]] = field(default_factory=list)
    refuse: dict[int, Exception] = field(default_factory=dict)
    submitted: list[SubmittedArray] = field(default_factory=list)
    excluded: tuple[str, ...] = ()
    collectors: list[tuple[int, ...]] = field(default_factory=list)
    later: list[int] = field(default_factory=list)
    reasons: dict[tuple[int, int | None], str] = field(default_factory=dict)
    max_array_size: int = 1001
    max_job_count: int = 10_000
    max_minutes: str = "UNLIMITED"
    cluster: str = ""
    partitions: str = ""
    calls: int = 0
    next_id: int = 100

    # -- what Slurm is asked --

    def run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.asked.append(list(argv))
        if argv[0] in self.down:
            return subprocess.CompletedProcess(argv, 1, stdout="", stderr=f"{argv[0]}: error: Unable to contact slurm controller\n")
        if argv[0] == "sacct" and self.accounts is None:
            return subprocess.CompletedProcess(argv, 1, stdout="", stderr="Slurm accounting storage is disabled\n")
        out = {"squeue": self._squeue, "sacct": self._sacct, "scontrol": self._scontrol, "scancel": self._scancel}[argv[0]](list(argv))
        return subprocess.CompletedProcess(argv, 0, stdout=out, stderr="")

    def _squeue(self, argv: list[str]) -> str:
        lines = []
        for (job, index), (name, state, node) in self.jobs.items():
            identifier = _job_id(job, index)
            reason = self.reasons.get((job, index), "None")
            lines.append("\x1f".join([identifier, str(job), "N/A" if index is None else str(index), state, reason, node, name]))
        return "".join(f"{line}\n" for line in lines)

    def _sacct(self, argv: list[str]) -> str:
        wanted = {int(number) for number in argv[argv.index("--jobs") + 1].split(",")}
        assert self.accounts is not None
        return "".join(f"{_job_id(job, index)}|{state}|0:0|n0|3\n" for (job, index), state in self.accounts.items() if job in wanted)

    def _scontrol(self, argv: list[str]) -> str:
        if argv[1:3] == ["show", "config"]:
            sizes = f"MaxArraySize = {self.max_array_size}\nMaxJobCount = {self.max_job_count}\n"
            name = f"ClusterName = {self.cluster}\n" if self.cluster else ""
            return f"Configuration data as of 2026-11-21T23:39:00\nAccountingStorageType = accounting_storage/none\n{name}{sizes}"
        if "partition" in argv:
            return self.partitions or f"PartitionName=main Default=YES MaxTime={self.max_minutes} TotalNodes=2 State=UP\n"
        return ""

    def _scancel(self, argv: list[str]) -> str:
        for text in argv[1:]:
            job, _, index = text.partition("_")
            key = (int(job), int(index) if index else None)
            name, state, node = self.jobs[key]
            assert state in ("PENDING", "RUNNING", "REQUEUE_HOLD")
            self.jobs[key] = (name, "CANCELLED", node)
        return ""

    # -- sbatch --

    def submit_array(
        self, folder: SweepFolder, submission: Path, index: int, array: SubmittedArray, launch: LaunchSettings, excluded: Sequence[str] = ()
    ) -> int:
        [declared] = [one for one in read_submissions(folder) if one.path == submission]
        assert declared.arrays[index] == array, "the intent is on disk before sbatch is called"
        call, self.calls = self.calls, self.calls + 1
        if call in self.refuse:
            raise self.refuse[call]
        self.submitted.append(array)
        self.excluded = tuple(excluded)
        return self.put(array)

    def put(self, array: SubmittedArray, state: str = "PENDING") -> int:
        """The array is in the queue; returns its number."""
        self.next_id += 1
        for n in range(len(array.tasks)):
            self.jobs[self.next_id, n] = (array.job_name, state, "")
        return self.next_id

    def submit_collector(
        self, folder: SweepFolder, job_name: str, launch: LaunchSettings, after: Sequence[int] = (), *, begin_minutes: int | None = None
    ) -> int:
        assert job_name.startswith(job_prefix(folder))
        assert job_name.endswith("collector")
        if begin_minutes is None:
            self.collectors.append(tuple(after))
        else:
            self.later.append(begin_minutes)
        self.next_id += 1
        self.jobs[self.next_id, 0] = (job_name, "PENDING", "")
        return self.next_id

    # -- what happens to jobs --

    def shards(self) -> list[tuple[str, int]]:
        """(plan, shard) of everything that was ever accepted, in order."""
        return [(array.plan, shard_id) for array in self.submitted for ids in array.tasks for shard_id in ids]

    def set(self, state: str, *, node: str = "n0", only: tuple[int, int | None] | None = None) -> None:
        """All jobs but collectors (or one) are in this state now."""
        for key, (name, _, _) in self.jobs.items():
            if key == only or (only is None and not name.endswith("collector")):
                self.jobs[key] = (name, state, node)

    def cancel_pending(self) -> None:
        """scancel of whole arrays: what had not begun becomes one line an array, which names no task."""
        for (job, index), (name, state, node) in list(self.jobs.items()):
            if state == "PENDING" and not name.endswith("collector"):
                del self.jobs[job, index]
                self.jobs[job, None] = (name, "CANCELLED", node)

    def forget(self, *, account: str | None = None) -> None:
        """squeue knows nothing any more; sacct says `account`."""
        if account is not None and self.accounts is not None:
            self.accounts |= dict.fromkeys(self.jobs, account)
        self.jobs.clear()


def _job_id(job: int, index: int | None) -> str:
    return str(job) if index is None else f"{job}_{index}"


def install(monkeypatch: pytest.MonkeyPatch, folder: SweepFolder, **values: Any) -> Site:
    """Put a Site in Slurm's place."""
    site = Site(folder=folder, **values)
    monkeypatch.setattr(slurm, "_run", site.run)
    monkeypatch.setattr(sbatch, "submit_array", site.submit_array)
    monkeypatch.setattr(sbatch, "submit_collector", site.submit_collector)
    monkeypatch.setattr(refill, "BACK_OFF_SECONDS", (0.0, 0.0))
    return site


def age_submissions(folder: SweepFolder, seconds: float) -> None:
    """Every submission was declared so long ago."""
    for submission in read_submissions(folder):
        dataclasses.replace(submission, declared=submission.declared - seconds).save()


def submit(folder: SweepFolder) -> SubmitSummary:
    """Settle and submit what waits, as a launch does."""
    with launch_lock(folder.plan / "launch.lock"):
        return submit_waiting(folder, settle(folder))
