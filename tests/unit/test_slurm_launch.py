"""What sbatch is told, and how its answers are taken."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import submitit
from submitit.core.utils import FailedJobError

from quantsweep.checkpoints.pins import OFFLINE
from quantsweep.errors import SlurmError
from quantsweep.hydra_plugin import sweeper
from quantsweep.launching import cluster as slurm_cluster
from quantsweep.launching.cluster import NoRoomError, RefusedError, ShardExecutor, afterany, sbatch_parameters, warning_seconds
from quantsweep.launching.settle import slurm_log
from quantsweep.launching.submissions import SubmittedArray
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import ClusterSpec, LaunchSettings, Resources

SLURM = ClusterSpec(kind="slurm")
ONE_GPU = Resources(gpus=1)


def test_the_script_that_slurm_gets() -> None:
    """The golden sbatch text: every option of the cluster's yaml in its place."""
    spec = ClusterSpec(
        kind="slurm",
        partition="gpu",
        account="lab",
        qos="long",
        constraint="a100",
        exclude="bad01",
        setup=("module load cuda",),
        max_parallel=20,
        additional_parameters=(("mail_type", "END"),),
    )
    parameters = slurm_cluster.sbatch_parameters(
        spec, Resources(gpus=2, cpus=8, memory_gb=64, minutes=90), "qs-sweep-0", code=Path("/results/code/cafe")
    )
    executor = submitit.SlurmExecutor(folder="/results/logs/slurm/qs-sweep-0", python="/env/bin/python")
    executor.update_parameters(**parameters)
    text = executor._make_submission_file_text("COMMAND", "UID")
    golden = Path(__file__).parents[1] / "golden" / "array.sbatch"
    if os.environ.get("QUANTSWEEP_REWRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_a_whole_node_is_asked_for_all_its_workers() -> None:
    cluster = ClusterSpec(kind="slurm", allocation="node", node_gpus=8, gpu_option="gpus")
    parameters = sbatch_parameters(cluster, Resources(gpus=2, cpus=4, memory_gb=32), "j", workers=4)
    assert (parameters["gpus_per_node"], parameters["cpus_per_task"]) == (8, 16)
    assert (parameters["additional_parameters"]["exclusive"], parameters["additional_parameters"]["mem"]) == (True, "0")
    assert "gres" not in parameters


def test_models_without_a_gpu_ask_for_none() -> None:
    parameters = sbatch_parameters(SLURM, Resources(), "j")
    assert not {"gres", "gpus_per_node", "partition", "account"} & set(parameters)
    assert parameters["additional_parameters"] == {"signal": "B:USR2@120", "requeue": True}


def flags(tmp_path: Path, needs: Resources = ONE_GPU, **cluster: Any) -> list[str]:
    """The options of a job's script, as sbatch reads them."""
    executor = ShardExecutor(folder=tmp_path, python="/p")
    executor.update_parameters(**sbatch_parameters(ClusterSpec(kind="slurm", **cluster), needs, "j"))
    executor.parameters["map_count"] = 2
    text = executor._make_submission_file_text("COMMAND", "UID")
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("given", "gpus", "memory"),
    [
        ({}, 1, ["mem=4GB"]),
        ({"mem": None}, 1, []),
        ({"mem": 0}, 1, ["mem=0"]),
        ({"mem_per_cpu": "2G"}, 1, ["mem-per-cpu=2G"]),
        ({"mem_per_gpu": "20G"}, 1, ["mem-per-gpu=20G"]),
        ({"mem_per_gpu": "20G"}, 0, ["mem=4GB"]),
    ],
)
def test_memory_is_asked_for_once_or_not_at_all(tmp_path: Path, given: dict[str, Any], gpus: int, memory: list[str]) -> None:
    found = flags(tmp_path, Resources(gpus=gpus), additional_parameters=tuple(given.items()))
    assert [flag for flag in found if flag.startswith("mem")] == memory
    whole = flags(tmp_path, Resources(gpus=gpus), allocation="node", node_gpus=1, node_cpus=1, additional_parameters=tuple(given.items()))
    assert [flag for flag in whole if flag.startswith("mem")] == ([] if not memory else memory if given and gpus else ["mem=0"])


