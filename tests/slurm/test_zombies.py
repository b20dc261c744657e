"""A worker that was frozen for long wakes up on a real cluster, when everything has been asked for and run again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

import quantsweep
from quantsweep.storage.workers import WorkerRecord, read_records
from tests.slurm import ledger
from tests.slurm.cluster import Cluster
from tests.slurm.studies import Study

pytestmark = [pytest.mark.slurm, pytest.mark.long]

EIGHT = ("data_type=int,fp", "bit_width=4,8", "block_size=32,64", "shard_minutes=0.1", "model=mini-neox-2.2m", "limit=40")


def signal_all(pid: int, number: int) -> None:
    """To a worker and its child."""
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(process.pid, number)


def at_work(study: Study) -> WorkerRecord:
    return next(heard.record for heard in read_records(study.folder) if heard.record.trial_id is not None and heard.record.ended is None)


def test_a_frozen_worker_and_a_queued_job_leave_alone_what_is_run_again(engine: Cluster, tmp_path: Path) -> None:
    study = Study(cluster=engine, root=tmp_path, arguments=(*EIGHT, "cluster.max_parallel=1"))
    study.launch()
    study.wait_for_rows(1)
    frozen = at_work(study)
    signal_all(frozen.pid, signal.SIGSTOP)
    said = study.quantsweep("rerun", study.name, "--all", "--yes")
    assert "had nothing else to do and left the queue" in said
    assert "submitted" in study.launch("cluster.max_parallel=null").stdout, "what was forgotten is not in flight"
    deadline = time.monotonic() + 180
    while (table := quantsweep.load_results(study.folder.path)).trial_id.nunique() < 8:
        assert time.monotonic() < deadline, study.logs()
        time.sleep(0.5)
    assert set(table.launch) == {3}, "the fence took number 2"
    begun = ledger.read(study.record).begun.total()
    signal_all(frozen.pid, signal.SIGCONT)
    study.wait_until_idle()
    report = ledger.check(ledger.read(study.record), study.folder.path)
    assert ledger.read(study.record).begun.total() - begun <= 1
    assert len(report.needless) <= 1
    assert [line for line in report.problems() if "needless" not in line] == [], study.logs()
    assert set(quantsweep.load_results(study.folder.path).launch) == {3}
    assert (study.status()["done"], set(quantsweep.load_trials(study.folder.path).status)) == (8, {"done"})
    assert "left alone" in Path(frozen.log).read_text()
