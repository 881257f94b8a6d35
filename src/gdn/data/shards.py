"""Token shards on disk, their manifest, and reading them: the final format, written by `prepare`.

A folder holds `manifest.json`, `tokenizer/`, and for each split `train-00000.bin` (token ids, raw little-endian uint16,
or uint32 for a vocabulary above 65,536) with `train-00000.docs` (uint64 little-endian: where in the shard each document
begins). A split is the concatenation of its shards. Which tokens a step sees is not here, but in `order`.
"""

import dataclasses
import hashlib
import json
import logging
import mmap
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gdn.errors import DataError
from gdn.files import sha256_file, write_text

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
TRAIN = "train"
HELDOUT = "heldout"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
DOCS_DTYPE = np.dtype("<u8")
BOS_POLICIES = ("before_each_document", "none")
EOS_POLICIES = ("after_each_document", "none")
VERIFIED = ".verified.json"
_OTHER_FILES = 512  # that a process may have open beside its shards


@dataclass(frozen=True)
class ShardFile:
    """One shard of a split: its token file, and what must be found in it."""

    name: str  # of the .bin; the .docs beside it has the same stem
    sha256: str
    docs_sha256: str
    tokens: int
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text
    source: int  # which of the manifest's sources the documents come from

    @property
    def docs_name(self) -> str:
        return self.name.removesuffix(".bin") + ".docs"


@dataclass(frozen=True)
class SourceRecord:
    """Where documents came from."""

    name: str
    revision: str  # commit of a Hub dataset; "" where the source has none
    weight: float | None  # part of the mixture that training draws from it; None, and then for all: in proportion to size


@dataclass(frozen=True)
class Manifest:
    """What a folder of token shards holds and how it was made."""

    format_version: int
    dtype: str
    vocab_size: int
    tokenizer_sha256: str
    bos_policy: str
    bos_id: int | None
    eos_policy: str
    eos_id: int | None
    splits: dict[str, tuple[ShardFile, ...]]
    source_tokens: dict[str, dict[str, int]]  # split -> source label -> tokens
    duplicates: int  # documents left out as exact copies
    skipped: int  # bad files and rows left out on request
    skipped_share: float  # of all files and rows with text
    options: dict[str, Any]
    sources: tuple[SourceRecord, ...]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides which tokens a step sees: the same after a move or the same preparation."""
        content = [
            self.format_version,
            self.dtype,
            self.vocab_size,
            self.tokenizer_sha256,
            self.bos_policy,
            self.bos_id,
            self.eos_policy,
            self.eos_id,
            [source.weight for source in self.sources],
        ]
        files = {split: [dataclasses.astuple(file) for file in files] for split, files in self.splits.items()}
        return hashlib.sha256(json.dumps([content, files], sort_keys=True).encode()).hexdigest()

    def num_tokens(self, split: str) -> int:
        return sum(file.tokens for file in self.splits[split])

    def num_documents(self, split: str) -> int:
        return sum(file.documents for file in self.splits[split])

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the split's text: the denominator of bits per byte."""
        return sum(file.bytes for file in self.splits[split])


