"""Sources of text to pieces of files, and pieces to tasks: what is read by whom, decided before anything is read.

A source is a file, a folder or a glob, local or under any fsspec URL, or the id of a dataset on the Hub.
"""

import json
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec

from gdn.data.shards import HELDOUT, TRAIN
from gdn.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = TEXT_SUFFIXES + ROW_SUFFIXES
TASK_BYTES = 256 << 20
INSTALL = 'pip install "gdn[data]"'
_SMALL_TASK_BYTES = 1 << 20
_TASKS = 64  # that a small source is cut into, so that several workers have some
_SPLITS = {"train": TRAIN, "validation": HELDOUT, "valid": HELDOUT, "val": HELDOUT, "dev": HELDOUT, "test": ""}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """Where text comes from, and its part of the mixture."""

    spec: str
    weight: float | None = None
    name: str = ""  # in the manifest, instead of the spec


class Piece(NamedTuple):
    """A file, or a stretch of one."""

    url: str  # a path, or a URL that fsspec opens
    name: str  # relative to the source
    suffix: str
    split: str | None  # that the source's own layout puts it in, if it has one
    start: int  # first byte of plain jsonl (a row belongs to the piece its first byte is in), first row group of parquet
    stop: int  # where the piece ends; -1: with the file
    size: int  # bytes on disk
    version: str = ""  # of the file's content, as its file system tells it: time of change, ETag or the like


class Found(NamedTuple):
    """The files of a source, sorted by name, and the commit they are of, if it has one."""

    files: list[Piece]
    revision: str


def find_files(spec: str, *, suffixes: Collection[str] = SUFFIXES, exclude: Collection[str] = (), revision: str = "") -> Found:
    """The files of a source, `revision` that of a Hub dataset ("": its newest); DataError where it cannot be reached.

    A single file may have any suffix. In a folder only `suffixes` are read; hidden entries, `__pycache__` and folders named
    in `exclude` are left out. Row files below folders train and validation (or named so) belong to those splits; those of
    a test split are left out.
    """
    try:
        url, revision = _resolve(spec, revision)
        fs, root = fsspec.url_to_fs(url)
        if any(sign in root for sign in "*?["):
            infos = fs.glob(root, detail=True)
            root = root[: re.search(r"[*?\[]", root).start()].rpartition("/")[0]  # type: ignore[union-attr]
        elif fs.isfile(root):
            infos, suffixes = {root: fs.info(root)}, ()
            root = fs._parent(root)
        elif fs.exists(root):
            infos = fs.find(root, detail=True)
        else:
            raise DataError(f"{spec}: {_absence(fs, root) or f'no such file or folder{_hint(spec)}'}")
    except DataError:
        raise
    except remote_errors(ValueError) as error:  # fsspec's for a protocol that it does not know
        raise DataError(f"{spec}: cannot be reached: {one_line(error)}") from None
    files = []
    for path, info in infos.items():
        name = path[len(root) :].strip("/")
        parts, suffix = name.split("/"), _suffix(name)
        hidden = any(part.startswith(".") or part == "__pycache__" or part in exclude for part in parts)
        is_file = info["type"] == "file" or fs.isfile(path)  # a link to one, as in the Hub's cache
        if is_file and (not suffixes or (suffix in suffixes and not hidden)):
            where = path if fs.protocol[0] == "file" else fs.unstrip_protocol(path)
            files.append(Piece(where, name, suffix, None, 0, -1, info["size"] or 0, _version(info)))
    if not files:
        raise DataError(f"{spec}: no readable file; expected one of {', '.join(sorted(suffixes))}")
    if revision and any(file.suffix in ROW_SUFFIXES for file in files):  # README.md is a dataset's card, not of its text
        files = [file for file in files if file.suffix in ROW_SUFFIXES]
    return Found(_with_splits(sorted(files, key=lambda file: file.name)), revision)


def _version(info: dict[str, Any]) -> str:
    names = ("ETag", "etag", "mtime", "last_modified", "LastModified", "generation", "md5Hash")
    return next((str(info[name]) for name in names if info.get(name)), "")


def _absence(fs: Any, root: str) -> str:
    """What keeps a file system from answering, if it is that: fsspec takes whatever fails for a file that is not there."""
    try:
        fs.info(root)
    except OSError as error:
        cause = error.__cause__
        return "" if cause is None or getattr(cause, "status", 0) == 404 else f"cannot be reached: {one_line(cause)}"
    return ""


def open_file(piece: Piece) -> BinaryIO:
    """The file's bytes from the start; OSError where it cannot be read."""
    stream: BinaryIO = fsspec.open(piece.url, "rb").open()
    return stream


