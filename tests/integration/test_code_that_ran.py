"""A row is made by the code that its launch was planned with, or there is none; on this machine too, where nothing is copied."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

import quantsweep
from quantsweep.failures import classes
from quantsweep.planning.plan import Expansion, build_plan
from quantsweep.planning.plan_files import plan_files, read_asked, read_header, write_plan
from quantsweep.running.environment import running_package, source_digest
from quantsweep.running.stopping import Stop
from quantsweep.running.worker import Worker
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from tests.conftest import Launch

TYPED = ("method=none", "task=mini_ppl", "limit=2", "device=cpu", "sweep=code", "workers=1")


def copied(place: Path) -> Path:
    """The package as it is, the bundled models linked; returns the folder to import from."""
    package = running_package()
    left_out = shutil.ignore_patterns("__pycache__", "models", "text", "corpus")
    shutil.copytree(package / "mini", place / "quantsweep" / "mini", ignore=left_out)
    shutil.copytree(package, place / "quantsweep", ignore=shutil.ignore_patterns("__pycache__", "mini"), dirs_exist_ok=True)
    for name in ("models", "text"):
        (place / "quantsweep" / "mini" / name).symlink_to(package / "mini" / name)
    for name in ("conf", "sweeps"):
        (place / name).symlink_to(package.parent / name)
    return place


def test_the_code_that_ran_is_in_the_row_and_other_code_makes_none(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch("-m", "model=mini-neox-0.3m", *TYPED)
    planned = source_digest(running_package())
    done = SweepFolder(tmp_path / "results" / "code")
    assert set(quantsweep.load_results(done.path).code_hash) == {planned}
    assert set(quantsweep.load_trials(done.path).code_hash) == {planned}
    header = read_header(plan_files(done.plan)[0])
    assert header.launch.sources == planned

    place = copied(tmp_path / "edited")
    assert source_digest(place / "quantsweep") == planned, "the same files elsewhere are the same code"
    with (place / "quantsweep" / "rounding" / "none.py").open("a") as file:
        file.write("# edited between the plan and the import of a trial's process\n")
    again = SweepFolder(tmp_path / "results" / "again")
    again.create()
    trials = tuple(read_asked(done.plan))
    expansion = Expansion(trials=trials, duplicates=0, skipped={}, candidates=len(trials))
    asked = build_plan(expansion, sweep="again", done=frozenset(), in_flight=frozenset(), settings=header.settings, workers=1)
    plan = write_plan(again.plan, dataclasses.replace(asked, launch=header.launch))
    monkeypatch.chdir(tmp_path)
    worker = Worker(plan, extra_environment={"PYTHONPATH": str(place)})
    summary = worker.run(0)
    worker.close()
    assert (summary.done, summary.failed, worker.stop.reason) == (0, 1, Stop.CODE_CHANGED)
    [row] = records.read_table(again.path, "trials").to_pylist()
    assert (row["failure_class"], row["code_hash"]) == (classes.CODE_CHANGED, source_digest(place / "quantsweep"))
    assert "Launch again" in row["failure_message"]
    assert records.read_done(again.path) == frozenset()
    assert records.read_table(again.path, "samples").num_rows == 0
