"""Files and folders to a stream of documents, one row or file in memory at a time. Knows nothing of tokens.

A broken file or row is one DataError that names it; with `skip_bad` it is counted in the caller's `ReadStats` instead.
"""

import gzip
import json
import logging
import os
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gdn.errors import DataError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = TEXT_SUFFIXES + ROW_SUFFIXES
_CHUNK = 1 << 18
_INSTALL = 'pip install "gdn[data]"'


class Document(NamedTuple):
    """One text, and where it came from."""

    text: str
    path: str  # of its file, relative to the source's root, with forward slashes
    row: int  # in its file, counted from 0; 0 for a file that is one document
    source: str  # label: `meta.redpajama_set_name` where the row has it, else ""


@dataclass
class ReadStats:
    """What a reader has seen so far; the reader updates the caller's object."""

    documents: int = 0
    bytes: int = 0  # UTF-8 bytes of the documents' text
    blank: int = 0  # files and rows with no text but whitespace, left out
    bad: int = 0  # files and rows skipped because of skip_bad
    first_bad: str = ""  # the error of the first of them


def read_documents(
    source: Path,
    *,
    suffixes: Collection[str] = SUFFIXES,
    exclude: Collection[str] = (),
    text_column: str = "text",
    skip_bad: bool = False,
    stats: ReadStats | None = None,
) -> Iterator[Document]:
    """Stream the documents of a file or a folder, in sorted order of relative paths.

    txt, md, rst and py files (and a single file of any other kind) are one document each; every row of jsonl (plain,
    gz, zst) and parquet is one. In a folder only `suffixes` are read; hidden entries, `__pycache__` and folders named
    in `exclude` are left out. Raises DataError, at the call for the source itself, else at the bad file or row.
    """
    files = list_files(source, suffixes=suffixes, exclude=exclude)
    return _read_all(source, files, text_column, skip_bad, ReadStats() if stats is None else stats)


def list_files(source: Path, *, suffixes: Collection[str] = SUFFIXES, exclude: Collection[str] = ()) -> list[str]:
    """Relative paths of the files that `read_documents` reads, sorted; [its name] for a single file.

    Raises DataError for a source that cannot be reached or has no such file.
    """
    try:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder")
        if source.is_file():
            return [source.name]
        if not source.is_dir():
            raise DataError(f"{source}: neither a file nor a folder")
        found = []
        for folder, folders, names in os.walk(source, onerror=_raise):
            folders[:] = [name for name in folders if not _skipped(name) and name not in exclude]
            relative = Path(folder).relative_to(source)
            found += [(relative / name).as_posix() for name in names if not _skipped(name) and _suffix(name) in suffixes]
    except OSError as error:
        raise DataError(f"{error.filename or source}: cannot be read: {error.strerror}") from None
    if not found:
        raise DataError(f"{source}: no readable file in this folder; expected one of {', '.join(sorted(suffixes))}")
    return sorted(found)


def is_row_file(path: str) -> bool:
    """Whether every row of the file is a document, rather than the file."""
    return _suffix(path) in ROW_SUFFIXES


def _raise(error: OSError) -> None:
    raise error


