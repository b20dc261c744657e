"""Model identity: what is hashed, what is refused, what is remembered."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from quantsweep.errors import ModelError
from quantsweep.trial import identity


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantsweep" / "hashes.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a model, with spaces"
    folder.mkdir()
    for name, content in {"model.safetensors": b"weights", "config.json": b"{}", "tokenizer.json": b"[]", "README.md": b"words"}.items():
        (folder / name).write_bytes(content)
    return folder


def test_content_is_a_sha256_of_contents_and_not_of_places(model: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    content = identity.local_content(model)
    assert content.startswith("sha256:")
    assert len(content) == len("sha256:") + 64
    assert identity.local_content(copied) == content


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_any_change_of_what_is_computed_changes_it(model: Path, name: str) -> None:
    before = identity.local_content(model)
    (model / name).write_bytes(b"other")
    assert identity.local_content(model) != before


def test_a_file_that_computes_nothing_does_not_change_it(model: Path) -> None:
    before = identity.local_content(model)
    (model / "README.md").write_bytes(b"other words")
    assert identity.local_content(model) == before


def test_two_files_that_swap_their_contents_are_another_model(model: Path) -> None:
    (model / "model-2.safetensors").write_bytes(b"more weights")
    before = identity.local_content(model)
    (model / "model.safetensors").write_bytes(b"more weights")
    (model / "model-2.safetensors").write_bytes(b"weights")
    assert identity.local_content(model) != before


def test_a_gguf_file_is_its_own_identity(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"gguf")
    assert identity.local_content(tmp_path, "m.gguf") == identity.local_content(tmp_path / "m.gguf", "m.gguf")
    with pytest.raises(ModelError, match=r"other\.gguf does not exist; .*holds: .*m\.gguf"):
        identity.local_content(tmp_path, "other.gguf")


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("model.safetensors", None, r"holds no \*\.safetensors file; .* holds: README\.md, config\.json, tokenizer\.json"),
        ("model.safetensors", "pytorch_model.bin", r"Pickled weights .* not loaded: convert"),
        ("model.safetensors", "m.gguf", r"Name the GGUF file with `gguf_file:`"),
        ("config.json", None, r"holds no config\.json; .*model\.safetensors"),
    ],
)
def test_what_is_missing_is_named_with_what_is_there(model: Path, remove: str, add: str | None, message: str) -> None:
    (model / remove).unlink()
    if add is not None:
        (model / add).write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        identity.local_content(model)


def test_a_folder_that_does_not_exist_shows_its_neighbours(model: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist; .*a model, with spaces"):
        identity.local_content(model.parent / "a modle")
    with pytest.raises(ModelError, match="nor does"):
        identity.local_content(model / "no" / "where")


class TestCache:
    @pytest.fixture(autouse=True)
    def small_files_count_as_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(identity, "CACHED_FROM_BYTES", 1)

    def test_a_large_file_is_read_once(self, model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        content = identity.local_content(model)
        assert own_cache.is_file()
        monkeypatch.setattr(identity, "_sha256", lambda file: pytest.fail(f"{file} was read again"))
        assert identity.local_content(model) == content

    def test_a_changed_file_is_read_again(self, model: Path) -> None:
        before = identity.local_content(model)
        weights = model / "model.safetensors"
        weights.write_bytes(b"WEIGHTS")  # the same size
        os.utime(weights, ns=(0, 0))
        assert identity.local_content(model) != before

    @pytest.mark.parametrize("garbage", ["", "not json", "[]", '{"a": 1}', '{"a": "not a hash"}'])
    def test_a_broken_cache_does_no_harm(self, model: Path, own_cache: Path, garbage: str) -> None:
        content = identity.local_content(model)
        own_cache.write_text(garbage)
        assert identity.local_content(model) == content
        assert len(json.loads(own_cache.read_text())) == 3

    def test_an_unwritable_cache_does_no_harm(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a file where a folder should be
        assert identity.local_content(model).startswith("sha256:")

    def test_files_that_are_gone_are_forgotten(self, model: Path, own_cache: Path) -> None:
        identity.local_content(model)
        (model / "tokenizer.json").unlink()
        (model / "config.json").write_bytes(b"{ }")
        identity.local_content(model)
        assert not any("tokenizer.json" in key for key in json.loads(own_cache.read_text()))

    def test_nothing_is_left_beside_it(self, model: Path, own_cache: Path) -> None:
        identity.local_content(model)
        assert [entry.name for entry in own_cache.parent.iterdir()] == ["hashes.json"]


def test_a_hub_model_is_identified_by_its_commit_only() -> None:
    assert identity.hub_content("org/name", "a" * 40) == f"hub:org/name@{'a' * 40}"
    assert identity.hub_content("org/name", None) is None


class TestResolvePath:
    def test_home_and_variables(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("MODELS", "/data/models")
        assert identity.resolve_path("~/m") == tmp_path / "m"
        assert identity.resolve_path("$MODELS/m") == Path("/data/models/m")
        with pytest.raises(ModelError, match="variable NO_SUCH_VARIABLE is not set"):
            identity.resolve_path("${NO_SUCH_VARIABLE}/m")

    @pytest.mark.parametrize("scheme", ["package:", "package://"])
    def test_inside_an_installed_package(self, scheme: str) -> None:
        path = identity.resolve_path(f"{scheme}quantsweep/mini/models/mini-neox-0.3m")
        assert (path / "config.json").is_file()

    def test_the_package_itself(self) -> None:
        assert (identity.resolve_path("package:quantsweep") / "errors.py").is_file()

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("package:no_such_package/m", r"no_such_package is not installed; install it \(`pip install no-such-package`\)"),
            ("package:json.decoder", "names no Python package"),
            ("package:", "names no Python package"),
            ("package:quantsweep/../../etc", "leaves its package"),
        ],
    )
    def test_refusals(self, path: str, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            identity.resolve_path(path)
