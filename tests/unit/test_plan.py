"""Plans and shards: every trial in exactly one shard, nothing that is done, nothing that is in flight."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsweep.errors import ResultsError
from quantsweep.planning.plan import Expansion, Plan, build_plan
from quantsweep.planning.plan_files import (
    count_assignments,
    plan_files,
    plan_owners,
    plan_sequence,
    read_asked,
    read_asked_tasks,
    read_header,
    read_headers,
    read_numbered_trials,
    read_owned_tasks,
    read_owners,
    read_shard,
    read_shard_trials,
    shard_samples,
    shard_sizes,
    shard_trials,
    write_plan,
)
from quantsweep.planning.shards import cut, predicted_minutes
from quantsweep.storage.paths import SweepFolder
from quantsweep.trial.specs import (
    ClusterSpec,
    LaunchSettings,
    ModelSpec,
    PlannedTrial,
    Resources,
    RunSettings,
    TaskSpec,
    TrialSpec,
    options_tuple,
)
from tests.unit.test_specs import QUANTIZATION

TASKS = tuple(
    TaskSpec(name=name, lm_eval_task=name, folder="mini", version="1.0", primary_metric="acc", higher_is_better=True, limit=10)
    for name in ("t", "u")
)


def trial(model: int, bits: int, tasks: tuple[TaskSpec, ...] = TASKS) -> PlannedTrial:
    spec = ModelSpec(
        name=f"m{model}",
        family="f",
        path=f"/{model}",
        content=f"sha256:{model}",
        parameters=10 ** (5 + model % 5),
        resources=Resources(gpus=model % 2),
    )
    return PlannedTrial(trial=TrialSpec(model=spec, quantization=dataclasses.replace(QUANTIZATION, bit_width=bits)), tasks=tasks)


trials = st.lists(st.builds(trial, st.integers(0, 6), st.integers(2, 8)), min_size=0, max_size=40, unique_by=lambda p: p.trial.trial_id)


@settings(deadline=None)
@given(trials, st.floats(0.0001, 10), st.none() | st.integers(1, 8))
def test_every_trial_is_in_exactly_one_shard_of_its_model(planned: list[PlannedTrial], minutes: float, workers: int | None) -> None:
    shards = cut(planned, max_minutes=minutes, workers=workers)
    assert [shard.shard_id for shard in shards] == list(range(len(shards)))
    inside = [p.trial.trial_id for shard in shards for p in shard.trials]
    assert sorted(inside) == sorted(p.trial.trial_id for p in planned)
    for shard in shards:
        assert len({p.trial.model for p in shard.trials}) == 1
        assert shard.resources == shard.trials[0].trial.model.resources
        assert len(shard.trials) == 1 or sum(map(predicted_minutes, shard.trials)) <= minutes * (1 + 1e-6)


def plan(planned: list[PlannedTrial], **changes: object) -> Plan:
    expansion = Expansion(trials=tuple(planned), duplicates=0, skipped={}, candidates=len(planned))
    arguments = {
        "sweep": "s",
        "done": frozenset(),
        "in_flight": frozenset(),
        "settings": RunSettings(),
        "workers": None,
    }
    return build_plan(expansion, **{**arguments, **changes})  # type: ignore[arg-type]


def test_done_tasks_are_not_run_again_and_in_flight_trials_are_left_alone() -> None:
    planned = [trial(0, bits) for bits in (2, 3, 4)]
    ids = [p.trial.trial_id for p in planned]
    done = frozenset({(ids[0], "t@1.0+limit10"), (ids[0], "u@1.0+limit10"), (ids[1], "t@1.0+limit10")})
    made = plan(planned, done=done, in_flight=frozenset({ids[2]}))
    [shard] = made.shards
    assert [(p.trial.trial_id, [t.name for t in p.tasks]) for p in shard.trials] == [(ids[1], ["u"])]
    counts = made.counts()
    assert (counts["done"], counts["in_flight"], counts["to_run"], counts["evaluations_to_run"]) == (1, 1, 1, 1)


def test_plans_of_before_data_were_pinned_are_read() -> None:
    old = {key: value for key, value in dataclasses.asdict(RunSettings(device="cpu")).items() if key != "data_revisions"}
    assert RunSettings.from_dict(old) == RunSettings(device="cpu")


def test_plans_of_before_launches_had_tags_are_read() -> None:
    old = {key: value for key, value in dataclasses.asdict(LaunchSettings(tag="mine")).items() if key != "tag"}
    assert LaunchSettings.from_dict(json.loads(json.dumps(old))) == LaunchSettings()


def test_a_plan_file_is_all_that_a_worker_needs(tmp_path: Path) -> None:
    planned = [trial(model, bits) for model in range(3) for bits in (2, 3)]
    tracking = options_tuple({"kind": "wandb", "project": "p"})
    settings_ = RunSettings(device="cpu", batch_size=4, tracking=tracking, data_revisions=(("piqa", "hub:0123"), ("t", "sha256:4567")))
    launch = LaunchSettings(
        cluster=ClusterSpec(kind="slurm", setup=("module load x",), additional_parameters=(("mail_type", "END"),)),
        gpu_hours=2.5,
        max_retries=1,
        breaker_trials=None,
        code="0123",
        tag="mine",
    )
    done = frozenset((planned[0].trial.trial_id, t.task_key) for t in TASKS)
    made = plan(planned, settings=settings_, launch=launch, done=done)
    path = write_plan(tmp_path, made)
    header = read_header(path)
    assert (header.settings, header.launch, header.sweep, header.root, header.name) == (settings_, launch, "s", path.name, path.name)
    assert shard_sizes(path) == {shard.shard_id: len(shard.trials) for shard in made.shards}
    samples = shard_samples(path)
    assert {shard_id: sample.trial.model.resources for shard_id, sample in samples.items()} == {
        s.shard_id: s.resources for s in made.shards
    }
    numbered = {shard.shard_id: set(shard.trials) for shard in made.shards}
    wanted = sorted(numbered)[:2]
    pairs = read_numbered_trials(path, wanted)
    assert {shard_id: {p for n, p in pairs if n == shard_id} for shard_id in wanted} == {n: numbered[n] for n in wanted}
    assert len(pairs) == sum(len(numbered[n]) for n in wanted), "no other shard, and none twice"
    assert read_numbered_trials(path, []) == []
    assert set(read_asked(tmp_path)) == set(planned), "what is done stays in the plan"
    for shard in made.shards:
        assert set(read_shard(path, shard.shard_id).trials) == set(shard.trials)
        assert shard_trials(path, [shard.shard_id]) == {p.trial.trial_id for p in shard.trials}
    with pytest.raises(ResultsError, match="no shard 99"):
        read_shard(path, 99)
    broken = tmp_path / "plan-00002-20260101T000000-0.parquet"
    broken.write_bytes(b"x")
    for read in (
        read_header,
        lambda path: read_shard(path, 0),
        lambda path: read_asked(path.parent),
        lambda path: read_owners(path.parent),
    ):
        with pytest.raises(ResultsError, match="plan-00002"):
            read(broken)


def test_plans_of_several_row_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of more than 2,000 trials are."""
    monkeypatch.setattr("quantsweep.planning.plan_files.ROWS_A_GROUP", 2)
    trials = tuple(trial(0, bits) for bits in (2, 3, 4, 5, 6))
    expansion = Expansion(trials=trials, duplicates=0, skipped={}, candidates=5)
    plan = build_plan(expansion, sweep="large", done=frozenset(), in_flight=frozenset(), settings=RunSettings(), workers=1)
    path = write_plan(tmp_path, plan)
    assert (sum(shard_sizes(path).values()), len(plan_owners(path)), len(read_asked(tmp_path))) == (5, 5, 5)
    assert read_asked_tasks(tmp_path) == {one.trial.trial_id: tuple(task.task_key for task in TASKS) for one in trials}


