"""The words of a launch, as they were typed: kept in its plan, shown by `quantsweep show`, typed again by `quantsweep resume`.

Hydra hands on what it made of a command line.  What a person typed is remembered before it sees it, for as long as the process lives.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from quantsweep.errors import ConfigurationError
from quantsweep.redaction import TOKENS

_SECRET_KEY = re.compile(r"(?i)(^|[._-])(token|password|passwd|passphrase|secret|credentials?|(api|access|private)_?key)$")
_SECRET_VALUE = re.compile(TOKENS + r"|://[^/\s:@]+:[^/\s@]+@|(?i:token|password|passwd|secret|api_?key)\s*[=:]\s*[^\s$'\"{}\[\],]{4,}")


@dataclass(frozen=True)
class Typed:
    """The words after `python launch.py`, and the folder in which they were typed, from which their relative paths lead.

    Raises ConfigurationError if one of them looks like a secret: they are kept in a file.
    """

    words: tuple[str, ...]
    folder: str

    def __post_init__(self) -> None:
        for word in self.words:
            if looks_secret(word):
                raise ConfigurationError(
                    f"{word.partition('=')[0]}=… looks like a secret, and a launch keeps its words in its plan; nothing was submitted. "
                    "Put it where its program looks for it (hf auth login, wandb login, an environment variable)"
                )

    @property
    def command(self) -> str:
        """What to type for the same again."""
        return shlex.join(["python", "launch.py", *self.words])


def looks_secret(word: str) -> bool:
    """True if a word of a command line seems to hold a key, a token or a password.

    >>> looks_secret("wandb.api_key=abc"), looks_secret("data_type.options.token=null"), looks_secret("num_tokens=5")
    (True, False, False)
    """
    key, _, value = word.lstrip("+~").partition("=")
    is_set = value.strip("'\"") not in ("", "null", "None") and not value.startswith("${")
    return bool((is_set and _SECRET_KEY.search(key)) or _SECRET_VALUE.search(value))


_remembered: ContextVar[Typed | None] = ContextVar("typed", default=None)


def remember(words: Sequence[str]) -> None:
    """Keep the words that this process was started with; raises ConfigurationError for secrets among them."""
    _remembered.set(Typed(tuple(words), str(Path.cwd())))


def typed(otherwise: Sequence[str]) -> Typed:
    """What was remembered; `otherwise`, for those who go through Hydra without `launch.py`."""
    return _remembered.get() or Typed(tuple(otherwise), str(Path.cwd()))
