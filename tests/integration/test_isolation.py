"""A trial that raises, crashes or hangs costs that trial; the shard goes on, and a resume runs what is missing.

The faults are real: a user's task (a YAML and a Python file in a folder of their own) that misbehaves
once, in the process that runs trials.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantsweep
from tests.conftest import Launch

TASK = """
task: faulty
custom_dataset: !function faulty.documents
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: !function faulty.target
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1.0
"""
CODE = """
import ctypes, os, sys, time
from pathlib import Path
import datasets

def documents(**_):
    return {"test": datasets.Dataset.from_list([{"text": "A small document of words."}])}

def target(doc):
    flag = Path(__file__).with_name("flag")
    if flag.exists() and "quantsweep.evaluation.evaluator" in sys.modules:  # in a trial, not where the task is planned
        flag.unlink()
        FAULT
    return doc["text"]
"""
FAULTS = {
    "raise": ("raise KeyError('a bug')", "bug"),
    "segfault": ("ctypes.string_at(0)", "crashed"),
    "abort": ("os.abort()", "crashed"),
    "exit": ("os._exit(7)", "crashed"),
    "out of memory": ("raise MemoryError", "out_of_host_memory"),
    "lost weights": ("from quantsweep.errors import ModelError; raise ModelError('not the original weights')", "model_or_data"),
    "hang": ("time.sleep(1000)", "hung"),
}
CONF = """
name: faulty
lm_eval_task: faulty
folder: mini
version: "1.0"
primary_metric: bits_per_byte
higher_is_better: false
num_fewshot: null
limit: null
"""


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A user's own folder of configuration and tasks."""
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "faulty.yaml").write_text(CONF)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "faulty.yaml").write_text(TASK)
    return tasks


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_one_trial(launch: Launch, quantsweep_command: Launch, tmp_path: Path, faulty: Path, fault: str) -> None:
    code, cause = FAULTS[fault]
    (faulty / "faulty.py").write_text(CODE.replace("FAULT", code))
    (faulty / "flag").touch()
    arguments = (
        "-m",
        "model=mini-neox-0.3m",
        "bit_width=3,4,8",
        "task=mini_ppl,faulty",
        "limit=4",
        "workers=1",
        f"task_path={faulty}",
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
        "sweep=faults",
        "trial_timeout_minutes=0.5",
    )
    first = launch(*arguments, expect=3)
    assert "2 trials done, 1 failed" in first.stdout
    folder = tmp_path / "results" / "faults"
    trials = quantsweep.load_trials(folder)
    [failed] = trials[trials.status == "failed"].itertuples()
    assert failed.failure_class == cause
    assert failed.failure_fingerprint
    assert failed.num_tasks == 1, "the task before the fault has its row"
    assert quantsweep.load_results(folder).query("metric == 'bits_per_byte'").groupby("task").size().to_dict() == {
        "mini_ppl": 3,
        "faulty": 2,
    }
    log = quantsweep_command("logs", failed.trial_id[:10]).stdout
    assert failed.failure_class in log
    assert "a bug" in log or fault != "raise"
    status = json.loads(quantsweep_command("status", "faults", "--json").stdout)
    assert status["failures"][0]["class"] == cause

    again = launch(*arguments)
    assert "to run 1 (1 evaluation)" in again.stdout, "the task that had its row is not run again"
    assert set(quantsweep.load_trials(folder).status) == {"done"}
    values = quantsweep.load_results(folder).query("task == 'faulty'").groupby("bit_width").value.first()
    assert values.nunique() == 3, "each trial had its own weights"


def test_weights_are_the_original_ones_after_each_trial(launch: Launch, tmp_path: Path) -> None:
    """The baseline comes first in a shard; in another sweep it runs alone: equal to the last bit, and so is every trial."""
    base = ("-m", "model=mini-opt-0.4m", "task=mini_ppl", "limit=10", "workers=1")
    launch(*base, "bit_width=16,3,4,8", "sweep=together")
    launch(*base, "bit_width=8,3", "sweep=apart")
    together, apart = (
        quantsweep.load_results(tmp_path / "results" / name).set_index(["trial_id", "metric"]).value for name in ("together", "apart")
    )
    assert len(apart) == 2 * 3
    assert (together.loc[apart.index] == apart).all()


def test_rows_of_quantized_models_have_honest_sizes(launch: Launch, tmp_path: Path) -> None:
    launch("-m", "model=mini-neox-0.3m", "bit_width=4,16", "block_size=64", "task=mini_ppl", "limit=2")
    rows = quantsweep.load_results(tmp_path / "results" / "adhoc").query("metric == 'bits_per_byte'").set_index("method")
    quantized, baseline = rows.loc["round_to_nearest"], rows.loc["none"]
    assert quantized.bits_per_weight == 4.25
    assert baseline.total_model_bits == 16 * baseline.num_parameters
    assert quantized.total_model_bits == 4.25 * quantized.num_quantized + 16 * (quantized.num_parameters - quantized.num_quantized)
    embeddings = 16 * quantized.num_embedding_parameters
    assert quantized.total_model_bits_without_embeddings == quantized.total_model_bits - embeddings
