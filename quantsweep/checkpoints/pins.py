"""Which commit a name of the hub stands for: decided once, written down, read at each planning.

    <results_dir>/pins.json      {"models": {"EleutherAI/pythia-70m": {"revision": "<40 hex>", "files": {…}}}, "tasks": {…}, "texts": {…}}

A branch of the hub may move tomorrow, and a trial's identity may not.  `quantsweep prewarm` resolves
a name, downloads what it stands for and writes the commit here; planning fills it in where a model's
yaml leaves `revision: null`.  A commit changes in this file only when somebody asks for that
(`prewarm --update`).  The file is made for people too: sorted, one line a fact, under version control if they like.

It also says which files were fetched, so that workers can be told to leave the network alone
(`offline_environment`) exactly when everything they need lies in the cache.

Planning reads this on a login node: no torch, and the hub's library only where the cache is looked at.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quantsweep.errors import ResultsError
from quantsweep.storage.files import checked_file, write_text
from quantsweep.trial.identity import cache_dir
from quantsweep.trial.specs import PERPLEXITY, ModelSpec, TaskSpec, TextSource

PINS_FILE = "pins.json"
BUNDLED_TASKS = "mini"
"""Folder of the tasks that ship with the product: they need no network."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that keep the libraries of the hub from the network."""

_FORMAT = 1
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class FileFact:
    """Size in bytes, and the hash that the hub gives: SHA-256 of large files; of small ones git's own (`blob`)."""

    size: int
    sha256: str | None = None
    blob: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelPin:
    """One model of the hub at one commit.

    files: what a worker reads.  converted: they lie in `converted_folder`, made from a checkpoint that
    has pickled weights only; otherwise in the hub's cache.
    """

    revision: str
    files: Mapping[str, FileFact]
    resolved_at: str
    converted: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskPin:
    """The data of one task: which (`hub:<commit>`, `sha256:…`, None if it cannot be known), and where in the cache of `datasets`."""

    dataset: str
    config: str | None
    revision: str | None
    resolved_at: str
    own_content: str | None = None
    cached: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextPin:
    """The files of a text (calibration, perplexities) at one commit of a data set on the hub."""

    revision: str
    files: Mapping[str, FileFact]
    resolved_at: str


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Everything that is written down in one results folder.

    models: by hub id for heads of default branches, by `hub_id@commit` where a yaml names the commit itself.
    texts: by data set and files, with the commit or branch that a yaml names (`text_key`).
    """

    models: Mapping[str, ModelPin] = field(default_factory=dict)
    tasks: Mapping[str, TaskPin] = field(default_factory=dict)
    texts: Mapping[str, TextPin] = field(default_factory=dict)

    def text_revision(self, source: TextSource) -> str | None:
        """The commit that a text's data set stands for; None if nobody has decided."""
        pin = self.texts.get(text_key(source))
        return None if pin is None else pin.revision

    def of_text(self, source: TextSource) -> TextPin | None:
        """What is known of a text at exactly the commit of its spec."""
        candidates = (self.texts.get(text_key(replace(source, revision=None))), self.texts.get(text_key(source)))
        return next((pin for pin in candidates if pin is not None and source.revision in (None, pin.revision)), None)

    def revision(self, hub_id: str) -> str | None:
        """The commit that a model's name stands for; None if nobody has decided."""
        pin = self.models.get(hub_id)
        return None if pin is None else pin.revision

    def of_model(self, spec: ModelSpec) -> ModelPin | None:
        """What is known of a model at exactly the commit of its spec."""
        candidates = (self.models.get(str(spec.hub_id)), self.models.get(f"{spec.hub_id}@{spec.revision}"))
        return next((pin for pin in candidates if pin is not None and spec.revision in (None, pin.revision)), None)

    def of_task(self, spec: TaskSpec) -> TaskPin | None:
        """What is known of a task's data, if it was looked at under the same definition."""
        pin = self.tasks.get(spec.name)
        return pin if pin is not None and pin.own_content == spec.own_content else None


def text_key(source: TextSource) -> str:
    """What a text is pinned under: `allenai/c4/en/c4-train.00000-of-01024.json.gz`."""
    place = source.revision or source.branch
    return f"{source.hub_id}{f'@{place}' if place else ''}/{source.files}"


def pins_path(results_dir: str | Path) -> Path:
    """Where the pins of a results folder are."""
    return Path(results_dir).expanduser() / PINS_FILE


def read_pins(results_dir: str | Path) -> Pins:
    """The pins of a results folder, none if there is no file; raises ResultsError for a file that cannot be understood."""
    path = pins_path(results_dir)
    try:
        content = json.loads(checked_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Pins()
    except (OSError, ValueError) as error:
        raise ResultsError(_unreadable(path, error)) from error
    try:
        if content["format"] != _FORMAT:
            raise ResultsError(f"{path} has format {content['format']}, this version of quantsweep reads format {_FORMAT}")
        models = {name: _model_pin(pin) for name, pin in content["models"].items()}
        tasks = {name: TaskPin(**{**pin, "cached": tuple(pin["cached"])}) for name, pin in content["tasks"].items()}
        texts = {name: _text_pin(pin) for name, pin in content.get("texts", {}).items()}  # earlier versions knew none
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ResultsError(_unreadable(path, error)) from error
    return Pins(models=models, tasks=tasks, texts=texts)


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} cannot be read ({error}): which models the names stand for is unknown. Mend it, or move it away and prewarm again"


def _model_pin(content: Mapping[str, Any]) -> ModelPin:
    files = {name: FileFact(**fact) for name, fact in content["files"].items()}
    pin = ModelPin(**{**content, "files": files})
    if not _COMMIT.fullmatch(pin.revision):
        raise ValueError(f"revision {pin.revision!r} is not a commit of 40 hexadecimal digits")
    if bad := [name for name in files if Path(name).name != name]:
        raise ValueError(f"file {bad[0]!r} is not a plain name")
    return pin


