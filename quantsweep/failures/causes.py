"""What surrounds a trial and may fail it through no fault of its own: memory, disk, file systems, the network, a broken machine.

An exception says so by its type, by its errno, or only in words (torch raises plain RuntimeErrors for lack of memory;
Rust and Arrow write errnos into messages).  It is often wrapped by one of ours or of a library ("the model cannot be
loaded"), so the chain of causes is followed: a stale file handle is no missing model.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Kind(Enum):
    """What it was."""

    GPU_MEMORY = "too little memory on the GPU"
    HOST_MEMORY = "too little memory on the machine"
    MACHINE = "a broken GPU or driver"
    DISK = "a full disk"
    NO_ANSWER = "a file system or a network that did not answer, or a limit of the operating system"
    NO_ACCESS = "a place that this user may not use"


@dataclass(frozen=True)
class Cause:
    """What it was, and what helps, in words."""

    kind: Kind
    remedy: str = ""


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
PASSING = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK, errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE),
        *(errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)
"""A stale handle, a server that restarts, a limit that is reached for a moment."""

_WORDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    (
        Kind.GPU_MEMORY,
        re.compile(
            r"CUDA (error: )?out of memory|cudaErrorMemoryAllocation|HIP out of memory"
            r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
        ),
    ),
    (
        Kind.HOST_MEMORY,
        re.compile(
            r"DefaultCPUAllocator|std::bad_alloc|not enough memory: you tried to allocate|Cannot allocate memory"
            r"|memory allocation of \d+ bytes failed"
        ),
    ),
    # What CUDA and NVML say when it is the machine's fault; a device-side assert or an illegal address is the program's.
    (
        Kind.MACHINE,
        re.compile(
            r"uncorrectable ECC|no CUDA-capable device|CUDA-capable device\(s\) is/are busy|device is unavailable|hardware stack error"
            r"|GPU is lost|fallen off the bus|driver/library version mismatch|CUDA driver initialization failed|CUDA unknown error",
            re.IGNORECASE,
        ),
    ),
    (Kind.NO_ANSWER, re.compile(r"can't start new thread|Thread creation failed")),
)
_ERRNO_IN_WORDS = re.compile(r"(?:\[errno |os error )(\d+)", re.IGNORECASE)
_PASSING_TYPES = frozenset(
    {"TimeoutError", "TimeoutExpired", "Timeout", "TimeoutException", "ConnectionError", "NetworkError", "ProtocolError"}
)
"""Of Python, requests, urllib3 and httpx, by name: none of them is imported here."""
_OFFLINE = re.compile(r"OfflineModeIsEnabled|offline mode", re.IGNORECASE)
"""Hugging Face's words for what was never fetched: connection errors by type, missing data by meaning."""

_REMEDIES = {
    Kind.GPU_MEMORY: "",  # tried again on more GPUs by itself
    Kind.HOST_MEMORY: "Give it more memory (cluster.memory_gb; here: fewer workers=…)",
    Kind.MACHINE: "",
    Kind.DISK: "Make space, then launch again",
    Kind.NO_ANSWER: (
        "It may pass: under Slurm the trial runs again by itself, here with the same command; if it stays, ask who runs that "
        "file system or network, or raise the limits (ulimit -n, ulimit -u)"
    ),
}
CACHES = (
    ("HF_DATASETS_CACHE", "~/.cache/huggingface/datasets"),
    ("HF_HUB_CACHE", "~/.cache/huggingface/hub"),
    ("HF_HOME", "~/.cache/huggingface"),
    ("TRITON_CACHE_DIR", "~/.triton"),
    ("TORCH_HOME", "~/.cache/torch"),
    ("MPLCONFIGDIR", "~/.config/matplotlib"),
    ("XDG_CACHE_HOME", "~/.cache"),
    ("TMPDIR", tempfile.gettempdir()),
)
"""Variables that name a folder in which libraries keep things, and where they keep them without."""


def of(error: BaseException) -> Cause | None:
    """What of a trial's surroundings an exception tells of; None if nothing does."""
    for one in reversed(list(_chain(error))):  # the innermost knows most: it has the file's name
        if (cause := _of_one(one)) is not None:
            return cause
    return None


def is_disk_full(error: OSError) -> bool:
    """True for the errors of a full disk, an exhausted quota or a limit on the size of files."""
    return error.errno in FULL


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def _of_one(error: BaseException) -> Cause | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if "OutOfMemoryError" in names:  # torch's
        return _cause(Kind.GPU_MEMORY)
    number = _errno(error, text)
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return _cause(Kind.HOST_MEMORY)
    for kind, words in _WORDS:
        if words.search(text):
            return _cause(kind)
    if number in FULL:
        return _cause(Kind.DISK)
    if (refused := _no_access(error, number)) is not None:
        return refused
    if _OFFLINE.search(f"{type(error).__name__} {text}"):
        return None
    return _cause(Kind.NO_ANSWER) if number in PASSING or names & _PASSING_TYPES else None


def _cause(kind: Kind) -> Cause:
    return Cause(kind, _REMEDIES[kind])


def _errno(error: BaseException, text: str) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _ERRNO_IN_WORDS.search(text)
    return int(found[1]) if found else None


def _no_access(error: BaseException, number: int | None) -> Cause | None:
    """A place that may not be used; folders of caches that cannot even be made are said with their variable."""
    place = getattr(error, "filename", None)
    cache = None if place is None else _cache_of(Path(os.fsdecode(place)))
    if cache is not None:
        variable, folder = cache
        if number in (*DENIED, errno.ENOENT, errno.ENOTDIR) and not (folder.is_dir() and os.access(folder, os.W_OK)):
            return Cause(
                Kind.NO_ACCESS,
                f"The cache folder {folder} cannot be written: set {variable} to a folder that can "
                f"(for Slurm jobs: `export {variable}=…` in cluster.setup)",
            )
    if number in DENIED:
        return Cause(Kind.NO_ACCESS, "Look at the owner and the mode of it and of the folders above, on the machine where this ran")
    return None


def _cache_of(place: Path) -> tuple[str, Path] | None:
    """(variable, folder) of the cache that a place belongs to, the innermost."""
    folders = [(variable, Path(os.environ.get(variable) or default).expanduser()) for variable, default in CACHES]
    inside = [found for found in folders if place.is_relative_to(found[1])]
    # Of a folder that somebody named also what lies above: it had to be made on the way.
    named = [found for found in folders if found[0] in os.environ and (found in inside or found[1].is_relative_to(place))]
    return max(named or inside, key=lambda found: len(found[1].parts), default=None)
