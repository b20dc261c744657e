"""What people type is taken as they mean it: folders of any name, lists in brackets, numbers in quotes, names that look like numbers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from quantsweep.checkpoints.sources import names_of, plain_name
from quantsweep.composing.composition import compose_base, make_request, search_folders
from quantsweep.composing.prepare import Prepared, prepare
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.errors import ConfigurationErrors, QuantsweepError
from quantsweep.planning.plan import Expansion, expand
from quantsweep.storage.paths import product_root
from quantsweep.trial.specs import ModelSpec, is_plain

MINI = product_root() / "quantsweep/mini/models/mini-neox-0.3m"


def copy(folder: Path, number: int = 0) -> Path:
    """The smallest bundled model; each `number` gives other weights."""
    shutil.copytree(MINI, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([number]))
    return folder


def expansion(*words: str) -> Expansion:
    cfg = compose_base(words)
    typed = expand_shorthand(words)
    request = make_request(cfg, search_folders(cfg.hydra), typed)
    return expand(request.schema, request.grids)


def models(*words: str) -> list[ModelSpec]:
    found = expansion(*words)
    return list({id(planned.trial.model): planned.trial.model for planned in found.trials}.values())


def planned(*words: str) -> Prepared:
    cfg = compose_base(words)
    return prepare(cfg, search_folders(cfg.hydra), expand_shorthand(words))


NAMES = ["my models (old)", "größe", "a,b", "{x}", "lr=1e-4", "it's", "my model", "3f2a" * 10, "100%", "a[1]"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_be_called_anything(tmp_path: Path, name: str) -> None:
    folder = copy(tmp_path / name)
    for typed in (f"model={folder}", f"model='{folder}'" if "'" not in name else f'model="{folder}"'):
        [model] = models(typed)
        assert model.path == str(folder)
        assert is_plain(model.name)
    [below] = models(f"model={copy(folder / 'm')}")
    assert below.name == "m"


def test_results_may_lie_anywhere(tmp_path: Path) -> None:
    for name in ("größe (alt)", "a,b", "{x} y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text("task: mini_ppl\n")
        prepared = planned("model=mini-neox-0.3m", f"results_dir={tmp_path / name}", f"task_path={tmp_path / name}", "task=mini_ppl")
        assert prepared.plan.settings.task_path == str(tmp_path / name)
        assert prepared.folder.path.parent == tmp_path / name


def test_a_list_of_folders_is_an_axis_named_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, step in enumerate(("step100", "step200")):
        copy(tmp_path / step / "hf", number)
    (tmp_path / "step300").mkdir()
    monkeypatch.chdir(tmp_path)
    for typed in (
        f"model={tmp_path}/step100/hf,{tmp_path}/step200/hf",
        "model=step100/hf,step200/hf",
        "model=[step100/hf,'step200/hf']",
        "model=glob(step*/hf)",
        f"model=glob({tmp_path}/step*/hf)",
    ):
        found = models(typed, "bit_width=3,4")
        assert [(model.name, model.path) for model in found] == [(s, str(tmp_path / s / "hf")) for s in ("step100", "step200")], typed
    with pytest.raises(ConfigurationErrors, match=r"model=glob\(nothing/\*\) matches no folder here"):
        models("model=glob(nothing/*)")


def test_a_study_may_name_folders_by_a_pattern(tmp_path: Path) -> None:
    for number, step in enumerate(("step 1", "step 2")):
        copy(tmp_path / "runs (new)" / step, number)
    (tmp_path / "sweeps").mkdir()
    text = f"# @package _global_\nstudy: {{grids: [{{axes: {{model: \"glob('{tmp_path}/runs (new)/*')\", bit_width: [4]}}}}]}}\n"
    (tmp_path / "sweeps" / "own.yaml").write_text(text)
    found = models("+sweeps=own", f"hydra.searchpath=[file://{tmp_path}]")
    assert [model.name for model in found] == ["step-1", "step-2"]


def test_own_components_may_lie_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "größe (alt), neu"
    (folder / "data_type").mkdir(parents=True)
    text = (product_root() / "conf/data_type/af4.yaml").read_text().replace("name: af4", "name: mine")
    (folder / "data_type" / "mine.yaml").write_text(text)
    assert len(expansion(f"hydra.searchpath=['file://{folder}']", "data_type=mine,int").trials) == 2


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["/r/step100/hf", "/r/step200/hf"], ["step100", "step200"]),
        (["/r/a/x/hf", "/r/b/y/hf"], ["a-x", "b-y"]),
        (["/r/hf", "/r/deep/hf"], ["hf", "deep"]),
        (["/r/one", "/s/two", "org/name"], ["one", "two", "name"]),
        (["/r/lr=1e-4/hf", "/r/lr=1e-3/hf", "/q/other"], ["lr-1e-4", "lr-1e-3", "other"]),
    ],
)
def test_models_are_named_by_what_differs(sources: list[str], names: list[str]) -> None:
    assert list(names_of(sources).values()) == names


def test_names_that_become_equal_are_told_apart() -> None:
    names = names_of(["/r/a b", "/r/a(b"])
    assert len(set(names.values())) == 2
    assert all(is_plain(name) for name in [*names.values(), plain_name("模型"), plain_name("---")])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("bit_width=[3,4]", "bit_width=3,4"),
        ("bit_width='4'", "bit_width=4"),
        ("bit_width=['3', \"4\"]", "bit_width=3,4"),
        ("bit_width=[4]", "bit_width=4"),
        ("data_type=[int,fp]", "data_type=int,fp"),
        ("block_size='tensor'", "block_size=tensor"),
        ("limit='5'", "limit=5"),
        ("task.limit=3", "limit=3"),
        ("+task.num_fewshot=2", "num_fewshot=2"),
        ("sweep=1e5", "sweep='1e5'"),
        ("sweep=42", "sweep='42'"),
        ("sweep=plain-1.0_x", "sweep=plain-1.0_x"),
        ("cluster.partition=3", "cluster.partition='3'"),
        ("+cluster.account=123", "+cluster.account='123'"),
        ("cluster.partition=a,b", "cluster.partition='a,b'"),
        ("tag=3", "tag='3'"),
        ("+tag=a,b", "tag='a,b'"),
        ("results_dir=null", "results_dir=null"),
        ("task.limit=null", "task.limit=null"),
        ("bit_width=range(3,9)", "bit_width=range(3,9)"),
        ("model=mini-neox-0.3m,mini-opt-1.1m", "model=mini-neox-0.3m,mini-opt-1.1m"),
        ("~cluster.additional_parameters", "~cluster.additional_parameters"),
    ],
)
def test_what_is_written_out(typed: str, meant: str) -> None:
    assert expand_shorthand([typed]) == [meant]
    assert expand_shorthand([meant]) == [meant]


def test_a_name_that_looks_like_a_number_is_kept_as_it_was_typed(tmp_path: Path) -> None:
    prepared = planned("model=mini-neox-0.3m", f"results_dir={tmp_path}", "sweep=1e5", "cluster=slurm", "cluster.partition=3")
    assert prepared.folder.name == "1e5"
    assert prepared.cluster.partition == "3"


def test_a_name_that_a_file_made_a_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "own.yaml").write_text(
        "# @package _global_\nsweep: 1e5\nstudy: {grids: [{axes: {model: [mini-neox-0.3m], bit_width: [4]}}]}\n"
    )
    with pytest.raises(ConfigurationErrors, match=r"sweep must be text; it was read as the number 100000\.0: put it in quotes"):
        planned("+sweeps=own", f"hydra.searchpath=[file://{tmp_path}]", f"results_dir={tmp_path}")


@pytest.mark.parametrize("typed", ["tag=7b,night", "+tag=7b,night", "++tag='7b,night'"])
def test_a_tag_is_kept_with_the_launch_and_is_part_of_no_trial(tmp_path: Path, typed: str) -> None:
    words = ("model=mini-neox-0.3m", f"results_dir={tmp_path}", "bit_width=3,4")
    plain, tagged = planned(*words).plan, planned(*words, typed).plan
    assert (plain.launch.tag, tagged.launch.tag) == (None, "7b,night")
    assert tagged.trials == plain.trials
    assert replace(tagged.launch, tag=None) == plain.launch


def test_a_tag_of_a_study_is_one_and_what_is_typed_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "own.yaml").write_text(
        "# @package _global_\ntag: first\nstudy: {grids: [{axes: {model: [mini-neox-0.3m], bit_width: [4]}}]}\n"
    )
    words = ("+sweeps=own", f"hydra.searchpath=[file://{tmp_path}]", f"results_dir={tmp_path}")
    assert [planned(*words, *more).plan.launch.tag for more in ((), ("+tag=second",), ("tag=null",))] == ["first", "second", None]


def test_a_limit_of_the_task_holds_for_a_suite(tmp_path: Path) -> None:
    tasks = expansion("model=mini-neox-0.3m", "task.limit=3").trials[0].tasks
    assert [task.task_key for task in tasks] == ["mini_cloze@1.0+limit3", "mini_continuation@1.0+limit3", "mini_ppl@1.0+limit3"]


def test_values_that_a_glob_found_may_mean_nothing() -> None:
    found = expansion("model=mini-neox-0.3m", "data_type=glob(*)", "bit_width=3")
    assert {"int", "fp", "quantile"} <= {planned.trial.quantization.data_type for planned in found.trials}
    assert any("nvfp4" in reason for reason in found.skipped)
    with pytest.raises(ConfigurationErrors, match="'nvfp4' supports bit_width 4; got 3"):
        expansion("model=mini-neox-0.3m", "data_type=nvfp4,int", "bit_width=3")
    with pytest.raises(ConfigurationErrors, match="supports bit_width"):
        expansion("model=mini-neox-0.3m", "data_type=glob(*)", "bit_width=1")


def test_a_path_that_no_system_takes_is_one_message(tmp_path: Path) -> None:
    long = "x" * 3000
    cases = (("results_dir=/", "/xxx"), ("model=/", "/xxx"), ("task_path=/", "task_path"), ("sweep=", "sweep"))
    for typed, said in ((f"{key}{long}", said) for key, said in cases):
        words = [typed, *([] if typed.startswith("results_dir") else [f"results_dir={tmp_path}"])]
        with pytest.raises(QuantsweepError) as caught:
            planned(*words)
        assert said in str(caught.value)


def test_weights_of_ones_own_never_go_under_a_models_name(tmp_path: Path) -> None:
    folder = copy(tmp_path / "final")
    for words in (
        [f"model.path={folder}"],  # conf/config.yaml's own model would lend its name
        ["model=mini-neox-6.0m", f"model.path={folder}"],
        ["model=mini-neox-0.3m,mini-opt-0.4m", f"model.path={folder}"],
    ):
        with pytest.raises(ConfigurationErrors, match=r"model\.path=.* would be scored under the name of mini-.*model\.name="):
            planned(*words, "bit_width=4", "limit=5")
    for words in (
        ["model=local", f"model.path={folder}"],
        ["model=opt-125m", "model.hub_id=null", f"model.path={folder}"],
        [f"model={folder}"],
    ):
        planned(*words, "bit_width=4", "limit=5")
