"""Files that people wrote by hand and that cannot be read: one sentence each, with the file and the remedy; Hydra's own flags work."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantsweep.composing.command_line import check_command_line
from quantsweep.composing.composition import compose_base, make_request, search_folders
from quantsweep.errors import ConfigurationError
from quantsweep.hydra_plugin.flags import split_flags
from quantsweep.hydra_plugin.task import checked_arguments

GRID = "study: {grids: [{axes: {bit_width: [4]}}]}\n"
STUDY = "# @package _global_\n"


def refusal(folder: Path, *words: str) -> str:
    """What is said to these words, with a folder of one's own on the search path."""
    typed = [f"hydra.searchpath=[file://{folder}]", *words]
    with pytest.raises(ConfigurationError) as caught:
        requested(typed)
    return str(caught.value)


def requested(typed: list[str]) -> None:
    cfg = compose_base(typed)
    make_request(cfg, search_folders(cfg.hydra), typed)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: mine\n  version: [1\n", "mine.yaml, line 2: mapping values are not allowed here"),
        (b"name: mine\nname: mine\n", "mine.yaml, line 2: found duplicate key name"),
        ("name: mine # größe\n".encode("latin-1"), "mine.yaml is not UTF-8 text (byte 16 is no part of a letter): save it as UTF-8"),
        ("name: mine\n".encode("utf-16"), "mine.yaml is not UTF-8 text"),
        (b"[1, 2]\n", "mine.yaml must hold keys and values (KEY: VALUE), got list"),
        (b"on: 3\n", "YAML reads one of its keys as True (bool); keys are names"),
        (b"name: ${nope}\n", "mine.yaml: name: ${nope} is no key of the configuration"),
        (b"name: ${oc.env:QUANTSWEEP_UNSET}\n", "the environment variable QUANTSWEEP_UNSET is not set: set it"),
        (b"", "data_type/mine.yaml says name: None; write name: mine"),
    ],
)
def test_a_component_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "data_type").mkdir()
    (tmp_path / "data_type" / "mine.yaml").write_bytes(content)
    for words in ("data_type=mine", "data_type=mine,int"):
        assert said in refusal(tmp_path, words)
    if content:  # a broken file that nobody chose is no concern of a launch
        check_command_line([f"hydra.searchpath=[file://{tmp_path}]", "+sweeps=quickstart", "data_type=int"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults: [mine]\n" + GRID, "stands on itself (mine → mine): take it off the defaults list"),
        ("defaults: mini\n" + GRID, "defaults is a list (- override /task: mini), got 'mini'"),
        ("defaults: [nosuch]\n" + GRID, "unknown sweeps 'nosuch'"),
        ("4: x\n" + GRID, "YAML reads one of its keys as 4 (int)"),
        ("study: {grids: [{axes: {on: [4]}}]}\n", "grid 1: YAML reads one of its keys as True (bool)"),
        ("sweep: a\nsweep: b\n" + GRID, "mine.yaml, line 3: found duplicate key sweep"),
        ("sweep: ${nope}\n" + GRID, "mine.yaml: sweep: ${nope} is no key of the configuration"),
        ("sweep: ${oc.env:QUANTSWEEP_UNSET}\n" + GRID, "mine.yaml: sweep: the environment variable QUANTSWEEP_UNSET is not set"),
        ("sweep: ${no\n" + GRID, "mine.yaml: sweep: "),
        ("- a\n", "must hold keys and values"),
        ("study: {grids: [{axes: {bit_width: 'range(3,9,0)'}}]}\n", "a step that is not 0"),
    ],
)
def test_a_study_that_cannot_be_read_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(STUDY + text)
    found = refusal(tmp_path, "+sweeps=mine")
    assert said in found
    assert found.count("\n  - ") <= 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("sweep=${nope}", "sweep: ${nope} is no key of the configuration"),
        ("results_dir=${oc.env:QUANTSWEEP_UNSET}/x", "results_dir: the environment variable QUANTSWEEP_UNSET is not set"),
    ],
)
def test_what_is_typed_refers_to_what_is_there(tmp_path: Path, typed: str, said: str) -> None:
    assert said in refusal(tmp_path, typed)


def test_a_link_that_leads_nowhere_is_no_component(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").symlink_to("/nowhere")
    assert "unknown model 'mine'" in refusal(tmp_path, "model=mine")


# --- Hydra's own flags --------------------------------------------------------------------------------------------------------


def test_flags_stand_anywhere() -> None:
    assert split_flags(["a=1", "-m", "b=2", "--cfg", "job", "c=3"]) == (["a=1", "b=2", "c=3"], ["-m", "--cfg", "job"])
    assert split_flags(["--info", "a=1"]) == (["a=1"], ["--info"])
    assert split_flags(["--info", "plugins", "a=1", "--version"]) == (["a=1"], ["--info", "plugins", "--version"])


@pytest.mark.parametrize(
    ("typed", "passed_on"),
    [
        (["bit_width=3,4", "-m", "limit=3"], ["bit_width=3,4", "limit=3", "-m"]),
        (["--cfg", "job", "limit=3"], ["limit=3", "--cfg", "job"]),
        (["-m", "+sweeps=quickstart", "bit_width=3,4", "-c", "job"], ["+sweeps=quickstart", "-c", "job"]),
        (["--info", "searchpath", "model=mini-neox-0.3m"], ["model=mini-neox-0.3m", "--info", "searchpath"]),
        (["-sc", "install=bash"], ["-sc", "install=bash"]),
        (["--hydra-help"], ["--hydra-help"]),
    ],
)
def test_hydras_own_flags_are_passed_on(typed: list[str], passed_on: list[str]) -> None:
    assert checked_arguments(typed) == passed_on


def test_a_mistake_beside_a_flag_is_said() -> None:
    with pytest.raises(SystemExit, match="unknown key 'bitwidth'"):
        checked_arguments(["--cfg", "job", "bitwidth=3"])


def test_hydra_sees_of_the_products_folder_its_studies_alone() -> None:
    """Its help and its completion walk whatever they see."""
    sources = {source.provider: source for source in compose_base([]).hydra.runtime.config_sources}
    assert sources["quantsweep"].schema == "studies"
    assert any((folder / "sweeps" / "quickstart.yaml").is_file() for folder in search_folders(compose_base([]).hydra))
