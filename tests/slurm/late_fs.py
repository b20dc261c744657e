"""A file system with late visibility: what NFS and Lustre clients show, on one machine.

A network file system's client asks the server for as little as it can.  It remembers the attributes
of a file, the names in a folder, and also that a name was *not* there, for seconds (NFS: `acregmin`
to `acdirmax`, 3 to 60).  So a file that another host has written is not seen, one that it deleted is
still there, a replaced one has its old size: a launcher that takes absence for failure, or a listing for
the truth, loses work.  Here one mount is one such client ("host"), and all mounts of one backing
folder are the hosts of one cluster:

- getattr, lookup and readdir answers are remembered for `delay` seconds, spread by `jitter`, absence included;
- a change made through this mount in a folder (create, unlink, rename, link, mkdir, …) makes the mount forget
  what it remembers of that folder and of all names in it, as `wcc_data` (RFC 1813) makes a client do;
- open() asks anew for the attributes and the data of that very file (close-to-open), and notices when
  the name leads to another file by now (replaced again within that moment: ESTALE, as on NFS 3); a name
  remembered as absent stays absent;
- O_EXCL, link, rename and unlink are done by the server, so they are exact at any time, and a name that one
  of them concerned is looked up anew, also when it failed;
- locks (flock, fcntl) are local to a mount, as with `local_lock=all`.

Harsher than NFS in one point: a fresh listing does not cure a remembered absence of one of its names.
Kinder in another: appending from two hosts does not lose data.

    with LateMount(backing=folder, mount_point=shared, delay=3):      # a process of its own
        …

    $ python -m tests.slurm.late_fs BACKING MOUNT_POINT --delay 3 --seed 1     # until a signal, or umount
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from tests.slurm.fuse_device import (
    Device,
    Opcode,
    Request,
    detach,
    pack_attributes_reply,
    pack_dirent,
    pack_entry,
    pack_open,
    pack_statfs,
)

READY = "mounted"
ROOT = Path(__file__).resolve().parents[2]
THREADS = 4
# Open flags that reach the backing file: the others were dealt with by the kernel on our side.
KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC
# Bits of `struct fuse_setattr_in.valid`.
MODE, UID, GID, SIZE, ATIME, MTIME, HANDLE, ATIME_NOW, MTIME_NOW = (1 << bit for bit in range(9))

Value = TypeVar("Value")
Key = tuple[int, int]
Entry = tuple[int, int, bytes]
"""inode, type, name"""


@dataclass(frozen=True, slots=True)
class Remembered(Generic[Value]):
    """An answer of the server, and until when it is believed (seconds of the monotonic clock)."""

    value: Value
    until: float


@dataclass(eq=False)
class Node:
    """A file or folder of the backing store, held by handle as an NFS client holds it: names may come and go.

    change: raised by each change made through this mount, so that an answer which was asked for before it is
    not remembered after it.  home: the folder and name under which it was last looked up.
    """

    number: int
    descriptor: int
    key: Key
    lookups: int = 0
    handles: int = 0
    change: int = 0
    home: tuple[int, bytes] | None = None
    attributes: Remembered[os.stat_result] | None = None
    listing: Remembered[list[Entry]] | None = None
    names: dict[bytes, Remembered[Node | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.descriptor).atexit = False

    @property
    def path(self) -> str:
        """A path that leads to this very file, whatever its name is now."""
        return f"/proc/self/fd/{self.descriptor}"


class LateFileSystem:
    """One host's view of a backing folder; `handle` answers the kernel, from any number of threads.

    delay: seconds; jitter: each memory lasts delay × (1 ± jitter), drawn from `seed`.
    """

    def __init__(self, backing: Path, *, delay: float, jitter: float, seed: int) -> None:
        self._delay, self._jitter, self._random = delay, jitter, random.Random(seed)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._by_key: weakref.WeakValueDictionary[Key, Node] = weakref.WeakValueDictionary()
        self._by_number: dict[int, Node] = {}
        self._opened: dict[int, Node] = {}
        self._listings: dict[int, list[Entry]] = {}
        self._listing_numbers = itertools.count(1)
        root = self._adopt(os.open(backing, os.O_PATH | os.O_DIRECTORY))
        self._by_number[root.number] = root
        self._operations: Mapping[int, Callable[[Request], bytes]] = {
            opcode: getattr(self, f"_{opcode.name.lower()}") for opcode in Opcode if opcode not in (Opcode.INIT, Opcode.INTERRUPT)
        }

    def handle(self, request: Request) -> bytes:
        """Answer one request; raises OSError as the reply."""
        operation = self._operations.get(request.opcode)
        if operation is None:
            raise OSError(errno.ENOSYS, "not implemented")
        return operation(request)

    # -- memory ---------------------------------------------------------------------------------

    def _remember(self, value: Value) -> Remembered[Value]:
        spread = 1 + self._jitter * self._random.uniform(-1, 1)
        return Remembered(value, time.monotonic() + self._delay * spread)

    def _node(self, number: int) -> Node:
        with self._lock:
            return self._by_number[number]

    def _adopt(self, descriptor: int) -> Node:
        """The node of an O_PATH descriptor, which it takes over; its attributes are the fresh ones."""
        status = os.fstat(descriptor)
        key = (status.st_dev, status.st_ino)
        with self._lock:
            node = self._by_key.get(key)
            if node is None:
                node = self._by_key[key] = Node(next(self._numbers), descriptor, key)
            else:
                os.close(descriptor)
            node.attributes = self._remember(status)
        return node

    def _resolve(self, parent: Node, name: bytes) -> Node | None:
        """What this host believes to be under a name: None for nothing."""
        with self._lock:
            known, change = parent.names.get(name), parent.change
        if known is not None and time.monotonic() < known.until and not self._is_known_dead(known.value):
            return known.value
        found = self._find(parent, name)
        with self._lock:
            if parent.change == change:
                parent.names[name] = self._remember(found)
        return found

    def _is_known_dead(self, node: Node | None) -> bool:
        """True for a file of which the server, asked because its attributes were too old, would say ESTALE."""
        if node is None or (node.attributes is not None and time.monotonic() < node.attributes.until):
            return False
        return os.fstat(node.descriptor).st_nlink == 0

    def _find(self, parent: Node, name: bytes) -> Node | None:
        try:
            return self._adopt(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent.descriptor))
        except FileNotFoundError:
            return None

    def _attributes(self, node: Node) -> os.stat_result:
        with self._lock:
            known, change = node.attributes, node.change
        if known is not None and time.monotonic() < known.until:
            return known.value
        status = os.fstat(node.descriptor)
        if status.st_nlink == 0 and node.handles == 0:
            self._forget_home(node)
            raise OSError(errno.ESTALE, "deleted by another host")
        with self._lock:
            if node.change == change:
                node.attributes = self._remember(status)
        return status

    def _changed(self, *nodes: Node) -> None:
        """This mount changed something there: nothing that it remembers of it is true any more."""
        with self._lock:
            for node in nodes:
                node.change += 1
                node.attributes = node.listing = None
                node.names.clear()

    @contextlib.contextmanager
    def _changing(self, *places: tuple[Node, bytes]) -> Iterator[None]:
        """Around a change of names: forgets the folders when it succeeds, the names concerned in any case."""
        targets = [self._peek(parent, name) for parent, name in places]
        try:
            yield
            self._changed(*(parent for parent, _ in places))
        finally:
            with self._lock:
                for parent, name in places:
                    parent.names.pop(name, None)
            self._changed(*(target for target in targets if target is not None))

    def _peek(self, parent: Node, name: bytes) -> Node | None:
        """The node that is really under a name, if this host has met it: its link count is about to change."""
        try:
            status = os.stat(name, dir_fd=parent.descriptor, follow_symlinks=False)
        except OSError:
            return None
        with self._lock:
            return self._by_key.get((status.st_dev, status.st_ino))

    def _forget_home(self, node: Node) -> None:
        with self._lock:
            parent = self._by_number.get(node.home[0]) if node.home else None
            if parent is not None and node.home is not None:
                parent.names.pop(node.home[1], None)

    # -- names ----------------------------------------------------------------------------------

    def _entry(self, parent: Node, name: bytes, node: Node) -> bytes:
        status = self._attributes(node)
        with self._lock:
            node.lookups += 1
            node.home = (parent.number, name)
            self._by_number[node.number] = node
        return pack_entry(node.number, status)

    def _place(self, request: Request, layout: str = "") -> tuple[Node, bytes]:
        return self._node(request.node), request.names(layout)[0]

    def _lookup(self, request: Request) -> bytes:
        parent, name = self._place(request)
        node = self._resolve(parent, name)
        if node is None:
            raise OSError(errno.ENOENT, "not there, as far as this host knows")
        return self._entry(parent, name, node)

    def _made(self, parent: Node, name: bytes) -> bytes:
        node = self._find(parent, name)
        if node is None:
            raise OSError(errno.ENOENT, "another host has removed it already")
        return self._entry(parent, name, node)

    def _mkdir(self, request: Request) -> bytes:
        mode, _ = request.unpack("II")
        parent, name = self._place(request, "II")
        with self._changing((parent, name)):
            os.mkdir(name, mode, dir_fd=parent.descriptor)
        return self._made(parent, name)

    def _symlink(self, request: Request) -> bytes:
        parent, (name, target) = self._node(request.node), request.names()
        with self._changing((parent, name)):
            os.symlink(target, name, dir_fd=parent.descriptor)
        return self._made(parent, name)

    def _link(self, request: Request) -> bytes:
        node = self._node(*request.unpack("Q"))
        parent, name = self._place(request, "Q")
        with self._changing((parent, name)):
            os.link(node.path, name, dst_dir_fd=parent.descriptor, follow_symlinks=True)
        self._changed(node)
        return self._made(parent, name)

    def _unlink(self, request: Request) -> bytes:
        parent, name = self._place(request)
        with self._changing((parent, name)):
            os.unlink(name, dir_fd=parent.descriptor)
        return b""

    def _rmdir(self, request: Request) -> bytes:
        parent, name = self._place(request)
        with self._changing((parent, name)):
            os.rmdir(name, dir_fd=parent.descriptor)
        return b""

    def _rename(self, request: Request) -> bytes:
        source, target = self._node(request.node), self._node(*request.unpack("Q"))
        old, new = request.names("Q")
        with self._changing((source, old), (target, new)):
            os.rename(old, new, src_dir_fd=source.descriptor, dst_dir_fd=target.descriptor)
        return b""

    def _readlink(self, request: Request) -> bytes:
        return os.readlink(b"", dir_fd=self._node(request.node).descriptor)

    def _forget(self, request: Request) -> bytes:
        self._forget_lookups(request.node, *request.unpack("Q"))
        return b""

    def _batch_forget(self, request: Request) -> bytes:
        count, _ = request.unpack("II")
        numbers = request.unpack(f"II{2 * count}Q")[2:]
        for node, lookups in zip(numbers[::2], numbers[1::2], strict=True):
            self._forget_lookups(node, lookups)
        return b""

    def _forget_lookups(self, number: int, lookups: int) -> None:
        with self._lock:
            node = self._by_number[number]
            node.lookups -= lookups
            if node.lookups <= 0 and node.home is not None:  # the root has no home, and is never forgotten
                del self._by_number[number]

    def _destroy(self, request: Request) -> bytes:
        return b""

    # -- attributes -----------------------------------------------------------------------------

    def _getattr(self, request: Request) -> bytes:
        return pack_attributes_reply(self._attributes(self._node(request.node)))

    def _setattr(self, request: Request) -> bytes:
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = request.unpack("IIQQQQQQIIIIIIII")
        node = self._node(request.node)
        try:
            if valid & MODE:
                os.chmod(node.path, stat.S_IMODE(mode))
            if valid & (UID | GID):
                os.chown(node.path, uid if valid & UID else -1, gid if valid & GID else -1)
            if valid & SIZE:
                os.truncate(handle if valid & HANDLE else node.path, size)
            if valid & (ATIME | MTIME):
                self._set_times(node, valid, atime * 10**9 + atime_ns, mtime * 10**9 + mtime_ns)
        finally:
            self._changed(node)
        return pack_attributes_reply(self._attributes(node))

    def _set_times(self, node: Node, valid: int, atime_ns: int, mtime_ns: int) -> None:
        now, old = time.time_ns(), os.fstat(node.descriptor)
        atime_ns = old.st_atime_ns if not valid & ATIME else now if valid & ATIME_NOW else atime_ns
        mtime_ns = old.st_mtime_ns if not valid & MTIME else now if valid & MTIME_NOW else mtime_ns
        os.utime(node.path, ns=(atime_ns, mtime_ns))

    def _statfs(self, request: Request) -> bytes:
        return pack_statfs(os.fstatvfs(self._node(request.node).descriptor))

    # -- files ----------------------------------------------------------------------------------

    def _create(self, request: Request) -> bytes:
        flags, mode, *_ = request.unpack("IIII")
        parent, name = self._place(request, "IIII")
        with self._changing((parent, name)):
            kept = flags & (KEPT_FLAGS | os.O_EXCL) | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(name, kept, stat.S_IMODE(mode), dir_fd=parent.descriptor)
        node = self._adopt(os.open(f"/proc/self/fd/{handle}", os.O_PATH))
        return self._entry(parent, name, self._hold(handle, node)) + pack_open(handle)

    def _open(self, request: Request) -> bytes:
        flags, _ = request.unpack("II")
        node = self._node(request.node)
        self._check_home(node)
        handle = os.open(node.path, flags & KEPT_FLAGS | os.O_CLOEXEC)
        self._changed(self._hold(handle, node))
        return pack_open(handle)

    def _hold(self, handle: int, node: Node) -> Node:
        with self._lock:
            self._opened[handle] = node
            node.handles += 1
        return node

    def _check_home(self, node: Node) -> None:
        """Close-to-open: the kernel found this node by a name that another host may have given to another file.

        ESTALE makes the kernel look the name up once more, which then asks the server.
        """
        parent = self._by_number.get(node.home[0]) if node.home else None
        if parent is None or node.home is None:
            return
        try:
            status = os.stat(node.home[1], dir_fd=parent.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != node.key:
            self._forget_home(node)
            raise OSError(errno.ESTALE, "another file has this name now")

    def _read(self, request: Request) -> bytes:
        handle, offset, size = request.unpack("QQI")
        return os.pread(handle, size, offset)

    def _write(self, request: Request) -> bytes:
        handle, offset, size = request.unpack("QQI")
        data = memoryview(request.body)[40 : 40 + size]
        try:
            written = os.pwrite(handle, data, offset)
        finally:
            self._changed(self._node(request.node))
        return written.to_bytes(4, "little") + bytes(4)

    def _flush(self, request: Request) -> bytes:
        return b""  # nothing is held back: each write went to the backing file

    def _fsync(self, request: Request) -> bytes:
        handle, data_only = request.unpack("QI")
        (os.fdatasync if data_only & 1 else os.fsync)(handle)
        return b""

    def _release(self, request: Request) -> bytes:
        (handle,) = request.unpack("Q")
        with self._lock:
            # By the handle, not by the node: the kernel may have forgotten that one meanwhile.
            self._opened.pop(handle).handles -= 1
        os.close(handle)
        return b""

    # -- folders --------------------------------------------------------------------------------

    def _opendir(self, request: Request) -> bytes:
        entries = self._list(self._node(request.node))
        with self._lock:
            handle = next(self._listing_numbers)
            self._listings[handle] = entries
        return pack_open(handle)

    def _list(self, node: Node) -> list[Entry]:
        with self._lock:
            known, change = node.listing, node.change
        if known is not None and time.monotonic() < known.until:
            return known.value
        folder = os.open(node.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(folder) as found:
                entries = [(entry.inode(), _kind(entry), os.fsencode(entry.name)) for entry in found]
        finally:
            os.close(folder)
        with self._lock:
            if node.change == change:
                node.listing = self._remember(entries)
        return entries

    def _readdir(self, request: Request) -> bytes:
        handle, offset, size = request.unpack("QQI")
        reply = bytearray()
        for number, (inode, kind, name) in enumerate(self._listings[handle][offset:], start=offset + 1):
            entry = pack_dirent(inode, number, kind, name)
            if len(reply) + len(entry) > size:
                break
            reply += entry
        return bytes(reply)

    def _releasedir(self, request: Request) -> bytes:
        with self._lock:
            del self._listings[request.unpack("Q")[0]]
        return b""

    def _fsyncdir(self, request: Request) -> bytes:
        folder = os.open(self._node(request.node).path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return b""


def _kind(entry: os.DirEntry[str]) -> int:
    """The type of a folder's entry, as d_type has it."""
    if entry.is_symlink():
        return stat.S_IFLNK >> 12
    return (stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG) >> 12


