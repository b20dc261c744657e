"""What a machine or a cluster lacks for sweeps, and which limits it has: small checks, each of one thing.

    Check(section, name, state, found, remedy)      state: ok | warning | problem | unknown

`problem`: sweeps will not work here as configured.  `warning`: they will, and something will hurt.
`unknown`: it cannot be told from here, and nothing is guessed.

Nothing is changed but a folder of probes, which is removed again.  Of Slurm a handful of read-only
questions are asked.  No value of an environment variable is shown, names only: some hold secrets.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from quantsweep import slurm
from quantsweep.checkpoints.pins import offline_switches
from quantsweep.errors import QuantsweepError, ResultsError, SlurmError, did_you_mean
from quantsweep.slurm import PartitionLimits, SlurmUnavailable
from quantsweep.storage.files import OTHERS_MAY_WRITE, filesystem_now
from quantsweep.storage.paths import SweepFolder, product_root
from quantsweep.trial.specs import ClusterSpec
from quantsweep.words import count

State = Literal["ok", "warning", "problem", "unknown"]

LITTLE_BYTES = 5 * 2**30
"""Less free space than this is worth a warning: a study of 35,000 trials writes about 1 GB, a 7B model has 14 GB."""
LITTLE_INODES = 10_000
SKEW_SECONDS = 5.0
"""Clocks that differ by more are worth a warning (ages are measured by the file system's clock all the same)."""
EARLIEST_YEAR = 2025
FEW_SECONDS_OF_MEMORY = 60
FEW_SECONDS_TO_END = 10
TORCH_SECONDS = 120
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "glusterfs", "afs", "panfs", "wekafs", "orangefs", "9p")

_TORCH_PROBE = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.device_count()]))"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at: what was found, and what to do about it if that is not good."""

    section: str
    name: str
    state: State
    found: str
    remedy: str = ""


def _check(section: str, name: str, found: str, state: State = "ok", remedy: str = "") -> Check:
    """A check; what is right needs no remedy."""
    return Check(section=section, name=name, state=state, found=found, remedy="" if state == "ok" else remedy)


def examine(cluster: ClusterSpec, results_dir: Path) -> Iterator[Check]:
    """Every check for sweeps on `cluster` with results under `results_dir`, as each is made (some take a second)."""
    yield from check_software()
    yield from check_machine()
    yield from check_gpus()
    yield from check_slurm(cluster)
    yield from check_results(results_dir, shared=cluster.kind == "slurm")
    yield from check_hub_cache()


# --- software and machine ----------------------------------------------------------------------------------------------------


def check_software() -> Iterator[Check]:
    """Python and each required library against the ranges of pyproject.toml; those that are right share a line."""
    python, requirements = _requirements()
    right = SpecifierSet(python).contains(platform.python_version())
    found = f"{platform.python_version()} (wanted: {python}), {sys.executable}"
    yield _check("software", "python", found, "ok" if right else "problem", f"use Python {python}")
    fine = 0
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            fine += 1
            continue
        found = f"{version or 'not installed'} (wanted: {requirement.specifier})"
        yield _check("software", requirement.name, found, "problem", f"pip install '{requirement}'")
    yield _check("software", "libraries", f"{fine} of {len(requirements)} in the ranges that pyproject.toml asks for")


