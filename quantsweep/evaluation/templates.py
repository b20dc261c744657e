"""lm-eval's prompt templates, compiled once instead of once a document.

`lm_eval.utils.apply_template` compiles its Jinja template at every call: 0.2 ms for each field of each
document, when requests are rendered and again when every trial is scored.  The templates of a task are
a handful of constant strings, so compiled ones are kept; what they render is the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import lm_eval.utils

_COMPILE = lm_eval.utils.env.from_string


@functools.lru_cache(maxsize=1024)
def _compiled(template: str) -> Any:
    return _COMPILE(template)


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Within this context lm-eval finds its templates compiled."""
    lm_eval.utils.env.from_string = _compiled
    try:
        yield
    finally:
        lm_eval.utils.env.from_string = _COMPILE
