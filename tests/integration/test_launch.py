"""`launch.py` for real: trained models, lm-eval, processes, kills; the tables read as a user would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import quantsweep
from quantsweep.exit_status import ExitStatus
from quantsweep.storage.lock import lock_holder
from quantsweep.storage.paths import SweepFolder
from quantsweep.storage.workers import read_records
from tests.conftest import ROOT, Launch

FAST = ("limit=8", "batch_size=8")
SMALLEST = "model=mini-neox-0.3m"


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid` and that run trials."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            command = stat.with_name("cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == pid and b"quantsweep.running.child" in command:
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments, f"results_dir={tmp_path / 'results'}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        # A suite that was started in the background of a shell hands SIGINT down as ignored; a user's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def num_rows(folder: Path) -> int:
    """Rows that a plain reader sees right now."""
    metrics = folder / "metrics"
    if not metrics.is_dir() or not any(not p.name.startswith(".") for p in metrics.iterdir()):
        return 0
    return len(pd.read_parquet(metrics))


def test_one_trial_prints_its_evaluations_and_is_not_run_twice(launch: Launch, tmp_path: Path) -> None:
    arguments = (SMALLEST, "data_type=fp", "bit_width=4", "block_size=64", *FAST)
    done = launch(*arguments)
    for word in ("mini_cloze", "mini_continuation", "bits_per_byte", "4.250"):
        assert word in done.stdout
    again = launch(*arguments)
    assert "already done" in again.stdout
    frame = quantsweep.load_results(tmp_path / "results" / "adhoc")
    assert not frame.duplicated(["trial_id", "task_key", "metric"]).any()
    assert len(quantsweep.load_trials(tmp_path / "results" / "adhoc", attempts=True)) == 1


def test_a_grid_from_the_command_line_and_everything_in_its_tables(launch: Launch, quantsweep_command: Launch, tmp_path: Path) -> None:
    arguments = ("-m", SMALLEST, "bit_width=3,4,16", "data_type=int,quantile", "task=mini_ppl", "limit=8", "sweep=grid")
    first = launch(*arguments)
    assert "5   = 5 evaluations (1 duplicate merged" in first.stdout
    folder = tmp_path / "results" / "grid"
    results = quantsweep.load_results(folder)
    bpb = results[results.metric == "bits_per_byte"].set_index(["method", "data_type", "bit_width"]).value
    assert bpb["round_to_nearest", "int", 3] > bpb["round_to_nearest", "int", 4]
    assert len(bpb) == 5
    for column in ("versions", "host", "device", "requests_hash", "attempt", "plan"):
        assert results[column].notna().all()
    assert results.code_commit.notna().all() == (ROOT / ".git").exists()
    trials = quantsweep.load_trials(folder)
    assert set(trials.status) == {"done"}
    for column in ("load_seconds", "quantize_seconds", "evaluate_seconds", "write_seconds", "restore_seconds", "peak_memory_bytes"):
        assert (trials[column] >= 0).all()
    assert json.loads(trials.config[0])["trial"]["model"]["name"] == "mini-neox-0.3m"
    samples = quantsweep.load_samples(folder)
    assert [len(s) for s in samples.loglikelihood] == [8] * 5
    assert samples.requests_hash.nunique() == 1
    layers = quantsweep.load_layers(folder)
    assert layers.groupby("trial_id").relative_error.mean().between(0, 1).all()
    assert layers.trial_id.nunique() == 4
    compared = quantsweep_command("compare", "grid bit_width=3 data_type=int", "bit_width=4 data_type=int", expect=ExitStatus.WORSE)
    assert "A and B differ in bit_width 3 against 4" in compared.stdout
    again = launch(*arguments)
    assert "nothing left to run" in again.stdout
    more = launch(*(a if a != "task=mini_ppl" else "task=mini" for a in arguments))
    assert "to run 5 (10 evaluations)" in more.stdout, "the tasks that were added run alone"


def test_the_words_that_were_typed_are_resumed_and_failures_are_an_exit_status(
    launch: Launch, quantsweep_command: Launch, tmp_path: Path
) -> None:
    arguments = ("-m", SMALLEST, "bit_width=4,8", "task=mini_cloze", "limit=4", "sweep=typed")
    failed = launch(*arguments, "trial_timeout_minutes=0.0001", expect=3)
    assert "quantsweep status typed" in failed.stdout
    launch(*arguments)
    resumed = quantsweep_command("resume", "typed")
    assert f"python launch.py {' '.join(arguments)}" in resumed.stdout
    for said in ("nothing left to run", "mini_cloze", "python -m analysis"):
        assert said in resumed.stdout, "a finished grid prints its table, and what to type next"
    assert "2/2" in quantsweep_command("list").stdout


def test_samples_give_the_same_value_as_the_metrics(launch: Launch, tmp_path: Path) -> None:
    launch(SMALLEST, "bit_width=4", "limit=30")
    folder = tmp_path / "results" / "adhoc"
    values = quantsweep.load_results(folder).set_index(["task", "metric"]).value
    samples = quantsweep.load_samples(folder).set_index("task")
    assert sum(samples.correct["mini_cloze"]) / 30 == pytest.approx(values["mini_cloze", "acc"])
    assert sum(samples.correct_norm["mini_continuation"]) / 30 == pytest.approx(values["mini_continuation", "acc_norm"])
    nats, num_bytes = samples.loglikelihood["mini_ppl"].sum(), samples.num_bytes["mini_ppl"].sum()
    assert -nats / num_bytes / 0.6931471805599453 == pytest.approx(values["mini_ppl", "bits_per_byte"], rel=1e-5)


def test_a_killed_child_costs_one_trial_and_resume_runs_that_one(tmp_path: Path, launch: Launch, quantsweep_command: Launch) -> None:
    arguments = ("-m", SMALLEST, "bit_width=range(3,9)", "workers=1", "limit=200", "task=mini_ppl", "sweep=killed")
    folder = tmp_path / "results" / "killed"
    process = start(tmp_path, *arguments)
    wait_for(lambda: num_rows(folder) > 0)
    [child] = children_of(process.pid)
    os.kill(child, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    trials = quantsweep.load_trials(folder)
    failed = trials[trials.status == "failed"]
    assert process.returncode == (3 if len(failed) else 0), output
    assert len(failed) <= 1, "a kill costs one trial at most"
    assert len(trials) == 6
    if len(failed):
        assert set(failed.failure_class) == {"killed"}
        status = json.loads(quantsweep_command("status", "killed", "--json").stdout)
        assert (status["failed"], status["done"], status["to_launch"]) == (1, 5, 0)
        assert "killed" in quantsweep_command("logs", failed.trial_id.iloc[0]).stdout
    again = launch(*arguments)
    assert f"to run {len(failed)} " in again.stdout
    assert set(quantsweep.load_trials(folder).status) == {"done"}
    assert json.loads(quantsweep_command("status", "killed", "--json").stdout)["done"] == 6


def test_kill_9_of_everything_loses_nothing_that_was_written(tmp_path: Path, launch: Launch) -> None:
    arguments = ("-m", SMALLEST, "bit_width=3,4", "data_type=int,fp", "workers=2", "limit=60", "sweep=resumed")
    folder = tmp_path / "results" / "resumed"
    for wanted in (1, 8):
        process = start(tmp_path, *arguments)
        wait_for(lambda wanted=wanted: num_rows(folder) >= wanted)
        children = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        wait_for(
            lambda children=children: (
                not any(
                    Path(f"/proc/{pid}/stat").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]
                    for pid in children
                )
            ),
            20,
        )
    before = quantsweep.load_results(folder)
    last = launch(*arguments)
    after = quantsweep.load_results(folder)
    kept = after.merge(before, on=["trial_id", "task_key", "metric", "attempt"])
    assert len(kept) == len(before), "what was written stays, and is not evaluated again"
    assert (kept.value_x == kept.value_y).all()
    undisturbed = launch(*(a if not a.startswith("sweep=") else "sweep=undisturbed" for a in arguments))
    assert "4 trials done" in undisturbed.stdout
    assert "trials done, 0 failed" in last.stdout
    key = ["trial_id", "task_key", "metric"]
    reference = quantsweep.load_results(tmp_path / "results" / "undisturbed")
    both = after.merge(reference, on=key, validate="one_to_one")
    assert len(both) == len(after) == len(reference)
    pd.testing.assert_series_equal(both.value_x, both.value_y, check_names=False)


def test_ctrl_c_finishes_what_is_at_hand_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "stopped"
    process = start(tmp_path, "-m", SMALLEST, "bit_width=range(3,9)", "data_type=int,fp", "workers=1", "limit=100", "sweep=stopped")
    wait_for(lambda: num_rows(folder) > 0)
    status = subprocess.run(
        [sys.executable, "-m", "quantsweep.cli.main", "status", "stopped", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert str(process.pid) in json.loads(status.stdout)["launch"], "a local launch at work is said"
    at_hand = [heard.record.trial_id for heard in read_records(SweepFolder(folder))]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    trials = quantsweep.load_trials(folder)
    kept = quantsweep.load_results(folder).groupby("trial_id").task_key.nunique()
    for trial_id in filter(None, at_hand):
        assert kept.get(trial_id, 0) > 0, "the task at hand has its row, as was promised"
    assert set(trials.trial_id) == set(kept.index[kept == 3]), "a trial whose tasks are all there has its own row"
    assert [heard.record.ended for heard in read_records(SweepFolder(folder))] == ["stopped"], "no record stays open"
    assert "The same command goes on from here" in output
    assert lock_holder(folder / "plan" / "launch.lock") is None
    assert 0 < quantsweep.load_results(folder).trial_id.nunique() < 12


def test_two_launches_of_one_sweep_at_once(tmp_path: Path, launch: Launch) -> None:
    arguments = ("-m", SMALLEST, "bit_width=3,4", "limit=40", "sweep=twice")
    process = start(tmp_path, *arguments)
    wait_for(lambda: (tmp_path / "results" / "twice" / "plan" / "launch.lock.1").exists())
    refused = launch(*arguments, expect=1)
    assert f"process {process.pid}" in refused.stderr
    process.communicate(timeout=300)
    assert "nothing left to run" in launch(*arguments).stdout


def test_a_local_folder_works_wherever_a_hub_id_does(tmp_path: Path, launch: Launch) -> None:
    import shutil

    copy = tmp_path / "my-model"
    shutil.copytree(ROOT / "quantsweep" / "mini" / "models" / "mini-opt-0.4m", copy)
    done = launch(f"model={copy}", "model.dtype=float32", "bit_width=8", "task=mini_ppl", "limit=5")
    assert "my-model" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("data_type=quantil",), "Did you mean 'quantile'?"),
        (("bit_width=1",), "supports bit_width 2–8"),
        (("bit_width=16", "block_size=64"), "would change nothing"),
        (("model=organisation/name",), "model.revision="),
        (("-m", "model=pythia-70m", "bit_width=4,8"), "pythia-70m"),
        (("-m", "sweep=../../etc", "bit_width=4,8"), "plain name"),
        (("model=/no/such/folder",), "does not exist"),
        (("task_path=/no/such/folder",), "not a folder"),
        (("-m", "device=cpu,cuda"), "is set once a launch"),
        (("bit_width=3,4",), "add -m"),
        (("tracking=wandb", "+tracking.api_key=secret"), "wandb login, an environment variable"),
        (("data_type.version=2",), "unknown key"),
        (("data_type=fp", "data_type.options.exponent_bits=2.0"), "got 2.0 (float)"),
        (("device=cpuu",), "device 'cpuu' is not one of auto"),
        (("-m", "device=cpuu", "bit_width=3,4"), "device 'cpuu' is not one of auto"),
        (("-m", "assume_dead=no", "bit_width=3,4"), "assume_dead must be true or false, got 'no'"),
        (("-m", "sweep=null", "bit_width=3,4"), "write sweep=NAME"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(launch: Launch, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    refused = launch(*arguments, expect=1)
    assert said in refused.stderr
    for words_of_hydra in ("Traceback", "Error executing job", "HYDRA_FULL_ERROR"):
        assert words_of_hydra not in refused.stderr
    assert not list(tmp_path.glob("results/*/trials/*"))


def test_help_is_one_screen_about_this_product(launch: Launch, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=30, check=True
    )
    assert "quickstart" in done.stdout
    assert "bit_width" in done.stdout
    assert ".venv" not in done.stdout
    assert len(done.stdout.splitlines()) < 80


def test_a_results_folder_that_others_may_write_is_refused(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "adhoc"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    refused = launch("-m", "bit_width=4,8", expect=1)
    assert f"chmod -R go-w '{folder}'" in refused.stderr


def test_the_dry_run_counts_what_the_launch_does(quantsweep_command: Launch, tmp_path: Path) -> None:
    counts = json.loads(quantsweep_command("plan", "+sweeps=quickstart", "--json", "results_dir=results").stdout)
    assert {"trials", "skipped", "duplicates", "done", "in_flight", "to_run", "shards", "array_tasks"} <= set(counts)
    assert counts["trials"] == counts["to_run"] == 175
    assert counts["evaluations"] == 525
    assert not (tmp_path / "results").exists(), "planning writes nothing"


def test_the_dry_run_of_the_k_bit_study(quantsweep_command: Launch) -> None:
    text = quantsweep_command("plan", "+sweeps=k_bit_inference").stdout
    assert "not pinned" in text
    assert "opt-175b" in text


def test_wandb_offline_logs_a_run_a_shard(tmp_path: Path, launch: Launch) -> None:
    launch(
        "-m", SMALLEST, "bit_width=4,8", "task=mini_ppl", "limit=4", "workers=1", "tracking=wandb", "tracking.mode=offline", "sweep=tracked"
    )
    folder = tmp_path / "results" / "tracked"
    assert len(list((folder / "logs" / "wandb").glob("offline-run-*"))) >= 1
    assert set(quantsweep.load_trials(folder).status) == {"done"}


def test_a_wandb_failure_fails_no_trial(tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    launch("-m", SMALLEST, "bit_width=4,8", "task=mini_ppl", "limit=4", "tracking=wandb", "sweep=untracked", timeout=280)
    folder = tmp_path / "results" / "untracked"
    assert set(quantsweep.load_trials(folder).status) == {"done"}
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"0" * 40 not in everything, "no secret in any file"
