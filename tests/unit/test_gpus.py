"""Which GPUs there are, asked without torch: nvidia-smi is a script on PATH here, the device files lie in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantsweep.crew import gpus
from quantsweep.crew.gpus import num_gpus, visible_gpus
from quantsweep.crew.local import num_cores, num_workers, worker_environment
from quantsweep.errors import ConfigurationError, ModelError
from quantsweep.failures import classes
from quantsweep.running.child import GIVEN_GPUS, _device


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without nvidia-smi and without GPUs; the folder of its device files, in which commands are found too."""
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("quantsweep.crew.gpus.shutil.which", lambda name: name if (tmp_path / name).exists() else None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def nvidia_smi(machine: Path, script: str) -> None:
    path = machine / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("value", ["-1", "NoDevFiles", "0", "", None])
def test_a_machine_without_gpus_has_a_worker_a_core_whatever_is_hidden(
    machine: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert num_workers(None, "auto") == num_cores()
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(0, 1, "auto")


@pytest.mark.parametrize(
    ("value", "visible"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("0,-1,1", ["0"]),
        ("-1", []),
        ("NoDevFiles", []),
        ("", []),
        ("1,7,2", ["1"]),
        ("GPU-8932f937-d72c,MIG-41b36db9", ["GPU-8932f937-d72c", "MIG-41b36db9"]),
    ],
)
def test_what_is_visible_is_what_cuda_would_take(
    machine: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, visible: list[str]
) -> None:
    nvidia_smi(machine, "for n in 0 1 2; do echo \"GPU $n: H100\"; echo '  MIG 1g'; done")
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == visible
    if visible:
        assert [worker_environment(n, 2, "auto")["CUDA_VISIBLE_DEVICES"] for n in range(len(visible))] == visible


def test_where_nvidia_smi_is_missing_the_device_files_count(machine: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (machine / name).touch()
    assert num_gpus() == 2


def test_a_driver_that_hangs_is_said_and_no_cpu_takes_its_place(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "ANSWER_SECONDS", 0.3)
    nvidia_smi(machine, "exec sleep 60")
    with pytest.raises(ConfigurationError, match="nvidia-smi gave no answer"):
        num_workers(None, "auto")
    assert num_workers(None, "cpu") == num_cores()


def test_so_is_one_that_is_broken_and_a_machine_without_devices_has_none(machine: Path) -> None:
    nvidia_smi(machine, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    with pytest.raises(ConfigurationError, match="NVML: Driver/library version mismatch': the driver"):
        num_workers(None, "auto")
    nvidia_smi(machine, "echo 'No devices were found'; exit 6")
    assert num_workers(None, "auto") == num_cores()


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_job_that_was_given_gpus_and_sees_none_is_on_a_bad_node(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv(GIVEN_GPUS, "1")
    with pytest.raises(ModelError, match="given 1 GPU, and torch sees 0") as caught:
        _device(wanted)
    assert classes.from_exception(caught.value).failure_class == classes.BAD_NODE
    assert _device("cpu") == "cpu", "what was asked for"
    monkeypatch.delenv(GIVEN_GPUS)
    assert _device("auto") == "cpu"


def test_so_is_one_that_sees_fewer_than_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv(GIVEN_GPUS, "2")
    with pytest.raises(ModelError, match="given 2 GPUs, and torch sees 1"):
        _device("auto")
