"""The `quantsweep` command as a whole: every subcommand, whatever it is given, answers in words or JSON, never with a traceback."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quantsweep.cli.completion import candidates
from quantsweep.cli.main import COMMANDS, main
from quantsweep.cli.status import sweep_status
from quantsweep.operations.messages import status_text
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import ClusterSpec
from tests.conftest import ROOT, Launch
from tests.unit.engine_cases import Site, fail, finish, trial, write

ON_A_SWEEP = ("status", "watch", "show", "resume", "cancel", "compact", "rerun")


def words(command: str, sweep: str) -> list[str]:
    """The least that a command of ON_A_SWEEP needs."""
    return [command, sweep, *{"rerun": ("--all", "--yes"), "resume": ("--dry-run",)}.get(command, ())]


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command)
    importlib.import_module(f"quantsweep.cli.{command}").configure(parser)
    return parser


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_knows_json(command: str) -> None:
    assert "--json" in parser_of(command).format_help()


def test_the_version_names_the_commit(capsys: pytest.CaptureFixture[str]) -> None:
    assert not main(["--version"])
    assert re.match(r"quantsweep \d+\.\d+\.\d+", capsys.readouterr().out)


@pytest.mark.parametrize("command", ON_A_SWEEP)
def test_json_is_json(command: str, sweep: SweepFolder, site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    from quantsweep.planning.plan import Expansion, build_plan
    from quantsweep.planning.plan_files import write_plan
    from quantsweep.planning.typed import Typed
    from quantsweep.trial.specs import RunSettings

    expansion = Expansion(trials=(trial(2),), duplicates=0, skipped={}, candidates=1)
    made = build_plan(expansion, sweep="sweep", done=frozenset(), in_flight=frozenset(), settings=RunSettings(), workers=1)
    plan = write_plan(sweep.plan, made, typed=Typed(("-m", "bit_width=2"), "/"))
    finish(sweep, trial(2), plan=plan.name)
    assert main([*words(command, "sweep"), "--json", "--results-dir", str(sweep.path.parent)]) == 0
    json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("command", ON_A_SWEEP)
@pytest.mark.parametrize("name", ["", "nosuch", "x" * 3000, "a\nb", "../..", "\udcff", "/etc/passwd"], ids=repr)
def test_a_sweep_that_is_none_is_one_message(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "foreign").mkdir(parents=True)
    assert main(words(command, name)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) <= 2
    assert len(said.err) < 5000


@pytest.mark.parametrize("command", [*ON_A_SWEEP, "logs", "list"])
def test_a_folder_with_a_foreign_plan_is_one_message(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("plan-00001-20260101T000000-00000000.parquet", "not Parquet"), ("plan-of-somebody.parquet", "")):
        room = tmp_path / name[:8] / "plan"
        room.mkdir(parents=True)
        (room / name).write_text(content)
        asked = ["list"] if command == "list" else ["logs", "abc"] if command == "logs" else words(command, name[:8])
        status = main([*asked, "--results-dir", str(tmp_path)])
        said = capsys.readouterr()
        if command in ("list", "compact"):  # which says it in its place, which reads no plan
            assert status == 0, said
        else:
            assert (status, said.out, len(said.err.splitlines())) == (1, "", 1), said


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"COLUMNS": "20"}])
def test_plain_locales_and_narrow_terminals(environment: dict[str, str], tmp_path: Path) -> None:
    for arguments in (["--help"], ["list"], ["status", "é"]):
        command = [sys.executable, "-m", "quantsweep.cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment}, cwd=tmp_path, timeout=60, check=False)
        assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
        assert done.returncode == (1 if arguments[0] == "status" else 0)


def test_the_plan_takes_the_words_of_a_launch(quantsweep_command: Launch) -> None:
    typed = ("-m", "model=mini-neox-0.3m", "bit_width=3,4", "hydra.launcher.wait=true", "--json")
    assert json.loads(quantsweep_command("plan", *typed).stdout)["trials"] == 2


def test_every_command_that_status_recommends_is_one(sweep: SweepFolder, site: Site) -> None:
    plan = write(sweep, [trial(2), trial(3)], cluster=ClusterSpec())
    fail(sweep, trial(2), "bug", plan=plan.name)
    recommended = re.findall(r"quantsweep (\w+)((?: [\w-]+)*)", status_text(sweep_status(sweep)))
    assert {command for command, _ in recommended} == {"logs", "resume"}
    for command, rest in recommended:
        parser_of(command).parse_args(shlex.split(rest))


def test_every_command_that_the_product_recommends_is_one() -> None:
    """In messages all over the code: `quantsweep prewarm`, quantsweep status {sweep} …"""
    text = "\n".join(path.read_text() for path in (ROOT / "quantsweep").rglob("*.py"))
    assert set(re.findall(r"(?:`|: |\()quantsweep ([a-z]+)\b", text)) <= {*COMMANDS, "command"}


def test_completion_knows_commands_sweeps_groups_and_choices(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sweep.path.parent.parent)
    assert candidates("quantsweep st") == ["status "]
    assert candidates("quantsweep status ") == ["sweep "]
    assert candidates("quantsweep cancel sweep bit_w") == ["bit_width="]
    assert candidates("quantsweep cancel sweep --dr") == ["--drop "]
    assert candidates("quantsweep plan +sw") == ["+sweeps="]
    assert "quickstart" in candidates("quantsweep plan +sweeps=")
    assert candidates("quantsweep plan data_type=int,quan") == ["int,quantile"]
    assert candidates("quantsweep nosuch ") == []


@pytest.mark.parametrize("shell", ["bash"])
def test_the_shell_takes_the_script(shell: str, tmp_path: Path) -> None:
    script = subprocess.run([sys.executable, "-m", "quantsweep.cli.main", "completion", shell], capture_output=True, text=True, check=True)
    done = subprocess.run([shell, "-c", script.stdout + "complete -p quantsweep"], capture_output=True, text=True, check=True)
    assert "quantsweep completion words" in done.stdout
