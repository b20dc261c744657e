"""Planning at the size that is promised: seconds of CPU, and the same identities as ever.

Bounds are some three times what two cores need, so that a busy machine does not fail and a step that
became quadratic does; `tests/benchmarks/planning.py` measures.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantsweep.composing.composition import compose_base, make_request, search_folders
from quantsweep.operations.prediction import Predictor
from quantsweep.planning.plan import Expansion, Plan, build_plan, expand
from quantsweep.planning.plan_files import read_asked, write_plan
from quantsweep.storage.paths import SweepFolder
from quantsweep.tables import records
from quantsweep.trial.specs import PlannedTrial, RunSettings
from tests.benchmarks.synthetic import write_done

GRID = ("model=glob(mini-*)", "data_type=int,fp,quantile,dynamic", "bit_width=range(3,9)", "block_size=range(16,3360,16)")
TRIALS = 7 * 4 * 6 * 209
IDS = "fe1fb52f46cfc220d83e058795406ad9e4096c93e1dc7d79e7cfb555a8efeefc"
"""SHA-256 of all trial ids.  Another value makes every finished sweep run again: only a raised `version` may change it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail if this process needs more CPU seconds."""
    before = time.process_time()
    yield
    used = time.process_time() - before
    assert used < seconds, f"{used:.1f} s of CPU, at most {seconds} are promised"


@pytest.fixture(scope="module")
def whole() -> Expansion:
    arguments = [*GRID, "task=mini_ppl", "limit=1"]
    with at_most(8):
        cfg = compose_base(arguments)
        request = make_request(cfg, search_folders(cfg.hydra), arguments)
        return expand(request.schema, request.grids)


def plan(whole: Expansion, done: frozenset[tuple[str, str]] = frozenset()) -> Plan:
    return build_plan(whole, sweep="s", done=done, in_flight=frozenset(), settings=RunSettings(), workers=None)


def test_identities_are_what_they_always_were(whole: Expansion) -> None:
    assert len(whole.trials) == TRIALS == 35_112
    ids = sorted(p.trial.trial_id for p in whole.trials)
    assert len(set(ids)) == TRIALS
    assert hashlib.sha256("".join(ids).encode()).hexdigest() == IDS


def test_a_plan_is_written_and_read_back(whole: Expansion, tmp_path: Path) -> None:
    with at_most(10):
        made = plan(whole)
        path = write_plan(tmp_path, made)
    assert path.stat().st_size < 10e6
    with at_most(6):
        asked = read_asked(tmp_path)
    assert {p.trial.trial_id for p in asked} == {p.trial.trial_id for p in whole.trials}
    assert len({id(p.trial.model) for p in asked}) == 7, "what is equal is built once"


@pytest.fixture(scope="module")
def finished(whole: Expansion, tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    folder = SweepFolder(tmp_path_factory.mktemp("scale") / "big")
    write_done(folder, whole.trials)
    return folder


def test_a_finished_sweep_is_seen_to_be_finished(whole: Expansion, finished: SweepFolder) -> None:
    with at_most(5):
        done = records.read_done(finished.path)
        made = plan(whole, done)
    assert made.counts()["done"] == TRIALS
    assert made.shards == ()


def test_prediction_is_cheap(whole: Expansion, finished: SweepFolder) -> None:
    with at_most(2):
        predictor = Predictor.from_tables([finished.path])
    with at_most(1):
        total = sum(predictor.minutes(p) for p in whole.trials)
        forecast = predictor.forecast(whole.trials)
    assert forecast.minutes == pytest.approx(total)
    assert f"{TRIALS:,} past trials" in forecast.basis
    seconds = [_measured(p) for p in whole.trials]
    assert forecast.low < sum(seconds) / 60 < forecast.high
    assert forecast.minutes == pytest.approx(sum(seconds) / 60, rel=0.1)


def _measured(planned: PlannedTrial) -> float:
    """What `write_done` says that such a trial takes, its small swings apart."""
    parameters = planned.trial.model.parameters or 1
    return 0.17 + 4e-8 * parameters + 3e-8 * parameters * 3 / 50