def test_what_is_false_or_null_is_no_option(tmp_path: Path) -> None:
    found = flags(tmp_path, additional_parameters=(("requeue", False), ("exclusive", False), ("reservation", None), ("contiguous", True)))
    assert "no-requeue" in found
    assert "contiguous" in found
    assert not [flag for flag in found if flag.startswith(("requeue", "exclusive", "reservation")) or flag.endswith(("False", "None"))]


def test_no_job_is_charged_to_a_key_that_nobody_named(tmp_path: Path) -> None:
    assert not [flag for flag in flags(tmp_path) if flag.startswith("wckey")]
    assert "wckey=mine" in flags(tmp_path, additional_parameters=(("wckey", "mine"),))


def test_options_of_gpus_are_left_out_where_a_job_needs_none(tmp_path: Path) -> None:
    given = (("gres", "gpu:a100:1"), ("gpu_bind", "closest"), ("licenses", "x"))
    assert "gres=gpu:a100:1" in flags(tmp_path, additional_parameters=given)
    bare = flags(tmp_path, Resources(), additional_parameters=given)
    assert "licenses=x" in bare
    assert not [flag for flag in bare if flag.startswith(("gpu", "gres"))]


def test_a_folder_that_slurm_would_take_for_a_pattern(tmp_path: Path) -> None:
    """%u is the user's name to sbatch, %j a job's number to submitit too, which would write its script somewhere else."""
    folder = tmp_path / "50%_of_%u" / "%j"
    calls = tmp_path / "bin"
    calls.mkdir()
    (calls / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 41\n")
    (calls / "sbatch").chmod(0o755)
    executor = ShardExecutor(folder=folder, python="/p")
    executor.update_parameters(**sbatch_parameters(SLURM, Resources(), "j"), array_parallelism=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{calls}:{os.environ['PATH']}")
        assert executor.submit_tasks("COMMAND", 2) == 41
    [script] = folder.iterdir()
    [output] = [line.partition("=")[2] for line in script.read_text().splitlines() if line.startswith("#SBATCH --output")]
    assert output == f"{tmp_path}/50%%_of_%%u/%%j/%A_%a_0_log.out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["50%_of_%u", "bin"]


def run_setup(tmp_path: Path, *setup: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sloppy.sh").write_text("false\ngrep -q nothing /dev/null\nWAS_HERE=1\n")
    lines = sbatch_parameters(ClusterSpec(kind="slurm", setup=setup), Resources(), "j")["setup"]
    script = tmp_path / "script.sh"
    script.write_text("\n".join([*lines, "false", "echo the worker begins"]))
    return subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("lines", "failed"),
    [
        (["true"], None),
        (["source sloppy.sh; echo $WAS_HERE"], None),
        (["false || true", "if false; then", "false", "fi", "f() { false; true; }", "f"], None),
        (["true", "no_such_module load cuda", "echo too far"], "no_such_module load cuda"),
        (["source /nowhere/activate"], "source /nowhere/activate"),
        (["cd /nowhere && echo 'here'", "f() { return 3; }", "f"], "return 3"),
    ],
)
def test_a_setup_line_that_fails_ends_the_job_with_its_own_words(tmp_path: Path, lines: list[str], failed: str | None) -> None:
    """The real lines in a real shell; what a line sources, or tries, may fail inside."""
    done = run_setup(tmp_path, *lines)
    if failed is None:
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "the worker begins")
    else:
        assert done.returncode == 1
        assert "the worker begins" not in done.stdout
        last = done.stderr.splitlines()[-1]
        assert "a setup line failed with exit status" in last
        assert last.endswith(f": {failed}")


def test_the_collector_goes_on_where_a_setup_line_fails(sweep: SweepFolder, sbatch: Said) -> None:
    """It writes down that the shards' jobs could not begin; were it to end with them, nobody would hear why."""
    scripts = sbatch(41)
    launch = LaunchSettings(cluster=ClusterSpec(kind="slurm", setup=("no_such_module load cuda",)))
    slurm_cluster.submit_array(sweep, sweep.plan / "submission-1.json", 0, array(), launch)
    slurm_cluster.submit_collector(sweep, "qs-s-1-collector", launch, [41])
    assert ["ERR" in script for script in scripts] == [True, False]
    assert all("no_such_module load cuda" in script for script in scripts)


def test_the_gpus_of_the_job_that_submits_are_not_those_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    argv = ShardExecutor(folder="/f", python="/p")._make_submission_command(Path("/f/script.sh"))
    told = subprocess.run([*argv[:-2], "env"], capture_output=True, text=True, check=True).stdout
    assert "CUDA_VISIBLE_DEVICES" not in told


def test_a_node_needs_no_srun_to_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("submitit.slurm.slurm.shutil.which", lambda name: None)
    ShardExecutor(folder="/f", python="/p")


def test_a_collector_waits_for_the_end_of_the_arrays_however_they_end() -> None:
    assert afterany([3, 17]) == "afterany:3:17"


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 30), (3, 90), (4, 120), (90, 120)])
def test_a_job_is_not_warned_in_the_first_half_of_its_time(minutes: int, seconds: int) -> None:
    needs = Resources(minutes=minutes)
    assert warning_seconds(SLURM, needs) == seconds
    assert sbatch_parameters(SLURM, needs, "j")["additional_parameters"]["signal"] == f"B:USR2@{seconds}"


