"""`quantsweep doctor` on a real cluster: what it prints is what is set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantsweep.slurm import user_associations
from tests.conftest import Launch
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def examined(command: Launch, *arguments: str, expect: int = 0) -> dict[str, dict[str, Any]]:
    done = command("doctor", "cluster=slurm", "--json", *arguments, expect=expect)
    return {check["name"]: check for check in json.loads(done.stdout) if check["section"] == "slurm"}


def test_what_is_set_is_what_is_printed(in_cluster: Cluster, quantsweep_command: Launch) -> None:
    found = examined(quantsweep_command, "cluster.qos=tight", "cluster.account=lab")
    assert found["slurm"]["found"].endswith("cluster quantsweep")
    assert found["MaxArraySize"]["found"].startswith("101 ")
    assert found["submitted jobs"]["found"] == "50 (MaxSubmitJobsPerUser=50 of QOS tight)"
    assert found["accounting"]["found"].startswith("on; enforced: associations")
    assert found["PreemptMode"]["found"].startswith("REQUEUE")
    assert found["partition"]["found"].startswith("main: 4 nodes, longest job: no limit")
    assert found["clock of the controller"]["state"] == "ok"
    assert {name for name, check in found.items() if check["state"] not in ("ok", "unknown")} <= {"MinJobAge", "KillWait"}
    assert "tight" in {row.account: row.qos for row in user_associations()}["lab"]


def test_what_a_yaml_gets_wrong_is_a_problem(in_cluster: Cluster, quantsweep_command: Launch) -> None:
    found = examined(quantsweep_command, "cluster.partition=mian", "cluster.qos=tihgt", "cluster.account=lab", expect=1)
    assert "Did you mean 'main'?" in found["partition"]["found"]
    assert "Did you mean 'tight'?" in found["qos"]["found"]


def test_without_accounting(own_root: Path, quantsweep_command: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(root=own_root / "doctor", nodes=1, accounting=False) as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        found = examined(quantsweep_command)
        assert found["accounting"]["found"] == "off"
        assert found["submitted jobs"]["state"] == "unknown"
        cluster.stop_controller()
        assert examined(quantsweep_command, expect=1)["slurm"]["state"] == "problem"
