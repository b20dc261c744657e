"""A small hub on loopback: the part of the Hugging Face hub's API that prewarm, transformers and datasets use.

    with Hub() as hub:
        hub.commit("lab/mini", {"config.json": b"…"})                    a new head of the default branch
        environment = {"HF_ENDPOINT": hub.url, …}

Commits are what the real hub has: immutable, named by 40 hexadecimal digits; `main` moves.  Weights
are served as large files (their ETag is their SHA-256), the rest as git blobs.  What was asked for
is kept in `hub.asked`, so that a test can tell what a client did.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

LARGE = (".safetensors", ".bin", ".parquet")


@dataclass
class Repository:
    """Commits of one repository; the last one is the head of `main`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


class Hub:
    """The server; usable as a context."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.asked: list[str] = []
        self.tokens: list[str | None] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def commit(self, name: str, files: Mapping[str, bytes], *, kind: str = "models", gated: bool = False) -> str:
        """Put a new commit at the head of a repository; returns its name."""
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.gated = gated
        digest = hashlib.sha1(f"{len(repository.commits)}{name}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        repository.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.tokens.append(self.headers.get("Authorization"))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path):
            kind, name, call, revision, folder = match.groups()
            self._api(kind, name, call, revision, folder or "", body)
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file("datasets" if match[1] else "models", match[2], match[3], match[4])
        else:
            self._error(404, "EntryNotFound")

    def _find(self, kind: str, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            self._error(401, "RepoNotFound")
            return None
        commit = repository.head if revision in (None, "main") else str(revision)
        if commit not in repository.commits:
            self._error(404, "RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def _api(self, kind: str, name: str, call: str | None, revision: str | None, folder: str, body: bytes) -> None:
        if (found := self._find(kind, name, revision)) is None:
            return
        commit, files = found
        if call == "tree":
            entries = [_entry(path, content) for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")]
            self._json(entries)
        elif call == "paths-info":
            fields = urllib.parse.parse_qs(body.decode()) if not body.startswith(b"{") else json.loads(body)
            wanted = {path.rstrip("/") for path in fields.get("paths", [])}
            folders = {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}
            answer = [_entry(path, content) for path, content in files.items() if path in wanted]
            answer += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders & wanted)]
            self._json(answer)
        else:
            siblings = [{"rfilename": path, "size": len(c), "blobId": _blob(c)} | _lfs_of(path, c) for path, c in files.items()]
            gated = "manual" if self.hub.repositories[kind, name].gated else False
            self._json({"id": name, "sha": commit, "private": False, "gated": gated, "siblings": siblings, "tags": [], "downloads": 0})

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        if (found := self._find(kind, name, revision)) is None:
            return
        commit, files = found
        if self.hub.repositories[kind, name].gated:
            self._error(403, "GatedRepo")
        elif path not in files:
            self._error(404, "EntryNotFound", commit)
        else:
            content = files[path]
            tag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else _blob(content)
            self._send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, commit: str | None = None) -> None:
        extra = {"X-Error-Code": code, "X-Error-Message": code} | ({"X-Repo-Commit": commit} if commit else {})
        self._send(status, b"{}", {"Content-Type": "application/json", **extra})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        first, last = 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(content) - 1) + 1, len(content))
        partial = (first, last) != (0, len(content)) and status == 200
        self.send_response(206 if partial else status)
        for key, value in headers.items():
            self.send_header(key, value)
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[first:last])

    def log_message(self, format: str, *arguments: object) -> None:
        """Stay silent."""


def _lfs_of(path: str, content: bytes) -> dict[str, object]:
    if not path.endswith(LARGE):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
