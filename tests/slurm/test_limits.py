"""Limits of a real cluster: 2,016 trials under MaxArraySize 101, MaxJobCount 200 and a QOS with 50 submitted jobs."""

from __future__ import annotations

import threading

import pytest

from quantsweep.launching.submissions import read_submissions
from tests.slurm.cluster import Cluster
from tests.slurm.studies import Study

pytestmark = [pytest.mark.slurm, pytest.mark.long]

TWO_THOUSAND = ("data_type=int,fp,quantile,dynamic", "bit_width=range(3,9)", "block_size=range(16,1360,16)")
"""4 x 6 x 84 = 2,016 trials."""


class Watch(threading.Thread):
    """The most tasks that were in the queue at once, as squeue itself has them."""

    def __init__(self, study: Study) -> None:
        super().__init__(daemon=True)
        self.study, self.most, self.ended = study, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(1.0):
            self.most = max(self.most, len(self.study.queued()))


def test_two_thousand_trials_pass_under_tight_limits(engine: Cluster, tmp_path: object) -> None:
    """What did not fit is submitted by the running sweep itself: one launch command, nobody comes back."""
    study = Study(cluster=engine, root=tmp_path, arguments=(*TWO_THOUSAND, "cluster.qos=tight", "shard_minutes=0.07"))  # type: ignore[arg-type]
    watch = Watch(study)
    watch.start()
    said = study.launch().stdout
    assert "submitted 44 shards" in said  # 90 % of 50, one kept for the collector
    assert "the running sweep submits them as room appears" in said
    study.wait_until_idle(1500)
    watch.ended.set()
    watch.join()
    assert watch.most <= 50
    submissions = read_submissions(study.folder)
    assert len(submissions) > 1, "the sweep submitted by itself what had no room at first"
    assert max(len(array.tasks) for submission in submissions for array in submission.arrays) <= 101
    report = study.check()
    assert (report.asked, report.rows, report.repeated) == (2016, 2016, {})
    assert study.status()["done"] == 2016
    assert "nothing left to run" in study.launch().stdout


def test_arrays_end_at_the_largest_index(engine: Cluster, tmp_path: object) -> None:
    """132 shards and MaxArraySize 101, MaxJobCount 200: at most 99 tasks in one array, never an index above 100."""
    arguments = ("data_type=int,fp,quantile,dynamic", "bit_width=range(3,9)", "block_size=range(32,208,32)")
    study = Study(cluster=engine, root=tmp_path, arguments=(*arguments, "shard_minutes=0.001", "cluster.max_parallel=1"))  # type: ignore[arg-type]
    said = study.launch().stdout
    assert "submitted 99 shards in 1 array " in said
    assert "45 shards wait" in said
    study.quantsweep("cancel", study.name)
    study.wait_until_idle()
    assert study.status()["waiting"] == 0, "what was cancelled does not come back by itself"
