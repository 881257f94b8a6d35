"""Documents to a published folder of token shards, and the choice of which documents are held out."""

import hashlib
import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import tokenizers

import gdn
from gdn.data.readers import Document, ReadStats, is_row_file
from gdn.data.shards import (
    DTYPES,
    FORMAT_VERSION,
    HELDOUT,
    TOKENIZER,
    TRAIN,
    Manifest,
    ShardFile,
    SourceRecord,
    dtype_for,
    write_manifest,
)
from gdn.data.tokenizer import Tokenizer
from gdn.errors import DataError
from gdn.files import publish_folder, sha256_file

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # documents and bytes of text so far

_BATCH_DOCUMENTS = 1000
_BATCH_CHARACTERS = 1 << 21


class Holdout(NamedTuple):
    """Which groups of documents are held out; `split_of` is a pure function of the document."""

    by: Literal["folder", "file"]
    groups: frozenset[str]

    def split_of(self, document: Document) -> str:
        return HELDOUT if document_group(document, self.by) in self.groups else TRAIN


def document_group(document: Document, by: Literal["folder", "file"]) -> str:
    """The group that is held out or trained on as a whole.

    `folder` is the first two parts of the file's folder ("." at the root), because near-copies live side by side;
    `file` is the path. A row of a jsonl or parquet file is always its own group, by the hash of its text.
    """
    if is_row_file(document.path):
        return hashlib.sha256(document.text.encode("utf-8")).hexdigest()
    if by == "file":
        return document.path
    return "/".join(document.path.split("/")[:-1][:2]) or "."


def choose_holdout(documents: Iterable[Document], fraction: float, seed: int) -> Holdout:
    """Hold out whole groups, in an order drawn from `seed`, up to `fraction` of the bytes of text.

    A group larger than what is left is passed over. Groups are package folders; where these are so few or so large that
    less than half of what was asked for is reached (a flat folder), files. Raises DataError where nothing fits.
    """
    sizes: dict[Literal["folder", "file"], Counter[str]] = {"folder": Counter(), "file": Counter()}
    for document in documents:
        num_bytes = len(document.text.encode("utf-8"))
        for by, counter in sizes.items():
            counter[document_group(document, by)] += num_bytes
    limit = int(fraction * sizes["file"].total())
    best, best_bytes = Holdout("folder", frozenset()), 0
    for by, counter in sizes.items():
        groups = _take_groups(counter, limit, seed)
        taken = sum(counter[group] for group in groups)
        if taken > best_bytes:
            best, best_bytes = Holdout(by, groups), taken
        if 2 * best_bytes >= limit > 0:
            break
    if not best.groups:
        raise DataError(
            f"no document is small enough to hold out {fraction:.1%} of {sizes['file'].total()} bytes in "
            f"{len(sizes['file'])} file(s) or row(s); expected more of them, or a larger fraction"
        )
    return best


def _take_groups(sizes: Mapping[str, int], limit: int, seed: int) -> frozenset[str]:
    taken, left = [], limit
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()):
        if sizes[group] <= left:
            taken.append(group)
            left -= sizes[group]
    return frozenset(taken)


