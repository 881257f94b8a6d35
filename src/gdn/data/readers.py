"""Pieces of files to documents, one row in memory at a time, and datatrove's reader made of that. Knows nothing of tokens.

datatrove's own readers skip broken rows without a word, drop the rest of a file after bad UTF-8, and know no plain text. Here
a broken file or row is one DataError that names it; a caller who skips it counts it.
"""

import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datatrove.data
from datatrove.pipeline.readers.base import BaseReader
from datatrove.utils.logging import logger as datatrove_logger

from gdn.data.documents import Document, is_blank
from gdn.data.sources import (
    INSTALL,
    ROW_SUFFIXES,
    SUFFIXES,
    Piece,
    find_files,
    one_line,
    open_file,
    read_streams,
    remote_errors,
)
from gdn.errors import DataError

_CHUNK = 1 << 18
_COLUMNS = ("text", "content", "raw_content", "body", "document", "article")


@dataclass
class ReadStats:
    """What `read_documents` has seen so far; it updates the caller's object."""

    documents: int = 0
    blank: int = 0  # files and rows with no text but whitespace, left out
    bad: int = 0  # files and rows skipped because of skip_bad
    first_bad: str = ""  # the error of the first of them


def read_documents(
    spec: str,
    *,
    suffixes: Collection[str] = SUFFIXES,
    exclude: Collection[str] = (),
    text_column: str | None = None,
    skip_bad: bool = False,
    stats: ReadStats | None = None,
) -> Iterator[Document]:
    """Stream the documents of a source in the order of its files' names, in this process; see `find_files`.

    Raises DataError at a bad file or row, unless it is skipped and counted, and for a source without any text.
    """
    files = find_files(spec, suffixes=suffixes, exclude=exclude).files
    column = text_column or find_text_column(files)
    stats = ReadStats() if stats is None else stats
    for item in (item for file in files for item in read_piece(file, column)):
        if isinstance(item, DataError):
            if not skip_bad:
                raise item
            stats.bad += 1
            stats.first_bad = stats.first_bad or str(item)
        elif is_blank(item.text):
            stats.blank += 1
        else:
            stats.documents += 1
            yield item
    if not stats.documents:
        bad = f", {stats.bad} bad files or rows skipped, the first: {stats.first_bad}" if stats.bad else ""
        raise DataError(f"{spec}: empty: no text in {len(files)} file(s){bad}")


def is_row_file(path: str) -> bool:
    """Whether every row of the file is a document, rather than the file."""
    return path.lower().endswith(ROW_SUFFIXES)


def read_piece(piece: Piece, text_column: str) -> Iterator[Document | DataError]:
    """Documents of one piece, those of white space alone included; what is bad is yielded, so that the caller may go on.

    Raises DataError for a file that cannot be read at all: a disk or a permission is no bad row.
    """
    try:
        with open_file(piece) as stream:
            if piece.suffix == ".parquet":
                yield from _read_parquet(stream, piece, text_column)
            elif piece.suffix in ROW_SUFFIXES:
                yield from _read_jsonl(stream, piece, text_column)
            else:
                yield _read_text(stream, piece)
    except remote_errors() as error:
        raise DataError(f"{piece.url}: cannot be read: {one_line(error)}") from None


def where(piece: Piece, row: int) -> str:
    """File and row, for a message; a row that was counted from the beginning of a stretch is counted from the file's."""
    if piece.suffix not in ROW_SUFFIXES:
        return piece.url
    row += _rows_before(piece) if piece.suffix == ".jsonl" else 0
    return f"{piece.url}: row {row} (line {row + 1})" if ".jsonl" in piece.suffix else f"{piece.url}: row {row}"


def find_text_column(files: Sequence[Piece]) -> str:
    """The column of the first row file that holds the text: `text`, the only one of strings, or one of the usual names.

    Raises DataError, naming the columns, where that is undecided; no row file at all, or a broken one, gets "text".
    """
    file = next((file for file in files if file.suffix in ROW_SUFFIXES), None)
    if file is None:
        return "text"
    strings, names = _string_columns(file)
    if "text" in names or not strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    for name in _COLUMNS:
        if name in strings:
            return name
    raise DataError(f"{file.url}: no 'text' column; it has {', '.join(map(repr, names))}: name one with --text-column")


