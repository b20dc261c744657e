"""A user's own definition of a task is another task than the built-in one of that name."""

from __future__ import annotations

from pathlib import Path

from quantsweep.identity import own_task_content


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
