"""A user's own definition of a task is another task than the built-in one of that name, and its documents are part of it."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from evaluation_cases import ROLLING, spec_of
from lm_eval.tasks import TaskManager
from PIL import Image

from quantsweep.errors import EvaluationError
from quantsweep.tasks.definition import load_task
from quantsweep.tasks.documents import hash_values
from quantsweep.trial.specs import TaskSpec
from quantsweep.trial.task_identity import read_own_tasks

PYTHON = """
import json
from pathlib import Path
import datasets

def load(**_):
    lines = Path(__file__).with_name("read.jsonl").read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}

def load_file(**_):
    return datasets.load_dataset("json", data_files={"test": str(Path(__file__).with_name("read.jsonl"))})

def process(documents):
    return documents.map(lambda document: {**document, "text": target(document)})

def target(document):
    return json.loads(Path(__file__).with_name("read.jsonl").read_text().splitlines()[document["n"]])["text"]
"""


def write(folder: Path, name: str, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = re.sub("'(!function [a-z_.]+)'", r"\1", yaml.safe_dump({"task": name, **ROLLING, **config}))
    (folder / f"{name}.yaml").write_text(text)


def spec(name: str, **changes: Any) -> TaskSpec:
    return spec_of("mini_ppl", name=name, lm_eval_task=name, **changes)


def lines(word: str) -> str:
    return "".join(json.dumps({"text": f"The {word} number {n}."}) + "\n" for n in range(3))


def tsv(word: str) -> str:
    return "text\n" + "".join(f"The {word} number {n}.\n" for n in range(3))


def pack(file: Path, text: str) -> None:
    with gzip.open(file, "wt") as stream:
        stream.write(text)


def zip_up(file: Path, text: str) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.jsonl", text)


FIXED: dict[str, Any] = {"dataset_kwargs": {"data_files": {"test": "fixed.jsonl"}}}
# How data may be given: keys of the YAML, and what writes the data.
PLACES: dict[str, tuple[dict[str, Any], Callable[[Path, str], object]]] = {
    "beside": ({"dataset_kwargs": {"data_files": {"test": "docs.jsonl"}}}, lambda f, w: (f / "docs.jsonl").write_text(lines(w))),
    "list": ({"dataset_kwargs": {"data_files": {"test": ["docs.jsonl"]}}}, lambda f, w: (f / "docs.jsonl").write_text(lines(w))),
    "space": ({"dataset_kwargs": {"data_files": {"test": "a b/d.jsonl"}}}, lambda f, w: (f / "a b/d.jsonl").write_text(lines(w))),
    "pattern": ({"dataset_kwargs": {"data_files": {"test": "d/*.jsonl"}}}, lambda f, w: (f / "d" / "x.jsonl").write_text(lines(w))),
    "gz": ({"dataset_kwargs": {"data_files": {"test": "d/x.jsonl.gz"}}}, lambda f, w: pack(f / "d/x.jsonl.gz", lines(w))),
    "tsv": (
        {"dataset_path": "csv", "dataset_kwargs": {"data_files": {"test": "d/x.tsv"}, "sep": "\t"}},
        lambda f, w: (f / "d" / "x.tsv").write_text(tsv(w)),
    ),
    "data_dir": ({"dataset_kwargs": {"data_dir": "e"}}, lambda f, w: (f / "e" / "test.jsonl").write_text(lines(w))),
    "folder": ({"dataset_path": "./e"}, lambda f, w: (f / "e" / "test.jsonl").write_text(lines(w))),
    "parquet": (
        {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": "d/x.parquet"}}},
        lambda f, w: pandas.read_json(io.StringIO(lines(w)), lines=True).to_parquet(f / "d/x.parquet"),
    ),
    "text": (
        {"dataset_path": "text", "dataset_kwargs": {"data_files": {"test": "d/x.txt"}}},
        lambda f, w: (f / "d/x.txt").write_text(tsv(w).removeprefix("text\n")),
    ),
    "zip": ({"dataset_kwargs": {"data_files": {"test": "d/x.zip"}}}, lambda f, w: zip_up(f / "d/x.zip", lines(w))),
    "python": ({"dataset_path": "", "custom_dataset": "!function load.load"}, lambda f, w: (f / "read.jsonl").write_text(lines(w))),
    "py_file": ({"dataset_path": "", "custom_dataset": "!function load.load_file"}, lambda f, w: (f / "read.jsonl").write_text(lines(w))),
    "processed": ({**FIXED, "process_docs": "!function load.process"}, lambda f, w: (f / "read.jsonl").write_text(lines(w))),
    "examples": (
        {**FIXED, "fewshot_config": {"samples": [{"n": 0}], "doc_to_text": "!function load.target", "sampler": "first_n"}},
        lambda f, w: (f / "read.jsonl").write_text(lines(w)),
    ),
    "target": ({**FIXED, "doc_to_target": "!function load.target"}, lambda f, w: (f / "read.jsonl").write_text(lines(w))),
}  # fmt: skip
"""Ways in which documents come into a task; some read a file while their task's data file stays as it is."""