class PieceReader(BaseReader):
    """datatrove's first step: the documents of a task, those that are bad with the reason in `metadata["bad"]`."""

    name = "pieces of files"

    def __init__(self, streams: Path, tasks: list[int], text_columns: list[str], skip_bad: bool) -> None:
        """`tasks` are the numbers of the tasks that datatrove's ranks stand for, over all streams."""
        super().__init__()
        self._streams = streams
        self._tasks = tasks
        self._text_columns = text_columns
        self._skip_bad = skip_bad

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A worker unpickles its pipeline before datatrove's first message, and those would go to the user's terminal.
        self.__dict__.update(state)
        datatrove_logger.disable("datatrove")

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[datatrove.data.Document]:
        """The documents of the task of this rank, blank ones too; DataError at what is bad, unless that is skipped."""
        task = self._tasks[rank]
        stream = next(stream for stream in reversed(read_streams(self._streams)) if stream.first_task <= task)
        for piece in stream.tasks[task - stream.first_task]:
            for item in read_piece(piece, self._text_columns[stream.source]):
                if isinstance(item, DataError):
                    if not self._skip_bad:
                        raise item
                    yield datatrove.data.Document("", piece.name, metadata={"bad": str(item)})
                else:
                    metadata = {"source": item.source, "piece": piece, "row": item.row}
                    yield datatrove.data.Document(item.text, f"{item.path}/{item.row}", metadata=metadata)


def _read_text(stream: BinaryIO, piece: Piece) -> Document | DataError:
    data = stream.read()
    nul = data.find(b"\0")
    if nul >= 0:
        return DataError(f"{piece.url}: binary data (a NUL at byte {nul}); expected UTF-8 text")
    try:
        return Document(data.decode("utf-8-sig"), piece.name, 0, "")
    except UnicodeDecodeError as error:
        return DataError(f"{piece.url}: not UTF-8 at byte {error.start}; expected UTF-8 text")


def _read_jsonl(stream: BinaryIO, piece: Piece, text_column: str) -> Iterator[Document | DataError]:
    chunks = {".jsonl": _plain_chunks, ".jsonl.gz": _gzip_chunks, ".jsonl.zst": _zstd_chunks}[piece.suffix](stream, piece)
    row = 0
    try:
        lines = _lines(chunks) if piece.stop < 0 else _lines_of_stretch(stream, piece)
        for row, line in enumerate(lines, start=1):
            if line.strip():
                item = _parse_row(line, piece, row - 1, text_column)
                yield DataError(f"{where(piece, row - 1)}: {item}") if isinstance(item, str) else item
    except DataError as error:  # the container is broken: nothing after it can be read
        yield DataError(f"{error}, from row {row} on")
        return
    if not row and piece.stop < 0:
        yield DataError(f"{piece.url}: empty file; expected one JSON object a line")


def _parse_row(line: bytes, piece: Piece, row: int, text_column: str) -> Document | str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start} of the line; expected a JSON object"
    except json.JSONDecodeError as error:
        return f"broken JSON: {error.msg} at column {error.colno}; expected a JSON object"
    except RecursionError:
        return "JSON nested too deeply; expected a JSON object"
    if not isinstance(value, dict):
        return f"a JSON {type(value).__name__}; expected an object with a {text_column!r} key"
    if text_column not in value:
        return f"no {text_column!r} key; it has {', '.join(map(repr, value)) or 'none'}"
    return _row_document(value[text_column], value.get("meta"), piece, row, text_column)


def _row_document(text: Any, meta: Any, piece: Piece, row: int, text_column: str) -> Document | str:
    if not isinstance(text, str):
        return f"{text_column!r} is {type(text).__name__}; expected a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{text_column!r} has half a surrogate pair at character {error.start}"
    return Document(text, piece.name, row, _label(meta))


def _label(meta: Any) -> str:
    """`redpajama_set_name` of a row's `meta`, which is an object or, in some mirrors, one written as a string."""
    if isinstance(meta, str) and '"redpajama_set_name"' in meta:
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            return ""
    label = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return label if isinstance(label, str) else ""