def dtype_for(vocab_size: int) -> str:
    """Name of the smallest token type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `folder/manifest.json`."""
    write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`; DataError where it is missing, of another format, or not exactly as written."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: no {MANIFEST}; expected a folder written by `gdn prepare`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version {version!r}; this gdn reads {FORMAT_VERSION}")
    splits = _typed(data.get("splits", {}), dict, path, "splits")
    for split, files in splits.items():
        rows = _typed(files, list, path, f"splits.{split}")
        splits[split] = tuple(_build(ShardFile, row, path, f"splits.{split}[{i}].") for i, row in enumerate(rows))
        for file in splits[split]:
            if not re.fullmatch(re.escape(split) + r"-\d{5,}\.bin", file.name):
                raise DataError(f"{path}: shard name {file.name!r}; expected {split}-00000.bin, {split}-00001.bin, ...")
            if not file.tokens or not file.documents:
                raise DataError(f"{path}: {file.name} has {file.tokens} tokens and {file.documents} documents; expected some")
    sources = _typed(data.get("sources", []), list, path, "sources")
    data["sources"] = tuple(_build(SourceRecord, row, path, f"sources[{i}].") for i, row in enumerate(sources))
    manifest = _build(Manifest, data, path, "")
    if manifest.dtype not in DTYPES:
        raise DataError(f"{path}: dtype {manifest.dtype!r}; expected one of {', '.join(DTYPES)}")
    if manifest.bos_policy not in BOS_POLICIES:
        raise DataError(f"{path}: bos_policy {manifest.bos_policy!r}; expected one of {', '.join(BOS_POLICIES)}")
    if manifest.eos_policy not in EOS_POLICIES:
        raise DataError(f"{path}: eos_policy {manifest.eos_policy!r}; expected one of {', '.join(EOS_POLICIES)}")
    weights = [source.weight for source in manifest.sources]
    if any(weight is not None for weight in weights) and not all(weight is not None and weight > 0 for weight in weights):
        raise DataError(f"{path}: weights {weights}; expected none, or one above 0 for each source")
    for files in manifest.splits.values():
        for file, before in zip(files, (files[0], *files)):
            if not before.source <= file.source < len(manifest.sources):
                raise DataError(
                    f"{path}: {file.name} has source {file.source}; expected ascending ones of {len(manifest.sources)}"
                )
    return manifest


class Part(NamedTuple):
    """A stretch of a split that has an order of its own: the whole split, or the shards of one weighted source."""

    name: str
    first: int  # where in the split's stream it begins
    num_tokens: int
    weight: float

    def num_windows(self, seq_len: int) -> int:
        """How many windows of seq_len + 1 tokens at a stride of seq_len: each token is a target at most once."""
        return max(self.num_tokens - 1, 0) // seq_len


class TokenShards:
    """One split as a single stream of tokens, mapped read-only from its shards."""

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        """Map the files; use `open`, which checks them first."""
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self._files = manifest.splits[split]
        dtype = DTYPES[manifest.dtype]
        _allow_open_files(2 * sum(map(len, manifest.splits.values())))
        self._tokens = [_map(folder / file.name, dtype, read_ahead=False) for file in self._files]
        self._docs = [_map(folder / file.docs_name, DOCS_DTYPE, read_ahead=True) for file in self._files]
        self._starts = np.concatenate([[0], np.cumsum([file.tokens for file in self._files])]).astype(np.int64)

    @classmethod
    def open(cls, folder: Path, split: str) -> "TokenShards":
        """Open `split` of a prepared folder; DataError for an unknown split or a file of another size than recorded."""
        manifest = read_manifest(folder)
        if split not in manifest.splits:
            raise DataError(f"{folder}: no split {split!r}; it has {', '.join(map(repr, manifest.splits))}")
        itemsize = DTYPES[manifest.dtype].itemsize
        for file in manifest.splits[split]:
            _check_size(folder / file.name, file.tokens * itemsize)
            _check_size(folder / file.docs_name, file.documents * DOCS_DTYPE.itemsize)
        return cls(folder, split, manifest)

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def paths(self) -> list[Path]:
        """The split's files, in order: tokens and documents of each shard."""
        return [self.folder / name for file in self._files for name in (file.name, file.docs_name)]

    @property
    def parts(self) -> list[Part]:
        """The stretches that training orders apart: one, unless the sources have weights."""
        weights = [source.weight for source in self.manifest.sources]
        if None in weights or not weights:
            return [Part(self.split, 0, self.num_tokens, 1.0)]
        parts: list[Part] = []
        for i, source in enumerate(self.manifest.sources):
            tokens = sum(file.tokens for file in self._files if file.source == i)
            first = parts[-1].first + parts[-1].num_tokens if parts else 0
            parts.append(Part(source.name, first, tokens, source.weight or 0.0))
        return parts

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the stream, across shards: int64 [count]; IndexError outside it."""
        result = np.empty(max(count, 0), dtype=np.int64)
        self._check_range(start, count)
        self.read_into(start, result)
        return result

    def read_into(self, start: int, result: np.ndarray) -> None:
        """Fill `result`, [count] of any integer type, with the tokens from `start` on; IndexError outside the stream."""
        self._check_range(start, len(result))
        for shard, first, last in self._overlaps(start, len(result)):
            base = int(self._starts[shard])
            result[first - start : last - start] = self._tokens[shard][first - base : last - base]

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Where in start .. start + count - 1 documents begin, relative to `start`, ascending: int64 [any]."""
        self._check_range(start, count)
        found = [np.empty(0, dtype=np.int64)]
        for shard, first, last in self._overlaps(start, count):
            base = int(self._starts[shard])
            # np.uint64: a plain int would have numpy convert the whole mapped file.
            low, high = np.searchsorted(self._docs[shard], np.array([first - base, last - base], dtype=np.uint64))
            found.append(self._docs[shard][low:high].astype(np.int64) + (base - start))
        return np.concatenate(found)

    def max_documents(self, start: int, seq_len: int) -> int:
        """The most documents that begin inside one stretch of seq_len tokens, of those laid end to end from `start` on.

        Reads all .docs files once.
        """
        most, last_window, last_count = 0, -1, 0
        for docs, base in zip(self._docs, self._starts):
            windows = (docs.astype(np.int64) + (int(base) - start)) // seq_len  # ascending
            ends = np.flatnonzero(np.diff(windows, append=windows[-1] + 1)) + 1
            counts = np.diff(ends, prepend=0)
            if windows[0] == last_window:  # the stretch began in the shard before
                counts[0] += last_count
            last_window, last_count = int(windows[-1]), int(counts[-1])
            most = max(most, int(counts.max()))
        return most

    def verify(self, progress: Callable[[str], None] | None = None, again: bool = False) -> None:
        """Check every checksum, calling `progress` with each file's name; DataError naming file, got and expected.

        A file whose sum was right before, and whose size and times of change are still those, is read only if `again`:
        a run that goes on must not wait for the sums of all its data.
        """
        seen = {} if again else _read_verified(self.folder)
        for file in self._files:
            for name, expected in ((file.name, file.sha256), (file.docs_name, file.docs_sha256)):
                stamp = _stamp(self.folder / name, expected)
                if seen.get(name) == stamp:
                    continue
                if progress is not None:
                    progress(name)
                _check_sha256(self.folder / name, expected)
                seen[name] = stamp
        _write_verified(self.folder, _read_verified(self.folder) | seen)

    def _check_range(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.num_tokens}")

    def _overlaps(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """(shard, first, last) of each shard that [start, start + count) touches, in positions of the stream."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts, position, end = [], start, start + count
        while position < end:
            last = min(end, int(self._starts[shard + 1]))
            parts.append((shard, position, last))
            position, shard = last, shard + 1
        return parts


def verify_shards(folder: Path, progress: Callable[[str], None] | None = None) -> Manifest:
    """Check sizes and checksums of all splits and of the tokenizer; DataError naming file, expected and got."""
    manifest = read_manifest(folder)
    for split in manifest.splits:
        TokenShards.open(folder, split).verify(progress, again=True)
    _check_sha256(folder / TOKENIZER / "tokenizer.json", manifest.tokenizer_sha256)
    return manifest


def _allow_open_files(count: int) -> None:
    """Let this process hold `count` files beside others: a mapped one stays open. DataError where the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise DataError(f"{count} files of shards, and a process may open {hard} here; expected ulimit -n {wanted}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _map(path: Path, dtype: "np.dtype[Any]", read_ahead: bool) -> np.ndarray:
    """The file as an array that cannot be written; a plain one, for slicing a memmap takes ten times as long."""
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if not read_ahead and hasattr(mmap, "MADV_RANDOM"):  # else the system reads 128 KB for each window of 4
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=dtype)


def _stamp(path: Path, sha256: str) -> list[Any]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256]


def _read_verified(folder: Path) -> dict[str, list[Any]]:
    try:
        seen = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a note for speed; without it everything is read
        return {}
    return seen if isinstance(seen, dict) else {}


def _write_verified(folder: Path, seen: dict[str, list[Any]]) -> None:
    try:
        if seen != _read_verified(folder):
            write_text(folder / VERIFIED, json.dumps(seen))
    except OSError:
        logger.debug("%s: cannot be written; checksums will be computed again next time", folder / VERIFIED)


def _check_size(path: Path, expected: int) -> None:
    try:
        got = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected a file of {expected} bytes") from None
    if got != expected:
        raise DataError(f"{path}: truncated or altered: got {got} bytes, expected {expected}")


def _check_sha256(path: Path, expected: str) -> None:
    try:
        got = sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if got != expected:
        raise DataError(f"{path}: altered: got sha256 {got}, expected {expected}")


def _typed(value: Any, kind: type, path: Path, key: str) -> Any:
    wrong = not isinstance(value, kind)
    if kind is int:
        wrong = wrong or isinstance(value, bool) or value < 0
    if wrong:
        wanted = {int: "a non-negative integer", float: "a number", str: "a string", dict: "an object"}.get(kind, "a list")
        raise DataError(f"{path}: {key} is {value!r}; expected {wanted}")
    return value


def _build(cls: type, data: Any, path: Path, prefix: str) -> Any:
    """The dataclass `cls` from exactly its keys, values of scalar fields checked."""
    data = _typed(data, dict, path, prefix.rstrip(".") or "the manifest")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key in fields.keys() ^ data.keys():
        raise DataError(f"{path}: key {prefix + key!r} is {'missing' if key in fields else 'unknown'}")
    for key, hint in fields.items():
        if hint == int | None or hint == float | None:
            if data[key] is not None:
                _typed(data[key], int if hint == int | None else float, path, prefix + key)
        else:
            kind: Any = getattr(hint, "__origin__", hint)
            _typed(data[key], kind, path, prefix + key)
    return cls(**data)
