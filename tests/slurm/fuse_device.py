"""The kernel's side of a FUSE file system: /dev/fuse, its messages, and the mount.

The high-level libfuse library names files by path, so two files that follow each other under one
name share an inode and its cached pages; the tests of late visibility are about exactly that case.
The kernel's own protocol (linux/fuse.h, version 7.31) has a number for each file, and what a pass-through
needs of it is small: fixed-size structures in, fixed-size structures out, one message a read.

    device = Device.mount(Path("/mnt/x"), "late_fs")
    device.serve(handler, threads=4)      # handler: Request -> reply, or OSError; returns when unmounted

Nothing of it is installed: Linux 5.4 or newer and root are all it takes.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VERSION = (7, 31)
MAX_WRITE = 128 * 1024
BUFFER = MAX_WRITE + 8192

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
INIT_IN = struct.Struct("<IIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
ATTRIBUTES = struct.Struct("<6Q10I")
ENTRY_OUT = struct.Struct("<4QII")
ATTRIBUTES_OUT = struct.Struct("<QII")
OPEN_OUT = struct.Struct("<QII")
WRITE_OUT = struct.Struct("<II")
STATFS_OUT = struct.Struct("<5Q4I24x")
DIRENT = struct.Struct("<QQII")

# INIT flags: reads may overtake each other; writes of more than a page; cached pages end with the attributes
# that they were read under; lookups in one folder side by side.
ASYNC_READ, BIG_WRITES, AUTO_INVAL_DATA, PARALLEL_DIROPS = 1 << 0, 1 << 5, 1 << 12, 1 << 18

MS_NOSUID, MS_NODEV = 2, 4
MNT_DETACH = 2


class Opcode(enum.IntEnum):
    """What the kernel asks; an opcode that is not listed is answered with ENOSYS, and the kernel does without."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


_WITHOUT_REPLY = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT)


@dataclass(frozen=True, slots=True)
class Request:
    """One question of the kernel: what, about which node, and the structure that comes with it."""

    opcode: int
    unique: int
    node: int
    body: bytes

    def unpack(self, layout: str) -> tuple[int, ...]:
        """The numbers at the beginning of the body."""
        return struct.unpack_from(f"<{layout}", self.body)

    def names(self, layout: str = "") -> list[bytes]:
        """The zero-terminated names behind them."""
        return self.body[struct.calcsize(f"<{layout}") :].split(b"\0")[:-1]


Handler = Callable[[Request], bytes]


class Device:
    """One open /dev/fuse with its mount."""

    def __init__(self, descriptor: int, mount_point: Path) -> None:
        self._descriptor = descriptor
        self._mount_point = mount_point

    @classmethod
    def mount(cls, mount_point: Path, name: str) -> Device:
        """Mount an empty file system; it answers once `serve` runs.  Raises OSError, as mount(2) does."""
        descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={descriptor},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions,allow_other"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(name.encode(), os.fsencode(mount_point), b"fuse", MS_NOSUID | MS_NODEV, options.encode()) != 0:
            os.close(descriptor)
            raise OSError(ctypes.get_errno(), f"cannot mount {name}", str(mount_point))
        return cls(descriptor, mount_point)

    def unmount(self) -> None:
        """Take the mount away, also while it is in use; open files on it are dead then.  Gone already is fine."""
        detach(self._mount_point)

    def serve(self, handler: Handler, *, threads: int) -> None:
        """Answer until the file system is unmounted."""
        workers = [threading.Thread(target=self._answer_all, args=(handler,), daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _answer_all(self, handler: Handler) -> None:
        while True:
            try:
                message = os.read(self._descriptor, BUFFER)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # the question was taken back before we read it
                if error.errno == errno.ENODEV:
                    return  # unmounted
                raise
            self._answer(handler, message)

    def _answer(self, handler: Handler, message: bytes) -> None:
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(message)
        request = Request(opcode, unique, node, message[IN_HEADER.size :])
        code, reply = 0, b""
        try:
            reply = _initialise(request) if opcode == Opcode.INIT else handler(request)
        except OSError as error:
            code = -(error.errno or errno.EIO)
        except Exception:  # whoever asked must get an answer, or it hangs for ever
            traceback.print_exc(file=sys.stderr)
            code = -errno.EIO
        if opcode not in _WITHOUT_REPLY:
            self._send(unique, code, reply)

    def _send(self, unique: int, code: int, reply: bytes) -> None:
        try:
            os.write(self._descriptor, OUT_HEADER.pack(OUT_HEADER.size + len(reply), code, unique) + reply)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # whoever asked was killed, or the mount is gone
                raise


def _initialise(request: Request) -> bytes:
    major, minor, readahead, offered = INIT_IN.unpack_from(request.body)
    if (major, minor) < VERSION:
        raise OSError(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}; {VERSION[0]}.{VERSION[1]} is needed (Linux 5.4)")
    flags = offered & (ASYNC_READ | BIG_WRITES | AUTO_INVAL_DATA | PARALLEL_DIROPS)
    return INIT_OUT.pack(*VERSION, readahead, flags, 16, 12, MAX_WRITE, 1, 0, 0, 0)


def pack_attributes(status: os.stat_result) -> bytes:
    """A `struct fuse_attr`."""
    seconds, rests = zip(*(divmod(t, 10**9) for t in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)), strict=True)
    return ATTRIBUTES.pack(
        status.st_ino, status.st_size, status.st_blocks, *seconds, *rests,
        status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev, status.st_blksize, 0,
    )  # fmt: skip


def pack_attributes_reply(status: os.stat_result) -> bytes:
    """A `struct fuse_attr_out` that the kernel may not keep."""
    return ATTRIBUTES_OUT.pack(0, 0, 0) + pack_attributes(status)


def pack_entry(node: int, status: os.stat_result) -> bytes:
    """A `struct fuse_entry_out` that the kernel may not keep."""
    return ENTRY_OUT.pack(node, 0, 0, 0, 0, 0) + pack_attributes(status)


def pack_open(handle: int) -> bytes:
    """A `struct fuse_open_out`: without FOPEN_KEEP_CACHE each open throws cached pages away (close-to-open)."""
    return OPEN_OUT.pack(handle, 0, 0)


def pack_statfs(status: os.statvfs_result) -> bytes:
    """A `struct fuse_statfs_out`."""
    return STATFS_OUT.pack(
        status.f_blocks, status.f_bfree, status.f_bavail, status.f_files, status.f_ffree,
        status.f_bsize, status.f_namemax, status.f_frsize, 0,
    )  # fmt: skip


def pack_dirent(inode: int, next_offset: int, kind: int, name: bytes) -> bytes:
    """A `struct fuse_dirent` with its padding; `kind` is the file type as in st_mode >> 12."""
    return (DIRENT.pack(inode, next_offset, len(name), kind) + name).ljust(-(-(DIRENT.size + len(name)) // 8) * 8, b"\0")


def detach(mount_point: Path) -> None:
    """Unmount lazily: the name is free at once.  Does nothing where nothing is mounted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mount_point), MNT_DETACH) != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        raise OSError(ctypes.get_errno(), "cannot unmount", str(mount_point))