def test_small_models_come_first() -> None:
    shards = cut([trial(4, 4), trial(0, 4), trial(2, 4)], max_minutes=60)
    assert [shard.trials[0].trial.model.parameters for shard in shards] == [10**5, 10**7, 10**9]


# --- several plans of one sweep -----------------------------------------------------------------------------------------


def test_plans_are_numbered_and_a_foreign_name_is_refused(tmp_path: Path) -> None:
    names = [write_plan(tmp_path, plan([trial(0, 2)])).name for _ in range(3)]
    assert [plan_sequence(name) for name in names] == [1, 2, 3]
    assert [path.name for path in plan_files(tmp_path)] == names == list(read_headers(tmp_path))
    (tmp_path / names[1]).unlink()
    assert plan_sequence(write_plan(tmp_path, plan([trial(0, 2)])).name) == 4, "numbers only grow"
    (tmp_path / "plan-100000-20260101T000000-0.parquet").touch()
    assert plan_sequence(plan_files(tmp_path)[-1].name) == 100_000, "by number, not by letter"
    (tmp_path / "plan-20260101T000000-cafe.parquet").touch()
    with pytest.raises(ResultsError, match=r"plan-20260101T000000-cafe\.parquet.*sweep="):
        plan_files(tmp_path)


def test_a_trial_belongs_to_the_newest_plan_that_gave_it_a_shard(tmp_path: Path) -> None:
    """The third plan leaves one trial alone because it is in flight: it stays the second's."""
    two, three, four = (trial(0, bits) for bits in (2, 3, 4))
    a = write_plan(tmp_path, plan([two, three])).name
    b = write_plan(tmp_path, plan([three, four])).name
    c = write_plan(tmp_path, plan([two, three], in_flight=frozenset({three.trial.trial_id}))).name
    owners = {trial_id: owner for trial_id, (owner, _) in read_owners(tmp_path).items()}
    assert owners == {two.trial.trial_id: c, three.trial.trial_id: b, four.trial.trial_id: b}
    assert plan_owners(tmp_path / a) == {two.trial.trial_id, three.trial.trial_id}
    assert plan_owners(tmp_path / c) == {two.trial.trial_id}, "what it left alone is not its"
    assert {key: owner for key, (owner, _) in read_owned_tasks(tmp_path).items()} == read_owners(tmp_path)


