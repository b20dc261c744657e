"""Durable submission on a real cluster: a launcher that dies at any step, two at once, jobs that nobody expected."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import quantsweep
from quantsweep.launching.submissions import read_submissions
from tests.conftest import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.ledger import KillPoint, fired
from tests.slurm.studies import Study

pytestmark = [pytest.mark.slurm, pytest.mark.long]

SIXTEEN = ("data_type=int,fp", "bit_width=4,8", "block_size=32,64,128,256", "shard_minutes=0.012")
"""16 trials in shards of some four: more than one task an array."""

STEPS = {
    "before the plan": ("quantsweep.planning.plan_files", "write_plan", "before", 1),
    "after the plan": ("quantsweep.planning.plan_files", "write_plan", "after", 1),
    "after the snapshot": ("quantsweep.launching.snapshot", "take", "after", 1),
    "before the intent": ("quantsweep.launching.submissions", "new_submission", "before", 1),
    "after the intent": ("quantsweep.launching.submissions", "new_submission", "after", 1),
    "before sbatch": ("quantsweep.launching.cluster", "submit_array", "before", 1),
    "after sbatch, before the receipt": ("quantsweep.launching.cluster", "submit_array", "after", 1),
    "after the receipt": ("quantsweep.launching.submissions", "Submission.with_array", "after", 1),
    "between two arrays": ("quantsweep.launching.cluster", "submit_array", "before", 2),
    "after the second sbatch": ("quantsweep.launching.cluster", "submit_array", "after", 2),
    "before the collector": ("quantsweep.launching.cluster", "submit_collector", "before", 1),
    "after the collector": ("quantsweep.launching.cluster", "submit_collector", "after", 1),
}


@pytest.mark.parametrize("step", STEPS, ids=[step.replace(" ", "-") for step in STEPS])
def test_a_launcher_killed_at_any_step_loses_and_doubles_nothing(engine: Cluster, tmp_path: Path, step: str) -> None:
    module, function, moment, call = STEPS[step]
    point = KillPoint(module=module, function=function, moment=moment, call=call)
    study = Study(cluster=engine, root=tmp_path, arguments=(*SIXTEEN, "cluster.max_array_size=2"))
    study.launch(expect=-9, kill=[point])
    assert fired(point, tmp_path / "killed")
    study.launch()
    study.wait_until_idle()
    assert study.launch().stdout.count("nothing left to run") == 1
    report = study.check()
    assert (report.rows, report.repeated) == (16, {})


def test_two_launches_at_once_submit_once(engine: Cluster, tmp_path: Path) -> None:
    study = Study(cluster=engine, root=tmp_path, arguments=SIXTEEN)
    pair = [
        subprocess.Popen(study.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=study.variables(), cwd=tmp_path)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=180)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert sum("submitted" in text for text in said) == 1, said
    assert any("nothing to submit: the rest is in flight" in text or "nothing left to run" in text for text in said), said
    study.wait_until_idle()
    assert study.check().repeated == {}


def test_a_job_whose_submission_was_given_up_touches_nothing(engine: Cluster, tmp_path: Path) -> None:
    """An sbatch that outlives its launcher: the array is abandoned, its shards are submitted anew, and then it turns up."""
    study = Study(cluster=engine, root=tmp_path, arguments=SIXTEEN)
    point = KillPoint(module="quantsweep.launching.cluster", function="submit_array", moment="before")
    study.launch(expect=-9, kill=[point])
    [lost] = read_submissions(study.folder)
    study.launch()
    assert all(array.abandoned for array in read_submissions(study.folder)[0].arrays)
    study.wait_until_idle()
    script = f"cd {ROOT} && {study.command()[0]} -m quantsweep.crew.slurm_job task {lost.path} 0"
    engine.run(["sbatch", "--array=0", f"--partition={'pair'}", "--job-name", lost.arrays[0].job_name, "--wrap", script])
    study.wait_until_idle()
    assert study.check().repeated == {}


def test_queued_jobs_run_the_code_as_it_was_submitted(engine: Cluster, tmp_path: Path) -> None:
    """The checkout is broken between submission and start: nothing of it reaches the jobs."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    for name in ("quantsweep", "launch.py", "conf"):  # as it is now, also what is not committed yet
        target = checkout / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        source = ROOT / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else shutil.copy(source, target)
    (checkout / ".env").write_text("SECRET=1\n")
    (checkout / ".git" / "info" / "exclude").write_text(".env\n")
    arguments = ("bit_width=4", "+cluster.additional_parameters.hold=true")
    study = Study(cluster=engine, root=tmp_path, arguments=arguments, checkout=checkout, where=checkout)
    study.launch()
    (checkout / "quantsweep" / "running" / "child.py").write_text("raise SystemExit('the edited checkout ran')\n")
    (checkout / "quantsweep" / "running" / "worker.py").write_text("raise SystemExit('the edited checkout ran')\n")
    for line in study.queued():
        engine.run(["scontrol", "release", line.split()[1]])
    study.wait_until_idle()
    assert study.check().rows == 1
    assert "the edited checkout ran" not in study.logs()
    [row] = quantsweep.load_trials(study.folder.path).to_dict("records")
    assert row["code_commit"] is not None
    assert not list(study.folder.code.rglob(".env"))
