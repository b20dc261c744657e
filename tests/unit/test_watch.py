"""`quantsweep watch` on a pseudo-terminal and without one, as a person and a log file would have it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantsweep.cli.watch import is_over
from quantsweep.composing.composition import compose_base, search_folders
from quantsweep.composing.prepare import prepare
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.planning.plan_files import write_plan
from tests.conftest import Launch

WORDS = ["model=mini-neox-0.3m", "task=mini_cloze", "limit=2", "sweep=watched"]
WATCH = [sys.executable, "-m", "quantsweep.cli.main", "watch", "watched", "--interval", "5"]
PATIENT = [*WATCH[:-1], "600"]  # whoever ends within SECONDS has not waited for the next look
SECONDS = 60


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A sweep that has a plan, of which nothing runs yet."""
    overrides = expand_shorthand([*WORDS, f"results_dir={tmp_path / 'results'}"])
    cfg = compose_base(overrides)
    prepared = prepare(cfg, search_folders(cfg.hydra), overrides)
    prepared.folder.create()
    write_plan(prepared.folder.plan, prepared.plan)
    return tmp_path


def _own_the_terminal() -> None:
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # Ctrl-C goes to whose terminal this is
    # A suite that was started in the background of a shell hands SIGINT down as ignored; a user's terminal does not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`quantsweep watch` on a terminal of 100 columns."""

    def __init__(self, folder: Path) -> None:
        self.screen, self.keyboard = pty.openpty()
        termios.tcsetwinsize(self.keyboard, (30, 100))
        self.before = termios.tcgetattr(self.keyboard)
        self.process = subprocess.Popen(
            PATIENT, stdin=self.keyboard, stdout=self.keyboard, stderr=self.keyboard, cwd=folder, start_new_session=True,
            preexec_fn=_own_the_terminal,
            env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        self.text = ""

    def read_until(self, pattern: str) -> str:
        """What the screen was sent, up to and with a pattern."""
        end = time.monotonic() + SECONDS
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"never saw {pattern!r}, but:\n{self.text}"
            if select.select([self.screen], [], [], 0.2)[0]:
                self.text += os.read(self.screen, 65536).decode(errors="replace")
        return self.text

    def press(self, key: bytes) -> int:
        """Press a key and wait for the end."""
        os.write(self.screen, key)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.screen)
        os.close(self.keyboard)


@pytest.fixture
def terminal(planned: Path) -> Iterator[Terminal]:
    terminal = Terminal(planned)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_a_key_leaves_and_the_terminal_is_as_it_was(terminal: Terminal, key: bytes) -> None:
    terminal.read_until(r"watched\s[\s\S]*trials +1[\s\S]*looks again every 600 s; q leaves")
    assert not termios.tcgetattr(terminal.keyboard)[3] & termios.ICANON
    os.write(terminal.screen, b"x")  # any other key is nothing
    assert terminal.press(key) == 0
    assert termios.tcgetattr(terminal.keyboard) == terminal.before
    # The cursor is shown again, and the last block stays.
    assert terminal.read_until(r"\x1b\[\?25h[\s\S]*watched").count("Traceback") == 0


def test_without_a_terminal_a_block_a_change_until_it_is_over(planned: Path, launch: Launch) -> None:
    log = planned / "watch.log"
    with log.open("w") as file, subprocess.Popen(WATCH, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=planned) as watch:
        end = time.monotonic() + SECONDS
        while "watched" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        launch(*WORDS)
        assert watch.wait(SECONDS) == 0
    blocks = re.split(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", log.read_text(), flags=re.MULTILINE)[1:]
    assert 2 <= len(blocks) <= 6
    assert all(block.startswith("watched\n") for block in blocks)
    assert "done 0" in blocks[0]
    assert "done 1" in blocks[-1]


def test_a_sweep_that_is_over_is_said_once(planned: Path, launch: Launch) -> None:
    launch(*WORDS)
    done = subprocess.run(PATIENT, stdin=subprocess.DEVNULL, capture_output=True, cwd=planned, text=True, check=True, timeout=SECONDS)
    assert done.stdout.count("watched\n") == 1


def test_what_is_refused(quantsweep_command: Launch, planned: Path) -> None:
    assert "--interval must be at least 5 seconds, got 4" in quantsweep_command("watch", "watched", "--interval", "4", expect=1).stderr
    assert "--interval must be at least 5 seconds" in quantsweep_command("watch", "watched", "--interval", "nan", expect=1).stderr
    assert "Did you mean 'watched'?" in quantsweep_command("watch", "watchd", expect=1).stderr


@pytest.mark.parametrize(
    ("changes", "over"),
    [
        pytest.param({}, True, id="all-done"),
        pytest.param({"running": 1}, False, id="running"),
        pytest.param({"queued": 1}, False, id="in-the-queue"),
        pytest.param({"waiting": 1}, False, id="waiting-for-room"),
        pytest.param({"unknown": 1}, False, id="unknown-is-not-dead"),
        pytest.param({"launch": "process 1 on here"}, False, id="a-launch-is-at-work"),
        pytest.param({"to_launch": 1, "failed": 2}, False, id="some-may-be-launched"),
        pytest.param({"failed": 2}, True, id="the-rest-has-failed"),
        pytest.param({"held": 5}, True, id="the-rest-is-held"),
    ],
)
def test_when_it_is_over(changes: dict[str, Any], over: bool) -> None:
    nothing = dict.fromkeys(("running", "queued", "waiting", "unknown", "held", "failed", "to_launch"), 0) | {"launch": None}
    assert is_over({**nothing, **changes}) is over