def _requirements() -> tuple[str, list[Requirement]]:
    """(range of Python, requirements): of the checkout's pyproject.toml, or of the installed package."""
    project = product_root() / "pyproject.toml"
    if project.is_file():
        content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, texts = content["requires-python"], content["dependencies"]
    else:
        python = importlib.metadata.metadata("quantsweep")["Requires-Python"]
        texts = importlib.metadata.requires("quantsweep") or []
    requirements = [Requirement(text) for text in texts]
    return python, [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_machine() -> Iterator[Check]:
    """Cores that this process may use, memory, and a clock that can be right."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _check("machine", "cores and memory", f"{count(cores, 'core')}, {_size(memory)} ({platform.node()})")
    now = datetime.now().astimezone()
    state: State = "ok" if now.year >= EARLIEST_YEAR else "problem"
    remedy = "set the clock (NTP): rows carry times, and the hub's certificates have dates"
    yield _check("machine", "clock", now.strftime("%Y-%m-%d %H:%M:%S %Z"), state, remedy)


# --- GPUs --------------------------------------------------------------------------------------------------------------------


def check_gpus() -> Iterator[Check]:
    """GPUs as the driver sees them; if there are any, whether torch sees as many (in a process of its own: it takes seconds)."""
    try:
        driver, gpus = _gpus()
    except QuantsweepError as error:
        yield _check("gpu", "gpu", f"none here ({error}): trials run on the CPU, or on the nodes of a cluster")
        return
    for number, (name, total, free) in enumerate(gpus):
        found = f"{name}, {_size(total)}, {_size(free)} free, driver {driver}"
        state: State = "ok" if free > total / 2 else "warning"
        yield _check("gpu", f"gpu {number}", found, state, "somebody else is using it: choose with CUDA_VISIBLE_DEVICES")
    yield _check_torch(len(gpus))


def _gpus() -> tuple[str, list[tuple[str, int, int]]]:
    """(driver, [(name, bytes, bytes free)]); raises QuantsweepError where there is no driver or no GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise QuantsweepError(str(error)) from error
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        facts = [(str(pynvml.nvmlDeviceGetName(handle)), pynvml.nvmlDeviceGetMemoryInfo(handle)) for handle in handles]
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        raise QuantsweepError(str(error)) from error
    finally:
        pynvml.nvmlShutdown()
    if not facts:
        raise QuantsweepError("a driver without a GPU")
    return driver, [(name, int(memory.total), int(memory.free)) for name, memory in facts]


def _check_torch(num_gpus: int) -> Check:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=TORCH_SECONDS, check=False
        )
        version, cuda, seen = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return _check("gpu", "torch", f"cannot be asked ({type(error).__name__})", "problem", f"run: {sys.executable} -c 'import torch'")
    found = f"torch {version} (CUDA {cuda or 'none'}) sees {seen} of {num_gpus} GPUs"
    if seen == num_gpus:
        return _check("gpu", "torch", found)
    if cuda is None:
        return _check("gpu", "torch", found, "problem", "this torch is built for CPUs: install one for CUDA")
    if seen:
        return _check("gpu", "torch", found, "warning", "CUDA_VISIBLE_DEVICES hides some")
    remedy = "the driver may be older than this CUDA, or CUDA_VISIBLE_DEVICES hides all: compare with nvidia-smi"
    return _check("gpu", "torch", found, "problem", remedy)


# --- Slurm -------------------------------------------------------------------------------------------------------------------


def check_slurm(cluster: ClusterSpec) -> Iterator[Check]:
    """The cluster's limits and habits, and whether the partition, account and QOS that will be used exist."""
    wanted = cluster.kind == "slurm"
    if not slurm.available():
        remedy = "load the site's Slurm module, or go to a login node"
        yield _check("slurm", "slurm", "no sbatch on PATH: sweeps run on this machine", "problem" if wanted else "ok", remedy)
        return
    try:
        config = slurm.configuration()
        found = f"{slurm.version()}, cluster {config.get('ClusterName', '?')}"
    except SlurmError as error:
        yield _check("slurm", "slurm", str(error), "problem" if wanted else "warning", "ask the site, or try again later")
        return
    yield _check("slurm", "slurm", found)
    yield from _check_configuration(config)
    try:
        yield from _check_limits(cluster)
        yield from _check_partition(cluster)
        yield from _check_account(cluster, config)
    except SlurmUnavailable as error:
        yield _check("slurm", "slurm", str(error), "unknown", "try again later")
    yield _check_submission_from_nodes(cluster)


def _keeps_accounts(config: Mapping[str, str]) -> bool:
    return not config.get("AccountingStorageType", "").endswith("none")


def _check_configuration(config: Mapping[str, str]) -> Iterator[Check]:
    kept = _keeps_accounts(config)
    found = f"on; enforced: {config.get('AccountingStorageEnforce', 'none')}" if kept else "off"
    remedy = "why a task was lost can be asked for MinJobAge seconds only, and is unknown later; so are limits on submitted jobs"
    yield _check("slurm", "accounting", found, "ok" if kept else "warning", remedy)
    age = _seconds(config.get("MinJobAge"))
    found = "unknown" if age is None else f"ended tasks are remembered for {age} s" if age else "ended tasks are never forgotten"
    short = age is not None and 0 < age < FEW_SECONDS_OF_MEMORY
    remedy = f"what ended between two looks is {'asked of accounting' if kept else 'unknown'}"
    yield _check("slurm", "MinJobAge", found, "warning" if short else "ok", remedy)
    requeue = config.get("JobRequeue") != "0"
    yield _check("slurm", "JobRequeue", "lost jobs are requeued" if requeue else "lost jobs are requeued only if they ask for it")
    wait = _seconds(config.get("KillWait"))
    found = "unknown" if wait is None else f"{wait} s from TERM to KILL at the time limit"
    few = wait is not None and wait < FEW_SECONDS_TO_END
    remedy = "a task in flight at the time limit is abandoned, not finished; it runs again"
    yield _check("slurm", "KillWait", found, "warning" if few else "ok", remedy)
    yield _check("slurm", "PreemptMode", f"{config.get('PreemptMode', 'unknown')} ({config.get('PreemptType', 'unknown')})")
    if (skew := _controller_skew(config)) is not None:
        yield _check_skew("slurm", "clock of the controller", skew)


