"""Change a module when it is imported, and die at a named function: tools for a process that knows nothing of them.

The product has no test hooks.  Python runs `sitecustomize` before anything else in every process that
has this folder on PYTHONPATH, also in jobs, in their children, and from a snapshot of the code; what it
asks for here is done right after a module's own code has run, before any importer has taken a name from it.
(A module that runs as `__main__`, by `python -m`, is out of reach: name a function of a module that it imports.)
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]

MOMENTS = ("before", "after")
PLACES = ("login", "job", "any")


class _Finder(MetaPathFinder):
    """Lets the other finders find, and adds the actions to what they found."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        actions = self.actions.get(fullname)
        if not actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for action in actions:
                action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def on_import(module: str, action: Action) -> None:
    """Call `action` with a module as soon as it has been imported; now, if it is imported already."""
    if module in sys.modules:
        action(sys.modules[module])
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.actions.setdefault(module, []).append(action)


@dataclass(frozen=True, kw_only=True)
class KillPoint:
    """Where a process kills itself: `module:function:before|after:n[:login|job|any]`.

    function: as Python qualifies it (`Submission.save`).  before: at the n-th call; after: when the n-th call has
    returned (not when it raised).  Calls are counted in each process by itself.  login (the default): only outside of
    Slurm's jobs, which inherit the launcher's environment; job: only inside.
    """

    module: str
    function: str
    moment: str
    call: int = 1
    place: str = "login"

    def __post_init__(self) -> None:
        if self.moment not in MOMENTS or self.place not in PLACES or self.call < 1 or not self.module or not self.function:
            raise ValueError(f"kill point {self}: expected module:function:{'|'.join(MOMENTS)}:n[:{'|'.join(PLACES)}], n from 1")

    def __str__(self) -> str:
        return f"{self.module}:{self.function}:{self.moment}:{self.call}:{self.place}"

    @classmethod
    def parse(cls, text: str) -> KillPoint:
        """The inverse of `str`; raises ValueError for anything else."""
        parts = text.split(":")
        if len(parts) not in (4, 5) or not parts[3].isdecimal():
            raise ValueError(f"kill point {text!r}: expected module:function:before|after:n[:login|job|any]")
        return cls(module=parts[0], function=parts[1], moment=parts[2], call=int(parts[3]), place=(*parts, "login")[4])

    @property
    def is_here(self) -> bool:
        """True in a process that the point is meant for."""
        return self.place == "any" or (self.place == "job") == ("SLURM_JOB_ID" in os.environ)


def arm(point: KillPoint, state: Path) -> None:
    """Die at `point`; once in all, over all processes that share the folder `state`, which keeps a file of it."""
    on_import(point.module, lambda module: _wrap(module, point, state))


def fired(point: KillPoint, state: Path) -> bool:
    """True once some process died at `point`."""
    return _marker(point, state).exists()


def _marker(point: KillPoint, state: Path) -> Path:
    return state / f"killed-{str(point).replace(':', '-')}"


def _wrap(module: ModuleType, point: KillPoint, state: Path) -> None:
    *holders, name = point.function.split(".")
    holder: Any = functools.reduce(getattr, holders, module)
    found = inspect.getattr_static(holder, name)  # raises AttributeError: a point that does not exist must not pass unnoticed
    kind = type(found) if isinstance(found, (staticmethod, classmethod)) else None
    function = found.__func__ if kind is not None else found
    if not callable(function):
        raise TypeError(f"kill point {point}: {point.function} is not a function")
    counter = itertools.count(1)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        is_it = next(counter) == point.call
        if is_it and point.moment == "before":
            _die(point, state)
        result = function(*arguments, **options)
        if is_it and point.moment == "after":
            _die(point, state)
        return result

    setattr(holder, name, wrapped if kind is None else kind(wrapped))


def _die(point: KillPoint, state: Path) -> None:
    try:
        _marker(point, state).touch(exist_ok=False)  # O_EXCL: one process only
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
