"""The documents of a text: what a file, or the pinned files of a data set, hold.

    .txt                the whole file is one document
    .jsonl .json        a document a line, in one column
    .parquet            a document a row, in one column          all of them also compressed: .gz, .zst

Documents stay in Arrow's memory (a file of C4 has 356,000 of them, 0.8 GB): a Python string is made of one when it is asked for.
Nothing is fetched here: files of the hub lie in its cache since `quantsweep prewarm`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from quantsweep.checkpoints.pins import text_folder
from quantsweep.errors import TextError
from quantsweep.trial.identity import text_content, text_file
from quantsweep.trial.texts import TextSource

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_LONGEST_LINE = 2**26
"""Bytes of the longest document of a file of JSON lines."""


def read_documents(source: TextSource) -> pa.ChunkedArray:
    """The documents of a text in their order, as large strings; null ones are empty.

    Raises TextError where it cannot be read, holds no text, or is not the one that was planned (`TextSource.content`).
    """
    found = [_read(file, source.column) for file in _files(source)]
    documents = pc.fill_null(pa.chunked_array([chunk for column in found for chunk in column.chunks], pa.large_string()), "")
    if not pc.any(pc.greater(pc.utf8_length(documents), 0)).as_py():
        raise TextError(f"text {source.text_source} holds no text (column {source.column})")
    return documents


def data_revision(source: TextSource) -> str:
    """Which text it is, as rows keep it: "sha256:…" of a file, "hub:<commit>" of a data set."""
    return text_content(source.path) if source.path is not None else f"hub:{source.revision}"


def _files(source: TextSource) -> list[Path]:
    if source.path is not None:
        found = text_content(source.path)
        if source.content not in (None, found):
            raise TextError(
                f"text {source.path} is not the one that was planned ({source.content} then, {found} now). "
                "Bring the old one back, or launch again, which plans it as it is now"
            )
        return [text_file(source.path)]
    if source.revision is None:
        raise TextError(f"text {source.text_source}: no commit is pinned for it. Run `quantsweep prewarm` with the words of the launch")
    folder = text_folder(str(source.hub_id), source.revision)
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = [folder / name for name in names if fnmatchcase(name, str(source.files))]
    if not files:
        raise TextError(
            f"text {source.text_source} is not in the hub's cache ({folder}). Run `quantsweep prewarm` with the words of the launch, "
            "on a machine with a network that shares this cache; or give a copy on disk (calibration.path=FILE, task.path=FILE)"
        )
    return files


def _read(file: Path, column: str) -> pa.ChunkedArray:
    try:
        with pa.input_stream(str(file), compression=_COMPRESSION.get(file.suffix)) as stream:
            kind = Path(file.stem).suffix if file.suffix in _COMPRESSION else file.suffix
            return _READERS.get(kind, _json_lines)(stream, file, column)
    except (pa.lib.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TextError(f"text {file} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _whole(stream: Any, _file: Path, _column: str) -> pa.ChunkedArray:
    return pa.chunked_array([[stream.read().decode()]], pa.large_string())


def _parquet(stream: Any, file: Path, column: str) -> pa.ChunkedArray:
    rows = pq.ParquetFile(pa.BufferReader(stream.read()))
    _check_column(file, column, rows.schema_arrow.names)
    return _as_text(rows.read([column]).column(column), file, column)


def _json_lines(stream: Any, file: Path, column: str) -> pa.ChunkedArray:
    rows = pyarrow.json.read_json(
        stream,
        read_options=pyarrow.json.ReadOptions(block_size=_LONGEST_LINE),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore"),
    )
    documents = rows.column(column)
    if documents.null_count == len(documents):  # also where no line has the column
        with pa.input_stream(str(file), compression=_COMPRESSION.get(file.suffix)) as again:
            first = json.loads(again.read(_LONGEST_LINE).split(b"\n", 1)[0])
        _check_column(file, column, list(first))
    return _as_text(documents, file, column)


_READERS: dict[str, Callable[[Any, Path, str], pa.ChunkedArray]] = {".txt": _whole, ".parquet": _parquet}


def _check_column(file: Path, column: str, there: list[str]) -> None:
    if column not in there:
        raise TextError(f"text {file} has no column {column}; it has {', '.join(there)}: give calibration.column=… or task.column=…")


def _as_text(column: pa.ChunkedArray, file: Path, name: str) -> pa.ChunkedArray:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise TextError(f"text {file}: its column {name} holds {column.type}, not text")
    return column.cast(pa.large_string())
