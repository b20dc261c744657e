"""The tasks of a user's own folder (`task_path`) as options of Hydra's group `task`: `task=NAME` is all that is typed.

For each task that the folder's YAMLs define and no conf/task names, a yaml of our own form is written into the user's cache,
which then lies on Hydra's search path.  A yaml of the user's in conf/task says it otherwise, and comes first.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantsweep.composing.components import has_option
from quantsweep.errors import ConfigurationError, EvaluationError
from quantsweep.storage.files import write_text
from quantsweep.trial.identity import cache_dir
from quantsweep.trial.task_identity import Definition, read_own_tasks

_DEFAULT_METRICS = {
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
}
"""What lm-eval measures, by output type, where a YAML has no metric_list."""
_HIGHER_IS_BETTER = {
    **dict.fromkeys(("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc"), True),
    **dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score"), False),
}
"""Directions where a YAML says none, as lm-eval has them."""
_HEADLINES = ("bits_per_byte", "acc")


def options_folder() -> Path:
    """Where the yamls of all folders lie."""
    return cache_dir() / "tasks"


def refuse_whole_home(folder: Path) -> None:
    """Raise ConfigurationError for a home folder, or one above it: every folder below would be looked through for YAMLs."""
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111 - a user id without a home is no error here
    if home.is_relative_to(folder):
        raise ConfigurationError(f"task_path {folder} holds a whole home folder; give the folder of the task YAMLs itself")


def write_options(folder: Path, known: Sequence[Path], asked: Iterable[str] = ()) -> Path | None:
    """Write the yamls of the tasks that `folder` defines and `known` (folders like conf/) does not; where they lie, None if there are none.

    Raises ConfigurationError when the cache cannot be written to, and where a YAML that cannot be read seems to define one of `asked`.
    """
    refuse_whole_home(folder.resolve())
    own = read_own_tasks(folder)
    try:
        for name in asked:
            own.definition(name)
    except EvaluationError as error:
        raise ConfigurationError(str(error)) from error
    definitions = [each for each in own.definitions.values() if not has_option(known, "task", each.name)]
    options = {each.name: option for each in definitions if (option := _option(each)) is not None}
    if not options:
        return None
    place = options_folder() / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    try:
        (place / "task").mkdir(parents=True, exist_ok=True)
        for stale in (place / "task").glob("*.yaml"):
            if stale.stem not in options:
                stale.unlink(missing_ok=True)
        for name, option in options.items():
            file, text = place / "task" / f"{name}.yaml", yaml.safe_dump(option, sort_keys=False)
            if not file.is_file() or file.read_text() != text:
                write_text(file, text)
    except OSError as error:
        raise ConfigurationError(f"{place} cannot be written to ({error.strerror}); set XDG_CACHE_HOME to a folder that can") from error
    return place


def _option(definition: Definition) -> dict[str, Any] | None:
    """The yaml of conf/task that a definition needs; None where only the user can say it (a metric without a direction, Python alone)."""
    config = definition.config
    output_type, metadata = config.get("output_type"), config.get("metadata")
    directions = _directions(config)
    if output_type not in _DEFAULT_METRICS or not directions:
        return None
    primary = next((metric for metric in _HEADLINES if metric in directions), next(iter(directions)))
    return {
        "name": definition.name,
        "lm_eval_task": definition.name,
        "folder": "own",
        "version": str(metadata.get("version", "Yaml") if isinstance(metadata, Mapping) else "Yaml"),
        "primary_metric": primary,
        "higher_is_better": directions[primary],
        "num_fewshot": None,
        "default_num_fewshot": config.get("num_fewshot") or 0,
        "limit": None,
        "window": None,
        "protocol": None,
    }


def _directions(config: Mapping[str, Any]) -> dict[str, bool]:
    """The metrics of a task whose direction is known, in its order."""
    listed = config.get("metric_list")
    if not isinstance(listed, list):
        listed = [{"metric": metric} for metric in _DEFAULT_METRICS.get(str(config.get("output_type")), ())]
    named = [entry for entry in listed if isinstance(entry, Mapping) and type(entry.get("metric")) is str]
    found = {entry["metric"]: entry.get("higher_is_better", _HIGHER_IS_BETTER.get(entry["metric"])) for entry in named}
    return {metric: direction for metric, direction in found.items() if isinstance(direction, bool)}
