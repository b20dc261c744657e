"""What of a checkpoint a model has no place for: found before transformers' own lists pass over it, and refused unless it is nothing.

harmless        tables that every model makes anew (`headers.is_harmless`)
left out        parts that are none of the language model (`checkpoints.left_out`)
all the rest    a checkpoint and a config.json that do not belong together: its weights would be dropped
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from quantsweep.checkpoints import headers
from quantsweep.checkpoints.left_out import guesses_next_tokens, is_of_another_sense
from quantsweep.errors import ModelError


@contextmanager
def noted_unplaced() -> Iterator[set[str]]:
    """Collects the tensors for which the model that is loaded meanwhile has no place.

    transformers reports them less those that lists of its own name, whatever lies there: seen before that.
    """
    names: set[str] = set()
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def noting(self: PreTrainedModel, loading_info: LoadStateDictInfo) -> None:
        names.update(map(str, loading_info.unexpected_keys))
        adjust(self, loading_info)

    PreTrainedModel._adjust_missing_and_unexpected_keys = noting  # type: ignore[method-assign]
    try:
        yield names
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = adjust  # type: ignore[method-assign]


def check_nothing_dropped(model: str, unplaced: set[str], reported: set[str], folder: Path) -> None:
    """Raise ModelError for tensors that are neither loaded, nor harmless, nor of a part that is left out by design.

    unplaced: what `noted_unplaced` collected.  reported: those of them that transformers names; folder: where the files lie.
    """
    if not unplaced:
        return
    tensors, config = headers.read_tensors(folder), headers.read_config(folder)
    # A checkpoint of the base model alone has names without the prefix that transformers reports them with.
    facts = {key: next((fact for name, fact in tensors.items() if f".{key}".endswith(f".{name}")), None) for key in sorted(unplaced)}
    others = guesses_next_tokens(unplaced, config) | {key for key in unplaced - reported if is_of_another_sense(key)}
    if keys := [key for key, fact in facts.items() if key not in others and not headers.is_harmless(key, fact)]:
        raise ModelError(
            f"model {model}: {len(keys)} weights of the checkpoint have no place in the model that its config.json describes "
            f"({some(keys)}) and would be dropped; the files and the config.json do not belong together"
        )


def some(names: Iterable[str]) -> str:
    """The first of them, for a message."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")
