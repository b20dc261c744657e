"""A small sweep on the test cluster with a ledger beside it, as all fault tests use it.

study = Study(cluster=cluster, root=tmp_path, arguments=("bit_width=3,4", …))
study.launch()
study.wait_until_idle()
report = study.check()          # the ledger against the tables: nothing missing, lost, doubled or invented
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantsweep.storage.paths import SweepFolder
from tests.conftest import ROOT
from tests.slurm import ledger
from tests.slurm.cluster import Cluster, ClusterError

PAIR = "pair"
"""A partition on which each node runs one job of one core at a time: two cores cannot carry more."""
SMALLEST = ("model=mini-neox-0.3m", "task=mini_ppl", "limit=1")


@dataclass
class Study:
    """One sweep: where it is, how it is launched, and what its environment holds."""

    cluster: Cluster
    root: Path
    arguments: Sequence[str]
    name: str = "faults"
    checkout: Path = ROOT
    where: Path | None = None
    """Where the launch command is typed; the test's own folder by default."""
    results: Path | None = None
    faults: ledger.FaultPlan | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.record = self.root / f"{self.name}.ledger"
        self.results = self.results or self.root / "results"
        if self.faults is not None:
            self.faults.write(self.root / f"{self.name}.faults")

    @property
    def folder(self) -> SweepFolder:
        """The sweep's folder."""
        assert self.results is not None
        return SweepFolder(self.results / self.name)

    def command(self, *extra: str) -> list[str]:
        """The launch command, as typed; a later word of a key replaces an earlier one."""
        fixed = ("cluster=slurm", f"cluster.partition={PAIR}", f"results_dir={self.results}", f"sweep={self.name}")
        words = {word.split("=")[0]: word for word in (*SMALLEST, *fixed, *self.arguments, *extra)}
        return [sys.executable, str(self.checkout / "launch.py"), "-m", *words.values()]

    def variables(self, kill: Sequence[ledger.KillPoint] = ()) -> dict[str, str]:
        """The environment of a launch: the cluster, the ledger, faults, and where the launcher dies."""
        state = self.root / "killed"
        state.mkdir(exist_ok=True)
        faults = None if self.faults is None else self.root / f"{self.name}.faults"
        inside = ledger.environment(record=self.record, faults=faults, kill=kill, state=state)
        # Anything of a Slurm job that this test may itself run in would confuse sbatch.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        return {**kept, **self.cluster.env, "OMP_NUM_THREADS": "1", **inside, **self.environment}

    def launch(
        self, *extra: str, expect: int | None = 0, kill: Sequence[ledger.KillPoint] = (), timeout: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """Type the launch command; `expect` is its exit status (negative: the signal that ended it; None: any)."""
        done = subprocess.run(
            self.command(*extra),
            capture_output=True,
            text=True,
            env=self.variables(kill),
            cwd=self.where or self.root,
            timeout=timeout,
            check=False,
        )
        assert expect is None or done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def quantsweep(self, *arguments: str) -> str:
        """Run one of the commands of `quantsweep`."""
        command = [sys.executable, "-m", "quantsweep.cli.main", *arguments, "--results-dir", str(self.results)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.variables(), cwd=self.root, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        """The facts of `quantsweep status`."""
        facts: dict[str, Any] = json.loads(self.quantsweep("status", self.name, "--json"))
        states = ("done", "running", "queued", "waiting", "unknown", "held", "failed", "to_launch")
        assert sum(facts[state] for state in states) == facts["trials"], facts
        return facts

    def queued(self) -> list[str]:
        """Lines of squeue, one a task: state and name."""
        return self.cluster.run(["squeue", "--noheader", "--array", "--format=%T %i %j"]).stdout.splitlines()

    def wait_until_idle(self, seconds: float = 300.0) -> None:
        """Until nothing of this cluster's user runs or waits, twice in a row."""
        deadline = time.monotonic() + seconds
        quiet = 0
        while quiet < 2:
            time.sleep(1.0)
            try:
                queued = self.queued()
            except ClusterError:
                queued = ["the controller does not answer"]  # it may be restarting, on purpose
            assert time.monotonic() < deadline, f"still there after {seconds:.0f} s:\n" + "\n".join(queued[:10]) + self.logs()
            quiet = 0 if queued else quiet + 1

    def wait_until_only_collectors(self, seconds: float = 300.0) -> None:
        """Until no task of a shard runs or waits; a collector that comes back in some minutes may still be there."""
        deadline = time.monotonic() + seconds
        while any(not line.endswith("collector") or line.startswith(("RUNNING", "COMPLETING")) for line in self.queued()):
            assert time.monotonic() < deadline, f"still there after {seconds:.0f} s:\n" + "\n".join(self.queued()[:10]) + self.logs()
            time.sleep(1.0)

    def wait_for_rows(self, count: int, seconds: float = 180.0) -> None:
        """Until the ledger has seen so many evaluations end."""
        deadline = time.monotonic() + seconds
        while not self.record.exists() or ledger.read(self.record).ended.total() < count:
            assert time.monotonic() < deadline, f"no {count} evaluations after {seconds:.0f} s\n{self.logs()}"
            time.sleep(0.2)

    def check(self) -> ledger.Report:
        """The ledger against the tables of a finished sweep; fails for any broken promise."""
        report = ledger.check(ledger.read(self.record), self.folder.path)
        assert report.problems() == [], f"{report}\n{report.problems()}\n{self.logs()}"
        return report

    def logs(self, characters: int = 1500) -> str:
        """The ends of the newest job logs, and what Slurm and the submissions say of the newest jobs, for a failure's message."""
        logs = sorted(self.folder.logs.glob("slurm/*/*.out"), key=lambda path: path.stat().st_mtime)[-4:]
        said = [f"--- {log.name}\n{log.read_text(errors='replace')[-characters:]}" for log in logs]
        asked = ["sacct", "--allocations", "--duplicates", "--format=JobID,JobName%50,State,Start,End,NodeList"]
        accounts = self.cluster.run(asked, check=False).stdout  # not every cluster keeps them
        said += ["--- sacct", *accounts.splitlines()[-12:], "--- squeue", *self.queued()]
        for path in sorted(self.folder.plan.glob("submission-*.json"))[-3:]:
            content = json.loads(path.read_text())
            arrays = [(a["array_job_id"], a["tasks"], a["ended"], a["abandoned"]) for a in content["arrays"]]
            said.append(f"--- {path.name}: closed {content['closed']}, collector {content['collector']}, arrays {arrays}")
        return "\n".join(said)