def write_all(folder: Path, word: str) -> None:
    for name, (config, write_data) in PLACES.items():
        place = folder / name
        for inner in ("a b", "d", "e"):
            (place / inner).mkdir(parents=True, exist_ok=True)
        write(place, name, **config)
        (place / "load.py").write_text(PYTHON)
        (place / "fixed.jsonl").write_text("".join(json.dumps({"text": "fixed", "n": n}) + "\n" for n in range(3)))
        write_data(place, word)
    for file in folder.rglob("*"):
        os.utime(file, (1_700_000_000, 1_700_000_000))  # as rsync and tar leave them: a file's time tells nothing


@pytest.fixture(scope="module")
def two_readings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, str]]:
    """The folder, and what all its tasks were before their documents were replaced by others of the same length, and after."""
    folder = tmp_path_factory.mktemp("own")
    write_all(folder, "king")
    before = read_own_tasks(folder).contents(PLACES)
    write_all(folder, "lord")
    return folder, before, read_own_tasks(folder).contents(PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_replaced_documents_make_another_task(two_readings: tuple[Path, dict[str, str], dict[str, str]], place: str) -> None:
    _, before, after = two_readings
    assert before[place] != after[place]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_loaded_is_what_was_planned(
    two_readings: tuple[Path, dict[str, str], dict[str, str]], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative data lie beside the YAML, wherever a worker runs; others than those that were planned are refused in words."""
    folder, before, after = two_readings
    monkeypatch.chdir(tmp_path)
    task = load_task(spec(place, own_content=after[place]), folder)
    assert task.doc_to_target(next(iter(task.eval_docs))) == ("fixed" if place == "examples" else "The lord number 0.")
    said = rf"task {place} \(.*{place}\.yaml\): its YAML, Python or documents are not those that were planned \({before[place]} then, "
    with pytest.raises(EvaluationError, match=said):
        load_task(spec(place, own_content=before[place]), folder)


def test_equal_documents_are_one_task_wherever_the_folder_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, "mine", **PLACES["beside"][0])
        (tmp_path / name / "docs.jsonl").write_text(lines("king"))
    assert read_own_tasks(tmp_path / "a").contents(["mine"]) == read_own_tasks(tmp_path / "b").contents(["mine"])


def test_documents_that_hold_objects_are_told_by_their_content() -> None:
    """An image's `repr` is its address, a long array's leaves its middle out."""

    def hashed(value: object) -> str:
        return hash_values([{"text": "a", "value": value}])

    def array(middle: int) -> np.ndarray[Any, Any]:
        return np.array([0] * 2000 + [middle] + [0] * 2000)

    assert hashed(Image.new("RGB", (2, 2))) == hashed(Image.new("RGB", (2, 2))) != hashed(Image.new("RGB", (2, 2), "red"))
    assert hashed(array(1)) == hashed(array(1)) != hashed(array(2))
    with pytest.raises(EvaluationError, match=r"a document holds <object object at .*leave that column out"):
        hashed(object())


class TestDefinition:
    """What needs no data: the files that a task is made of."""

    @staticmethod
    def content(folder: Path, name: str = "piqa") -> str:
        definition = read_own_tasks(folder).definition(name)
        assert definition is not None
        return definition.content("documents")

    def test_the_built_in_one_is_meant_where_the_folder_has_none(self, tmp_path: Path) -> None:
        assert read_own_tasks(tmp_path).definition("piqa") is None
        (tmp_path / "piqa.yaml").write_text("task: piqa  # with our prompt\n")
        assert read_own_tasks(tmp_path).definition("piqa") is not None
        assert read_own_tasks(tmp_path).definition("piq") is None

    @pytest.mark.parametrize(
        "include", ["_base", "'_base'  # shared", "[_base, _other]", "\n  - _other\n  - _base", "[\n  _other,\n  _base\n]"]
    )
    def test_what_it_includes_and_its_python_are_part_of_it(self, tmp_path: Path, include: str) -> None:
        (tmp_path / "piqa.yaml").write_text(f"include: {include}\ntask: piqa\nprocess_docs: !function deep.code.run\n")
        for name in ("deep", "lib/inner", ".venv"):
            (tmp_path / name).mkdir(parents=True)
        changed = [tmp_path / name for name in ("_base", "piqa.yaml", "beside.py", "deep/code.py", "lib/inner/h.py")]
        for file in (*changed, tmp_path / "_other"):
            file.write_text(file.read_text() if file.is_file() else "{}\n" if file.suffix != ".py" else "")
        found = [self.content(tmp_path)]
        for file in changed:
            file.write_text(file.read_text().replace("{}", "a: 1") + "# edited\n")
            found.append(self.content(tmp_path))
        assert len(set(found)) == 6
        (tmp_path / ".venv" / "other.py").write_text("")
        assert self.content(tmp_path) == found[-1]

    def test_python_is_part_of_those_that_name_some(self, tmp_path: Path) -> None:
        (tmp_path / "piqa.yaml").write_text("task: piqa\n")
        before = self.content(tmp_path)
        (tmp_path / "of_another.py").write_text("")
        assert self.content(tmp_path) == before

    @pytest.mark.parametrize("line", ["task: piqa", '"task": "piqa"'])
    def test_a_task_named_only_through_its_include(self, tmp_path: Path, line: str) -> None:
        """lm-eval's own MMLU quotes the key, and a folder with other data includes it without a line of its own."""
        (tmp_path / "theirs").write_text(f"{line}\ndataset_path: org/name\n")
        (tmp_path / "mine.yaml").write_text("include: theirs\ndataset_path: json\n")
        definition = read_own_tasks(tmp_path).definition("piqa")
        assert definition is not None
        assert definition.config["dataset_path"] == "json"
        assert not definition.is_hub

    def test_data_of_the_hub_are_not_loaded_to_plan(self, tmp_path: Path) -> None:
        (tmp_path / "piqa.yaml").write_text("task: piqa\ndataset_path: org/name\n")
        definition = read_own_tasks(tmp_path).definition("piqa")
        assert definition is not None
        assert definition.is_hub
        assert read_own_tasks(tmp_path).contents(["piqa"]) == {"piqa": definition.content("hub")}

    def test_paths_begin_where_the_file_stands_that_gives_them(self, tmp_path: Path) -> None:
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared" / "base").write_text(
            "dataset_path: json\ndataset_kwargs: {data_files: {test: [x.jsonl, 'https://a/b']}, field: d}\n"
        )
        (tmp_path / "mine.yaml").write_text("include: shared/base\ntask: mine\n")
        definition = read_own_tasks(tmp_path).definition("mine")
        assert definition is not None
        files = {"test": [str(tmp_path / "shared" / "x.jsonl"), "https://a/b"]}
        assert definition.overrides == {"dataset_kwargs": {"data_files": files, "field": "d"}}

    def test_a_broken_yaml_stands_in_the_way_of_its_own_task_alone(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("include: nowhere.yaml\ntask: mini_cloze\n")
        (tmp_path / "b.yaml").write_text("include: b.yaml\ntask: circle\n")
        (tmp_path / "c.yaml").write_text("task: mine\n")
        own = read_own_tasks(tmp_path)
        assert own.definition("mine") is not None
        for name, file in (("mini_cloze", "a"), ("circle", "b")):
            with pytest.raises(EvaluationError, match=rf"task {name}: lm-eval cannot read .*{file}\.yaml"):
                own.definition(name)

    def test_names_are_those_of_lm_eval(self, tmp_path: Path) -> None:
        for number, line in enumerate(("piqa", "'mine'  # mine", '"my-own"', "[a, b]\ngroup: both", "\n  - a\ngroup: g")):
            (tmp_path / f"{number}.yaml").write_text(f"# A task\ntask: {line}\nversion: 1\n")
        own = read_own_tasks(tmp_path)
        assert (
            sorted(own.definitions)
            == TaskManager(include_path=[tmp_path], include_defaults=False).all_subtasks
            == ["mine", "my-own", "piqa"]
        )


def test_a_task_that_was_planned_as_the_built_in_one_is_loaded_as_that(tmp_path: Path) -> None:
    """A YAML that comes into the folder while a job waits."""
    write(tmp_path, "mini_ppl", **PLACES["beside"][0])
    (tmp_path / "docs.jsonl").write_text(lines("king"))
    assert len(load_task(spec_of("mini_ppl"), tmp_path, as_planned=True).eval_docs) > 100
    assert len(load_task(spec_of("mini_ppl"), tmp_path).eval_docs) == 3
    (tmp_path / "mini_ppl.yaml").unlink()
    with pytest.raises(EvaluationError, match="it was planned as one of your own folder"):
        load_task(spec_of("mini_ppl", own_content="0" * 8), tmp_path, as_planned=True)


def test_documents_that_cannot_be_loaded_are_said_and_planned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "gone", **PLACES["beside"][0])
    write(tmp_path, "there", dataset_kwargs={"data_files": {"test": "there.jsonl"}})
    (tmp_path / "there.jsonl").write_text(lines("king"))
    (tmp_path / "dies.py").write_text(f"import os\ndef load(**_): os._exit({os.EX_SOFTWARE})\n")
    text = yaml.safe_dump({"task": "dies", **ROLLING, "custom_dataset": "F"}).replace("F", "!function dies.load", 1)
    (tmp_path / "dies.yaml").write_text(text)
    own = read_own_tasks(tmp_path)
    contents = own.contents(["gone", "there", "dies"])
    assert len(set(contents.values())) == 3
    assert [name for name, content in contents.items() if own.is_unloadable(name, content)] == ["gone", "dies"]
    assert "task gone: its documents cannot be loaded here" in caplog.text
    assert "task dies: its documents cannot be loaded here" in caplog.text
    assert "task there" not in caplog.text


def test_a_task_that_asks_while_it_is_planned_gets_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it asks is seen by nobody, so that waiting for an answer would last for ever."""
    (tmp_path / "asks.py").write_text("def load(**_): input('Which documents? ')\n")
    text = yaml.safe_dump({"task": "asks", **ROLLING, "custom_dataset": "F"}).replace("F", "!function asks.load", 1)
    (tmp_path / "asks.yaml").write_text(text)
    reading, writing = os.pipe()
    before = os.dup(0)
    os.write(writing, b"these\n")
    os.dup2(reading, 0)
    try:
        read_own_tasks(tmp_path).contents(["asks"])
    finally:
        os.dup2(before, 0)
        for end in (before, reading, writing):
            os.close(end)
    assert "EOFError" in caplog.text