def test_what_a_job_tells_sbatch_is_not_what_was_told_to_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker submits from within a job: its environment must not become that of the next, nor SBATCH_… overrule the yaml."""
    for key, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_MEM_PER_NODE": "1",
        "SBATCH_PARTITION": "debug",
        "SLURM_CONF": "/c",
        "MINE": "x",
    }.items():
        monkeypatch.setenv(key, value)
    argv = ShardExecutor(folder="/f", python="/p")._make_submission_command(Path("/f/script.sh"))
    assert argv[-2:] == ["sbatch", "/f/script.sh"]
    told = subprocess.run([*argv[:-2], "env"], capture_output=True, text=True, check=True).stdout.splitlines()
    keys = {line.partition("=")[0] for line in told}
    assert {key for key in keys if key.startswith(("SLURM_", "SBATCH_"))} == {"SLURM_CONF"}
    assert "MINE=x" in told, "everything else is handed on"


def test_whether_the_hub_is_asked_is_the_plans_word_not_that_of_the_job_that_submits(
    sweep: SweepFolder, sbatch: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a plan that needs no hub submits a task of one that does, and the other way round: the real script in a real shell."""
    for submitter in ("0", "1", None):
        for key in OFFLINE:
            monkeypatch.delenv(key, raising=False)
            if submitter is not None:
                monkeypatch.setenv(key, submitter)
        for variables in ((), tuple((key, "1") for key in OFFLINE)):
            assert offline_in_job(sweep, sbatch, variables) == dict(variables)


