"""Fetch once, on a machine with a network, what a study's workers will read without one.

    name on the hub → commit (the pinned one; else the head of the default branch, or what the yaml names)
                    → files: safetensors, config, tokenizer, nothing else → hub's cache → pins.json

A checkpoint that has pickled weights only is converted to safetensors, once, by a process that does
nothing else (`quantsweep.operations.prewarm_child`).  Data of tasks are fetched by loading each task as a worker would;
texts (calibration, perplexities) are files of a data set, which workers read out of the hub's cache at the pinned commit.

What is here already is not asked for again, so the command may be repeated after an interruption.
Access to gated models is the hub library's own business (`hf auth login` and its token file): no
token is read, passed on or shown here, and no address either, since addresses may carry signatures.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

from quantsweep.checkpoints.pins import (
    BUNDLED_TASKS,
    OFFLINE,
    FileFact,
    ModelPin,
    Pins,
    TaskPin,
    TextPin,
    add_pins,
    converted_folder,
    is_model_here,
    is_task_here,
    is_text_here,
    offline_switches,
    read_pins,
    text_key,
)
from quantsweep.errors import QuantsweepError
from quantsweep.running.environment import module_command, module_variables
from quantsweep.trial.identity import OTHER_TOKENIZER_FILES, TOKENIZER_FILES
from quantsweep.trial.specs import PERPLEXITY, CalibrationSpec, ModelSpec, TaskSpec, TextSource

COMPANIONS = ("config.json", "generation_config.json", "chat_template.jinja", *TOKENIZER_FILES)
"""What stands beside the weights and is fetched with them, where a repository has it; no code."""

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"
SPARE_BYTES = 2**30
"""Free space that a download leaves."""
_TIMEOUT = 30

Kind = Literal["model", "task", "text"]
Repository = Literal["model", "dataset"]
State = Literal["here", "fetched", "skipped", "failed"]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one model, task or calibration text: `here` (it was), `fetched`, `skipped` (it cannot be had by anybody), `failed`."""

    kind: Kind
    name: str
    state: State
    text: str


class _FetchError(QuantsweepError):
    """One model, task or text could not be had; the others go on."""


def prewarm(
    models: Iterable[ModelSpec],
    tasks: Iterable[TaskSpec],
    results_dir: str | Path,
    *,
    calibrations: Iterable[CalibrationSpec] = (),
    task_path: str | None = None,
    update: bool = False,
    report: Report = lambda _text: None,
) -> Iterator[Outcome]:
    """Fetch and pin models, data of tasks and calibration texts; yields an outcome as each is known.

    update: ask the hub again what its default branches are now (ids of trials change where they have moved).
    report: told what is being done, for a display.  Raises ResultsError when pins cannot be read or written.
    """
    pins = read_pins(results_dir)
    for spec in models:
        yield _guarded("model", spec.name, partial(_model, spec, pins, results_dir, update=update, report=report))
    asked = list(tasks)
    of_lm_eval = [spec for spec in asked if spec.kind != PERPLEXITY]
    yield from _tasks(of_lm_eval, pins, results_dir, task_path=task_path, update=update, report=report)
    texts: list[tuple[Kind, str, TextSource]] = [("task", spec.name, spec) for spec in asked if spec.kind == PERPLEXITY]
    texts += [("text", spec.name, spec) for spec in calibrations]
    for kind, name, source in texts:
        yield _guarded(kind, name, partial(_text, source, read_pins(results_dir), results_dir, update=update, report=report))


def _guarded(kind: Kind, name: str, step: Callable[[], tuple[State, str]]) -> Outcome:
    try:
        state, text = step()
    except _FetchError as error:
        state, text = "failed", str(error)
    return Outcome(kind=kind, name=name, state=state, text=text)


# --- models ------------------------------------------------------------------------------------------------------------------


