"""A cluster as sites write it: what YAML, Hydra or sbatch would take for something else is refused, or taken as it was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from quantsweep.composing.cluster import cluster_spec, file_problems, minutes_of, unused_variables
from quantsweep.composing.command_line import check_command_line
from quantsweep.composing.composition import compose_base, plain
from quantsweep.errors import ConfigurationError, ConfigurationErrors
from quantsweep.storage.paths import product_root
from quantsweep.trial.specs import ClusterSpec

SHIPPED = (product_root() / "conf/cluster/slurm.yaml").read_text()


def site(tmp_path: Path, key: str, value: str, name: str = "mine") -> list[str]:
    """The shipped yaml with one line changed, in a folder of a person's own; the words that choose it."""
    lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in SHIPPED.splitlines()]
    path = tmp_path / "conf" / "cluster" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return [f"hydra.searchpath=[file://{tmp_path}/conf]", "cluster=mine"]


def composed(words: list[str], environment: dict[str, str] | None = None) -> ClusterSpec:
    return cluster_spec(plain(compose_base(words))["cluster"], environment or {})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("minutes", "24:00:00", "minutes: 24:00:00 is 86,400 to YAML (base 60); write minutes as a number, or quote it"),
        ("minutes", "12:00", "minutes: 12:00 is 720 to YAML"),
        ("account", "0123456", "account: 0123456 is 42798 to YAML (an octal number); quote it: account: '0123456'"),
        ("partition", "on", "partition: on is true to YAML; quote it (partition: 'on')"),
        ("additional_parameters", "{begin: 16:00}", "additional_parameters.begin: 16:00 is 960 to YAML (base 60); quote it"),
        ("additional_parameters", "{mail_type: NO}", "additional_parameters.mail_type: NO is false to YAML; quote it"),
        (
            "setup",
            "['export PATH=${HOME}/bin:$PATH']",
            r"setup: ${HOME} is read as a setting of that name, and there is none; for the shell",
        ),
        ("setup", "['X=${SLURM_JOB_ID:-x}']", r"setup: ${SLURM_JOB_ID:-x} is read as a setting"),
        ("setup", "[unclosed", "cannot be read"),
    ],
)
def test_what_yaml_or_hydra_would_take_for_something_else(tmp_path: Path, key: str, value: str, said: str) -> None:
    words = site(tmp_path, key, value)
    with pytest.raises(ConfigurationErrors) as caught:
        check_command_line(words)
    [problem] = caught.value.problems
    assert said in problem
    assert str(tmp_path / "conf/cluster/mine.yaml") in problem


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("revision: 01234567", "revision: 01234567 is 342391 to YAML (an octal number)"),
        ("resources: {minutes: 4:00:00}", "resources.minutes: 4:00:00 is 14,400 to YAML (base 60); write minutes as a number"),
    ],
)
def test_numbers_of_a_model_are_read_as_they_were_written_too(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "conf" / "model" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"name: mine\nfamily: f\nhub_id: a/b\n{line}\n")
    with pytest.raises(ConfigurationErrors) as caught:
        check_command_line([f"hydra.searchpath=[file://{tmp_path}/conf]", "model=mine"])
    [problem] = caught.value.problems
    assert problem.startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("minutes", "'24:00:00'", 1440),
        ("minutes", "'1-00:00:00'", 1440),
        ("minutes", "90", 90),
        ("account", "'0123456'", "0123456"),
        ("account", "123456", "123456"),
        ("partition", "'on'", "on"),
        ("partition", "a,b", "a,b"),
        ("submit_from_nodes", "no", False),
        ("setup", r"['export PATH=\${HOME}/bin:$PATH; X=\${SLURM_JOB_ID:-x}']", ("export PATH=${HOME}/bin:$PATH; X=${SLURM_JOB_ID:-x}",)),
        ("setup", "['cd ${sweep}']", ("cd adhoc",)),
        ("additional_parameters", "{mem: null, requeue: false}", (("mem", None), ("requeue", False))),
        ("additional_parameters", "{mail-type: 'NO'}", (("mail_type", "NO"),)),
    ],
)
def test_what_is_legitimate_is_taken_as_it_was_meant(tmp_path: Path, key: str, value: str, meant: Any) -> None:
    found = getattr(composed(site(tmp_path, key, value)), key)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    ("words", "key", "meant"),
    [
        (["cluster.partition=3"], "partition", "3"),
        (["cluster.minutes=24:00:00"], "minutes", 1440),
        (["cluster.account=0123"], "account", "0123"),
        (["cluster.partition='a,b'"], "partition", "a,b"),
        (["+cluster.additional_parameters.mem=null"], "additional_parameters", (("mem", None),)),
    ],
)
def test_what_is_typed_is_taken_as_it_was_meant(words: list[str], key: str, meant: Any) -> None:
    assert getattr(composed(["cluster=slurm", *words]), key) == meant