def offline_in_job(sweep: SweepFolder, sbatch: Said, variables: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Which switches a job of a plan with these variables finds, if this process submits it."""
    [*handed_on, _, _] = ShardExecutor(folder="/f", python="/p")._make_submission_command(Path("/f/script.sh"))
    scripts = sbatch(41)
    launch = LaunchSettings(cluster=SLURM, variables=variables)
    slurm_cluster.submit_array(sweep, sweep.plan / "submission-1.json", 0, array(), launch)
    exports = "\n".join(line for line in scripts[0].splitlines() if line.startswith(tuple(f"export {key}=" for key in OFFLINE)))
    done = subprocess.run([*handed_on, "bash", "-euc", f"{exports}\nenv"], capture_output=True, text=True, check=True)
    told = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    return {key: told[key] for key in OFFLINE if key in told}


@pytest.mark.parametrize(
    ("own", "planned", "kept"),
    [
        ({}, {}, {}),
        ({"HF_HUB_OFFLINE": "1"}, {}, {"HF_HUB_OFFLINE": "1"}),
        ({"HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "1"}),
    ],
)
def test_what_a_person_said_to_the_hubs_switches_is_kept_unless_the_plan_switched_the_hub_off(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, own: dict[str, str], planned: dict[str, str], kept: dict[str, str]
) -> None:
    monkeypatch.setattr(sweeper, "within_nodes", lambda cluster: cluster)
    monkeypatch.setattr(sweeper.snapshot, "take", lambda folder: "cafe")
    for key in OFFLINE:
        monkeypatch.delenv(key, raising=False)
    for key, value in own.items():
        monkeypatch.setenv(key, value)
    launch = sweeper._on_slurm(LaunchSettings(cluster=SLURM, variables=tuple(planned.items())), sweep)
    assert (dict(launch.variables), launch.code) == (kept, "cafe")


def test_the_copy_of_the_code_goes_before_everything_also_in_a_job_that_a_job_submits(tmp_path: Path) -> None:
    """The real lines in a real shell: live code lies in the working directory and in the user's PYTHONPATH."""
    for place in ("code", "live", "path"):
        crew = tmp_path / place / "quantsweep" / "crew"
        crew.mkdir(parents=True)
        for folder in (crew, crew.parent):
            (folder / "__init__.py").touch()
        (crew / "slurm_job.py").write_text(f"import os; print('{place}', os.environ['PYTHONPATH'])\n")
    (tmp_path / "path" / "mine.py").touch()
    lines = [line for line in sbatch_parameters(SLURM, Resources(), "j", code=tmp_path / "code")["setup"] if not line.startswith("#")]
    job = "\n".join([*lines, f"{sys.executable} -m quantsweep.crew.slurm_job", f"{sys.executable} -c 'import mine'"])
    once = shell(job, tmp_path / "live", PYTHONPATH=str(tmp_path / "path"))
    assert once == f"code {tmp_path}/code:{tmp_path}/path\n"
    nested = shell(f"{job}\n{job}", tmp_path / "live", PYTHONPATH=str(tmp_path / "path"))
    assert nested == once * 2, "it does not grow from job to job"
    bare = "\n".join([*lines, f"{sys.executable} -m quantsweep.crew.slurm_job"])
    assert shell(f"{bare}\n{bare}", tmp_path / "live") == f"code {tmp_path}/code\n" * 2


def shell(script: str, cwd: Path, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if "PYTHON" not in key} | variables
    return subprocess.run(["bash", "-euc", script], cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_copy_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    marker = tmp_path / "quantsweep" / "crew" / "slurm_job.py"
    [wait, *_] = sbatch_parameters(SLURM, Resources(), "j", code=tmp_path)["setup"]
    marker.parent.mkdir(parents=True)
    began = time.monotonic()
    threading.Timer(0.3, marker.touch).start()
    shell(wait, tmp_path)
    assert marker.exists()
    assert time.monotonic() - began < 30
    assert f"seq {slurm_cluster.VISIBLE_SECONDS})" in wait, "not for ever"


@pytest.mark.parametrize(
    ("largest", "memory", "gpus"),
    [
        ("515000|gpu:h100:4", 502, 4),
        ("515000|gpu:h100:4(S:0-1)\n614400|(null)", 600, 4),
        ("1|(null)", 1000, 8),
        ("2000000|gpu:16", 1000, 8),
        ("", 1000, 8),
    ],
)
def test_retries_are_bounded_by_the_largest_node(monkeypatch: pytest.MonkeyPatch, largest: str, memory: int, gpus: int) -> None:
    """Where Slurm states nothing (one megabyte is its default) the yaml's word stands."""
    asked: list[list[str]] = []

    def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(argv)
        return subprocess.CompletedProcess(argv, 0, stdout=f"{largest}\n" if largest else "", stderr="")

    monkeypatch.setattr("quantsweep.slurm._run", run)
    spec = ClusterSpec(kind="slurm", partition="gpu", max_memory_gb=1000, max_gpus=8)
    bounded = slurm_cluster.within_nodes(spec)
    assert (bounded.max_memory_gb, bounded.max_gpus) == (memory, gpus)
    assert dataclasses.replace(bounded, max_memory_gb=1000, max_gpus=8) == spec
    assert [argv[0] for argv in asked] == ["sinfo"]
    assert "gpu" in asked[0]


Said = Callable[[str | int], list[str]]


@pytest.fixture
def sbatch(monkeypatch: pytest.MonkeyPatch) -> Said:
    """What is answered (a job id, or an error's text), and the scripts that were handed over."""

    def install(answer: str | int) -> list[str]:
        scripts: list[str] = []

        def submit(executor: ShardExecutor, command: str) -> Any:
            scripts.append(executor._make_submission_file_text(command, "UID"))
            if isinstance(answer, str):
                raise FailedJobError(f"sbatch: error: Batch job submission failed: {answer}")
            return submitit.SlurmJob(folder=executor.folder, job_id=str(answer), tasks=[0])

        monkeypatch.setattr(ShardExecutor, "_submit_command", submit)
        monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2))
        return scripts

    return install