def _model(spec: ModelSpec, pins: Pins, results_dir: str | Path, *, update: bool, report: Report) -> tuple[State, str]:
    if spec.unavailable is not None:
        return "skipped", spec.unavailable
    if spec.path is not None:
        return "here", f"on disk: {spec.path}"
    hub_id = str(spec.hub_id)
    moves = spec.revision is None
    known = pins.of_model(spec)
    if known is not None and not (update and moves) and is_model_here(hub_id, known):
        return "here", f"{hub_id}@{known.revision[:12]}"
    _refuse_offline(hub_id)
    report(f"{hub_id}: asking the hub")
    wanted = None if update and moves else (known.revision if known else spec.revision)
    remote = _resolve(hub_id, wanted)
    pin = _fetch_model(hub_id, remote, report)
    add_pins(results_dir, models={hub_id if moves else f"{hub_id}@{pin.revision}": pin})
    size = sum(fact.size for fact in pin.files.values())
    text = f"{hub_id}@{pin.revision[:12]}, {_size(size)}{', converted to safetensors' if pin.converted else ''}"
    if known is not None and known.revision != pin.revision:
        text += f"; it was at {known.revision[:12]}: its trials are new ones"
    return "fetched", text


@dataclass(frozen=True, kw_only=True)
class _Remote:
    """A repository at one commit, as the hub describes it: of a model the files of its top folder, of a data set all."""

    commit: str
    files: Mapping[str, FileFact]


