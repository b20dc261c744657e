"""`quantsweep doctor`: each check finds what is wrong, and says so; Slurm's answers are recorded ones.

The same command meets a live cluster in tests/slurm/test_doctor.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantsweep import slurm
from quantsweep.cli.doctor import doctor_lines
from quantsweep.errors import QuantsweepError
from quantsweep.operations import doctor
from quantsweep.operations.doctor import Check, check_gpus, check_hub_cache, check_results, check_slurm, check_software, file_system_type
from quantsweep.trial.specs import ClusterSpec
from tests.conftest import Launch

CLUSTER = ClusterSpec(kind="slurm")
CONFIG = """\
Configuration data as of 2001-02-03T04:05:06
AccountingStorageEnforce = associations,limits,qos
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = lab
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
MaxJobCount             = 10000
MinJobAge               = 300 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
"""
PARTITIONS = """\
PartitionName=main AllowAccounts=ALL AllowQos=ALL Default=YES QoS=N/A MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=4
PartitionName=gpu AllowAccounts=guests DenyQos=tight Default=NO MaxNodes=2 MaxTime=02:00:00 OverSubscribe=EXCLUSIVE State=DRAIN TotalNodes=8
"""


class Answers:
    """Stands in for `slurm._run`: answers by words of the command, and counts the questions."""

    def __init__(self, **changes: str | int) -> None:
        self.asked: list[str] = []
        self.replies: dict[str, str | int] = {
            "--version": "slurm-wlm 22.05.8\n",
            "show config": CONFIG,
            "show partition": PARTITIONS,
            "format=DefaultAccount": "lab\n",
            "format=Account,Partition,QOS": "lab||normal,tight\nguests||normal\n",
            "account=lab": "lab|root|||200||normal\n",
            "user=": "root||||||\nlab|||root||500|\n",
            "show qos": "normal||||\ntight|50|||\n",
        } | changes

    def __call__(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        command = " ".join(argv)
        self.asked.append(command)
        reply = next(value for words, value in self.replies.items() if words in command)
        if isinstance(reply, int):
            return subprocess.CompletedProcess([], reply, "", "Connection refused")
        return subprocess.CompletedProcess([], 0, reply, "")


Says = Callable[..., Answers]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    def install(**changes: str | int) -> Answers:
        answers = Answers(**changes)
        monkeypatch.setattr(slurm, "_run", answers)
        monkeypatch.setattr(slurm, "available", lambda: True)
        monkeypatch.setattr(slurm, "user_name", lambda: "root")
        return answers

    return install


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


class TestSlurm:
    def test_a_cluster_that_lacks_nothing(self, says: Says) -> None:
        answers = says()
        found = by_name(check_slurm(ClusterSpec(kind="slurm", account="lab", qos="normal", partition="main", minutes=600)))
        assert {check.state for check in found.values()} - {"ok"} == {"warning", "unknown"}
        assert {name for name, check in found.items() if check.state != "ok"} == {"clock of the controller", "sbatch on nodes"}
        assert found["slurm"].found == "slurm-wlm 22.05.8, cluster lab"
        assert found["submitted jobs"].found == "200 (MaxSubmitJobs=200 of user root in account lab; GrpSubmitJobs=500 of account lab)"
        assert found["KillWait"].found.startswith("30 s")
        assert found["account"].found == "lab (this user has: guests, lab)"
        assert "behind" in found["clock of the controller"].found
        # A handful of questions, none that changes anything.
        assert len(answers.asked) <= 10
        assert all(
            command.split()[0] in ("scontrol", "sacctmgr") and (" show " in command or "--version" in command) for command in answers.asked
        )

    @pytest.mark.parametrize(
        ("cluster", "name", "found"),
        [
            pytest.param({"partition": "gpus"}, "partition", "Did you mean 'gpu'?", id="no-such-partition"),
            pytest.param({"partition": "gpu"}, "partition", "DRAIN", id="drained"),
            pytest.param({"partition": "gpu", "minutes": 121}, "time limit", "more than the partition allows (120)", id="too-long"),
            pytest.param({"partition": "gpu", "account": "lab"}, "account in partition", "does not take account lab", id="not-admitted"),
            pytest.param({"partition": "gpu", "qos": "tight"}, "qos in partition", "denied: tight", id="denied-qos"),
            pytest.param({"account": "lba"}, "account", "Did you mean 'lab'?", id="no-such-account"),
            pytest.param({"account": "guests", "qos": "tight"}, "qos", "unknown qos 'tight'", id="qos-of-another-account"),
        ],
    )
    def test_what_a_cluster_yaml_gets_wrong(self, says: Says, cluster: dict[str, Any], name: str, found: str) -> None:
        says()
        check = by_name(check_slurm(ClusterSpec(kind="slurm", **cluster)))[name]
        assert check.state == "problem"
        assert found in check.found
        assert check.remedy

    def test_whole_nodes_want_the_allocation_of_nodes(self, says: Says) -> None:
        says()
        assert by_name(check_slurm(ClusterSpec(kind="slurm", partition="gpu")))["allocation"].state == "warning"
        assert "allocation" not in by_name(check_slurm(ClusterSpec(kind="slurm", partition="gpu", allocation="node", node_gpus=4)))

    def test_without_accounting_it_says_what_cannot_be_known(self, says: Says) -> None:
        answers = says(
            **{"show config": CONFIG.replace("accounting_storage/slurmdbd", "accounting_storage/none").replace("300 sec", "5 sec")}
        )
        found = by_name(check_slurm(ClusterSpec(kind="slurm", account="lab")))
        assert (found["accounting"].state, found["accounting"].found) == ("warning", "off")
        assert "MinJobAge seconds only" in found["accounting"].remedy
        assert found["MinJobAge"].state == "warning"
        assert (found["submitted jobs"].state, found["account"].state) == ("unknown", "unknown")
        assert not any("sacctmgr" in command for command in answers.asked)

    def test_a_user_without_account_and_one_of_a_database_that_is_down(self, says: Says) -> None:
        says(**{"format=Account,Partition,QOS": ""})
        assert by_name(check_slurm(CLUSTER))["account"].state == "problem"
        says(**{"format=Account,Partition,QOS": 1, "format=DefaultAccount": 1})
        found = by_name(check_slurm(CLUSTER))
        assert (found["account"].state, found["submitted jobs"].state, found["partition"].state) == ("unknown", "unknown", "ok")

    def test_a_controller_that_is_silent(self, says: Says) -> None:
        says(**{"show config": 1})
        (check,) = check_slurm(CLUSTER)
        assert check.state == "problem"
        (check,) = check_slurm(ClusterSpec())
        assert check.state == "warning"

    def test_a_machine_without_slurm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(slurm, "available", lambda: False)
        assert [check.state for check in check_slurm(CLUSTER)] == ["problem"]
        assert [check.state for check in check_slurm(ClusterSpec())] == ["ok"]


class TestResults:
    def test_a_good_folder(self, tmp_path: Path) -> None:
        found = by_name(check_results(tmp_path / "new" / "results", shared=False))
        assert all(found[name].state == "ok" for name in ("folder", "rename", "hard link", "sync of files", "clock of the file system"))
        assert "does not exist yet" in found["folder"].found
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_others_may_write_to(self, tmp_path: Path) -> None:
        (tmp_path / "sweep" / "plan").mkdir(parents=True)
        assert by_name(check_results(tmp_path, shared=False))["closed to others"].state == "ok"
        (tmp_path / "sweep").chmod(0o777)
        check = by_name(check_results(tmp_path, shared=False))["closed to others"]
        assert (check.state, check.remedy) == ("problem", f"chmod -R go-w '{tmp_path / 'sweep'}'")
        (tmp_path / "sweep").chmod(0o755)
        tmp_path.chmod(0o775)
        assert by_name(check_results(tmp_path, shared=False))["closed to others"].remedy == f"chmod -R go-w '{tmp_path}'"
        tmp_path.chmod(0o1777)  # as /tmp: nobody can rename what is another's
        assert by_name(check_results(tmp_path, shared=False))["closed to others"].state == "ok"

    def test_a_file_where_a_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "results").write_text("")
        assert [check.state for check in check_results(tmp_path / "results" / "x", shared=False)] == ["problem"]

    def test_a_file_system_that_breaks_promises(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_arguments: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "fsync", refuse)
        monkeypatch.setattr(doctor, "filesystem_now", lambda folder: folder.stat().st_mtime - 100)
        found = by_name(check_results(tmp_path, shared=False))
        assert (found["hard link"].state, found["sync of files"].state, found["sync of folders"].state) == ("problem", "problem", "warning")
        assert found["hard link"].found == "Operation not supported"
        assert found["clock of the file system"].found == "100 s behind this machine's"
        assert list(tmp_path.iterdir()) == []

    def test_little_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        room = SimpleNamespace(f_bavail=1000, f_frsize=4096, f_files=100, f_favail=7)
        monkeypatch.setattr(os, "statvfs", lambda _place: room)
        found = by_name(check_results(tmp_path, shared=False))
        assert (found["free space"].state, found["free space"].found, found["free inodes"].found) == ("warning", "4 MB", "7")
        room.f_files = 0
        assert by_name(check_results(tmp_path, shared=False))["free inodes"].state == "unknown"

    @pytest.mark.parametrize(
        ("kind", "shared", "state"),
        [
            ("ext4", False, "ok"),
            ("ext4", True, "warning"),
            ("nfs4", True, "ok"),
            ("lustre", True, "ok"),
            ("fuse.sshfs", True, "unknown"),
            (None, True, "unknown"),
        ],
    )
    def test_kinds_of_file_systems(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None, shared: bool, state: str
    ) -> None:
        monkeypatch.setattr(doctor, "file_system_type", lambda _place: kind)
        assert by_name(check_results(tmp_path, shared=shared))["file system"].state == state

    def test_the_file_system_is_that_of_the_innermost_mount(self, tmp_path: Path) -> None:
        mounts = tmp_path / "mounts"
        mounts.write_text(
            "rootfs / rootfs rw 0 0\n/dev/a / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\nx /home/my\\040data lustre rw 0 0\nbroken\n"
        )
        kinds = [file_system_type(Path(place), mounts) for place in ("/srv", "/home/me/results", "/home/my data/results", "/homestead")]
        assert kinds == ["ext4", "nfs4", "lustre", "ext4"]
        assert file_system_type(Path("/"), tmp_path / "absent") is None


class TestMachine:
    def test_libraries_out_of_their_ranges_and_absent_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = importlib.metadata.version

        def version(name: str) -> str:
            if name == "rich":
                raise importlib.metadata.PackageNotFoundError(name)
            return "4.57.0" if name == "transformers" else real(name)

        assert {check.state for check in check_software()} == {"ok"}
        monkeypatch.setattr(importlib.metadata, "version", version)
        found = by_name(check_software())
        assert (found["transformers"].state, found["rich"].state) == ("problem", "problem")
        assert found["transformers"].found.startswith("4.57.0 (wanted: ")
        assert found["rich"].remedy == "pip install 'rich>=13'"

    @pytest.mark.parametrize(
        ("answer", "state", "word"),
        [
            ('["2.13.0+cpu", null, 0]', "problem", "built for CPUs"),
            ('["2.13.0", "12.8", 0]', "problem", "driver may be older"),
            ('["2.13.0", "12.8", 1]', "warning", "hides some"),
            ('["2.13.0", "12.8", 2]', "ok", ""),
            ("Traceback", "problem", "import torch"),
        ],
    )
    def test_gpus_and_what_torch_sees_of_them(self, monkeypatch: pytest.MonkeyPatch, answer: str, state: str, word: str) -> None:
        monkeypatch.setattr(doctor, "_gpus", lambda: ("550.1", [("H100", 80 * 10**9, 79 * 10**9), ("H100", 80 * 10**9, 10**9)]))
        monkeypatch.setattr(doctor, "_TORCH_PROBE", f"print({answer!r})")
        found = by_name(check_gpus())
        assert (found["gpu 0"].state, found["gpu 1"].state) == ("ok", "warning")
        assert found["torch"].state == state
        assert word in found["torch"].remedy

    def test_no_gpu_is_no_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none() -> None:
            raise QuantsweepError("NVML Shared Library Not Found")

        monkeypatch.setattr(doctor, "_gpus", none)
        (check,) = check_gpus()
        assert check.state == "ok"

    def test_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        assert by_name(check_hub_cache())["hub"].found.startswith("off, by HF_HUB_OFFLINE:")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        assert by_name(check_hub_cache())["hub"].found.startswith("switched on")


def test_the_command(quantsweep_command: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_this_is_nobodys_token")
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm here
    done = quantsweep_command("doctor")
    assert "hf_this_is_nobodys_token" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "software"
    done = quantsweep_command("doctor", "cluster=slurm", "--json", expect=1)
    checks = json.loads(done.stdout)
    assert [check["found"] for check in checks if check["state"] == "problem"] == ["no sbatch on PATH: sweeps run on this machine"]
    assert list(tmp_path.iterdir()) == []


def test_text_of_checks() -> None:
    checks = [
        Check(section="a", name="x", state="ok", found="fine"),
        Check(section="b", name="y", state="problem", found="broken", remedy="mend it"),
        Check(section="b", name="z", state="unknown", found="who knows"),
    ]
    lines = [" ".join(line.split()) for line in doctor_lines(checks)]
    assert lines == ["a", "ok x fine", "b", "PROBLEM y broken", "→ mend it", "unknown z who knows", "1 problem, 1 unknown, 1 ok"]