def _seconds(text: str | None) -> int | None:
    number = (text or "").split()[:1]
    return int(number[0]) if number and number[0].isdigit() else None


def _controller_skew(config: Mapping[str, str]) -> float | None:
    """Seconds that the controller's clock is ahead of ours, to a second."""
    try:
        return datetime.fromisoformat(config["as of"]).timestamp() - int(time.time())
    except (KeyError, ValueError):
        return None


def _check_skew(section: str, name: str, skew: float) -> Check:
    far = abs(skew) > SKEW_SECONDS
    found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's" if far else "agrees with this machine's"
    remedy = "have the clocks set (NTP); until then times in rows are those of each host"
    return _check(section, name, found, "warning" if far else "ok", remedy)


def _check_limits(cluster: ClusterSpec) -> Iterator[Check]:
    limits = slurm.read_limits(cluster.account, cluster.qos, cluster.partition)
    yield _check("slurm", "MaxArraySize", f"{limits.max_array_size} (tasks of one array)")
    yield _check("slurm", "MaxJobCount", f"{limits.max_job_count} (tasks of all users at once)")
    notes = "; ".join(limits.notes)
    if limits.max_submit_jobs is not None:
        yield _check("slurm", "submitted jobs", f"{limits.max_submit_jobs} ({notes})")
    elif "unknown" in notes or "no accounts" in notes:
        yield _check("slurm", "submitted jobs", notes, "unknown", "if the site has a limit, say so with cluster.max_submitted=N")
    else:
        yield _check("slurm", "submitted jobs", f"no limit ({notes})")


def _check_partition(cluster: ClusterSpec) -> Iterator[Check]:
    try:
        partition = slurm.partition_limits(cluster.partition)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        yield _check("slurm", "partition", str(error), "problem", "list them with sinfo -s")
        return
    longest = "no limit" if partition.max_minutes is None else count(partition.max_minutes, "minute")
    whole = ", whole nodes only" if partition.whole_nodes else ""
    found = f"{partition.name}: {count(partition.num_nodes, 'node')}, longest job: {longest}{whole}, {partition.state}"
    remedy = "jobs would wait there for ever: choose another with cluster.partition=…"
    yield _check("slurm", "partition", found, "ok" if partition.state == "UP" else "problem", remedy)
    if partition.max_minutes is not None and cluster.minutes is not None and cluster.minutes > partition.max_minutes:
        found = f"cluster.minutes={cluster.minutes} is more than the partition allows ({partition.max_minutes})"
        yield _check("slurm", "time limit", found, "problem", f"cluster.minutes={partition.max_minutes}, or another partition")
    if partition.whole_nodes and cluster.allocation == "gpu":
        found = f"partition {partition.name} gives whole nodes, and cluster.allocation=gpu runs one worker on each"
        yield _check("slurm", "allocation", found, "warning", "cluster.allocation=node cluster.node_gpus=N")
    yield from _check_admission("account", cluster.account, partition, partition.allow_accounts, partition.deny_accounts)
    yield from _check_admission("qos", cluster.qos, partition, partition.allow_qos, partition.deny_qos)


def _check_admission(
    kind: str, name: str | None, partition: PartitionLimits, allowed: tuple[str, ...] | None, denied: tuple[str, ...]
) -> Iterator[Check]:
    if name is None or (name not in denied and (allowed is None or name in allowed)):
        return
    choices = f"allowed: {', '.join(allowed)}" if allowed else f"denied: {', '.join(denied)}"
    found = f"partition {partition.name} does not take {kind} {name} ({choices})"
    yield _check("slurm", f"{kind} in partition", found, "problem", f"another cluster.{kind}=… or cluster.partition=…")