def _resolve(hub_id: str, revision: str | None, kind: Repository = "model") -> _Remote:
    from huggingface_hub import HfApi  # half a second that `prewarm` of bundled models need not pay

    with _hub_errors(hub_id):
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        info = ask(hub_id, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise _FetchError(f"{hub_id}: the hub names no commit for it")
    files = {
        file.rfilename: FileFact(size=file.size or 0, sha256=file.lfs.sha256 if file.lfs else None, blob=file.blob_id)
        for file in info.siblings or ()
        if kind == "dataset" or "/" not in file.rfilename
    }
    return _Remote(commit=str(info.sha), files=files)


def _fetch_model(hub_id: str, remote: _Remote, report: Report) -> ModelPin:
    if "config.json" not in remote.files:
        raise _FetchError(f"{hub_id} has no config.json: it is not a model that transformers loads")
    companions = [name for name in remote.files if name in COMPANIONS or any(fnmatchcase(name, rarer) for rarer in OTHER_TOKENIZER_FILES)]
    weights = _weights(hub_id, remote, WEIGHTS, report)
    if weights:
        names = [*companions, *weights]
        _download(hub_id, remote, names, report)
        return _pin(remote.commit, {name: remote.files[name] for name in names}, converted=False)
    pickled = _weights(hub_id, remote, PICKLED, report)
    if not pickled:
        raise _FetchError(f"{hub_id} holds neither {WEIGHTS} nor {PICKLED} (nor the index of either); it holds: {_some(remote.files)}")
    source = _download(hub_id, remote, [*companions, *pickled], report)
    report(f"{hub_id}: converting to safetensors")
    return _pin(remote.commit, _convert(hub_id, remote.commit, source, companions), converted=True)


def _pin(commit: str, files: Mapping[str, FileFact], *, converted: bool) -> ModelPin:
    return ModelPin(revision=commit, files=files, resolved_at=_now(), converted=converted)


def _weights(hub_id: str, remote: _Remote, name: str, report: Report) -> list[str]:
    """The files of one kind of weights as transformers finds them, the index included; empty if there are none."""
    index = f"{name}.index.json"
    if name in remote.files:  # goes before an index, as in transformers
        return [name]
    if index not in remote.files:
        return []
    folder = _download(hub_id, remote, [index], report)
    try:
        shards = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise _FetchError(f"{hub_id}: its {index} cannot be read ({error})") from error
    if absent := [shard for shard in shards if shard not in remote.files]:
        raise _FetchError(f"{hub_id}: its {index} names {absent[0]}, which is not in the repository")
    return [index, *shards]


def _download(hub_id: str, remote: _Remote, names: list[str], report: Report, kind: Repository = "model") -> Path:
    """Fetch files of one commit into the hub's cache, and the folder of the last; what lies there is not fetched again."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    need = sum(remote.files[name].size for name in names)
    _check_space(hub_id, Path(constants.HF_HUB_CACHE), need, kind)
    if not sys.stderr.isatty():
        disable_progress_bars()
    for number, name in enumerate(names, 1):
        report(f"{hub_id}: {name} ({number} of {len(names)}, {_size(remote.files[name].size)})")
        with _hub_errors(hub_id):
            path = Path(hf_hub_download(hub_id, name, repo_type=kind, revision=remote.commit))
        if path.stat().st_size != remote.files[name].size:
            raise _FetchError(f"{hub_id}: {name} is {path.stat().st_size} bytes, the hub says {remote.files[name].size}; remove {path}")
    return path.parent


def _check_space(hub_id: str, cache: Path, need: int, kind: Repository = "model") -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    # What is cached already is counted too, so only a download that cannot end well is refused.
    if need > SPARE_BYTES and need + SPARE_BYTES > free and not cache.joinpath(f"{kind}s--{hub_id.replace('/', '--')}").is_dir():
        raise _FetchError(f"{hub_id} needs {_size(need)}, {place} has {_size(free)} free. Give the cache another place with HF_HOME")


def _convert(hub_id: str, commit: str, source: Path, companions: list[str]) -> dict[str, FileFact]:
    target = converted_folder(hub_id, commit)
    _check_space(hub_id, target, sum(file.stat().st_size for file in source.glob("pytorch_model*.bin")))
    try:
        found = _child("convert", {"source": str(source), "target": str(target), "companions": companions}, offline=True)
    except _FetchError as error:
        raise _FetchError(f"{hub_id} has pickled weights only, and converting them failed: {error}") from error
    return {name: FileFact(**fact) for name, fact in found["files"].items()}


# --- tasks -------------------------------------------------------------------------------------------------------------------


def _tasks(
    tasks: list[TaskSpec], pins: Pins, results_dir: str | Path, *, task_path: str | None, update: bool, report: Report
) -> Iterator[Outcome]:
    missing = []
    for spec in tasks:
        known = pins.of_task(spec)
        if spec.own_content is None and spec.folder == BUNDLED_TASKS:
            yield Outcome(kind="task", name=spec.name, state="here", text="bundled")
        elif known is not None and is_task_here(known) and not update:
            yield Outcome(kind="task", name=spec.name, state="here", text=_data_text(known))
        else:
            missing.append(spec)
    for spec in missing:
        report(f"task {spec.name}: loading its data")
        yield _guarded("task", spec.name, partial(_task, spec, pins, results_dir, task_path=task_path, update=update))


def _task(spec: TaskSpec, pins: Pins, results_dir: str | Path, *, task_path: str | None, update: bool) -> tuple[State, str]:
    _refuse_offline(f"the data of {spec.name}")
    found = _child("task", {"task_path": task_path, "task": asdict(spec)}, offline=False)
    pin = TaskPin(**{**found, "cached": tuple(found["cached"])}, own_content=spec.own_content, resolved_at=_now())
    before = pins.of_task(spec)
    if before is not None and not update and before.revision != pin.revision:
        raise _FetchError(
            f"its data were {before.revision} when they were pinned, and are {pin.revision} now. "
            "Rows of both would not be comparable: accept the new ones with --update, or bring the old cache back"
        )
    add_pins(results_dir, tasks={spec.name: pin})
    return "fetched", _data_text(pin)


def _data_text(pin: TaskPin) -> str:
    return f"{pin.dataset}{f'/{pin.config}' if pin.config else ''} {(pin.revision or 'of unknown revision')[:20]}"


# --- texts -------------------------------------------------------------------------------------------------------------------


def _text(source: TextSource, pins: Pins, results_dir: str | Path, *, update: bool, report: Report) -> tuple[State, str]:
    """Fetch the files of one text; planning may have filled its revision in, out of the pin of a branch."""
    if source.path is not None:
        return "here", f"on disk: {source.path}"
    hub_id, pattern, branch = str(source.hub_id), str(source.files), replace(source, revision=None)
    moves = source.revision in (None, pins.text_revision(branch))
    known = pins.of_text(source)
    if known is not None and not (update and moves) and is_text_here(hub_id, known):
        return "here", f"{hub_id}@{known.revision[:12]}: {', '.join(known.files)}"
    _refuse_offline(hub_id)
    report(f"{hub_id}: asking the hub")
    wanted = source.branch if update and moves else (known.revision if known else source.revision or source.branch)
    remote = _resolve(hub_id, wanted, "dataset")
    names = sorted(name for name in remote.files if fnmatchcase(name, pattern))
    if not names:
        raise _FetchError(f"data set {hub_id} has no files like {pattern}; it holds: {_some(remote.files)}")
    _download(hub_id, remote, names, report, "dataset")
    pin = TextPin(revision=remote.commit, files={name: remote.files[name] for name in names}, resolved_at=_now())
    add_pins(results_dir, texts={text_key(branch if moves else source): pin})
    return "fetched", f"{hub_id}@{pin.revision[:12]}: {', '.join(names)}, {_size(sum(fact.size for fact in pin.files.values()))}"


# --- the outside ---------------------------------------------------------------------------------------------------------------


def _child(job: str, request: Mapping[str, Any], *, offline: bool) -> dict[str, Any]:
    """Run one job of `quantsweep.operations.prewarm_child`; raises _FetchError with its reason, or with what it last said."""
    environment = module_variables() | (dict.fromkeys(OFFLINE, "1") if offline else {})
    with tempfile.TemporaryDirectory(prefix="quantsweep-prewarm-") as name:
        asked, answered = Path(name) / "request.json", Path(name) / "answer.json"
        asked.write_text(json.dumps(request))
        argv = module_command("quantsweep.operations.prewarm_child", job, str(asked), str(answered))
        done = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        answer = json.loads(answered.read_text()) if answered.is_file() else None
    if answer is None:
        words = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
        raise _FetchError(f"its process ended with exit status {done.returncode}, and last said: {without_addresses(words)}")
    if "error" in answer:
        raise _FetchError(without_addresses(answer["error"]))
    return dict(answer)


def _refuse_offline(what: str) -> None:
    if switched := offline_switches():
        raise _FetchError(f"{what} is not in the cache, and {', '.join(switched)} switches the hub off. Unset it for this command")


@contextlib.contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """What the hub's library raises, as one sentence with a remedy and without addresses."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _FetchError(
            f"{hub_id} is gated: accept its terms on the hub with your account, then log in once on this machine (hf auth login); "
            "the token stays in the hub's own file"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _FetchError(f"{hub_id} does not exist on the hub, or is private: check the name, or log in (hf auth login)") from error
    except errors.RevisionNotFoundError as error:
        raise _FetchError(f"{hub_id} has no such commit any more: remove its pin, or take the present one with --update") from error
    except Exception as error:  # the hub's library changed its HTTP library twice, and raises whatever that raises
        what = without_addresses(str(error).splitlines()[0] if str(error) else "")
        raise _FetchError(f"{hub_id} cannot be fetched: {type(error).__name__}: {what}. Is there a network here?") from error


def without_addresses(text: str) -> str:
    """The text with the query of every address cut off: it may hold a signature that opens the door.

    >>> without_addresses("404 for https://a.b/c?X-Signature=secret here")
    '404 for https://a.b/c?… here'
    """
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1?…", text)


def _some(names: Iterable[str], limit: int = 8) -> str:
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (f", … ({len(listed)} in all)" if len(listed) > limit else "")


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
