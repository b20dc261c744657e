"""From a request to a plan: everything that is checked before anything is submitted, and nothing is left out.

`prepare` is what `quantsweep plan` shows and what the sweeper runs: the same code, so that the dry
run is the truth.  All mistakes are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from quantsweep import checks
from quantsweep.checkpoints import planned_layers
from quantsweep.checkpoints.pins import data_revisions, offline_environment, read_pins
from quantsweep.composing.cluster import cluster_spec
from quantsweep.composing.command_line import as_typed
from quantsweep.composing.components import has_option, load_yaml
from quantsweep.composing.composition import Request, make_request
from quantsweep.composing.own_tasks import refuse_whole_home
from quantsweep.convert import convert
from quantsweep.crew.gpus import num_gpus
from quantsweep.crew.local import num_workers
from quantsweep.errors import ConfigurationError, ConfigurationErrors, QuantsweepError, did_you_mean
from quantsweep.launching.tasks import Observation, observe, to_leave_alone
from quantsweep.operations.launches import without_dropped
from quantsweep.operations.prediction import Predictor, sweep_folders
from quantsweep.planning.inapplicable import refuse_inapplicable
from quantsweep.planning.plan import Expansion, Plan, build_plan, expand
from quantsweep.running.environment import running_package, source_digest
from quantsweep.running.tracking import what_lacks
from quantsweep.storage.paths import SweepFolder, is_folder, sweep_folder
from quantsweep.tables import records
from quantsweep.trial.registry import DATA_TYPES, STEPS, is_codebook
from quantsweep.trial.specs import CalibrationSpec, ClusterSpec, LaunchSettings, ModelSpec, RunSettings, TaskSpec, options_tuple
from quantsweep.trial.task_identity import read_own_tasks

T = TypeVar("T")

_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Where NVIDIA's driver, AMD's, and Windows' for Linux put what they serve."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A plan and where it would run.

    models: where the config.json of each model lies that is here.  unseen: what is to be said of their architectures;
    left_out: of parts of their checkpoints.
    """

    plan: Plan
    folder: SweepFolder
    cluster: ClusterSpec
    workers: int
    title: str
    models: Mapping[ModelSpec, Path]
    unseen: tuple[str, ...]
    left_out: tuple[str, ...]


def prepare(cfg: DictConfig, folders: Sequence[Path], arguments: Sequence[str], *, seen: Observation | None = None) -> Prepared:
    """Plan what a composed configuration and its overrides ask for; writes nothing.

    seen: how the sweep's jobs stand, if that is known already.
    """
    request = make_request(cfg, folders, arguments)
    base = request.base
    problems: list[str] = []
    folder = _collect(problems, lambda: asked_folder(base))
    settings = _collect(problems, lambda: run_settings(base))
    cluster = _collect(problems, lambda: cluster_spec(base["cluster"]))
    assume_dead = _collect(problems, lambda: checks.truth("assume_dead", base["assume_dead"]))
    _collect(problems, lambda: checks.whole_number("workers", base["workers"], otherwise=", or null for one a GPU or core"))
    launch = None if cluster is None else _collect(problems, lambda: launch_settings(base, cluster))
    expansion = _collect(problems, lambda: _expanded(request))
    if settings is not None and cluster is not None:
        _collect(problems, lambda: _refuse_missing_gpu(settings, cluster))
    if expansion is not None:
        _collect(problems, lambda: refuse_inapplicable([planned.trial for planned in expansion.trials], _typed(arguments)))
        _collect(problems, lambda: _refuse_borrowed_name(cfg, request, folders, _typed(arguments)))
        _collect(problems, lambda: _refuse_without_code(expansion))
        _collect(problems, lambda: _refuse_foreign_tasks(_tasks(expansion), settings))
    if problems or folder is None or settings is None or launch is None or expansion is None or cluster is None or assume_dead is None:
        raise ConfigurationErrors(problems)
    workers = num_workers(base["workers"], settings.device) if cluster.kind == "local" else 1
    seen = seen or observe(folder, assume_dead=assume_dead)
    wanted = _without_dropped(expansion, folder)
    plan = _plan(base, folder, settings, launch, wanted, workers, seen)
    models = planned_layers.folders(_models(wanted), read_pins(str(base["results_dir"])))
    quantized = {id(planned.trial.model) for planned in wanted.trials if not planned.trial.quantization.is_baseline}
    planned_layers.refuse_none({model: place for model, place in models.items() if id(model) in quantized})
    return Prepared(
        plan=plan,
        folder=folder,
        cluster=cluster,
        workers=workers,
        title=_title(request),
        models=models,
        unseen=planned_layers.unseen(models),
        left_out=planned_layers.left_out(models),
    )