def _check_account(cluster: ClusterSpec, config: Mapping[str, str]) -> Iterator[Check]:
    """Whether Slurm's accounts know this user, and with the account and QOS that are asked for."""
    if not _keeps_accounts(config):
        if cluster.account or cluster.qos:
            yield _check("slurm", "account", "the cluster keeps no accounts: account and QOS are not checked", "unknown")
        return
    try:
        own = slurm.user_associations()
    except SlurmError as error:
        yield _check("slurm", "account", str(error), "unknown", "account and QOS are not checked; try again later")
        return
    accounts = sorted({row.account for row in own})
    if not own:
        enforced = config.get("AccountingStorageEnforce", "none") != "none"
        yield _check(
            "slurm", "account", "this user has none", "problem" if enforced else "ok", "ask the site for one: jobs would be refused"
        )
        return
    if cluster.account is not None and cluster.account not in accounts:
        yield _check("slurm", "account", did_you_mean("account", cluster.account, accounts), "problem", "cluster.account=…")
        return
    yield _check("slurm", "account", f"{cluster.account or 'the default one'} (this user has: {', '.join(accounts)})")
    names = sorted({name for row in own if cluster.account in (None, row.account) for name in row.qos})
    if cluster.qos is None:
        return
    if cluster.qos in names:
        yield _check("slurm", "qos", f"{cluster.qos} (this user may use: {', '.join(names)})")
    else:
        yield _check("slurm", "qos", did_you_mean("qos", cluster.qos, names), "problem", "cluster.qos=…")


def _check_submission_from_nodes(cluster: ClusterSpec) -> Check:
    name = "sbatch on nodes"
    if not cluster.submit_from_nodes:
        return _check("slurm", name, "not allowed (cluster.submit_from_nodes=false): the launch command, typed again, submits the rest")
    found = "taken to work (cluster.submit_from_nodes=true); only a job can tell"
    return _check("slurm", name, found, "unknown", "if nodes may not submit: cluster.submit_from_nodes=false")


# --- the results folder ------------------------------------------------------------------------------------------------------


def check_results(results_dir: Path, *, shared: bool) -> Iterator[Check]:
    """Whether the file system does what durable results need: rename, link, sync, room, clock; shared: nodes must see it too."""
    folder = results_dir.expanduser().resolve()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    elsewhere = "give another with results_dir=…"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield _check("results", "folder", f"{place} is not a folder that can be written to", "problem", elsewhere)
        return
    yield _check("results", "folder", f"{folder}{'' if place == folder else f' (does not exist yet; looked at {place})'}")
    yield from _check_openness(folder)
    yield _check_kind(place, shared=shared)
    yield from _check_room("results", place)
    try:
        probes = Path(tempfile.mkdtemp(dir=place, prefix=".quantsweep-doctor-"))
    except OSError as error:
        yield _check("results", "writing", f"nothing can be made there: {error.strerror}", "problem", elsewhere)
        return
    try:
        yield from _check_behaviour(probes)
    finally:
        shutil.rmtree(probes, ignore_errors=True)


def _check_openness(folder: Path) -> Iterator[Check]:
    """Jobs run code from results folders: others may not write there."""
    if not folder.is_dir():
        return
    mode = folder.stat().st_mode
    bad = [str(folder)] if mode & OTHERS_MAY_WRITE and not mode & stat.S_ISVTX else []
    for plan in sorted(folder.glob("*/plan")):
        try:
            SweepFolder(plan.parent).check()
        except ResultsError:
            bad.append(str(plan.parent))
    if not bad:
        yield _check("results", "closed to others", "nobody else may write there")
        return
    shown = ", ".join(bad[:3]) + (f", … ({len(bad)} in all)" if len(bad) > 3 else "")
    yield _check("results", "closed to others", f"others may write to {shown}", "problem", f"chmod -R go-w '{bad[0]}'")


def _check_kind(place: Path, *, shared: bool) -> Check:
    kind = file_system_type(place)
    remedy = "every node of the cluster must see the same folder: give one on the shared file system with results_dir=…"
    if kind is None:
        return _check("results", "file system", "its type cannot be told here", "unknown", remedy)
    if kind.removeprefix("fuse.").startswith(NETWORK_FILE_SYSTEMS):
        return _check("results", "file system", f"{kind} (network)")
    if kind.startswith("fuse"):
        return _check("results", "file system", f"{kind} (network or local: unknown)", "unknown" if shared else "ok", remedy)
    return _check("results", "file system", f"{kind} (local)", "warning" if shared else "ok", remedy)


