"""Places for a sweep to go wrong in: disks that are full, and hosts that do not see the same.

with small_file_system(folder, megabytes=8) as disk: …          ENOSPC after 8 MB
with small_file_system(folder, inodes=50) as disk: …            ENOSPC after 50 files
with late_hosts(folder, delay=3) as hosts:                      two hosts, one shared path
    Cluster(root=…, nodes=2, node_mounts=hosts.node_mounts("n1"))
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.fuse_device import detach
from tests.slurm.late_fs import LateMount

CHUNK = 64 * 1024


@contextlib.contextmanager
def small_file_system(mount_point: Path, *, megabytes: int = 64, inodes: int | None = None) -> Iterator[Path]:
    """A file system of its own at `mount_point` (made if absent) that holds so many megabytes, and so many files.

    It is in memory; its content is lost at the end.  Needs root.  An inode goes to the root folder itself.
    """
    mount_point.mkdir(exist_ok=True)
    options = f"size={megabytes}m,mode=700" + (f",nr_inodes={inodes}" if inodes is not None else "")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "quantsweep-small", str(mount_point)], check=True)
    try:
        yield mount_point
    finally:
        detach(mount_point)


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Use up the space of a small file system but for `leave` bytes (in steps of a page); returns the file that holds it.

    Removing that file makes space again.  Refuses a file system of more than a gigabyte, which is nobody's test.
    """
    status = os.statvfs(folder)
    if status.f_blocks * status.f_frsize > 2**30:
        raise ValueError(f"{folder} is on a file system of {status.f_blocks * status.f_frsize} bytes: not a small one")
    path = folder / ".ballast"
    with path.open("wb", buffering=0) as file, _until_full():
        while True:
            file.write(bytes(CHUNK))
    os.truncate(path, max(0, path.stat().st_size - leave))
    return path


def use_up_inodes(folder: Path, *, leave: int = 0) -> Path:
    """Make empty files until no more can be made, then remove `leave` of them; returns the folder that holds them."""
    ballast = folder / ".ballast-files"
    ballast.mkdir()
    if os.statvfs(folder).f_ffree > 100_000:
        raise ValueError(f"{folder} has room for {os.statvfs(folder).f_ffree} files: not a small file system")
    with _until_full():
        for number in itertools.count():
            (ballast / str(number)).touch()
    for path in itertools.islice(ballast.iterdir(), leave):
        path.unlink()
    return ballast


@contextlib.contextmanager
def _until_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


@dataclass(frozen=True, kw_only=True)
class LateHosts:
    """One shared path that the login side and some nodes see through mounts of their own.

    shared: the path, as everybody names it; this process sees it through the first host's mount.
    backing: the truth, for the test to look at.  logs: a folder that everybody sees at once, for what jobs say.
    """

    shared: Path
    backing: Path
    logs: Path
    second: Path

    def node_mounts(self, *nodes: str) -> dict[str, Sequence[tuple[Path, Path]]]:
        """What `Cluster(node_mounts=…)` takes for these nodes to be (together) the second host."""
        return {node: [(self.second, self.shared)] for node in nodes}


@contextlib.contextmanager
def late_hosts(folder: Path, *, delay: float = 3.0, jitter: float = 0.0, seed: int = 0) -> Iterator[LateHosts]:
    """Two hosts' views of one shared folder below `folder`; a cluster on it must be stopped before this ends."""
    hosts = LateHosts(shared=folder / "shared", backing=folder / "backing", logs=folder / "logs", second=folder / "second")
    for path in (hosts.shared, hosts.backing, hosts.logs, hosts.second):
        path.mkdir()
    with (
        LateMount(backing=hosts.backing, mount_point=hosts.shared, delay=delay, jitter=jitter, seed=seed),
        LateMount(backing=hosts.backing, mount_point=hosts.second, delay=delay, jitter=jitter, seed=seed + 1),
    ):
        yield hosts
