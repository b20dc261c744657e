"""Faults from outside, at random but by a seed, while a sweep runs on the test cluster.

    with Chaos(cluster=cluster, log=tmp_path / "chaos.jsonl", seed=1, every=15) as chaos:
        …                                       # what is to survive it
    assert chaos.counts()["kill_worker"] > 0    # at the end of the block all nodes and the controller are back

    $ python -m tests.slurm.chaos CLUSTER_ROOT --log chaos.jsonl --every 60 --seed 1      # until Ctrl-C

Each fault is one that a real cluster has: a process killed by the machine, a task requeued or
cancelled by an administrator, a node daemon that crashes (its jobs live on), a node that loses power (they do not),
one that is drained the hard way, a preemption, a controller that restarts.  The log holds one JSON object a line:
time, kind, target, and what came of it; what the driver itself brings back is logged too.

Nothing outside of the cluster is touched: a process is killed only if its environment names this
cluster's configuration, checked again through a pidfd, so that a pid which was reused meanwhile is safe.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.slurm.cluster import Cluster, ClusterError

JOB_NAME = "chaos"
"""Jobs of the driver itself, which it leaves alone."""

BOOT_SECONDS = 30.0
"""A node that registers sooner than 20 s after a job began (BatchStartTimeout + MessageTimeout) is not believed to have lost it,
and is asked again only much later."""

WORKER, CHILD, COLLECTOR = r"quantsweep\.crew\.slurm_job task", r"quantsweep\.running\.child ", r"quantsweep\.crew\.slurm_job collect"
"""How a Python process of a job is told from another: by its command line."""


class Task(NamedTuple):
    """A running job or array task."""

    job: str
    name: str
    node: str
    partition: str


class Step(NamedTuple):
    """Something to be brought back, and when (monotonic clock)."""

    due: float
    number: int
    kind: str
    target: str
    action: Callable[[], object]


@dataclass(kw_only=True)
class Chaos:
    """A driver of faults; starts with the block and brings everything back at its end.

    every: mean seconds between faults (their distances are exponential); kinds: fault -> weight, see FAULTS.
    down: seconds for which nodes and the controller stay away, least and most.
    worker, child, collector: regular expressions over command lines.
    """

    cluster: Cluster
    log: Path
    seed: int = 0
    every: float = 20.0
    kinds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(FAULTS, 1.0))
    down: tuple[float, float] = (3.0, 15.0)
    worker: str = WORKER
    child: str = CHILD
    collector: str = COLLECTOR

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.kinds) - set(FAULTS)):
            raise ValueError(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
        self._random = random.Random(self.seed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._drive, name="chaos", daemon=True)
        self._error: Exception | None = None
        self._steps: list[Step] = []
        self._numbers = itertools.count()
        self._away: set[str] = set()
        self._counts: Counter[str] = Counter()

    # -- life -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if "preempt" in self.kinds and "high" not in self.cluster.run(["sinfo", "-h", "-o", "%R"]).stdout.split():
            raise ValueError("fault preempt needs the partitions low and high: Cluster(preemption=True)")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End the faults and bring everything back; raises what went wrong in the driver itself."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self.bring_back()
        if self._error is not None:
            raise self._error

    def bring_back(self) -> None:
        """Bring back at once whatever is away.  Not while the driver's own thread runs."""
        while self._steps:
            self._take_step()

    def counts(self) -> Counter[str]:
        """How often each fault has struck so far; one that found nothing to strike is not counted."""
        return Counter(self._counts)

    def strike(self, kind: str) -> str | None:
        """Do one fault now; returns what it struck, None if there was nothing to strike or Slurm refused."""
        try:
            target = FAULTS[kind](self)
        except ClusterError as error:  # a task that has just ended, a controller that is away
            self._note(kind, None, "refused: " + str(error).splitlines()[-1])
            return None
        self._note(kind, target, "nothing to strike" if target is None else "done")
        if target is not None:
            self._counts[kind] += 1
        return target

    def _drive(self) -> None:
        try:
            due = self._next_fault()
            while not self._ended.wait(max(0.0, min([due, *(step.due for step in self._steps[:1])]) - time.monotonic())):
                if self._steps and self._steps[0].due <= time.monotonic():
                    self._take_step()
                if due <= time.monotonic():
                    kinds = sorted(self.kinds)
                    self.strike(self._random.choices(kinds, [self.kinds[kind] for kind in kinds])[0])
                    due = self._next_fault()
        except Exception as error:
            self._error = error

    def _next_fault(self) -> float:
        return time.monotonic() + self._random.expovariate(1 / self.every)

    def _later(self, kind: str, target: str, action: Callable[[], object], *, at_least: float = 0.0) -> None:
        """Do something when the time of being down is over; it is done in any case at the end."""
        self._away.add(target)
        due = time.monotonic() + at_least + self._random.uniform(*self.down)
        heapq.heappush(self._steps, Step(due, next(self._numbers), kind, target, action))

    def _take_step(self) -> None:
        step = heapq.heappop(self._steps)
        step.action()
        self._away.discard(step.target)
        self._note(step.kind, step.target, "done")

    def _note(self, kind: str, target: str | None, result: str) -> None:
        line = json.dumps({"time": time.time(), "kind": kind, "target": target, "result": result})
        with self.log.open("a") as log:
            log.write(line + "\n")

    # -- what there is to strike ----------------------------------------------------------------

    def _tasks(self, partition: str | None = None) -> list[Task]:
        """Running tasks on nodes that are there, in the order of their ids; none while the controller is away."""
        if CONTROLLER in self._away:
            return []
        lines = self.cluster.run(["squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i|%j|%N|%P"]).stdout.splitlines()
        tasks = sorted(Task(*line.split("|")) for line in lines)
        return [task for task in tasks if task.name != JOB_NAME and task.node not in self._away and partition in (None, task.partition)]

    def _task(self, partition: str | None = None) -> Task | None:
        tasks = self._tasks(partition)
        return self._random.choice(tasks) if tasks else None

    def _busy_node(self) -> str | None:
        """A node with running tasks; none while another one is away, so that the cluster never comes to a stop."""
        nodes = sorted({task.node for task in self._tasks()})
        return self._random.choice(nodes) if nodes and not self._away else None

    # -- faults ---------------------------------------------------------------------------------

    def kill_worker(self) -> str | None:
        """SIGKILL for the process that writes the rows."""
        return self._kill_one(self.worker)

    def kill_child(self) -> str | None:
        """SIGKILL for the process that runs the trials."""
        return self._kill_one(self.child)

    def kill_collector(self) -> str | None:
        """SIGKILL for the job that looks after the sweep."""
        return self._kill_one(self.collector)

    def requeue(self) -> str | None:
        """An administrator puts a running task back into the queue."""
        if task := self._task():
            self.cluster.run(["scontrol", "requeue", task.job])
        return task and task.job

    def cancel(self) -> str | None:
        """An administrator kills a running task outright: all its processes at once, without a warning (CANCELLED)."""
        if task := self._task():
            self.cluster.run(["scancel", "--signal=KILL", "--full", task.job])
        return task and task.job

    def node_crash(self) -> str | None:
        """The daemon of a node dies and is started again later; the node's jobs run on."""
        if node := self._busy_node():
            self.cluster.kill_node(node)
            self._later("node_back", node, lambda: self.cluster.start_node(node))
        return node

    def node_lost(self) -> str | None:
        """A node loses power: its daemon and all its processes are gone at once; it boots, and comes back empty."""
        if node := self._busy_node():
            self.cluster.kill_node(node)
            for pid in self._processes_of(node):
                _kill(pid, self.cluster)
            self._later("node_back", node, lambda: self.cluster.start_node(node, rebooted=True), at_least=BOOT_SECONDS)
        return node

    def node_down(self) -> str | None:
        """An administrator sets a node down, which ends its jobs, and resumes it later."""
        if node := self._busy_node():
            self.cluster.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=chaos"])
            self._later("node_resumed", node, lambda: self._resume(node))
        return node

    def _resume(self, node: str) -> None:
        """Bring a node back that is down; with ReturnToService=2 its daemon may have done so already."""
        if "down" in self.cluster.run(["sinfo", "--noheader", f"--nodes={node}", "--format=%T"]).stdout:
            self.cluster.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])

    def preempt(self) -> str | None:
        """A job of the partition `high` takes the node of one of `low` for some seconds."""
        if task := self._task("low"):
            options = [
                "--partition=high",
                "--exclusive",
                f"--nodelist={task.node}",
                f"--job-name={JOB_NAME}",
                "--output=/dev/null",
                "--time=1",
            ]
            self.cluster.submit(*options, script=f"sleep {self._random.uniform(*self.down):.1f}")
        return task and task.job

    def controller_restart(self) -> str | None:
        """The controller stops, and is started again later."""
        if self._away:
            return None
        self.cluster.stop_controller()
        self._later("controller_back", CONTROLLER, self.cluster.start_controller)
        return CONTROLLER

    def _kill_one(self, pattern: str) -> str | None:
        pids = [pid for pid in sorted(self.cluster.job_processes()) if is_python(pid, pattern)]
        while pids:
            pid = pids.pop(self._random.randrange(len(pids)))
            said = f"{pid} of job {_variable(pid, 'SLURM_JOB_ID')} on {_variable(pid, 'SLURMD_NODENAME')}"
            if _kill(pid, self.cluster):
                return said
        return None

    def _processes_of(self, node: str) -> list[int]:
        """Processes of a node's jobs; first the daemons of their steps, which would report the deaths of the others."""
        inside = [pid for pid in self.cluster.job_processes() if _variable(pid, "SLURMD_NODENAME") == node]
        daemons = {daemon for pid in inside for daemon in _ancestors(pid) if _read(daemon, "comm").startswith(b"slurmstepd")}
        return [*sorted(daemons), *sorted(set(inside) - daemons)]