def array(tasks: int = 3) -> SubmittedArray:
    return SubmittedArray(job_name="qs-s-1-0", plan="p", tasks=tuple((n,) for n in range(tasks)), resources=Resources(memory_gb=5))


def submit(sweep: SweepFolder, *, excluded: tuple[str, ...] = (), tasks: int = 3, **cluster: Any) -> int:
    launch = LaunchSettings(cluster=ClusterSpec(kind="slurm", python="/env/bin/python", **cluster), code="cafe")
    return slurm_cluster.submit_array(sweep, sweep.plan / "submission-1.json", 2, array(tasks), launch, excluded)


def test_an_array_is_numbered_from_zero_and_knows_its_submission(sweep: SweepFolder, sbatch: Said) -> None:
    scripts = sbatch(41)
    assert submit(sweep, excluded=("n1", "n2"), exclude="n0", max_parallel=2) == 41
    [text] = scripts
    lines = text.splitlines()
    for line in (
        "#SBATCH --array=0-2%2",
        "#SBATCH --exclude=n0,n1,n2",
        "#SBATCH --mem=5GB",
        "#SBATCH --requeue",
        "#SBATCH --job-name=qs-s-1-0",
    ):
        assert line in lines
    assert f"exec /env/bin/python -u -m quantsweep.crew.slurm_job task {sweep.plan / 'submission-1.json'} 2" in text
    assert f"PYTHONPATH={sweep.code / 'cafe'}" in text
    assert "-m submitit" not in text, "nothing is unpickled"
    [output] = [line.partition("=")[2] for line in lines if line.startswith("#SBATCH --output=")]
    assert output.replace("%A", "41").replace("%a", "0") == str(slurm_log(sweep, "qs-s-1-0", "41_0"))


def test_the_batch_script_of_an_array_does_not_grow_with_it(sweep: SweepFolder, sbatch: Said) -> None:
    scripts = sbatch(41)
    submit(sweep, tasks=1)
    submit(sweep, tasks=1_000)
    assert abs(len(scripts[0]) - len(scripts[1])) < 40


def test_the_collectors_script(sweep: SweepFolder, sbatch: Said) -> None:
    scripts = sbatch(42)
    assert slurm_cluster.submit_collector(sweep, "qs-s-1-collector", LaunchSettings(cluster=SLURM), [40, 41]) == 42
    assert "#SBATCH --dependency=afterany:40:41" in scripts[0]
    assert f"quantsweep.crew.slurm_job collect {sweep.path}" in scripts[0]
    slurm_cluster.submit_collector(sweep, "qs-s-later-collector", LaunchSettings(cluster=SLURM), begin_minutes=10)
    assert "#SBATCH --begin=now+10minutes" in scripts[1]
    assert "dependency" not in scripts[1]


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ("Job violates accounting/QOS policy (QOSMaxSubmitJobPerUserLimit)", NoRoomError, "as your QOS allows"),
        ("Slurm temporarily unable to accept job, sleeping and retrying", NoRoomError, "MaxJobCount"),
        ("Job violates accounting/QOS policy (AssocGrpSubmitJobsLimit)", NoRoomError, "account"),
        ("Invalid job array specification", RefusedError, "cluster.max_array_size"),
        ("Invalid account or account/partition combination specified", RefusedError, "cluster.account"),
        ("invalid partition specified: gpu", RefusedError, "cluster.partition"),
        ("Requested node configuration is not available", RefusedError, "GPUs"),
        ("Socket timed out on send/recv operation", SlurmError, "may have been accepted all the same"),
    ],
)
def test_what_a_refusal_means(sweep: SweepFolder, sbatch: Said, answer: str, kind: type[SlurmError], said: str) -> None:
    sbatch(answer)
    with pytest.raises(SlurmError, match=said) as caught:
        submit(sweep)
    assert caught.type is kind