# -- a process of its own -----------------------------------------------------------------------------


def why_not() -> str | None:
    """Say why no such file system can be mounted here, None if it can."""
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    return None if Path("/dev/fuse").exists() else "this machine has no /dev/fuse (modprobe fuse, or start the container with it)"


@dataclass(kw_only=True)
class LateMount:
    """One host's mount of a backing folder, served by a process of its own; both folders must exist.

    The process ends when `stop` is called, when this process dies, or when somebody unmounts it.
    """

    backing: Path
    mount_point: Path
    delay: float = 3.0
    jitter: float = 0.0
    seed: int = 0
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process that serves it."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> Self:
        """Mount, and return once it answers; raises RuntimeError with the process's words when it does not."""
        options = [f"--delay={self.delay}", f"--jitter={self.jitter}", f"--seed={self.seed}", "--attached"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.late_fs", str(self.backing), str(self.mount_point), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != READY:
            self.stop()
            raise RuntimeError(f"no late file system at {self.mount_point}: its process said why on standard error")
        return self

    def stop(self) -> None:
        """Unmount and reap the process."""
        detach(self.mount_point)
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Mount and serve in the foreground."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.late_fs", description="A pass-through file system with late visibility.")
    parser.add_argument("backing", type=Path)
    parser.add_argument("mount_point", type=Path)
    parser.add_argument("--delay", type=float, default=3.0, help="seconds for which answers are remembered")
    parser.add_argument("--jitter", type=float, default=0.0, help="share of the delay by which each memory is longer or shorter, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attached", action="store_true", help="end when standard input ends, as when the parent dies")
    arguments = parser.parse_args(argv)
    if reason := why_not():
        parser.error(reason)
    os.umask(0)  # the kernel has applied the caller's
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a descriptor for each file that the kernel knows
    system = LateFileSystem(arguments.backing, delay=arguments.delay, jitter=arguments.jitter, seed=arguments.seed)
    device = Device.mount(arguments.mount_point, "late_fs")
    ended = threading.Event()

    def serve() -> None:
        try:
            device.serve(system.handle, threads=THREADS)
        finally:
            ended.set()

    def watch_parent() -> None:
        sys.stdin.buffer.read()
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    for target in [serve, *([watch_parent] if arguments.attached else [])]:
        threading.Thread(target=target, daemon=True).start()
    print(READY, flush=True)
    ended.wait()
    device.unmount()
    # Threads may still be reading standard input or the device: leave without waiting for them.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
