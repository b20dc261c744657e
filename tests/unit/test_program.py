"""A command outlives its output, and every end has its exit status: small programs in a shell of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantsweep.exit_status import ExitStatus

PROGRAM = """
import sys, time
from pathlib import Path
from quantsweep.program import as_program
with as_program():
    print("began", flush=True)
    {body}
"""
WORK = "[print('x' * 100) for _ in range(5000)]; sys.stderr.write('said'); Path(sys.argv[1]).write_text('worked')"


def shell(tmp_path: Path, body: str, rest: str) -> tuple[int, str, str]:
    """A program with this body in a pipeline; the program's own exit status, and what came out."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(body=body))
    text = f"'{sys.executable}' '{program}' '{tmp_path / 'work'}' {rest}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("rest", ["| head -1", "> /dev/full", "2> /dev/full", "2>&1 | head -1", "> /dev/full 2>&1"])
def test_output_that_cannot_be_written_stops_nothing_and_is_told(tmp_path: Path, rest: str) -> None:
    status, _, said = shell(tmp_path, WORK, rest)
    assert status == ExitStatus.OUTPUT_LOST
    assert (tmp_path / "work").read_text() == "worked"
    assert "Traceback" not in said
    assert "ignored" not in said


@pytest.mark.parametrize("rest", ["> /dev/null", ">&-", ">&- 2>&-"])
def test_output_that_nobody_wants_is_no_loss(tmp_path: Path, rest: str) -> None:
    assert shell(tmp_path, WORK, rest)[0] == 0
    assert (tmp_path / "work").read_text() == "worked"


@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(3)", 3), ("sys.exit('wrong')", 1), ("sys.exit()", 0), ("raise KeyboardInterrupt", 130)]
)
def test_an_end_keeps_its_status_whatever_became_of_the_output(tmp_path: Path, end: str, status: int) -> None:
    assert shell(tmp_path, end, "")[0] == status
    assert shell(tmp_path, end, "> /dev/full")[0] == (status or ExitStatus.OUTPUT_LOST)


def test_an_error_is_shown_as_ever(tmp_path: Path) -> None:
    status, _, said = shell(tmp_path, "raise KeyError('a bug')", "")
    assert (status, "KeyError: 'a bug'" in said) == (1, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    body = "\n    try:\n        time.sleep(60)\n    finally:\n        Path(sys.argv[1]).write_text('released')"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(body=body))
    command = [sys.executable, str(program), str(tmp_path / "work")]
    # A suite that was started in the background of a shell hands SIGINT down as ignored; a user's terminal does not.
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)] and None,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "began\n"
    time.sleep(0.2)
    running.send_signal(number)
    _, said = running.communicate(timeout=30)
    assert (running.returncode, said) == (ExitStatus.STOPPED, "interrupted\n")
    assert (tmp_path / "work").read_text() == "released"


def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    """`nohup` outlives its terminal."""
    body = "\n    import os, signal\n    os.kill(os.getpid(), signal.SIGHUP)\n    Path(sys.argv[1]).write_text('lived')"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(body=body))
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "work")],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "work").read_text() == "lived"