def cut_document(document: Document, pieces: int) -> list[Document]:
    """Cut one text at line ends into at most `pieces` + 1 documents, with paths `<path>#<i>`, to hold some out."""
    result: list[Document] = []
    size = max(len(document.text) // pieces, 1)
    start = 0
    while start < len(document.text):
        newline = document.text.find("\n", start + size - 1)
        end = len(document.text) if newline < 0 else newline + 1
        result.append(document._replace(text=document.text[start:end], path=f"{document.path}#{len(result)}"))
        start = end
    return result


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: Path,
    *,
    split_of: Callable[[Document], str],
    splits: Sequence[str] = (TRAIN, HELDOUT),
    deduplicate: bool = False,
    bos: bool = True,
    shard_tokens: int = 100_000_000,
    sources: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    stats: ReadStats | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenise `documents` into the new folder `out`, which appears complete or not at all.

    Documents keep their order within their split; with `bos` the BOS id goes before each, and no EOS after (the
    published policy). A shard holds at most `shard_tokens` tokens, or one longer document. `deduplicate` leaves out
    exact copies of an earlier text. `sources`, `options` (what else the caller chose) and `stats.bad` are recorded.
    Raises DataError for an `out` that exists or cannot be written, no BOS, or a split that gets no token.
    """
    if bos and tokenizer.bos_id is None:
        raise DataError("the tokenizer has no BOS; name bos_token in its tokenizer_config.json, or prepare without")
    if shard_tokens < 1:
        raise DataError(f"shard_tokens = {shard_tokens}; expected at least 1")
    dtype = dtype_for(tokenizer.vocab_size)
    prefix = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    try:
        if out.exists():
            raise DataError(f"{out}: exists already; expected a new folder")
        with publish_folder(out) as folder:
            writers = {split: _SplitWriter(folder, split, DTYPES[dtype], shard_tokens) for split in splits}
            with ExitStack() as stack:
                for writer in writers.values():
                    stack.callback(writer.close)
                duplicates = _write(documents, tokenizer, prefix, writers, split_of, deduplicate, progress)
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                dtype=dtype,
                vocab_size=tokenizer.vocab_size,
                tokenizer_sha256=tokenizer.sha256,
                bos_policy="before_each_document" if bos else "none",
                bos_id=tokenizer.bos_id if bos else None,
                eos_policy="none",
                eos_id=None,
                splits={split: tuple(writer.files) for split, writer in writers.items()},
                source_tokens={split: dict(sorted(writer.source_tokens.items())) for split, writer in writers.items()},
                duplicates=duplicates,
                skipped=stats.bad if stats is not None else 0,
                skipped_share=0.0,
                options={"deduplicate": deduplicate, "shard_tokens": shard_tokens} | dict(options or {}),
                sources=tuple(SourceRecord(name, "", None) for name in sources or ["memory"]),
                versions=_versions(),
            )
            tokenizer.save(folder / TOKENIZER)
            write_manifest(manifest, folder)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    return manifest


def _write(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    prefix: list[int],
    writers: Mapping[str, "_SplitWriter"],
    split_of: Callable[[Document], str],
    deduplicate: bool,
    progress: Progress | None,
) -> int:
    """Tokenise and write all documents; returns how many were left out as duplicates."""
    seen: set[bytes] = set()
    num_documents = num_bytes = duplicates = 0
    for batch in _batches(documents):
        if deduplicate:
            kept = []
            for document in batch:
                digest = hashlib.blake2b(document.text.encode("utf-8"), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    kept.append(document)
            duplicates += len(batch) - len(kept)
            batch = kept
        for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch])):
            size = len(document.text.encode("utf-8"))
            writers[split_of(document)].add(prefix + ids, size, document.source)
            num_documents += 1
            num_bytes += size
        if progress is not None:
            progress(num_documents, num_bytes)
    for split, writer in writers.items():
        if not writer.source_tokens:
            raise DataError(f"split {split!r} got no document; expected at least one")
    logger.info("%d documents, %d bytes, %d duplicates left out", num_documents, num_bytes, duplicates)
    return duplicates


def _versions() -> dict[str, str]:
    return {"gdn": gdn.__version__, "tokenizers": tokenizers.__version__, "python": platform.python_version()}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the shards of one split; a document lies whole in one shard."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.files: list[ShardFile] = []
        self.source_tokens: Counter[str] = Counter()
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._streams: tuple[BinaryIO, BinaryIO] | None = None
        self._tokens = self._documents = self._bytes = 0

    def add(self, ids: list[int], num_bytes: int, source: str) -> None:
        if not ids:  # two documents may not begin at the same token
            return
        if self._tokens and self._tokens + len(ids) > self._shard_tokens:
            self.close()
        if self._streams is None:
            name = f"{self._split}-{len(self.files):05d}"
            self._streams = ((self._folder / f"{name}.bin").open("wb"), (self._folder / f"{name}.docs").open("wb"))
        tokens, docs = self._streams
        tokens.write(np.asarray(ids, dtype=self._dtype).tobytes())
        docs.write(self._tokens.to_bytes(8, "little"))
        self.source_tokens[source] += len(ids)
        self._tokens += len(ids)
        self._documents += 1
        self._bytes += num_bytes

    def close(self) -> None:
        """Finish the open shard, if any, and list it."""
        if self._streams is None:
            return
        streams, self._streams = self._streams, None
        for stream in streams:
            stream.close()
        names = [Path(stream.name) for stream in streams]
        sums = [sha256_file(name) for name in names]
        self.files.append(ShardFile(names[0].name, sums[0], sums[1], self._tokens, self._documents, self._bytes, 0))
        self._tokens = self._documents = self._bytes = 0
