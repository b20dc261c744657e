"""Faults of a trial, on purpose: which trials they strike, how often, and what they do.

    {"seed": 1, "state": "/folder", "faults": [{"kind": "segfault", "trials": ["3f"], "times": 1}, …]}

A fault chooses trials by the beginnings of their ids, or by `rate`: that share of all trials, always the
same ones for a seed, in whatever process they run.  It strikes at the first `times` evaluations of each
(null: at every one); files in `state` count, so a retry in another process succeeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

MOMENTS = ("begin", "end")
CHUNK = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault, and whom it strikes.

    kind: one of KINDS.  trials: beginnings of trial ids; rate: share of all trials, 0 to 1.  times: evaluations a
    trial, None for all.  moment: before the evaluation, or after it and before its result is told.
    megabytes, seconds: for `host_memory`, how much it takes and how long it holds it.
    """

    kind: str
    trials: tuple[str, ...] = ()
    rate: float = 0.0
    times: int | None = 1
    moment: str = "begin"
    megabytes: int = 2_000
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.moment not in MOMENTS:
            raise ValueError(f"fault {self.kind}: moment {self.moment!r} is not one of {', '.join(MOMENTS)}")
        if not self.trials and not self.rate:
            raise ValueError(f"fault {self.kind} strikes nobody: give trials (beginnings of ids) or a rate")

    def chooses(self, trial: str, salt: str) -> bool:
        """True if this trial is one of those that the fault strikes."""
        if any(trial.startswith(beginning) for beginning in self.trials):
            return True
        draw = int.from_bytes(hashlib.sha256(f"{salt} {trial}".encode()).digest()[:8], "big") / 2**64
        return draw < self.rate


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """All faults of a test, and the folder that counts them."""

    faults: tuple[Fault, ...]
    state: Path
    seed: int = 0

    def write(self, path: Path) -> None:
        """Write the file that `read` reads, and make the folder."""
        self.state.mkdir(parents=True, exist_ok=True)
        plan = {"seed": self.seed, "state": str(self.state), "faults": [asdict(fault) for fault in self.faults]}
        path.write_text(json.dumps(plan))

    @classmethod
    def read(cls, path: Path) -> FaultPlan:
        """The plan in a file; raises ValueError or TypeError for one that says nothing sensible."""
        plan = json.loads(path.read_text())
        faults = tuple(Fault(**{**fault, "trials": tuple(fault.get("trials", ()))}) for fault in plan["faults"])
        return cls(faults=faults, state=Path(plan["state"]), seed=plan["seed"])

    def due(self, trial: str, moment: str) -> Fault | None:
        """The fault that strikes this trial now, counted as struck; None if there is none."""
        for number, fault in enumerate(self.faults):
            if fault.moment == moment and fault.chooses(trial, f"{self.seed} {number}") and self._count(number, fault, trial):
                return fault
        return None

    def _count(self, number: int, fault: Fault, trial: str) -> bool:
        return fault.times is None or any(_claim(self.state / f"{number}-{trial}-{time_}") for time_ in range(fault.times))


def strike(fault: Fault) -> None:
    """Do it; comes back only if nobody ended the process that took too much memory (and then raises MemoryError)."""
    KINDS[fault.kind](fault)


def _out_of_gpu_memory(fault: Fault) -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")


def _device_assert(fault: Fault) -> NoReturn:
    raise RuntimeError("CUDA error: device-side assert triggered (injected)")


def _bug(fault: Fault) -> NoReturn:
    raise KeyError("a bug (injected): always the same code path, so always the same fingerprint")


def _segfault(fault: Fault) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.SIGSEGV)


def _kill(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(fault: Fault) -> NoReturn:
    while True:
        time.sleep(3600)


def _host_memory(fault: Fault) -> NoReturn:
    """Touch memory until `megabytes` are taken, and hold it until somebody who counts (Slurm, the kernel) ends us."""
    held = [bytearray(b"x") * CHUNK for _ in range(max(1, fault.megabytes * 2**20 // CHUNK))]
    time.sleep(fault.seconds)
    raise MemoryError(f"held {len(held) * CHUNK // 2**20} MB for {fault.seconds} s, and nobody minded (injected)")


def _cuda_assert(fault: Fault) -> None:
    """A true one: the CUDA context of this process is lost with it."""
    import torch

    table = torch.zeros(4, device="cuda")
    table[torch.tensor([99], device="cuda")].sum().item()


def _cuda_memory(fault: Fault) -> None:
    """A true one: a petabyte."""
    import torch

    torch.empty(2**50, dtype=torch.uint8, device="cuda")


def _slow(fault: Fault) -> None:
    """No fault at all: an evaluation that takes `seconds` longer, whatever the machine."""
    time.sleep(fault.seconds)


KINDS: dict[str, Callable[[Fault], None]] = {
    "out_of_gpu_memory": _out_of_gpu_memory,
    "device_assert": _device_assert,
    "bug": _bug,
    "segfault": _segfault,
    "kill": _kill,
    "hang": _hang,
    "host_memory": _host_memory,
    "slow": _slow,
    "cuda_assert": _cuda_assert,
    "cuda_memory": _cuda_memory,
}


def _claim(marker: Path) -> bool:
    try:
        marker.touch(exist_ok=False)  # O_EXCL
    except FileExistsError:
        return False
    return True
