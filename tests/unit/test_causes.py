"""What surrounds a trial fails it under its own name, with what helps; only what nobody expected is a bug."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import requests
from huggingface_hub.errors import OfflineModeIsEnabled

from quantsweep.errors import EvaluationError, ModelError
from quantsweep.failures import breaker, classes
from quantsweep.failures.classes import from_exception
from quantsweep.failures.retries import TREATMENTS


class AcceleratorError(RuntimeError):
    """Stands for torch's."""


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is known by its name."""


def os_error(name: str, *place: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), *place)


GPU, HOST, NO_ANSWER, NO_ACCESS = classes.OUT_OF_GPU_MEMORY, classes.OUT_OF_HOST_MEMORY, classes.NO_ANSWER, classes.NO_ACCESS
CAUSES = [
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), GPU),
    (AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), GPU),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), GPU),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), GPU),
    (MemoryError(), HOST),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        HOST,
    ),
    (RuntimeError("std::bad_alloc"), HOST),
    (RuntimeError("unable to mmap 270 bytes from file </m/model.safetensors>: Cannot allocate memory (12)"), HOST),
    (os_error("ENOMEM"), HOST),
    (os_error("ENOSPC"), classes.DISK_FULL),
    (os_error("EDQUOT"), classes.DISK_FULL),
    (os_error("ESTALE"), NO_ANSWER),
    (os_error("EIO", "/data/model.safetensors"), NO_ANSWER),
    (os_error("ESHUTDOWN"), NO_ANSWER),
    (os_error("EMFILE"), NO_ANSWER),
    (RuntimeError("can't start new thread"), NO_ANSWER),
    (RuntimeError("Error while deserializing header: I/O error: Stale file handle (os error 116)"), NO_ANSWER),
    (TimeoutError("timed out"), NO_ANSWER),
    (subprocess.TimeoutExpired("git", 60), NO_ANSWER),
    (ConnectionResetError(errno.ECONNRESET, "reset"), NO_ANSWER),
    (requests.exceptions.ReadTimeout("slow"), NO_ANSWER),
    (requests.exceptions.ConnectionError("unreachable"), NO_ANSWER),
    (httpx.ConnectError("unreachable"), NO_ANSWER),
    (httpx.ReadTimeout("slow"), NO_ANSWER),
    (PermissionError(errno.EACCES, "Permission denied", "/data/x"), NO_ACCESS),
    (os_error("EROFS", "/data/x"), NO_ACCESS),
    (OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."), classes.MODEL_OR_DATA),
    (ConnectionError("Couldn't reach 'piqa' on the Hub (OfflineModeIsEnabled)"), classes.MODEL_OR_DATA),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/x"), classes.MODEL_OR_DATA),
    (RuntimeError("CUDA error: device-side assert triggered"), classes.BUG),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), classes.BAD_NODE),
    (IndexError("index 7 is out of bounds"), classes.BUG),
]


@pytest.mark.parametrize(("error", "cause"), CAUSES, ids=[f"{type(error).__name__}-{number}" for number, (error, _) in enumerate(CAUSES)])
@pytest.mark.parametrize("wrapped", [None, ModelError, EvaluationError])
def test_class_by_cause_also_where_one_of_ours_speaks_for_it(error: Exception, cause: str, wrapped: type[Exception] | None) -> None:
    if wrapped is None:
        assert from_exception(error).failure_class == cause
        return
    outer = wrapped(f"model m cannot be loaded: {error}")
    outer.__cause__ = error
    assert from_exception(outer).failure_class == (classes.MODEL_OR_DATA if cause == classes.BUG else cause)


@pytest.mark.parametrize("cause", [NO_ANSWER, GPU, HOST, classes.DISK_FULL])
def test_what_may_pass_or_is_a_resource_trips_no_breaker(cause: str) -> None:
    assert cause not in breaker.COUNTED
    assert TREATMENTS[cause].retries > 0 or cause == classes.DISK_FULL


def test_what_helps_is_said_once() -> None:
    message = from_exception(os_error("ESTALE", "/data/x")).message
    assert "Stale file handle" in message
    assert "runs again by itself" in message
    assert "owner and the mode" in from_exception(os_error("EACCES", "/data/x")).message
    assert "cluster.memory_gb" in from_exception(MemoryError("4 GiB")).message


@pytest.mark.parametrize(
    ("variable", "made", "name"),
    [
        ("XDG_CACHE_HOME", "quantsweep/gguf", "ENOTDIR"),  # as /dev/null/x
        ("HF_HOME", "", "ENOENT"),  # as /proc/nowhere
        ("HF_DATASETS_CACHE", "piqa/lock", "EROFS"),
        ("HF_HUB_CACHE", "models--x", "ENOENT"),
        ("TMPDIR", "pymp-1", "ENOENT"),
    ],
)
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, made: str, name: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    inner = os_error(name, str(tmp_path / "nowhere" / made))
    outer = EvaluationError(f"task t: its data cannot be loaded: {inner}. Load it once where there is a network")
    outer.__cause__ = inner
    failure = from_exception(outer)
    assert failure.failure_class == NO_ACCESS
    assert f"cache folder {tmp_path / 'nowhere'} cannot be written: set {variable} " in failure.message


def test_a_parent_of_a_named_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no" / "where"))
    failure = from_exception(os_error("EROFS", str(tmp_path / "no")))
    assert f"{tmp_path / 'no' / 'where'} cannot be written: set HF_HOME" in failure.message


def test_a_file_that_is_missing_in_a_cache_is_no_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert from_exception(os_error("ENOENT", str(tmp_path / "hub" / "x"))).failure_class == classes.MODEL_OR_DATA


def test_real_errors_of_torch_and_safetensors(tmp_path: Path) -> None:
    """Not from memory: what the libraries say here and now."""
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert from_exception(caught.value).failure_class == HOST


def test_our_own_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantsweep.checkpoints.gguf import converted_folder

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    with pytest.raises(OSError, match="/dev/null/x") as caught:
        converted_folder(tmp_path, "m.gguf")
    failure = from_exception(caught.value)
    assert failure.failure_class == NO_ACCESS
    assert "The cache folder /dev/null/x cannot be written: set XDG_CACHE_HOME" in failure.message


def test_hugging_faces_cache_that_cannot_be_made(tmp_path: Path) -> None:
    """In a process of its own: the library reads its variables when it is imported."""
    (tmp_path / "d.jsonl").write_text('{"text": "words"}\n')
    program = (
        "import datasets\nfrom quantsweep.failures import classes\n"
        f"try:\n    datasets.load_dataset('json', data_files={str(tmp_path / 'd.jsonl')!r})\n"
        "except Exception as error:\n    found = classes.from_exception(error)\n    print(found.failure_class, found.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HOME": "/proc/nowhere"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.startswith(NO_ACCESS)
    assert "The cache folder /proc/nowhere cannot be written: set HF_HOME" in done.stdout
