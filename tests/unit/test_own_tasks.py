"""`task_path=/my/tasks task=mine` is all that is typed; suites and few-shot counts ask for each evaluation once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from quantsweep.cli.main import main
from quantsweep.composing.command_line import check_command_line
from quantsweep.composing.composition import compose_base, search_folders
from quantsweep.composing.prepare import prepare
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.errors import ConfigurationError, QuantsweepError
from quantsweep.planning.plan import Plan, build_plan, remaining_tasks
from quantsweep.storage.paths import product_root
from quantsweep.trial.specs import PlannedTrial

WORDS = ("model=mini-neox-0.3m", "method=none", "sweep=own_tasks")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a rolling task, one with choices in a task of several words, and one that only a conf yaml can describe."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "my tasks"
    folder.mkdir()
    (folder / "docs.jsonl").write_text(json.dumps({"text": "The king went.", "a": "x", "b": "y"}) + "\n")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}}, "test_split": "test"}
    rolling = {**data, "task": "ptb_local", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    metrics = [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]
    (folder / "ptb.yaml").write_text(yaml.safe_dump({**rolling, "metric_list": metrics, "metadata": {"version": 2}}))
    choices = {
        **data,
        "task": "my-choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": 0,
        "num_fewshot": 0,
    }
    (folder / "choice.yaml").write_text(yaml.safe_dump({**choices, "doc_to_choice": ["{{a}}", "{{b}}"]}))
    (folder / "odd.yaml").write_text(yaml.safe_dump({**rolling, "task": "odd", "metric_list": [{"metric": "surprise"}]}))
    return folder


def plan(*words: str) -> Plan:
    arguments = expand_shorthand([*WORDS, *words])
    check_command_line(arguments)
    cfg = compose_base(arguments)
    return prepare(cfg, search_folders(cfg.hydra), arguments).plan


def only(found: Plan) -> PlannedTrial:
    (trial,) = found.trials
    return trial


def test_the_folder_alone_makes_its_tasks_known(own: Path) -> None:
    (task,) = only(plan(f"task_path={own}", "task=ptb_local", "limit=3", "task.window=64")).tasks
    assert task.task_key.startswith("ptb_local@2+limit3+window64+own")
    assert (task.lm_eval_task, task.primary_metric, task.higher_is_better) == ("ptb_local", "bits_per_byte", False)


def test_several_and_beside_the_bundled_ones(own: Path) -> None:
    tasks = only(plan(f"task_path={own}", "task=ptb_local,my-choice,mini_cloze")).tasks
    assert [(task.name, task.primary_metric, task.own_content is not None) for task in tasks] == [
        ("ptb_local", "bits_per_byte", True),
        ("my-choice", "acc", True),
        ("mini_cloze", "acc", False),
    ]


def test_a_yaml_of_ones_own_says_what_differs(own: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "task").mkdir(parents=True)
    conf = {"name": "ptb_local", "lm_eval_task": "ptb_local", "folder": "own", "version": "2", "primary_metric": "word_perplexity"}
    (tmp_path / "conf" / "task" / "ptb_local.yaml").write_text(yaml.safe_dump({**conf, "higher_is_better": False}))
    search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    (task,) = only(plan(f"task_path={own}", "task=ptb_local", search)).tasks
    assert task.primary_metric == "word_perplexity"
    assert {task.name for task in only(plan(search, f"task_path={own}", "task=ptb_local,my-choice")).tasks} == {"ptb_local", "my-choice"}


def test_a_study_that_names_the_folder(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    (root / "sweeps").mkdir(parents=True)
    (root / "conf").symlink_to(product_root() / "conf")
    (root / "sweeps" / "mine.yaml").write_text(
        f"# @package _global_\ntask_path: {own}\nstudy: {{grids: [{{axes: {{task: [my-choice]}}}}]}}\n"
    )
    monkeypatch.setattr("quantsweep.composing.shorthand.product_root", lambda: root)
    words = expand_shorthand(["+sweeps=mine"])
    assert len(words) == 2
    (folder,) = [Path(word.removeprefix("hydra.searchpath=[").strip("]'").removeprefix("file://")) for word in words[1:]]
    assert sorted(file.stem for file in (folder / "task").glob("*.yaml")) == ["my-choice", "ptb_local"]


def test_names_that_are_not_there_are_answered_with_those_that_are(own: Path) -> None:
    with pytest.raises(QuantsweepError, match=r"unknown task 'ptb_locl'.*Did you mean .*'ptb_local'"):
        plan(f"task_path={own}", "task=ptb_locl")
    with pytest.raises(QuantsweepError, match=r"defines none of the tasks asked for \(mini_window_ppl\)"):  # of a kind that no YAML makes
        plan(f"task_path={own}", "task=mini_window_ppl")
    with pytest.raises(QuantsweepError, match="unknown task 'odd'"):  # a metric whose direction only the user can say
        plan(f"task_path={own}", "task=odd")


@pytest.mark.parametrize("text", ["task: [oops\n", "task: oops\ninclude: nowhere.yaml\n", "a: {\n"])
def test_a_yaml_that_cannot_be_read_is_named(own: Path, text: str) -> None:
    """Before anything else is said of the task, and in the way of no other."""
    (own / "oops.yaml").write_text(text)
    with pytest.raises(
        QuantsweepError, match=rf"task oops: lm-eval cannot read {re.escape(str(own))}/oops\.yaml; check its YAML.*(line|No such file)"
    ):
        plan(f"task_path={own}", "task=ptb_local,oops")
    assert only(plan(f"task_path={own}", "task=ptb_local")).tasks


def test_expanding_twice_is_expanding_once(own: Path) -> None:
    once = expand_shorthand([f"task_path={own}", "task=ptb_local"])
    assert expand_shorthand(once) == once
    assert len(once) == 3


def test_a_suite_that_lists_a_task_twice_asks_for_it_once() -> None:
    assert [task.name for task in only(plan("task.suite=[mini_ppl,mini_cloze,mini_ppl]")).tasks] == ["mini_ppl", "mini_cloze"]


def test_null_and_the_tasks_own_few_shot_count_are_one_evaluation() -> None:
    asked = plan("task=mini_cloze", "num_fewshot=null,0,2")
    assert [task.num_fewshot for task in only(asked).tasks] == [None, 2]
    assert asked.expansion.duplicates == 1
    trial = only(trial_plan := plan("task=mini_cloze", "num_fewshot=0"))
    for key in ("mini_cloze@1.0", "mini_cloze@1.0+0shot"):
        assert remaining_tasks(trial, {(trial.trial.trial_id, key)}).tasks == ()
    assert remaining_tasks(trial, {(trial.trial.trial_id, "mini_cloze@1.0+2shot+others")}).tasks == trial.tasks
    done = {(trial.trial.trial_id, "mini_cloze@1.0")}
    again = build_plan(trial_plan.expansion, sweep="s", done=done, in_flight=frozenset(), settings=trial_plan.settings, workers=1)
    assert again.shards == ()
    assert [task.task_key for task in only(again).tasks] == ["mini_cloze@1.0"], "status looks for the key that has the row"


@pytest.mark.parametrize("above", ["~", "~/..", "/"])
def test_a_whole_home_folder_is_not_looked_through(above: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("it is walked"))
    with pytest.raises(ConfigurationError, match="holds a whole home folder; give the folder of the task YAMLs"):
        expand_shorthand([f"task_path={above}", "task=mine"])


def test_a_plan_of_tasks_whose_documents_cannot_be_loaded_does_not_end_well(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "docs.jsonl").unlink()
    assert main(["plan", *WORDS, f"task_path={own}", "task=ptb_local", f"results_dir={own}"]) == 1
    assert "task        ptb_local: its documents cannot be loaded here" in capsys.readouterr().out