@pytest.mark.parametrize(
    ("text", "minutes"), [("5", 5), ("10:30", 11), ("1:00:00", 60), ("0:00:01", 1), ("2-0", 2880), ("1-12:30", 2190), ("1-00:00:30", 1441)]
)
def test_times_as_sbatch_takes_them(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


def test_a_time_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="write minutes as a number"):
        minutes_of("a day")


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("array", "set by the engine"), ("output", "set by the engine"), ("wrap", "set by the engine"), ("job-name", "set by the"),
        ("time", "cluster.minutes"), ("--partition", "cluster.partition"), ("ntasks", "allocation"),
    ],
)  # fmt: skip
def test_further_parameters_do_not_override_the_engines_own(key: str, instead: str) -> None:
    with pytest.raises(ConfigurationError, match=instead):
        cluster_spec({"kind": "slurm", "additional_parameters": {key: "1"}}, {})


def test_what_sbatch_would_read_from_the_environment_fills_what_is_null() -> None:
    there = {"SBATCH_ACCOUNT": "lab", "SBATCH_PARTITION": "gpu", "SBATCH_QOS": "", "SBATCH_MEM_PER_CPU": "1G"}
    spec = cluster_spec({"kind": "slurm", "partition": "mine", "account": None, "qos": None}, there)
    assert (spec.account, spec.partition, spec.qos) == ("lab", "mine", None)
    assert unused_variables(there) == ["SBATCH_MEM_PER_CPU"]
    assert cluster_spec({"kind": "local"}, there).account is None


@pytest.mark.parametrize(
    "line",
    [
        "export HF_TOKEN=abcdefgh",
        "export WANDB_API_KEY='0123456789abcdef'",
        "huggingface-cli login --token hf_abcdefghijklmnopqrst",
        "huggingface-cli login --token nomakersprefix",
        "curl https://me:x@host -H x; MY_PASSWORD=hunter2 run",
    ],
)
def test_a_secret_in_the_setup_is_refused_with_the_remedy(line: str) -> None:
    with pytest.raises(ConfigurationError, match="looks like a secret") as caught:
        cluster_spec({"kind": "slurm", "setup": [line]}, {})
    for secret in ("abcdefgh", "0123456789abcdef", "hunter2", "nomakersprefix"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "export HF_TOKEN=$(cat ~/.hf_token)",
        'export HF_TOKEN="$MY_TOKEN"',
        "export HF_TOKEN_PATH=/home/me/.token",
        "export TOKENIZERS_PARALLELISM=false",
        "module load cuda/12.4 gcc=12",
        "huggingface-cli login --token $(cat ~/.token)",
        "unset WANDB_API_KEY; export HF_TOKEN=",
    ],
)
def test_what_only_sounds_like_a_secret_is_taken(line: str) -> None:
    assert cluster_spec({"kind": "slurm", "setup": [line]}, {}).setup == (line,)


@pytest.mark.parametrize("words", [["cluster.partiton=x"], ["cluster.minutes=5"], []])
def test_a_broken_cluster_beside_the_chosen_one_is_no_concern(tmp_path: Path, words: list[str]) -> None:
    chosen = site(tmp_path, "minutes", "60")
    for name, text in {"syntax": "a: [", "home": "setup: ['${HOME}']", "list": "- 1", "binary": "\x00"}.items():
        (tmp_path / "conf" / "cluster" / f"{name}.yaml").write_text(text)
    if words == ["cluster.partiton=x"]:
        with pytest.raises(ConfigurationErrors, match="Did you mean 'partition'"):
            check_command_line([*chosen, *words])
    else:
        assert composed([*chosen, *words]).kind == "slurm"


def test_the_shipped_files_have_no_such_problem() -> None:
    roots = set(OmegaConf.load(product_root() / "conf/config.yaml"))
    for path in (product_root() / "conf").rglob("*/*.yaml"):
        assert file_problems(path, roots if path.parent.name == "cluster" else None) == []
