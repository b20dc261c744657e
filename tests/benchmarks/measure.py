"""What the benchmarks share: a process measured as the kernel counts it, calls of Slurm's programs counted, files counted.

A process's CPU time is `wait4`'s: its own and that of every child that it waited for.  Calls are
counted by a folder at the head of PATH whose `sbatch`, `squeue`, … note the call, then run the real
program; jobs inherit that PATH, and their calls are told apart by SLURM_JOB_ID.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import TEMPORARY_PREFIX, Cluster, reap_orphans

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("sbatch", "squeue", "sacct", "scontrol", "sacctmgr", "scancel", "sinfo")
LAUNCHER, JOBS = "launcher", "jobs"

SHIM = """#!/bin/sh
'{real}' "$@"
code=$?
read -r parent < /proc/$PPID/stat
printf '%s\\t%s\\t%s\\t%s\\n' "$(date +%s.%N)" '{program}' "${{SLURM_JOB_ID:--}}" "$parent" >> '{log}'
exit $code
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One process that has ended: seconds of wall clock and CPU (children included), peak memory in MB, and what it said."""

    wall: float
    cpu: float
    peak_mb: float
    started: float
    output: str


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a program of Slurm: when it ended, who made it, and how much CPU the calling process had used until then."""

    time: float
    program: str
    by: str
    caller_cpu: float


class Shims:
    """Counts calls of Slurm's programs by every process that is given `environment`."""

    def __init__(self, folder: Path) -> None:
        self._bin, self._log = folder / "bin", folder / "calls"
        self._bin.mkdir(parents=True)
        self._log.touch()
        for program in PROGRAMS:
            shim = self._bin / program
            shim.write_text(SHIM.format(real=shutil.which(program), program=program, log=self._log))
            shim.chmod(0o755)

    def environment(self, cluster: Cluster) -> dict[str, str]:
        """Variables of a process that talks to this cluster through the shims."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_"))}
        return {**kept, **cluster.env, "PATH": f"{self._bin}:{kept['PATH']}", "HF_HUB_OFFLINE": "1"}

    def reset(self) -> None:
        """Forget the calls so far."""
        self._log.write_text("")

    def calls(self) -> list[Call]:
        """All calls since the last reset, in order."""
        return [_parsed(line) for line in self._log.read_text().splitlines()]

    def counts(self, by: str) -> Counter[str]:
        """How often each program was called by the launching process, or from inside jobs."""
        return Counter(call.program for call in self.calls() if call.by == by)


def _parsed(line: str) -> Call:
    when, program, job, stat = line.split("\t")
    ticks = sum(int(field) for field in stat.rpartition(") ")[2].split()[11:15])  # utime, stime, and those of its children
    by = LAUNCHER if job == "-" else JOBS
    return Call(time=float(when), program=program, by=by, caller_cpu=ticks / os.sysconf("SC_CLK_TCK"))


def run(argv: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> Measured:
    """Run a command to its end and measure it; raises RuntimeError with its output if it fails."""
    with tempfile.TemporaryFile("w+") as output:
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(list(argv), cwd=cwd, env=dict(env), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - clock
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}\n{said}")
    return Measured(wall=wall, cpu=usage.ru_utime + usage.ru_stime, peak_mb=usage.ru_maxrss / 1024, started=started, output=said)


def num_files(folder: Path) -> int:
    """Files below a folder, hidden ones included."""
    return sum(len(names) for _, _, names in os.walk(folder))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, numbers to the right."""
    everything = [header, *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in everything
    )


def output_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--output`, described by the first line of a benchmark's own docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=None, help="write the text there too")
    return parser


def say(text: str, output: Path | None) -> None:
    """Print what was measured, and write it to `output` if that was asked for."""
    print(text)
    if output is not None:
        output.write_text(text + "\n")


@contextmanager
def work_folder() -> Iterator[Path]:
    """A new folder, short enough for a cluster's sockets, removed at the end, also of a run that is terminated."""
    reap_orphans(Path("/tmp"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
