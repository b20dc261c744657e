"""Where things are: the configuration that comes with the product, and the rooms of a results folder.

In a checkout `conf/` and `sweeps/` stand beside the package; in a wheel they lie inside it.
"""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import quantsweep
from quantsweep.errors import ResultsError
from quantsweep.storage.files import OTHERS_MAY_WRITE, PRIVATE
from quantsweep.trial.specs import check_name

logger = logging.getLogger(__name__)
TABLES = ("trials", "metrics", "samples", "layers")


def product_root() -> Path:
    """The folder that holds `conf/` and `sweeps/`: the checkout, or the installed package."""
    package = Path(quantsweep.__file__).resolve().parent
    return package.parent if (package.parent / "conf" / "config.yaml").is_file() else package


def is_folder(path: Path) -> bool:
    """True for a folder; False for everything else, also for what the system refuses as a name (too long, a null in it)."""
    try:
        return path.is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


@dataclass(frozen=True)
class SweepFolder:
    """The rooms of `results/<sweep>/`.

    plan/      one Parquet a launch or retry: what was asked, and which shard runs it; submissions (JSON)
    holds/     one small JSON a hold: trials that are not run for now
    workers/   one small JSON a worker: which trial it is at, and when it was last heard of
    trials/ metrics/ samples/ layers/     Parquet, one file a worker, only ever replaced whole
    logs/      one file a worker; the trials table holds each trial's place in it
    code/      copies of the code that jobs run, and uncommitted changes that rows refer to by hash
    """

    path: Path

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name

    def table(self, name: str) -> Path:
        """The folder of one table."""
        return self.path / name

    @property
    def plan(self) -> Path:
        """The folder of plans and submissions."""
        return self.path / "plan"

    @property
    def holds(self) -> Path:
        """The folder of holds."""
        return self.path / "holds"

    @property
    def workers(self) -> Path:
        """The folder of workers' records."""
        return self.path / "workers"

    @property
    def logs(self) -> Path:
        """The folder of logs."""
        return self.path / "logs"

    @property
    def code(self) -> Path:
        """The folder of uncommitted changes, one diff a hash."""
        return self.path / "code"

    def create(self) -> None:
        """Make all rooms; raises ResultsError if that is not possible or if others may write here."""
        try:
            for room in self._rooms():
                if not room.is_dir():
                    room.mkdir(parents=True, exist_ok=True)
                    room.chmod(room.stat().st_mode & ~OTHERS_MAY_WRITE)  # whatever the umask of the site
        except OSError as error:
            raise ResultsError(f"results folder {self.path} cannot be made: {error.strerror}. Give another with results_dir=…") from error
        self.check()

    def check(self) -> None:
        """Refuse a folder that cannot be written to, or that others can (jobs run code and plans from it)."""
        if not self.path.exists():
            self._check_parent()
            return
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ResultsError(f"results folder {self.path} is not writable. Give another with results_dir=…")
        for room in filter(Path.is_dir, self._rooms()):
            there = room.stat()
            if os.getuid() not in (0, there.st_uid) and there.st_uid != 0:
                words = "is somebody else's, and jobs trust what is in it. Give another with results_dir=…"
                _refuse(room, words, is_known=_new_file(room).st_uid == os.getuid())
            if there.st_mode & OTHERS_MAY_WRITE:
                words = f"is writable by others, and jobs trust what is in it. Run: chmod -R go-w '{self.path}'"
                _refuse(room, words, is_known=not _new_file(room).st_mode & OTHERS_MAY_WRITE)

    def _rooms(self) -> tuple[Path, ...]:
        own = (self.plan, self.holds, self.workers, self.logs, self.logs / "slurm", self.code)
        return (self.path, *own, *(self.table(name) for name in TABLES))

    def _check_parent(self) -> None:
        parent = next(p for p in self.path.parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ResultsError(
                f"results folder {self.path} cannot be made: {parent} is not a writable folder. Give another with results_dir=…"
            )


def _new_file(room: Path) -> os.stat_result:
    """What the file system says of a file that this process makes, private, in a folder."""
    probe = room / f".owner.{os.getpid()}.{secrets.token_hex(4)}"
    probe.touch(mode=PRIVATE)
    try:
        return probe.stat()
    finally:
        probe.unlink()


def _refuse(room: Path, words: str, *, is_known: bool) -> None:
    """Raise ResultsError; only warn where the file system says the same of a private file of our own: it knows no modes, or maps owners."""
    if is_known:
        raise ResultsError(f"results folder {room} {words}")
    logger.warning("results folder %s: its file system does not tell who may write there; jobs trust what is in it", room)


def sweep_folder(results_dir: str | Path, sweep: str) -> SweepFolder:
    """The folder of one sweep; the name must be plain, so that it cannot leave `results_dir`."""
    check_name("sweep", sweep)
    return SweepFolder(Path(results_dir).expanduser().resolve() / sweep)