def cut(file: Piece, task_bytes: int) -> list[Piece]:
    """The file in stretches of about `task_bytes`: plain jsonl by bytes, parquet by row groups, others stay whole."""
    if file.size <= task_bytes:
        return [file]
    if file.suffix == ".jsonl":
        count = -(-file.size // task_bytes)
        edges = [file.size * i // count for i in range(count + 1)]
    elif file.suffix == ".parquet":
        edges = _row_group_edges(file, task_bytes)
    else:
        return [file]
    size = file.size // (len(edges) - 1)
    return [file._replace(start=start, stop=stop, size=size) for start, stop in zip(edges, edges[1:])]


def group(files: Sequence[Piece], task_bytes: int) -> list[list[Piece]]:
    """Tasks of neighbouring pieces, of at most `task_bytes` or one piece; a source of less than that gets several too."""
    total = sum(file.size for file in files)
    limit = min(task_bytes, max(total // _TASKS, _SMALL_TASK_BYTES))
    tasks: list[list[Piece]] = []
    size = 0
    for piece in (piece for file in files for piece in cut(file, limit)):
        if not tasks or size + piece.size > limit:
            tasks.append([])
            size = 0
        tasks[-1].append(piece)
        size += piece.size
    return tasks


def _resolve(spec: str, revision: str) -> tuple[str, str]:
    """The URL or path to list, and the revision."""
    if not spec:
        raise DataError("an empty source; expected a path, a URL or the id of a dataset on the Hub")
    if "://" in spec:
        return spec, ""
    if os.path.exists(spec) or not _HUB_ID.fullmatch(spec) or any(sign in spec for sign in "*?["):
        return os.path.abspath(spec), ""
    import huggingface_hub

    name, _, asked = spec.partition("@")
    try:
        info = huggingface_hub.HfApi().dataset_info(name, revision=revision or asked or None)
    except remote_errors(ValueError) as error:
        raise DataError(f"{spec}: neither a file here nor to be had from the Hub: {one_line(error)}") from None
    return f"hf://datasets/{name}@{info.sha}", str(info.sha)


def _hint(spec: str) -> str:
    return "" if "/" in spec else "; a dataset on the Hub is written OWNER/NAME"


def remote_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What a file system may raise when the far side does not answer: OSError, or its network client's own; and `others`."""
    clients = (
        ("httpx2", "HTTPError"),
        ("httpx", "HTTPError"),
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
    )
    return (
        *others,
        OSError,
        ImportError,
        *(getattr(sys.modules[module], name) for module, name in clients if module in sys.modules),
    )


def one_line(error: BaseException) -> str:
    """What an error says, without its second line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _suffix(name: str) -> str:
    lowered = name.lower()
    return next((suffix for suffix in SUFFIXES if lowered.endswith(suffix)), os.path.splitext(lowered)[1])


def _with_splits(files: list[Piece]) -> list[Piece]:
    """The files with the splits that their layout names, if it names a train split; text beside those is about them."""
    named = [_SPLITS.get(_layout_word(file)) for file in files]
    if TRAIN not in named:
        return files
    rows = [(file, split) for file, split in zip(files, named) if file.suffix in ROW_SUFFIXES]
    return [file._replace(split=split or TRAIN) for file, split in rows if split != ""]


def _layout_word(file: Piece) -> str:
    if file.suffix not in ROW_SUFFIXES:
        return ""
    folders, _, base = file.name.rpartition("/")
    words = [*folders.split("/"), re.split(r"[-.]", base, maxsplit=1)[0]]
    return next((word for word in words if word in _SPLITS), "")


def _row_group_edges(file: Piece, task_bytes: int) -> list[int]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(file) as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
            sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        return [0, -1]  # the reader will say what is wrong, or skip it
    # total_byte_size counts uncompressed bytes; in proportion, a group's part of the file.
    scale = file.size / max(sum(sizes), 1)
    edges, size = [0], 0.0
    for i, group_size in enumerate(sizes):
        if i > edges[-1] and size + group_size * scale > task_bytes:
            edges.append(i)
            size = 0.0
        size += group_size * scale
    return edges + [max(len(sizes), 1)]


@dataclass(frozen=True)
class Stream:
    """Tasks whose results follow each other in a split: the rest of them is not needed once there are `limit` tokens."""

    source: int
    split: str | None  # of the source's own layout; None: by the hash of the document
    limit: int | None  # tokens of `counted`
    first_task: int
    tasks: list[list[Piece]]

    @property
    def counted(self) -> str:
        return self.split or TRAIN


def write_streams(path: Path, streams: Sequence[Stream]) -> None:
    """Write them as JSON for the workers to read; OSError."""
    path.write_text(json.dumps([stream.__dict__ for stream in streams]), encoding="utf-8")


def read_streams(path: Path) -> list[Stream]:
    """What `write_streams` wrote."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        row["tasks"] = [[Piece(*piece) for piece in task] for task in row["tasks"]]
    return [Stream(**row) for row in rows]
