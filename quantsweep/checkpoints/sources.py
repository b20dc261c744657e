"""Models that no yaml is named after: a folder, a package's data, or a name on the hub, typed where a model's name may stand.

    model=/runs/step100/hf,/runs/step200/hf      two models, named step100 and step200: by what differs
    model=glob(/runs/step*/hf)                   every folder that fits, in order
    model=organisation/name                      one of the hub

A name labels rows and is plain (letters, digits, `.`, `_`, `+`, `-`); the identity of a model is its content, whatever it is called.
"""

from __future__ import annotations

import glob
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from quantsweep.errors import ConfigurationError
from quantsweep.storage.paths import is_folder
from quantsweep.trial.specs import is_plain

PACKAGE = "package:"


def is_source(value: Any) -> bool:
    """True for a path or a hub id, as opposed to the name of a yaml."""
    return isinstance(value, str) and ("/" in value or value.startswith(("~", PACKAGE)))


def source_of(value: str) -> tuple[str, str]:
    """The yaml of `conf/model` for a path or a hub id, and the key that takes it: an id has two parts, and no folder is called so."""
    is_path = value.startswith(("/", "~", ".", PACKAGE)) or value.count("/") != 1 or is_folder(Path(value))
    return ("local", "path") if is_path else ("hub", "hub_id")


def folders_of(patterns: Sequence[str], exclude: Sequence[str]) -> tuple[str, ...]:
    """The folders that fit one of the patterns and none of `exclude`, in order; raises ConfigurationError if there are none."""
    found, out = ({path for pattern in each for path in _matches(pattern)} for each in (patterns, exclude))
    folders = sorted(path for path in found - out if is_folder(Path(path)))
    if not folders:
        raise ConfigurationError(f"model=glob({','.join(patterns)}) matches no folder here ({Path.cwd()})")
    return tuple(folders)


def _matches(pattern: str) -> list[str]:
    return glob.glob(str(Path(pattern).expanduser()))  # noqa: PTH207 - patterns may be absolute, which Path.glob refuses


def names_of(sources: Iterable[str]) -> dict[str, str]:
    """A plain name for each source: its last part, or of sources that share theirs the parts in which they differ.

    >>> names_of(["/runs/step100/hf", "/runs/step200/hf", "/other/opt 1"])
    {'/runs/step100/hf': 'step100', '/runs/step200/hf': 'step200', '/other/opt 1': 'opt-1'}
    """
    sources = list(dict.fromkeys(sources))
    parts = {source: _parts(source) for source in sources}
    last = Counter(each[-1] for each in parts.values())
    names = {source: plain_name(each[-1]) for source, each in parts.items() if last[each[-1]] == 1}
    for shared in (name for name, number in last.items() if number > 1):
        names |= _by_difference({source: each for source, each in parts.items() if each[-1] == shared})
    twice = {name for name, number in Counter(names.values()).items() if number > 1}
    return {source: f"{names[source]}-{_digest(source)}" if names[source] in twice else names[source] for source in sources}


def plain_name(text: str) -> str:
    """A text as a name that labels rows and leaves no folder: accents are dropped, other signs become `-`.

    >>> plain_name("größe (alt)"), plain_name("lr=1e-4")
    ('grosse-alt', 'lr-1e-4')
    """
    if is_plain(text):
        return text
    ascii_text = unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._+]+", "-", ascii_text).strip("-._+")
    return plain or f"model-{_digest(text)}"


def _by_difference(parts: dict[str, list[str]]) -> dict[str, str]:
    """Names from the parts that are not the same at the beginning or the end of all; the last part stands in where nothing is left."""
    before = _num_equal(parts.values())
    after = _num_equal([each[::-1] for each in parts.values()])
    return {source: plain_name("-".join(each[before : len(each) - after] or each[-1:])) for source, each in parts.items()}


def _num_equal(rows: Iterable[list[str]]) -> int:
    """How many first entries all rows share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _parts(source: str) -> list[str]:
    return [part for part in re.split(r"[/:]", source) if part] or [source]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:6]