def _refuse_missing_gpu(settings: RunSettings, cluster: ClusterSpec) -> None:
    """Each trial would fail here; a machine whose drivers hide its GPUs from `nvidia-smi` is left to torch."""
    if cluster.kind == "local" and settings.device == "cuda" and num_gpus() == 0 and not any(map(Path.exists, map(Path, _GPU_DEVICES))):
        raise ConfigurationError("device=cuda was asked for, and this machine has no GPU; use device=auto or device=cpu, or a cluster=…")


def _expanded(request: Request) -> Expansion:
    task_path(request.base)  # before its YAMLs are looked for
    return replace(expand(request.schema, request.grids), changes=request.changes)


def refuse_unpinned(plan: Plan) -> None:
    """A plan may count models and texts that are not identified; nothing is run or submitted with them."""
    if plan.unpinned:
        raise ConfigurationError(
            f"not submitted: it is not known which weights or text {', '.join(plan.unpinned)} would be (a name on the hub may move). "
            "Run `quantsweep prewarm` with the same words, which fetches and pins them; or give the exact commit "
            "(model.revision=<40 hexadecimal digits>), or a copy on disk (model=/folder, calibration.path=FILE, task.path=FILE)"
        )


def _plan(
    base: Mapping[str, Any],
    folder: SweepFolder,
    settings: RunSettings,
    launch: LaunchSettings,
    expansion: Expansion,
    workers: int,
    seen: Observation,
) -> Plan:
    here = launch.cluster.kind == "local"
    on_gpu = (settings.device != "cpu" and num_gpus() > 0) if here else None
    predictor = Predictor.from_tables(sweep_folders(Path(str(base["results_dir"])).expanduser()), gpu=on_gpu)
    return build_plan(
        expansion,
        sweep=folder.name,
        done=records.read_done(folder.path),
        in_flight=to_leave_alone(folder, seen),
        settings=replace(settings, data_revisions=tuple(sorted(data_revisions(_tasks(expansion), str(base["results_dir"])).items()))),
        launch=replace(launch, sources=source_digest(running_package()), variables=_offline_switches(expansion, base)),
        workers=workers if here else None,
        predictor=predictor,
    )