def _read_parquet(stream: BinaryIO, piece: Piece, text_column: str) -> Iterator[Document | DataError]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{piece.url}: reading parquet needs pyarrow: {INSTALL}") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                yield DataError(f"{piece.url}: no {text_column!r} column; it has {', '.join(map(repr, names))}")
                return
            columns = [text_column] + (["meta"] if "meta" in names else [])
            stop = file.num_row_groups if piece.stop < 0 else piece.stop
            row = first = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
            # One group after the other: iterating over all would keep what was read of each.
            for group in range(piece.start, stop):
                for batch in file.iter_batches(batch_size=32, row_groups=[group], columns=columns):
                    texts = batch.column(text_column)
                    metas = batch.column("meta") if "meta" in columns else None
                    for i in range(batch.num_rows):
                        try:
                            meta = metas[i].as_py() if metas is not None else None
                            item = _row_document(texts[i].as_py(), meta, piece, row, text_column)
                        except UnicodeDecodeError:
                            item = f"{text_column!r} is not UTF-8"
                        yield DataError(f"{where(piece, row)}: {item}") if isinstance(item, str) else item
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        yield DataError(f"{piece.url}: broken parquet after row {row}: {str(error).splitlines()[0]}")
        return
    if row == first and piece.stop < 0:
        yield DataError(f"{piece.url}: no rows; expected at least one")


def _string_columns(file: Piece) -> tuple[list[str], list[str]]:
    """Names of the columns that hold strings, and of all; from parquet's schema or the first row that is an object."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            with open_file(file) as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
                schema = parquet.schema_arrow
        except (pyarrow.ArrowException, OSError):  # the reader will say what is wrong
            return [], []
        return [field.name for field in schema if _holds_strings(field.type)], list(schema.names)
    chunks = {".jsonl": _plain_chunks, ".jsonl.gz": _gzip_chunks, ".jsonl.zst": _zstd_chunks}[file.suffix]
    try:
        with open_file(file) as stream:
            row = next((json.loads(line) for line in _lines(chunks(stream, file)) if line.strip()), None)
    except remote_errors(DataError, ValueError, RecursionError):  # the reader will say what is wrong
        return [], []
    if not isinstance(row, dict):
        return [], []
    return [name for name, value in row.items() if isinstance(value, str)], list(row)


def _holds_strings(kind: Any) -> bool:
    """Whether values of this type of pyarrow's are strings, however they are laid out."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


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


def _lines_of_stretch(stream: BinaryIO, piece: Piece) -> Iterator[bytes]:
    """Lines that begin in [start, stop) of plain jsonl: the one under `start` is another piece's, unless it begins there."""
    position = max(piece.start - 1, 0)
    stream.seek(position)
    lines = _lines(_plain_chunks(stream, piece))
    if piece.start > 0:
        position += len(next(lines, b"")) + 1
    while position < piece.stop:
        line = next(lines, None)
        if line is None:
            return
        yield line
        position += len(line) + 1


def _rows_before(piece: Piece) -> int:
    """How many lines of plain jsonl begin before `start`."""
    if piece.start == 0:
        return 0
    rows, left = 1, piece.start - 1
    with open_file(piece) as stream:
        while left and (chunk := stream.read(min(_CHUNK, left))):
            rows += chunk.count(b"\n")
            left -= len(chunk)
    return rows


def _plain_chunks(stream: BinaryIO, piece: Piece) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _gzip_chunks(stream: BinaryIO, piece: Piece) -> Iterator[bytes]:
    done = 0
    try:
        with gzip.open(stream, "rb") as text:
            while chunk := text.read(_CHUNK):
                done += len(chunk)
                yield chunk
    except EOFError:
        raise DataError(f"{piece.url}: truncated gzip, after {done} bytes of text: the rest of the file is missing") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{piece.url}: broken gzip after {done} bytes of text: {error}") from None


def _zstd_chunks(stream: BinaryIO, piece: Piece) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{piece.url}: reading zst needs zstandard: {INSTALL}") from None
    done = 0
    # One object a frame: zstandard's stream_reader takes a cut-off frame for the end of the file.
    frame = None
    try:
        for compressed in _plain_chunks(stream, piece):
            while compressed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                chunk = frame.decompress(compressed)
                done += len(chunk)
                yield chunk
                compressed = frame.unused_data
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"{piece.url}: broken zst after {done} bytes of text: {error}") from None
    if frame is not None:
        raise DataError(f"{piece.url}: truncated zst, after {done} bytes of text: the rest of the file is missing")