def _skipped(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _suffix(name: str) -> str:
    lowered = name.lower()
    return next((suffix for suffix in SUFFIXES if lowered.endswith(suffix)), os.path.splitext(lowered)[1])


def _read_all(source: Path, files: list[str], text_column: str, skip_bad: bool, stats: ReadStats) -> Iterator[Document]:
    before = stats.documents
    for name in files:
        path = source if source.is_file() else source / name
        try:
            for item in _read_file(path, name, text_column):
                if isinstance(item, DataError):
                    if not skip_bad:
                        raise item
                    stats.bad += 1
                    stats.first_bad = stats.first_bad or str(item)
                    logger.debug("skipped: %s", item)
                elif not item.text or item.text.isspace():
                    stats.blank += 1
                else:
                    stats.documents += 1
                    stats.bytes += len(item.text.encode("utf-8"))
                    yield item
        except OSError as error:  # not bad data: a disk or a permission, so skip_bad does not hide it
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if stats.documents == before:
        bad = f", {stats.bad} bad files or rows skipped, the first: {stats.first_bad}" if stats.bad else ""
        raise DataError(f"{source}: empty: no text in {len(files)} file(s){bad}")


def _read_file(path: Path, name: str, text_column: str) -> Iterator[Document | DataError]:
    """Documents of one file; what is bad is yielded rather than raised, so that the reader can go on after it."""
    suffix = _suffix(name)
    if suffix == ".parquet":
        return _read_parquet(path, name, text_column)
    if suffix in ROW_SUFFIXES:
        return _read_jsonl(path, name, suffix, text_column)
    return _read_text(path, name)


def _read_text(path: Path, name: str) -> Iterator[Document | DataError]:
    data = path.read_bytes()
    nul = data.find(b"\0")
    if nul >= 0:
        yield DataError(f"{path}: binary data (a NUL at byte {nul}); expected UTF-8 text")
        return
    try:
        yield Document(data.decode("utf-8-sig"), name, 0, "")
    except UnicodeDecodeError as error:
        yield DataError(f"{path}: not UTF-8 at byte {error.start}; expected UTF-8 text")


def _read_jsonl(path: Path, name: str, suffix: str, text_column: str) -> Iterator[Document | DataError]:
    chunks = {".jsonl": _plain_chunks, ".jsonl.gz": _gzip_chunks, ".jsonl.zst": _zstd_chunks}[suffix](path)
    row = -1
    try:
        for row, line in enumerate(_lines(chunks)):
            if line.strip():
                yield _parse_row(line, f"{path}: row {row} (line {row + 1})", name, row, text_column)
    except DataError as error:  # the container is broken: nothing after it can be read
        yield error
        return
    if row < 0:
        yield DataError(f"{path}: empty file; expected one JSON object a line")


def _parse_row(line: bytes, where: str, name: str, row: int, text_column: str) -> Document | DataError:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8 at byte {error.start} of the line; expected a JSON object")
    except json.JSONDecodeError as error:
        return DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}; expected a JSON object")
    except RecursionError:
        return DataError(f"{where}: JSON nested too deeply; expected a JSON object")
    if not isinstance(value, dict):
        return DataError(f"{where}: a JSON {type(value).__name__}; expected an object with a {text_column!r} key")
    if text_column not in value:
        return DataError(f"{where}: no {text_column!r} key; it has {', '.join(map(repr, value)) or 'none'}")
    return _row_document(value[text_column], value.get("meta"), where, name, row, text_column)


def _row_document(text: Any, meta: Any, where: str, name: str, row: int, text_column: str) -> Document | DataError:
    if not isinstance(text, str):
        return DataError(f"{where}: {text_column!r} is {type(text).__name__}; expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return DataError(f"{where}: {text_column!r} has half a surrogate pair at character {error.start}")
    label = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return Document(text, name, row, label if isinstance(label, str) else "")


def _read_parquet(path: Path, name: str, text_column: str) -> Iterator[Document | DataError]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow: {_INSTALL}") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                yield DataError(f"{path}: no {text_column!r} column; it has {', '.join(map(repr, names))}")
                return
            columns = [text_column] + (["meta"] if "meta" in names else [])
            for batch in file.iter_batches(batch_size=256, columns=columns):
                texts = batch.column(text_column)
                metas = batch.column("meta") if "meta" in columns else None
                for i in range(batch.num_rows):
                    where = f"{path}: row {row}"
                    try:
                        text = texts[i].as_py()
                        meta = metas[i].as_py() if metas is not None else None
                        yield _row_document(text, meta, where, name, row, text_column)
                    except UnicodeDecodeError:
                        yield DataError(f"{where}: {text_column!r} is not UTF-8")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        detail = str(error).splitlines()[0]
        yield DataError(f"{path}: broken parquet after row {row}: {detail}")
        return
    if row == 0:
        yield DataError(f"{path}: no rows; expected at least one")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline; a line longer than a chunk is joined once, not chunk by chunk."""
    pieces: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        for piece in rest:
            yield b"".join(pieces)
            pieces = [piece]
    last = b"".join(pieces)
    if last:
        yield last


def _plain_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    done = 0
    try:
        with gzip.open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                done += len(chunk)
                yield chunk
    except EOFError:
        raise DataError(f"{path}: truncated gzip, after {done} bytes of text") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: broken gzip after {done} bytes of text: {error}") from None


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading zst needs zstandard: {_INSTALL}") from None
    done = 0
    # One object a frame: zstandard's stream_reader takes a cut-off frame for the end of the file.
    frame = None
    try:
        for compressed in _plain_chunks(path):
            while compressed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                chunk = frame.decompress(compressed)
                done += len(chunk)
                yield chunk
                compressed = frame.unused_data
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: broken zst after {done} bytes of text: {error}") from None
    if frame is not None:
        raise DataError(f"{path}: truncated zst, after {done} bytes of text")
