"""The GPUs of this machine that this process may use, without torch, whose import costs seconds.

nvidia-smi says how many there are; where it is missing (containers often lack it), the driver's device files do.
CUDA_VISIBLE_DEVICES takes some of them away, by CUDA's own rule: the list ends at the first entry that names none,
so that -1 and NoDevFiles hide all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from quantsweep.errors import ConfigurationError

ANSWER_SECONDS = 30.0
"""nvidia-smi takes some seconds where the driver is loaded anew for each call; one that hangs never answers."""
DEVICES = Path("/dev")
_BROKEN = re.compile(r".*(?:version mismatch|GPU is lost|fallen off the bus).*", re.IGNORECASE)
_BY_NAME = re.compile(r"(GPU|MIG)-[0-9A-Za-z/-]+")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Raises ConfigurationError where the driver does not answer or is broken: the CPU in its place would compute for hours.
    """
    there = _num_there()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(there)]
    found: list[str] = []
    for entry in (entry.strip() for entry in listed.split(",")):
        is_there = int(entry) < there if entry.isdecimal() else bool(there and _BY_NAME.fullmatch(entry))
        if not is_there:
            break
        found.append(entry)
    return found


def num_gpus() -> int:
    """How many GPUs this process may use."""
    return len(visible_gpus())


def _num_there() -> int:
    if shutil.which("nvidia-smi") is None:
        return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in DEVICES.glob("nvidia*"))
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"nvidia-smi gave no answer in {ANSWER_SECONDS:.0f} s: the driver of this machine's GPUs hangs (a restart helps). "
            "device=cpu runs without them"
        ) from None
    if done.returncode == 0:
        return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    if broken := _BROKEN.search(done.stdout + done.stderr):  # else there is none, or none for this job
        raise ConfigurationError(
            f"nvidia-smi says '{broken[0].strip()}': the driver of this machine's GPUs is broken (a restart helps). "
            "device=cpu runs without them"
        )
    return 0
