"""A user's own definition of a task is another task than the built-in one of that name."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantsweep.identity import own_task_content, own_tasks


def test_own_definitions_are_told_apart_by_their_content_and_data(tmp_path: Path) -> None:
    assert own_task_content(tmp_path, "piqa") is None
    data = tmp_path / "data.parquet"
    data.write_bytes(b"1")
    yaml = tmp_path / "piqa.yaml"
    yaml.write_text(f"task: piqa\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n")
    first = own_task_content(tmp_path, "piqa")
    assert first is not None
    assert own_task_content(tmp_path, "piq") is None
    data.write_bytes(b"2")
    second = own_task_content(tmp_path, "piqa")
    yaml.write_text(yaml.read_text() + "# edited\n")
    assert len({first, second, own_task_content(tmp_path, "piqa")}) == 3


@pytest.mark.parametrize(
    "include", ["_base", "'_base'  # shared", "[_base, _other]", "\n  - _other\n  - _base", "[\n  _other,\n  _base\n]"]
)
def test_what_an_own_definition_includes_is_part_of_it(tmp_path: Path, include: str) -> None:
    (tmp_path / "piqa.yaml").write_text(f"include: {include}\ntask: piqa\n")
    base, data = tmp_path / "_base", tmp_path / "data.jsonl"
    base.write_text("include: piqa.yaml\ndataset_kwargs: {data_files: {test: data.jsonl}}\n")  # (a cycle, which lm-eval refuses later)
    data.write_text("1")
    found = [own_task_content(tmp_path, "piqa")]
    base.write_text(base.read_text() + "doc_to_text: another prompt\n")
    found.append(own_task_content(tmp_path, "piqa"))
    data.write_text("2")
    found.append(own_task_content(tmp_path, "piqa"))
    assert None not in found
    assert len(set(found)) == 3


def test_an_own_definition_is_found_behind_a_comment_too(tmp_path: Path) -> None:
    (tmp_path / "piqa.yaml").write_text("task: piqa  # with our prompt\n")
    assert own_task_content(tmp_path, "piqa") is not None


def test_the_tasks_of_a_folder_are_listed(tmp_path: Path) -> None:
    for number, line in enumerate(("piqa", "'mine'  # mine", '"my-own"', "[a, b]", "\n  - a")):
        (tmp_path / f"{number}.yaml").write_text(f"# A task\ntask: {line}\nversion: 1\n")
    assert own_tasks(tmp_path) == ["mine", "my-own", "piqa"]