def test_tasks_that_were_added_later_are_asked_for_and_owned(tmp_path: Path) -> None:
    first, both = trial(0, 2, TASKS[:1]), trial(0, 2)
    write_plan(tmp_path, plan([first]))
    done = frozenset({(first.trial.trial_id, TASKS[0].task_key)})
    path = write_plan(tmp_path, plan([both], done=done))
    keys = tuple(task.task_key for task in TASKS)
    assert read_asked_tasks(tmp_path) == {first.trial.trial_id: keys}
    assert read_owned_tasks(tmp_path)[first.trial.trial_id][1] == keys
    assert [task.name for task in read_shard(path, 0).trials[0].tasks] == ["u"], "only what was left is run"
    write_plan(tmp_path, plan([first], done=done))
    assert read_asked_tasks(tmp_path) == {first.trial.trial_id: keys}, "asking for less forgets nothing"


def test_assignments_are_counted_a_launch(tmp_path: Path) -> None:
    two, three = trial(0, 2), trial(0, 3)
    first = write_plan(tmp_path, plan([two, three])).name
    write_plan(tmp_path, plan([two]), root=first)
    write_plan(tmp_path, plan([two]), root=first)
    second = write_plan(tmp_path, plan([two, three], in_flight=frozenset({three.trial.trial_id}))).name
    assert count_assignments(tmp_path) == {
        (two.trial.trial_id, first): 3,
        (three.trial.trial_id, first): 1,
        (two.trial.trial_id, second): 1,
    }


histories = st.lists(st.tuples(st.sets(st.integers(2, 8), min_size=1), st.sets(st.integers(2, 8))), min_size=1, max_size=5)


@settings(deadline=None, max_examples=25)
@given(histories)
def test_every_trial_that_was_ever_given_a_shard_has_one_owner(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[set[int], set[int]]]
) -> None:
    folder = SweepFolder(tmp_path_factory.mktemp("s") / "s")
    folder.create()
    expected: dict[str, str] = {}
    for wanted, flying in history:
        planned = [trial(0, bits) for bits in sorted(wanted)]
        ids = frozenset(trial(0, bits).trial.trial_id for bits in flying)
        path = write_plan(folder.plan, plan(planned, in_flight=ids))
        expected |= {p.trial.trial_id: path.name for p in planned if p.trial.trial_id not in ids}
    owners = read_owners(folder.plan)
    assert {trial_id: name for trial_id, (name, _) in owners.items()} == expected
    for trial_id, (name, shard_id) in owners.items():
        assert trial_id in {p.trial.trial_id for p in read_shard_trials(folder.plan / name, [shard_id])}
