"""lm-eval's prompt templates, rendered in a sandbox, and compiled once instead of once a document.

A template comes with a task's YAML, perhaps from a stranger: in Jinja's sandbox it can read a document, and nothing of
Python behind it.  (A task's `!function` runs as it is: a folder of tasks is trusted as code is.)

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
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

_SANDBOX = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)  # as lm-eval's own
_SANDBOX.filters |= lm_eval.utils.env.filters


@functools.lru_cache(maxsize=1024)
def _compiled(template: str) -> Any:
    return _SANDBOX.from_string(template)


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Within this context lm-eval finds its templates compiled, for the sandbox."""
    before = lm_eval.utils.env.from_string
    lm_eval.utils.env.from_string = _compiled
    try:
        yield
    finally:
        lm_eval.utils.env.from_string = before
