"""Why a trial failed, in one word, and whether two failures are the same.

Only the worker can tell a GPU out of memory from a bug (both are exceptions inside the process), and
only the parent can tell a crash (a signal) from an exception.  A fingerprint is a hash of the
exception's type and of the functions in its traceback: the same code path gives the same
fingerprint, whatever the line numbers, messages and machines.  NaN is not a failure but a result.
What an exception is a sign of is decided in `quantsweep.failures.causes`.
"""

from __future__ import annotations

import hashlib
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path

from quantsweep.errors import ConfigurationError, EvaluationError, ModelError, QuantizationError
from quantsweep.failures import causes
from quantsweep.failures.causes import Kind
from quantsweep.failures.causes import is_disk_full as is_disk_full
from quantsweep.words import count

OUT_OF_GPU_MEMORY = "out_of_gpu_memory"
OUT_OF_HOST_MEMORY = "out_of_host_memory"
MODEL_OR_DATA = "model_or_data"
CONFIGURATION = "configuration"
QUANTIZATION = "quantization"
DISK_FULL = "disk_full"
CRASHED = "crashed"
KILLED = "killed"
HUNG = "hung"
BAD_NODE = "bad_node"
NO_ANSWER = "no_answer"
NO_ACCESS = "no_access"
TIME_LIMIT = "time_limit"
NODE_FAILURE = "node_failure"
PREEMPTED = "preempted"
LOST = "lost"
NOT_STARTED = "not_started"
CODE_CHANGED = "code_changed"
BUG = "bug"
CLASSES = {
    OUT_OF_GPU_MEMORY: "the GPU had too little memory, also with the smallest batch",
    OUT_OF_HOST_MEMORY: "the machine had too little memory",
    MODEL_OR_DATA: "a model or a task's data is missing or is not what was asked for",
    CONFIGURATION: "a configuration that planning could not refuse",
    QUANTIZATION: "weights that cannot be quantized as asked",
    DISK_FULL: "no space to write results",
    CRASHED: "the process died of a signal of its own (segmentation fault, abort)",
    KILLED: "somebody killed the process (often the machine, out of memory)",
    HUNG: "nothing was heard of the trial for too long; it was killed",
    BAD_NODE: "the machine's GPU or driver is broken",
    NO_ANSWER: "a file system or a network did not answer, or the machine had no handle, thread or process left; it may pass",
    NO_ACCESS: "a file or a folder that this user may not read or write, a cache for example",
    TIME_LIMIT: "the batch system's time limit ended the job in the middle of the trial",
    NODE_FAILURE: "the machine was lost in the middle of the trial",
    PREEMPTED: "the job had to make room for another in the middle of the trial",
    LOST: "the job is gone, and nobody knows why",
    NOT_STARTED: "the job ended before its worker could begin (its setup lines, its interpreter, its file system)",
    CODE_CHANGED: "the code of quantsweep was edited after the launch was planned; launch again",
    BUG: "an exception that nobody expected",
}
"""Every failure class, and what it means."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a trial failed; the columns `failure_…` of the trials table."""

    failure_class: str
    message: str
    fingerprint: str
    traceback: str | None = None


def from_exception(error: BaseException) -> Failure:
    """Classify an exception that came out of a trial; the message ends with what helps."""
    frames = traceback.extract_tb(error.__traceback__)
    path = [f"{Path(frame.filename).name}:{frame.name}" for frame in frames]
    kind, remedy = _class_of(error)
    message = f"{type(error).__name__}: {error}"
    return Failure(
        failure_class=kind,
        message=f"{message}. {remedy}" if remedy else message,
        fingerprint=_hash([type(error).__name__, *path]),
        traceback="".join(traceback.format_exception(error)),
    )


def from_exit(returncode: int | None) -> Failure:
    """Classify the death of the process that ran the trial (negative: by that signal)."""
    if returncode is not None and returncode < 0:
        number = -returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        kind = KILLED if number in (signal.SIGKILL, signal.SIGTERM) else CRASHED
        return Failure(failure_class=kind, message=f"the process that ran the trial died of {name}", fingerprint=_hash([kind, name]))
    return Failure(
        failure_class=CRASHED,
        message=f"the process that ran the trial ended with exit code {returncode}",
        fingerprint=_hash(["exit", str(returncode)]),
    )