CONTROLLER = "slurmctld"

FAULTS: Mapping[str, Callable[[Chaos], str | None]] = {
    fault.__name__: fault
    for fault in (
        Chaos.kill_worker,
        Chaos.kill_child,
        Chaos.kill_collector,
        Chaos.requeue,
        Chaos.cancel,
        Chaos.node_crash,
        Chaos.node_lost,
        Chaos.node_down,
        Chaos.preempt,
        Chaos.controller_restart,
    )
}


# -- processes ------------------------------------------------------------------------------------------


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""  # it has ended


def _variable(pid: int, name: str) -> str | None:
    start = f"{name}=".encode()
    found = (variable for variable in _read(pid, "environ").split(b"\0") if variable.startswith(start))
    return next((variable[len(start) :].decode() for variable in found), None)


def is_python(pid: int, pattern: str) -> bool:
    """True for a Python process whose command line matches."""
    program, _, _ = (words := _read(pid, "cmdline").decode(errors="replace").replace("\0", " ")).partition(" ")
    return Path(program).name.startswith("python") and re.search(pattern, words) is not None


def _ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        parent = re.search(rb"^PPid:\s+(\d+)$", _read(pid, "status"), re.MULTILINE)
        pid = int(parent[1]) if parent else 0
        found.append(pid)
    return found


def _kill(pid: int, cluster: Cluster) -> bool:
    """SIGKILL for a process of this cluster; False if it has ended, or is another one by now."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if _variable(pid, "SLURM_CONF") != cluster.env["SLURM_CONF"]:
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


# -- command line ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Drive faults on a running cluster (one without `node_mounts`) until Ctrl-C, TERM, or so many seconds."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.chaos", description="Seeded random faults on a test cluster.")
    parser.add_argument("root", type=Path, help="folder of the cluster")
    parser.add_argument("--log", type=Path, required=True, help="JSON lines: each fault")
    parser.add_argument("--every", type=float, default=20.0, help="mean seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=None, help="end by itself after so long")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="faults, separated by commas (default: all)")
    arguments = parser.parse_args(argv)
    if not (arguments.root / "slurm.conf").exists():
        parser.error(f"{arguments.root} holds no running cluster")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    kinds = dict.fromkeys(arguments.kinds.split(","), 1.0)
    with Chaos(cluster=Cluster(root=arguments.root), log=arguments.log, seed=arguments.seed, every=arguments.every, kinds=kinds) as chaos:
        ended.wait(arguments.seconds)
    print(json.dumps(chaos.counts()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
