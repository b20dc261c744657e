"""A worker's hold on its child: start it, hand it a trial, hear what it says, and tell how it died.

What runs in the child is `quantsweep.running.child`.  It may hang, crash, or be killed for lack of memory: here that
becomes an exception with a cause, and the next trial gets a new child.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from quantsweep.failures import classes
from quantsweep.failures.classes import Failure
from quantsweep.running import environment
from quantsweep.running.stopping import Stop, StoppedError
from quantsweep.trial.specs import PlannedTrial, RunSettings

POLL_SECONDS = 0.2
TICK_SECONDS = 1.0
KILL_SECONDS = 10.0
"""How long the end of a child is waited for."""
SILENCE_MINUTES = 10.0
"""Everything long gives signs of life; a trial that gives none for so long hangs, whatever was predicted of it."""


class Silence:
    """Seconds in which nothing was heard, as far as this process could listen.

    A process that is stopped (a suspended job, a closed laptop, a paused machine) hears nothing, and that says nothing of its
    child, which was stopped too: between two looks at most one tick is counted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._clock, self._last = clock, clock()

    def look(self) -> float:
        """Count the time since the last look; returns the silence until now."""
        now = self._clock()
        self.seconds += min(now - self._last, TICK_SECONDS)
        self._last = now
        return self.seconds


class ChildDiedError(Exception):
    """The child process ended without saying why (internal; becomes a row)."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Child:
    """One child process, started when needed and replaced when it died.  Its output goes to `log`."""

    def __init__(self, extra_environment: Mapping[str, str] | None = None) -> None:
        self._extra = dict(extra_environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def events(self, planned: PlannedTrial, settings: RunSettings, log: Path, stop: Stop) -> Iterator[dict[str, Any]]:
        """Run one trial; yields what the child says, ending with "done" or "failed".

        Raises ChildDiedError if the child dies or is silent for too long, StoppedError between two tasks once `stop` is set
        (in the middle of one when it must not go on).  After the last task nothing is left to stop: the trial is heard to its end.
        """
        timeout = settings.trial_timeout_minutes or SILENCE_MINUTES
        pipe = self._start(log)
        kills = oom_kills()
        left = {task.task_key for task in planned.tasks}
        try:
            pipe.send_bytes(json.dumps({"planned": planned.to_json(), "settings": asdict(settings)}).encode())
            while True:
                event = self._receive(pipe, timeout, stop)
                if event.pop("last", False):
                    self.kill()
                yield event
                if event["event"] in ("done", "failed"):
                    return
                if event["event"] == "task":
                    left.discard(event["task_key"])
                    if stop.is_set() and left:
                        self.kill()
                        raise StoppedError
        except (EOFError, OSError) as error:
            code = self._reap()
            if code == -signal.SIGTERM and environment.slurm_job() is not None:
                stop.set(Stop.ENDED, 0.0)  # Slurm ends the job (scancel, preemption, time limit): its TERM reaches every process of it
            if stop.is_set():
                raise StoppedError from error  # it was ended on purpose: no failure of the trial
            raise ChildDiedError(_cause_of_death(code, kills)) from error

    def _receive(self, pipe: Connection, timeout_minutes: float, stop: Stop) -> dict[str, Any]:
        silence = Silence()
        while not pipe.poll(POLL_SECONDS):
            if stop.drops_now():
                self.kill()
                raise StoppedError
            if silence.look() > timeout_minutes * 60:
                self.kill()
                raise ChildDiedError(classes.hung(timeout_minutes))
        return json.loads(pipe.recv_bytes())  # type: ignore[no-any-return]

    def _start(self, log: Path) -> Connection:
        if self._process is not None and self._process.poll() is None and self._pipe is not None:
            return self._pipe
        self._close_pipe()
        ours, theirs = Pipe()
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                environment.module_command("quantsweep.running.child", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A session of its own: Ctrl-C in the terminal reaches the launcher, which ends trials in order.
                start_new_session=True,
                env={**environment.module_variables(), **self._extra},
            )
        self._pipe = ours
        return ours

    def _reap(self) -> int | None:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=KILL_SECONDS)
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End the child now; what it had reported is written already."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver or a file system that hangs may hold it for ever
                self._process.wait(timeout=KILL_SECONDS)
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def oom_kills() -> int:
    """How many processes of this job the kernel has killed for lack of memory, by its control group's own count; 0 where there is none.

    Version 2 of control groups keeps the count in memory.events, version 1 in memory.oom_control (both: a line `oom_kill N`).
    """
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return 0
    places = [Path("/sys/fs/cgroup") / place.lstrip("/") / "memory.events" for _, kinds, place in groups if not kinds]
    places += [
        Path("/sys/fs/cgroup/memory") / place.lstrip("/") / "memory.oom_control"
        for _, kinds, place in groups
        if "memory" in kinds.split(",")
    ]
    total = 0
    for path in places:
        with contextlib.suppress(OSError, ValueError):
            total += sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("oom_kill "))
    return total


def _cause_of_death(code: int | None, kills_before: int) -> Failure:
    if code == -signal.SIGKILL and oom_kills() > kills_before:
        return classes.out_of_host_memory("the control group's count of kills for lack of memory went up")
    return classes.from_exit(code)
