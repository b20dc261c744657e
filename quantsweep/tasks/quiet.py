"""lm-eval without its chatter: progress bars, and remarks that are about how it is meant to be called.

Warnings that tell something about the data or the scores pass: only messages listed here are held back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import datasets
import lm_eval.api.task

from quantsweep.tasks.progress import OnProgress, reporting, silent

# Phrases of the messages that say nothing to a reader of our logs, by where they come from.
_CHATTER = (
    "is defined, but",  # "[Task: x] metric acc is defined, but aggregation is not. using default …"
    "Custom kwargs can be passed to `--metadata`",
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model",
)
_LOGGERS = ("lm_eval.api.task", "lm_eval.models.huggingface")


class _DropChatter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(phrase in message for phrase in _CHATTER)


@contextlib.contextmanager
def quiet(on_progress: OnProgress = silent) -> Iterator[None]:
    """Hold back the progress bars of lm-eval and datasets and the remarks listed above.

    on_progress: called where lm-eval's bar over the documents would move.
    """
    chatter = _DropChatter()
    had_bars = not datasets.are_progress_bars_disabled()
    bar = lm_eval.api.task.tqdm
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(chatter)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda documents, **_options: reporting(documents, on_progress)  # it offers no switch
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if had_bars:
            datasets.enable_progress_bars()
        for logger in loggers:
            logger.removeFilter(chatter)