def _text_pin(content: Mapping[str, Any]) -> TextPin:
    pin = TextPin(**{**content, "files": {name: FileFact(**fact) for name, fact in content["files"].items()}})
    if not _COMMIT.fullmatch(pin.revision):
        raise ValueError(f"revision {pin.revision!r} is not a commit of 40 hexadecimal digits")
    if bad := [name for name in pin.files if name.startswith("/") or ".." in Path(name).parts]:
        raise ValueError(f"file {bad[0]!r} leaves its data set")
    return pin


def add_pins(
    results_dir: str | Path,
    *,
    models: Mapping[str, ModelPin] | None = None,
    tasks: Mapping[str, TaskPin] | None = None,
    texts: Mapping[str, TextPin] | None = None,
) -> None:
    """Write pins down, beside those that are there; the file is replaced in one step.

    It is read again right before, so that another prewarm's pins stay.  Raises ResultsError when it cannot be written.
    """
    known = read_pins(results_dir)
    content = {
        "format": _FORMAT,
        "models": {name: asdict(pin, dict_factory=_told) for name, pin in {**known.models, **(models or {})}.items()},
        "tasks": {name: asdict(pin) for name, pin in {**known.tasks, **(tasks or {})}.items()},
        "texts": {name: asdict(pin, dict_factory=_told) for name, pin in {**known.texts, **(texts or {})}.items()},
    }
    path = pins_path(results_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise ResultsError(f"{path} cannot be written: {error.strerror}. Give another place with results_dir=…") from error


def _told(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What is known, without the nulls of what is not."""
    return {key: value for key, value in items if value is not None}


# --- where the files are -----------------------------------------------------------------------------------------------------


def converted_folder(hub_id: str, revision: str) -> Path:
    """The folder of a model that was converted to safetensors by prewarm, whether or not it exists."""
    return cache_dir() / "converted" / hub_id.replace("/", "--") / revision


def model_folder(hub_id: str, pin: ModelPin) -> Path:
    """Where the files of a pinned model lie once they are fetched."""
    if pin.converted:
        return converted_folder(hub_id, pin.revision)
    from huggingface_hub import constants  # its import costs what a plan need not pay
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model") / "snapshots" / pin.revision


def is_model_here(hub_id: str, pin: ModelPin) -> bool:
    """True if every file of a pinned model is in the cache, whole."""
    folder = model_folder(hub_id, pin)
    return all(_size(folder / name) == fact.size for name, fact in pin.files.items())


def text_folder(hub_id: str, revision: str) -> Path:
    """Where the files of a data set of the hub lie at one commit, once they are fetched."""
    from huggingface_hub import constants  # its import costs what a plan need not pay
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="dataset") / "snapshots" / revision


def is_text_here(hub_id: str, pin: TextPin) -> bool:
    """True if every file of a pinned text is in the cache, whole."""
    folder = text_folder(hub_id, pin.revision)
    return all(_size(folder / name) == fact.size for name, fact in pin.files.items())


def is_task_here(pin: TaskPin) -> bool:
    """True if the data of a task is in the cache of `datasets` (or needs none)."""
    return all((datasets_cache() / place).is_dir() for place in pin.cached)


def datasets_cache() -> Path:
    """Where the library `datasets` keeps data, as its own configuration finds it (importing it takes seconds)."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def offline_environment(
    models: Iterable[ModelSpec], tasks: Iterable[TaskSpec], results_dir: str | Path, texts: Iterable[TextSource] = ()
) -> dict[str, str]:
    """Variables that switch the hub off for workers, if these models, tasks and calibration texts need nothing from it; else none.

    That is so when each model of the hub is pinned and whole in the cache, and the data of each task was
    fetched.  Call it once a launch, on a machine that shares the cache with the nodes.
    """
    pins = read_pins(results_dir)
    wanted = [spec for spec in models if spec.path is None and spec.unavailable is None]
    hub_ids = [(str(spec.hub_id), pins.of_model(spec)) for spec in wanted]
    asked = list(tasks)
    of_lm_eval = [spec for spec in asked if spec.kind != PERPLEXITY]
    data = [pins.of_task(spec) for spec in of_lm_eval if spec.own_content is not None or spec.folder != BUNDLED_TASKS]
    sources = [source for source in (*texts, *(spec for spec in asked if spec.kind == PERPLEXITY)) if source.path is None]
    files = [(str(source.hub_id), pins.of_text(source)) for source in sources]
    ready = (
        all(pin is not None and is_model_here(hub_id, pin) for hub_id, pin in hub_ids)
        and all(pin is not None and is_task_here(pin) for pin in data)
        and all(pin is not None and is_text_here(hub_id, pin) for hub_id, pin in files)
    )
    return dict.fromkeys(OFFLINE, "1") if ready else {}


def data_revisions(tasks: Iterable[TaskSpec], results_dir: str | Path) -> dict[str, str]:
    """Task → revision of its data, where that was pinned and can be known."""
    pins = read_pins(results_dir)
    found = {spec.name: pins.of_task(spec) for spec in tasks}
    return {name: pin.revision for name, pin in found.items() if pin is not None and pin.revision is not None}


def own_switches() -> dict[str, str]:
    """What this environment itself says to the hub's switches; a launch keeps it for its jobs, unless the plan has switched the hub off."""
    return {name: os.environ[name] for name in OFFLINE if name in os.environ}


def offline_switches() -> list[str]:
    """Names of the variables that switch the hub off in this environment."""
    return [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