def _offline_switches(expansion: Expansion, base: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Workers leave the hub alone if nothing of this plan needs it (see `quantsweep prewarm`)."""
    needed = _models(expansion), _tasks(expansion), str(base["results_dir"]), calibrations(expansion)
    return tuple(sorted(offline_environment(*needed).items()))


def _models(expansion: Expansion) -> list[ModelSpec]:
    return list({id(planned.trial.model): planned.trial.model for planned in expansion.trials}.values())


def calibrations(expansion: Expansion) -> set[CalibrationSpec]:
    """The calibration texts of a study."""
    return {c for planned in expansion.trials if (c := planned.trial.calibration) is not None}


def _tasks(expansion: Expansion) -> set[TaskSpec]:
    suites = {id(planned.tasks): planned.tasks for planned in expansion.trials}
    return {task for suite in suites.values() for task in suite}


def _typed(arguments: Sequence[str]) -> dict[str, str]:
    """What was typed, single values and lists alike, by key."""
    return {key.lstrip("+"): value for key, _, value in (as_typed(argument).partition("=") for argument in arguments)}


def _without_dropped(expansion: Expansion, folder: SweepFolder) -> Expansion:
    return replace(expansion, trials=without_dropped(folder, expansion.trials))


def _refuse_borrowed_name(cfg: DictConfig, request: Request, folders: Sequence[Path], typed: Mapping[str, str]) -> None:
    """Weights of one's own under the name of a model that has its own, or of several, would be averaged with theirs."""
    if "model.path" not in typed or "model.name" in typed:
        return
    axes = [axis.values for grid in request.grids for axis in grid.axes if axis.key == "model"]
    options = sorted({str(value) for values in axes for value in values}) or [str(OmegaConf.select(cfg, "hydra.runtime.choices.model"))]
    named = [name for name in options if has_option(folders, "model", name) and load_yaml(folders, f"model/{name}").get("path") is not None]
    if named or len(options) > 1:
        raise ConfigurationError(
            f"model.path={typed['model.path']} would be scored under the name of {', '.join(named or options)}, which "
            f"{'has weights of its own' if named else 'are several models'}. Type model=/the/folder (its own name), "
            "or give it one: model.name=…"
        )


def _refuse_without_code(expansion: Expansion) -> None:
    """A yaml of one's own names a step or data type that no Python file is there for: each of its trials would fail."""
    quantizations = {id(planned.trial.quantization): planned.trial.quantization for planned in expansion.trials}.values()
    steps = {(factor, step.name) for quantization in quantizations for factor, steps in quantization.steps.items() for step in steps}
    steps = {(factor, name) for factor, name in steps if name not in STEPS[factor].names()}
    types = {q.data_type for q in quantizations if q.data_type is not None and not is_codebook(q)} - set(DATA_TYPES.names())
    missing = [*sorted(steps), *(("data_type", name) for name in sorted(types))]
    if missing:
        raise ConfigurationErrors(
            f"{kind} {name} has a yaml and no code: write {_room(kind)}/{name}.py (CONTRIBUTING.md says how)"
            + ("; a codebook needs none, and lists options.levels" if kind == "data_type" else "")
            for kind, name in missing
        )


def _room(kind: str) -> str:
    """The folder of a component's code."""
    return (DATA_TYPES if kind == "data_type" else STEPS[kind]).package.replace(".", "/")


def _refuse_foreign_tasks(tasks: set[TaskSpec], settings: RunSettings | None) -> None:
    """Who gives a folder of tasks means one of them: that none of those asked for is there is a slip in the folder or the names."""
    if settings is None or settings.task_path is None or not tasks or any(task.own_content is not None for task in tasks):
        return
    defined = sorted(read_own_tasks(Path(settings.task_path)).definitions)
    asked = ", ".join(sorted({task.lm_eval_task or task.name for task in tasks}))
    raise ConfigurationError(
        f"task_path {settings.task_path} defines none of the tasks asked for ({asked}); "
        f"its YAMLs define {', '.join(defined) or 'none'}. Give task=… of these (conf/task names them), or task_path=null"
    )


def _collect(problems: list[str], step: Callable[[], T]) -> T | None:
    try:
        return step()
    except ConfigurationErrors as errors:
        problems.extend(errors.problems)
    except QuantsweepError as error:
        problems.append(str(error))
    return None


def asked_folder(base: Mapping[str, Any]) -> SweepFolder:
    """The sweep's folder, from the composed configuration; one that cannot be written to is refused."""
    sweep = checks.text("sweep", base["sweep"], "sweep=NAME, the name of the folder under results_dir")
    folder = sweep_folder(results_dir(base), sweep)
    try:
        folder.check()
    except OSError as error:
        raise ConfigurationError(
            f"results folder {folder.path} cannot be: {error.strerror}. Give another results_dir=… or sweep=…"
        ) from error
    return folder


def results_dir(base: Mapping[str, Any]) -> str:
    """Where sweeps lie, from the composed configuration."""
    return checks.text("results_dir", base["results_dir"], "results_dir=FOLDER (results_dir=. for this one)")


def task_path(base: Mapping[str, Any]) -> str | None:
    """The folder of a user's own tasks, from the composed configuration; None for none."""
    if base["task_path"] is None:
        return None
    typed = checks.text("task_path", base["task_path"], "task_path=FOLDER, or task_path=null for none")
    folder = Path(typed).expanduser().resolve()
    if not is_folder(folder):
        raise ConfigurationError(f"task_path {folder} is not a folder; give a folder of lm-eval task YAMLs")
    refuse_whole_home(folder)
    return str(folder)


def run_settings(base: Mapping[str, Any]) -> RunSettings:
    """How trials are run, from the composed configuration."""
    data = {
        "device": base["device"],
        "batch_size": base["batch_size"],
        "task_path": task_path(base),
        "trial_timeout_minutes": base["trial_timeout_minutes"],
    }
    settings = convert(RunSettings, data, "settings")
    tracking = dict(base["tracking"])
    known = ("kind", "project", "entity", "mode")
    for key in set(tracking) - set(known):
        raise ConfigurationError(f"tracking: {did_you_mean('key', key, known)}. Keys and passwords belong into wandb's own login")
    if tracking.get("kind") not in ("none", "wandb"):
        raise ConfigurationError(f"tracking.kind must be none or wandb, got {tracking.get('kind')!r}")
    if tracking["kind"] == "wandb" and tracking.get("mode") not in ("online", "offline"):
        raise ConfigurationError(f"tracking.mode must be online or offline, got {tracking.get('mode')!r}")
    if tracking["kind"] == "wandb" and (lack := what_lacks(tracking["mode"])) is not None:
        raise ConfigurationError(lack)
    return RunSettings(**{key: getattr(settings, key) for key in data}, tracking=options_tuple(tracking))


def launch_settings(base: Mapping[str, Any], cluster: ClusterSpec) -> LaunchSettings:
    """Budget, retries, breaker, the length of shards and the launch's tag, from the composed configuration."""
    data = {key: base[key] for key in ("max_retries", "breaker_trials", "shard_minutes")}
    if base["tag"] is not None:
        data["tag"] = checks.text("tag", base["tag"], "tag=TEXT, or tag=null for none")
    rest = convert(LaunchSettings, {**data, "gpu_hours": base["budget"]["gpu_hours"]}, "launch")
    return replace(rest, cluster=cluster)


def _title(request: Request) -> str:
    study = request.base["study"]
    return str(study["title"]) if study and study.get("title") else str(request.base["sweep"])
