"""What others may read, write or put where we load from."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from quantsweep.errors import ResultsError
from quantsweep.hydra_plugin.launcher import _check_own
from quantsweep.launching import snapshot
from quantsweep.redaction import REDACTED, redacted
from quantsweep.running import environment
from quantsweep.storage import files
from quantsweep.storage.files import own_umask, write_text
from quantsweep.storage.paths import SweepFolder

HUB = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"x = '{HUB}'", f"x = '{REDACTED}'"),
        ("export WANDB_API_KEY=0123456789abcdef0123", f"export WANDB_API_KEY={REDACTED}"),
        ('"db_password": "correct-horse-battery"', f'"db_password": "{REDACTED}"'),
        ("a\n-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\nb", f"a\n{REDACTED}\nb"),
    ],
)
def test_what_looks_like_a_secret_is_left_out(text: str, kept: str) -> None:
    assert redacted(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "token = secrets.token_hex(8)",
        "task_key=0123",
        "tokens: 5883",
        "password = getpass()",
        "def redacted(text)",
        "cd /disk-fast-scratch-of-the-group",
    ],
)
def test_code_is_left_as_it_is(text: str) -> None:
    assert redacted(text) == text


def test_uncommitted_changes_are_kept_for_their_owner_alone_and_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    folder.create()
    monkeypatch.setattr(environment, "git_state", lambda root: ("c0ffee", f"new file quantsweep/mine.py\nTOKEN = '{HUB}'\n"))
    _, digest = environment.code_state(folder)
    diff = folder.code / f"{digest}.diff"
    assert diff.stat().st_mode & 0o777 == 0o600
    assert HUB not in diff.read_text()


def test_the_umask_is_our_own(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        own_umask()
        (tmp_path / "made").touch()
        (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o022 == (tmp_path / "folder").stat().st_mode & 0o022 == 0


def test_pickles_are_not_loaded_from_where_others_may_write(tmp_path: Path) -> None:
    _check_own(tmp_path / "run" / ".submitit")
    assert (tmp_path / "run" / ".submitit").stat().st_mode & 0o777 == 0o700
    for place in (tmp_path / "run", tmp_path / "run" / ".submitit"):
        mode = place.stat().st_mode
        place.chmod(mode | 0o020)
        with pytest.raises(ResultsError, match="chmod go-w"):
            _check_own(tmp_path / "run" / ".submitit")
        place.chmod(mode)


def test_bundled_models_lie_once_in_the_results_folder(tmp_path: Path) -> None:
    copies = []
    for name in ("a", "b"):
        folder = SweepFolder(tmp_path / "results" / name)
        folder.create()
        copies.append(folder.code / snapshot.take(folder))
    weights = sorted(path.relative_to(copies[0]) for path in copies[0].rglob("*.safetensors"))
    assert weights
    for path in weights:
        assert os.path.samefile(copies[0] / path, copies[1] / path)
    own = sum(path.stat().st_size for path in copies[0].rglob("*") if path.is_file() and path.stat().st_nlink == 1)
    assert own < 8_000_000, own
    shared = next((tmp_path / "results" / snapshot.SHARED).iterdir())
    shared.chmod(0o644)


def test_a_write_that_slept_past_the_tidying_ends_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def tidied(source: Path, target: Path) -> None:
        Path(source).unlink()
        real(source, target)

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(files.os, "replace", tidied)
    with pytest.raises(OSError, match="cleaned away while this process stood still") as caught:
        write_text(tmp_path / "file", "new")
    assert caught.value.errno == errno.ESTALE
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_that_others_may_write_in_is_refused_where_the_file_system_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    folder.create()
    folder.plan.chmod(0o777)
    with pytest.raises(ResultsError, match=r"plan is writable by others.*chmod -R go-w"):
        folder.check()
    assert list(folder.plan.iterdir()) == [], "nothing is left of the question"
    look = Path.stat

    def without_modes(path: Path, **options: bool) -> os.stat_result:
        there = look(path, **options)
        return os.stat_result((there.st_mode | 0o777, *there[1:]))

    monkeypatch.setattr(Path, "stat", without_modes)
    folder.check()
    assert "its file system does not tell who may write there" in caplog.text


def test_a_folder_of_another_owner_is_refused_unless_owners_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    folder.create()
    look, us = Path.stat, 4242

    def owned(rooms: int, files: int) -> None:
        def stat(path: Path, **options: bool) -> os.stat_result:
            there = look(path, **options)
            return os.stat_result((*there[:4], files if path.name.startswith(".owner") else rooms, *there[5:]))

        monkeypatch.setattr(Path, "stat", stat)

    monkeypatch.setattr("quantsweep.storage.paths.os.getuid", lambda: us)
    owned(rooms=99, files=us)
    with pytest.raises(ResultsError, match="is somebody else's"):
        folder.check()
    owned(rooms=99, files=99)
    folder.check()
    assert "its file system does not tell who may write there" in caplog.text