def hung(minutes: float) -> Failure:
    """The trial said nothing for `minutes` and was killed."""
    return Failure(
        failure_class=HUNG, message=f"nothing was heard of the trial for {minutes:.1f} minutes; it was killed", fingerprint=_hash([HUNG])
    )


def of_lost_job(state_word: str, trial_label: str) -> Failure:
    """Why a trial has no end: its job is gone, and `state_word` is what Slurm says of it (UNKNOWN: nothing)."""
    kind = _CLASS_OF_STATE.get(state_word, KILLED)
    said = "Slurm knows nothing of it any more" if state_word == "UNKNOWN" else f"Slurm says {state_word}"
    return Failure(
        failure_class=kind, message=f"the job ended while it was at {trial_label}: {said}", fingerprint=_hash([kind, state_word])
    )


_CLASS_OF_STATE = {
    "TIMEOUT": TIME_LIMIT,
    "DEADLINE": TIME_LIMIT,
    "OUT_OF_MEMORY": OUT_OF_HOST_MEMORY,
    "NODE_FAIL": NODE_FAILURE,
    "BOOT_FAIL": NODE_FAILURE,
    "PREEMPTED": PREEMPTED,
    "COMPLETED": LOST,
    "UNKNOWN": LOST,
}


def not_started(state_word: str, text: str, worker_said: str | None = None) -> Failure:
    """The job ended before it came to this trial.

    state_word: what Slurm says of it (UNKNOWN: nothing).  text: the end of what it printed.  worker_said: the last word of its worker.
    """
    # A time limit or an exit status say nothing of the trial here: more time would only be lost again.
    kind = _CLASS_OF_STATE.get(state_word, NOT_STARTED)
    kind = kind if kind in (OUT_OF_HOST_MEMORY, NODE_FAILURE, PREEMPTED) or state_word == "UNKNOWN" else NOT_STARTED
    last = worker_said or (text.strip().splitlines()[-1] if text.strip() else "it printed nothing")
    message = f"the job ended before its worker began this trial (Slurm says {state_word}): {last}"
    return Failure(failure_class=kind, message=message, fingerprint=_hash([kind, state_word, last]), traceback=text or None)


def out_of_host_memory(seen: str) -> Failure:
    """The machine's memory watch killed the trial's process; `seen` says how that is known."""
    message = f"the process that ran the trial was killed for lack of memory ({seen})"
    return Failure(failure_class=OUT_OF_HOST_MEMORY, message=message, fingerprint=_hash([OUT_OF_HOST_MEMORY]))


def overtime(minutes: float) -> Failure:
    """The time limit came while the trial had most of the job's time for itself."""
    message = f"the job's time limit of {count(round(minutes), 'minute')} came before the trial's end"
    return Failure(failure_class=TIME_LIMIT, message=message, fingerprint=_hash([TIME_LIMIT]))


def code_changed(planned: str, imported: str) -> Failure:
    """Other code would have run than the launch was planned with."""
    message = (
        f"the process of the trial imported code ({imported}) that is not what this launch was planned with ({planned}): files of "
        "quantsweep were edited meanwhile. Nothing of it became a row. Launch again"
    )
    return Failure(failure_class=CODE_CHANGED, message=message, fingerprint=_hash([CODE_CHANGED]))


def _class_of(error: BaseException) -> tuple[str, str]:
    """(class, what helps: empty where the message says it)."""
    surroundings = causes.of(error)
    if surroundings is not None:
        return _CLASS_OF_CAUSE[surroundings.kind], surroundings.remedy
    if isinstance(error, (ModelError, EvaluationError, FileNotFoundError, ConnectionError)):
        return MODEL_OR_DATA, ""
    if isinstance(error, QuantizationError):
        return QUANTIZATION, ""
    return (CONFIGURATION if isinstance(error, ConfigurationError) else BUG), ""


_CLASS_OF_CAUSE = {
    Kind.GPU_MEMORY: OUT_OF_GPU_MEMORY,
    Kind.HOST_MEMORY: OUT_OF_HOST_MEMORY,
    Kind.MACHINE: BAD_NODE,
    Kind.DISK: DISK_FULL,
    Kind.NO_ANSWER: NO_ANSWER,
    Kind.NO_ACCESS: NO_ACCESS,
}


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
