"""conf/task agrees with the installed lm-eval, and what a task cannot do is said before it is scored."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets.fingerprint import Hasher
from evaluation_cases import CONF, LOCAL, ROLLING, spec_of, write_local_tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from quantsweep import evaluation
from quantsweep.errors import EvaluationError
from quantsweep.tasks.definition import _LM_EVAL_TASKS, _MINI_TASKS, data_revision, load_task
from quantsweep.trial.specs import TaskSpec

FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
TASKS = {stem: content for stem, content in FILES.items() if "suite" not in content}
SUITES = {stem: content for stem, content in FILES.items() if "suite" in content}


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_local_tasks(tmp_path_factory.mktemp("tasks"))


class TestConfigurations:
    @pytest.mark.parametrize("stem", [stem for stem, content in TASKS.items() if content.get("kind", "lm_eval") == "lm_eval"])
    def test_a_task_is_what_the_installed_lm_eval_has(self, stem: str) -> None:
        spec = TaskSpec(**TASKS[stem])
        assert spec.name == stem
        folder = _MINI_TASKS if spec.folder == "mini" else _LM_EVAL_TASKS / spec.folder
        entry = TaskManager(include_path=[folder], include_defaults=False).task_index[spec.lm_eval_task]
        config = load_yaml(entry.yaml_path)
        assert str(config["metadata"]["version"]) == spec.version
        metrics = {metric["metric"]: metric.get("higher_is_better") for metric in config["metric_list"]}
        assert metrics[spec.primary_metric] in (spec.higher_is_better, None)

    @pytest.mark.parametrize("stem", SUITES)
    def test_a_suite_names_tasks(self, stem: str) -> None:
        assert set(SUITES[stem]) == {"suite"}
        assert set(SUITES[stem]["suite"]) <= set(TASKS)


class TestLoading:
    def test_only_one_folder_is_read(self, task_path: Path) -> None:
        started = time.perf_counter()
        load_task(spec_of("mini_ppl"))
        assert time.perf_counter() - started < 3  # all of lm-eval's YAMLs take 6 s on a free machine

    def test_the_users_folder_comes_first(self, task_path: Path) -> None:
        task = load_task(spec_of("piqa"), task_path)
        assert len(task.eval_docs) == len(LOCAL["piqa"][2])

    def test_a_task_that_the_users_folder_lacks_is_built_in(self, task_path: Path) -> None:
        assert len(load_task(spec_of("mini_cloze"), task_path).eval_docs) > 1000

    @pytest.mark.parametrize("name", ["mini_cloze", "mini_continuation", "mini_ppl"])
    def test_the_bundled_data_are_not_pickled(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """datasets would, for a fingerprint; dill cannot where pyarrow lies outside `site-packages`."""
        monkeypatch.setattr(Hasher, "hash", lambda _value: pytest.fail("pickled"))
        documents = load_task(spec_of(name)).eval_docs
        assert len(documents) > 100

    def test_the_state_of_random_generators_is_left_alone(self) -> None:
        random.seed(7)
        np.random.seed(7)
        expected = random.random(), np.random.random()
        random.seed(7)
        np.random.seed(7)
        load_task(spec_of("mini_cloze"))
        assert (random.random(), np.random.random()) == expected

    def test_nothing_is_printed(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, task_path: Path) -> None:
        load_task(spec_of("mini_cloze"))
        load_task(spec_of("wikitext"), task_path)
        assert capfd.readouterr() == ("", "")
        assert not caplog.records


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"version": "0.9"},
                r"task piqa: version 0\.9 was asked for, lm-eval \S+ has version 1\.0; install .* or change `version:` .*piqa\.yaml",
            ),
            ({"primary_metric": "acc_norn"}, r"unknown primary_metric 'acc_norn'\. Did you mean 'acc_norm'\? Available: acc, acc_norm"),
            ({"higher_is_better": False}, r"lm-eval says higher_is_better=True for acc"),
        ],
    )
    def test_what_the_task_is_not(self, task_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(EvaluationError, match=message):
            load_task(spec_of("piqa", **changes), task_path)

    def test_names_that_do_not_exist(self) -> None:
        with pytest.raises(EvaluationError, match=r"unknown folder 'lambda'\. Did you mean 'lambada'\?"):
            load_task(spec_of("lambada_openai", folder="lambda"))
        with pytest.raises(EvaluationError, match=r"unknown lm-eval task 'lambada_opnai'\. Did you mean 'lambada_openai'\?"):
            load_task(spec_of("lambada_openai", lm_eval_task="lambada_opnai"))
        with pytest.raises(EvaluationError, match="unknown folder"):
            load_task(spec_of("piqa", folder="../tasks/piqa"))
        with pytest.raises(EvaluationError, match=r"folder of task YAMLs .*nowhere does not exist"):
            load_task(spec_of("piqa"), Path("nowhere"))

    def test_data_that_cannot_be_had(self) -> None:
        with pytest.raises(EvaluationError, match=r"task piqa: its data cannot be loaded: .* Load it once where there is a network"):
            load_task(spec_of("piqa"))

    def test_a_yaml_that_cannot_be_read_is_not_replaced_by_the_built_in_task(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("include: nowhere.yaml\ntask: mini_cloze\n")
        with pytest.raises(EvaluationError, match=r"task mini_cloze: lm-eval cannot read .*mine\.yaml"):
            load_task(spec_of("mini_cloze"), tmp_path)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"dataset_path": "{folder}/script"}, r"scripts.* Data sets with a loading script are not run"),
            ({"doc_to_target": "{{{{txt.strip()[0]}}}}"}, r"'txt' is undefined\. Its YAML names a split .* There are: test with 2"),
            ({"test_split": "validation"}, r"'validation'\. Its YAML names a split .* There are: test with 2 documents of text"),
            ({"dataset_kwargs": {"data_file": "x", "data_files": {"test": "docs.jsonl"}}}, r"data_file'\. Look at its dataset_path"),
            ({"dataset_kwargs": {"data_files": {"test": "empty.jsonl"}}}, r"It has no documents, or fewer"),
            ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, r"gone\.jsonl.* Look at its dataset_path and dataset_kwargs"),
            ({"doc_to_target": "{{{{text.__class__.__mro__}}}}"}, r"unsafe.* Templates are rendered in a sandbox"),
            ({"process_docs": "{none}"}, r"It has no documents, or fewer than it needs"),
        ],
        ids=["script", "column", "split", "option", "empty", "gone", "sandbox", "none"],
    )  # fmt: skip
    def test_broken_data_and_yamls_name_task_file_and_remedy(self, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
        (tmp_path / "script").mkdir()
        (tmp_path / "script" / "script.py").write_text("import datasets\nclass Mine(datasets.GeneratorBasedBuilder):\n    pass\n")
        (tmp_path / "docs.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        (tmp_path / "empty.jsonl").write_text("")
        (tmp_path / "code.py").write_text("def none(docs):\n    return docs.select([])\n")
        config = {
            **ROLLING,
            "task": "mine",
            "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
        } | {key: value.format(folder=tmp_path, none="F") if isinstance(value, str) else value for key, value in changes.items()}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config).replace("process_docs: F", "process_docs: !function code.none"))
        with pytest.raises(EvaluationError, match=rf"(?s)task mine \(.*mine\.yaml\): its data cannot be loaded: .*{said}"):
            load_task(spec_of("mini_ppl", name="mine", lm_eval_task="mine"), tmp_path)

    def test_a_bug_in_a_tasks_own_python_is_not_reworded(self, tmp_path: Path) -> None:
        (tmp_path / "code.py").write_text("def target(doc):\n    raise KeyError('a bug')\n")
        self.write(tmp_path, "buggy", doc_to_target="F")
        file = tmp_path / "buggy.yaml"
        file.write_text(file.read_text().replace("doc_to_target: F", "doc_to_target: !function code.target"))
        with pytest.raises(KeyError, match="a bug"):
            load_task(spec_of("mini_cloze", name="buggy", lm_eval_task="buggy"), tmp_path)

    def test_generation(self, tmp_path: Path) -> None:
        self.write(tmp_path, "gen", output_type="generate_until", metric_list=[{"metric": "exact_match"}])
        with pytest.raises(EvaluationError, match="task gen: output type generate_until is not supported; supported: loglikelihood, "):
            load_task(spec_of("mini_cloze", name="gen", lm_eval_task="gen", primary_metric="exact_match"), tmp_path)

    def test_few_shot_where_the_task_fixes_zero(self, tmp_path: Path) -> None:
        self.write(tmp_path, "fixed", num_fewshot=0)
        spec = spec_of("mini_cloze", name="fixed", lm_eval_task="fixed", num_fewshot=3)
        with pytest.raises(EvaluationError, match="task fixed: its definition fixes num_fewshot at 0, 3 cannot be had"):
            load_task(spec, tmp_path)

    def test_a_group(self, tmp_path: Path) -> None:
        self.write(tmp_path, "one")
        self.write(tmp_path, "two")
        (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"]}))
        with pytest.raises(EvaluationError, match="both is a group of lm-eval tasks; name its members: one, two"):
            load_task(spec_of("mini_cloze", name="both", lm_eval_task="both"), tmp_path)

    @staticmethod
    def write(folder: Path, name: str, **changes: Any) -> None:
        """A variation of mini_cloze; its data functions are found through the absolute include."""
        config = {"include": str(_MINI_TASKS / "mini_cloze.yaml"), "task": name, "tag": None, **changes}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


class TestDataRevision:
    def test_local_files_by_their_content(self, tmp_path: Path) -> None:
        first, second = write_local_tasks(tmp_path / "a"), write_local_tasks(tmp_path / "b")
        spec = spec_of("lambada_openai")
        revision = data_revision(load_task(spec, first))
        assert revision is not None
        assert revision.startswith("sha256:")
        assert data_revision(load_task(spec, second)) == revision
        (second / "lambada_openai.jsonl").write_text('{"text": "another text altogether"}\n')
        assert data_revision(load_task(spec, second)) != revision

    def test_bundled_data_by_their_content(self) -> None:
        revisions = {data_revision(load_task(spec_of(name))) for name in ("mini_cloze", "mini_continuation", "mini_ppl")}
        assert len(revisions) == 3
        assert None not in revisions

    def test_a_hub_data_set_by_its_commit(self) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        assert data_revision(HubTask(f"/cache/org___name/default/0.0.0/{commit}/name-test.arrow")) == f"hub:{commit}"
        assert data_revision(HubTask("/cache/json/default-12/0.0.0/name-test.arrow")) is None


class HubTask:
    """As much of a task with data from the hub as its revision needs."""

    def __init__(self, cache_file: str) -> None:
        self.eval_docs = self
        self.info = None
        self.cache_files = [{"filename": cache_file}]

    def get_config(self, _key: str) -> None:
        return None


def test_the_package_itself_imports_nothing_heavy() -> None:
    """lm-eval takes a second to import: only who evaluates pays for it."""
    assert "import" not in Path(str(evaluation.__file__)).read_text()
