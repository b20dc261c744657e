"""One whole sweep of 35,136 distinct real trials on a real Slurm cluster, under seeded faults, to its end.

    python -m tests.benchmarks.whole_sweep --output /tmp/whole.txt [--trials 35136] [--seed 1]

The smallest bundled models, one document of one task: what is measured is the engine, not the models.
Faults come from inside (a share of all trials runs out of GPU memory, crashes, is killed, or meets a bug, once each)
and from outside (workers and children killed, tasks requeued, nodes lost, the controller restarted).  Nobody
attends to it until the cluster is quiet; then the launch command is typed again until nothing is left.

Printed: wall time, trials a second, files, calls of Slurm's commands, faults, and what the ledger (written by
the trial processes for this test, unknown to the product) says against the tables: evaluations repeated, lost,
doubled, invented.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.benchmarks.measure import Shims, num_files, output_parser, say
from tests.slurm import ledger
from tests.slurm.chaos import Chaos
from tests.slurm.cluster import TEMPORARY_PREFIX, Cluster
from tests.slurm.ledger import Fault, FaultPlan
from tests.slurm.studies import PAIR, Study

FAULTS = {"kill": 0.0008, "segfault": 0.0006, "out_of_gpu_memory": 0.0006, "device_assert": 0.0004, "bug": 0.0028}
"""Share of trials that each strikes, once: 1 in 192 in all."""
CHAOS = {"kill_worker": 3.0, "kill_child": 3.0, "requeue": 2.0, "node_lost": 0.5, "controller_restart": 0.5, "kill_collector": 1.0}
MODELS = 2
COMBINATIONS = 4 * 6
"""Data types x bit widths."""
MAX_LAUNCHES = 12


def main(argv: list[str] | None = None) -> int:
    """Run it all and print the table; returns 1 if a promise was broken."""
    parser = output_parser(__doc__)
    parser.add_argument("--trials", type=int, default=35_136)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds between two faults from outside")
    arguments = parser.parse_args(argv)
    room = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir="/tmp"))
    lines, sound = run(room, arguments.trials, arguments.seed, arguments.every)
    if sound:
        shutil.rmtree(room)  # else it stays, to be looked at
    say("\n".join(lines), arguments.output)
    return 0 if sound else 1


def run(room: Path, trials: int, seed: int, every: float) -> tuple[list[str], bool]:
    """The sweep on a cluster of its own; returns the table and whether every promise held."""
    blocks = -(-trials // (MODELS * COMBINATIONS))
    grid = (
        "model=mini-neox-0.3m,mini-opt-0.4m",
        "data_type=int,fp,quantile,dynamic",
        "bit_width=range(3,9)",
        f"block_size=range(16,{16 + blocks})",
        "model.resources.gpus=1",  # pretended: so that running out of GPU memory can be helped
        "device=cpu",
        "breaker_trials=null",  # its bugs are spread over all trials on purpose
    )
    faults = FaultPlan(faults=tuple(Fault(kind=kind, rate=rate) for kind, rate in FAULTS.items()), state=room / "struck", seed=seed)
    with Cluster(root=room / "c", nodes=2, partitions={PAIR: "MaxCPUsPerNode=1 PreemptMode=OFF"}, preemption=True) as cluster:
        shims = Shims(room / "shims")
        path = {"PATH": shims.environment(cluster)["PATH"]}
        study = Study(cluster=cluster, root=room, arguments=grid, name="whole", faults=faults, environment=path)
        return _measure(study, shims, room, seed, every)


def _measure(study: Study, shims: Shims, room: Path, seed: int, every: float) -> tuple[list[str], bool]:
    started = time.monotonic()
    said = study.launch(timeout=600).stdout
    submitted = time.monotonic() - started
    with Chaos(cluster=study.cluster, log=room / "chaos.jsonl", seed=seed, every=every, kinds=CHAOS) as chaos:
        print(said, flush=True)
        _Progress(study.record).start()
        study.wait_until_idle(3 * 3600)
    launches = 1
    while "nothing left to run" not in study.launch(timeout=600).stdout and launches < MAX_LAUNCHES:
        launches += 1
        study.wait_until_idle(3600)
    wall = time.monotonic() - started
    record = ledger.read(study.record)
    report = ledger.check(record, study.folder.path)
    outside = chaos.counts()
    struck = sum(record.faults.values()) + outside.total()
    calls = Counter(call.program for call in shims.calls())
    lines = [
        f"trials asked {report.asked:,}   with a row {report.rows:,}",
        f"wall {wall:,.0f} s (planned and submitted in {submitted:.1f} s)   {report.rows / wall:.1f} trials a second   {launches} launches",
        f"faults {struck:,} (1 in {report.asked / max(1, struck):.0f} trials): {_words(record.faults)}; from outside {_words(outside)}",
        f"files {num_files(study.folder.path):,} ({num_files(study.folder.path) / report.asked:.4f} a trial)",
        f"calls of Slurm's commands {calls.total():,}: {_words(calls)}",
        f"evaluations ended {record.ended.total():,}   repeated {sum(n - 1 for n in report.repeated.values())}   cut off {len(report.cut)}",
        f"rows lost {len(report.lost)}   doubled {len(report.doubled)}   missing {len(report.missing)}   invented {len(report.invented)}"
        f"   begun although a row was there {len(report.needless)}",
        *report.problems(),
    ]
    return lines, not report.problems() and report.rows == report.asked


class _Progress(threading.Thread):
    """Says once a minute how many evaluations have ended."""

    def __init__(self, record: Path) -> None:
        super().__init__(daemon=True)
        self._record = record

    def run(self) -> None:
        while True:
            time.sleep(60)
            ended = sum(line.startswith("end ") for line in self._record.open()) if self._record.exists() else 0
            print(f"{time.strftime('%H:%M:%S')}  {ended:,} evaluations", flush=True)


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