def file_system_type(place: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """The type of the file system that holds a folder, as the kernel names it; None where it cannot be told."""
    try:
        rows = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    # Spaces in names are written as \040; the last mount over a point is the one that is seen.
    points = [(Path(row[1].replace("\\040", " ")), row[2]) for row in rows if len(row) > 2]
    holding = [(len(point.parts), number, kind) for number, (point, kind) in enumerate(points) if place.is_relative_to(point)]
    return max(holding)[2] if holding else None


def _check_room(section: str, place: Path) -> Iterator[Check]:
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    remedy = "clear some, or choose another place (a quota may be tighter still)"
    yield _check(section, "free space", _size(free), "warning" if free < LITTLE_BYTES else "ok", remedy)
    if room.f_files == 0:
        yield _check(section, "free inodes", "the file system does not count them", "unknown")
        return
    remedy = "clear some files (`quantsweep compact` folds a sweep's)"
    yield _check(section, "free inodes", f"{room.f_favail:,}", "warning" if room.f_favail < LITTLE_INODES else "ok", remedy)


def _check_behaviour(probes: Path) -> Iterator[Check]:
    for name, why, probe in (
        ("rename", "results are replaced whole by renaming", _probe_rename),
        ("hard link", "a launch is locked with one", _probe_link),
        ("sync of files", "a row that is written must survive a power cut", _probe_sync),
    ):
        yield _probed(name, probes, probe, bad="problem", why=why)
    yield _probed(
        "sync of folders", probes, _probe_folder_sync, bad="warning", why="a file's name may be lost in a power cut, its content not"
    )
    yield _check_skew("results", "clock of the file system", filesystem_now(probes) - time.time())
    yield _check_grain(probes)


def _probed(name: str, probes: Path, probe: Callable[[Path], str | None], *, bad: State, why: str) -> Check:
    started = time.monotonic()
    try:
        complaint = probe(probes)
    except OSError as error:
        complaint = error.strerror or type(error).__name__
    took = f"{(time.monotonic() - started) * 1000:.0f} ms"
    if complaint is None:
        return _check("results", name, f"works ({took})")
    return _check("results", name, complaint, bad, f"choose another file system: {why}")


def _probe_rename(probes: Path) -> str | None:
    old, new = probes / "rename-old", probes / "rename-new"
    old.write_text("old")
    new.write_text("new")
    new.replace(old)
    return None if old.read_text() == "new" and not new.exists() else "renaming over a file did not replace it"


def _probe_link(probes: Path) -> str | None:
    name, first, second = probes / "link", probes / "link-1", probes / "link-2"
    first.write_text("1")
    second.write_text("2")
    os.link(first, name)
    with contextlib.suppress(FileExistsError):
        os.link(second, name)
        return "a second link of the same name was not refused"
    return None if name.read_text() == "1" else "a link shows another file's content"


def _probe_sync(probes: Path) -> str | None:
    with (probes / "sync").open("wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    return None


def _probe_folder_sync(probes: Path) -> str | None:
    descriptor = os.open(probes, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


def _check_grain(probes: Path) -> Check:
    """How finely times of files are told; whole seconds are too coarse to tell two writes of one second apart."""
    times = set()
    for number in range(5):
        path = probes / f"grain-{number}"
        path.touch()
        times.add(path.stat().st_mtime_ns % 10**9)
        time.sleep(0.003)
    if times == {0}:
        return _check("results", "times of files", "whole seconds", "warning", "two writes within a second look like one")
    return _check("results", "times of files", "finer than a second")


# --- the hub's cache ---------------------------------------------------------------------------------------------------------


def check_hub_cache() -> Iterator[Check]:
    """Where models are kept, whether there is room, and whether the hub is switched off."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    place = next(parent for parent in (cache, *cache.parents) if parent.is_dir())
    writable = os.access(place, os.W_OK | os.X_OK)
    found = f"{cache}{'' if place == cache else ' (does not exist yet)'}{'' if writable else ', not writable'}"
    yield _check("hub", "cache", found, "ok" if writable else "warning", "prewarm cannot fetch into it: give another place with HF_HOME")
    yield from (check for check in _check_room("hub", place) if check.name == "free space")
    off = offline_switches()
    switched = f"off, by {', '.join(off)}: only what is in the cache can be had"
    yield _check("hub", "hub", switched if off else "switched on; workers of a prewarmed study leave it alone")


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
