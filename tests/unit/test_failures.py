"""Causes and fingerprints."""

from __future__ import annotations

import errno
import signal

import pytest

from quantsweep.errors import EvaluationError, ModelError, QuantizationError
from quantsweep.failures import classes


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is known by its name."""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OutOfMemoryError("CUDA out of memory"), classes.OUT_OF_GPU_MEMORY),
        (MemoryError(), classes.OUT_OF_HOST_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), classes.DISK_FULL),
        (ModelError("gone"), classes.MODEL_OR_DATA),
        (EvaluationError("other version"), classes.MODEL_OR_DATA),
        (FileNotFoundError("data"), classes.MODEL_OR_DATA),
        (QuantizationError("NaN"), classes.QUANTIZATION),
        (KeyError("bug"), classes.BUG),
    ],
)
def test_exceptions_are_classified(error: Exception, cause: str) -> None:
    assert classes.from_exception(error).failure_class == cause
    assert cause in classes.CLASSES


def test_the_torch_error_has_the_name_we_look_for() -> None:
    import torch

    assert torch.OutOfMemoryError.__name__ == "OutOfMemoryError"


@pytest.mark.parametrize(("code", "cause"), [(-signal.SIGSEGV, classes.CRASHED), (-signal.SIGKILL, classes.KILLED), (3, classes.CRASHED)])
def test_deaths_are_classified(code: int, cause: str) -> None:
    assert classes.from_exit(code).failure_class == cause


def raise_in(depth: int, text: str) -> None:
    if depth:
        raise_in(depth - 1, text)
    raise ValueError(text)


def fingerprint(depth: int, text: str) -> str:
    try:
        raise_in(depth, text)
    except ValueError as error:
        return classes.from_exception(error).fingerprint
    raise AssertionError


def test_same_path_same_fingerprint_whatever_the_message() -> None:
    assert fingerprint(2, "layer 1") == fingerprint(2, "layer 9")
    assert fingerprint(2, "x") != fingerprint(3, "x")
