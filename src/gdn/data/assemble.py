"""Results of tasks to the published folder: which documents are kept, the shards of those, their manifest.

A task's result is a folder: for each split `train.bin` (ids) and `train.rows` (one record a document), and `task.json`.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gdn.data.shards import DOCS_DTYPE, HELDOUT, TRAIN, ShardFile
from gdn.data.sources import Stream

ROWS = np.dtype([("start", "<u8"), ("bytes", "<u8"), ("label", "<u4"), ("hash", "<u8", 2)])
TASK = "task.json"
_HASHES = np.dtype([("hash", "<u8", 2), ("part", "<u4"), ("place", "<u4")])
_SORTED = 1 << 20  # hashes that are sorted together: 100 MB
_BLOCK = 1 << 18  # documents of a task that are in hand: it may have any number
_COPY = 1 << 24  # tokens


class Kept(NamedTuple):
    """What is taken of one task: the documents of each of its splits up to an end, but for those dropped."""

    stream: Stream
    folder: Path
    ends: dict[str, int]
    dropped: dict[str, np.ndarray]  # a bit for each document; only of splits from which any is dropped


class _Block(NamedTuple):
    """Some documents of a task that follow each other."""

    first: int
    rows: np.ndarray  # ROWS
    lengths: np.ndarray  # tokens, int64
    kept: np.ndarray  # bool


class Totals(NamedTuple):
    """What the manifest says beside the shards."""

    source_tokens: dict[str, Counter[str]]
    duplicates: int
    documents: int  # read with text, before anything was left out
    bad: int
    first_bad: str
    blank: int
    first_blank: str


def task_folder(work: Path, task: int) -> Path:
    """Where the result of a task is published."""
    return work / "tasks" / f"{task:06d}"


def read_task(folder: Path) -> dict[str, Any] | None:
    """A task's summary; None while it is not done."""
    try:
        result: dict[str, Any] = json.loads((folder / TASK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return result


def task_tokens(summary: dict[str, Any], split: str) -> int:
    """Tokens of `split` in a task's summary."""
    return int(summary["splits"].get(split, {"tokens": 0})["tokens"])


def missing_tasks(stream: Stream, work: Path, target: int | None) -> list[int]:
    """Tasks of the stream that are still to do, in order: none once those done from the first on hold `target` tokens."""
    tokens, missing = 0, []
    for task in range(stream.first_task, stream.first_task + len(stream.tasks)):
        summary = read_task(task_folder(work, task))
        if summary is None:
            missing.append(task)
        elif not missing:
            tokens += task_tokens(summary, stream.counted)
            if target is not None and tokens >= target:
                return []
    return missing


def select(streams: Sequence[Stream], work: Path, deduplicate: bool) -> tuple[list[Kept], dict[int, int]]:
    """Which documents are kept: the first of each text if `deduplicate`, up to the limit of each stream.

    A stream takes whole documents until it has its limit, from the tasks done from its first on; what others have done
    beyond that is left out, so that the result does not depend on who was faster. Returns those, and for each stream the
    tokens that are missing to its limit, 0 without a limit.
    """
    kept: list[Kept] = []
    lacking = {}
    for number, stream in enumerate(streams):
        candidates: list[Kept] = []
        for task in range(stream.first_task, stream.first_task + len(stream.tasks)):
            folder = task_folder(work, task)
            summary = read_task(folder)
            if summary is None:
                break
            ends = {split: int(counts["documents"]) for split, counts in sorted(summary["splits"].items())}
            candidates.append(Kept(stream, folder, ends, {}))
        if deduplicate:
            _drop_copies(kept, candidates, work / "hashes")
        taken, left = _up_to_limit(candidates, stream)
        kept += taken
        lacking[number] = left
    return kept, lacking


def assemble(kept: Sequence[Kept], out: Path, dtype: "np.dtype[Any]") -> tuple[dict[str, tuple[ShardFile, ...]], Totals]:
    """Write the shards of what is kept into `out`, one for each task and split that has any; OSError."""
    splits: dict[str, list[ShardFile]] = {TRAIN: [], HELDOUT: []}
    source_tokens: dict[str, Counter[str]] = {TRAIN: Counter(), HELDOUT: Counter()}
    duplicates = documents = bad = blank = 0
    first_bad = first_blank = ""
    for item in sorted(kept, key=lambda item: item.stream.source):  # a source's shards lie together
        summary = read_task(item.folder)
        assert summary is not None
        bad, blank = bad + summary["bad"], blank + summary["blank"]
        first_bad, first_blank = first_bad or summary["first_bad"], first_blank or summary["first_blank"]
        documents += summary["documents"]
        for split, end in item.ends.items():
            name = f"{split}-{len(splits[split]):05d}.bin"
            shard, tokens = _write_shard(item, split, out / name, dtype, summary)
            duplicates += end - shard.documents
            if not shard.documents:
                (out / name).unlink()
                (out / shard.docs_name).unlink()
                continue
            splits[split].append(shard)
            for label, count in zip(summary["labels"], tokens.tolist()):
                source_tokens[split][label] += count
    tokens_by_label = {split: +counts for split, counts in source_tokens.items()}
    totals = Totals(tokens_by_label, duplicates, documents, bad, first_bad, blank, first_blank)
    return {split: tuple(files) for split, files in splits.items() if files}, totals


def _blocks(item: Kept, split: str) -> Iterator[_Block]:
    """The documents up to the end, dropped ones too."""
    summary = read_task(item.folder)
    assert summary is not None
    path, total, end = item.folder / f"{split}.rows", int(summary["splits"][split]["documents"]), item.ends[split]
    for first in range(0, end, _BLOCK):
        count = min(_BLOCK, end - first)
        rows = np.fromfile(path, dtype=ROWS, count=count + 1, offset=first * ROWS.itemsize)
        starts = rows["start"].astype(np.int64)
        if first + count == total:  # there is no row after the last
            starts = np.append(starts, task_tokens(summary, split))
        kept = np.ones(count, dtype=bool)
        if split in item.dropped:
            bits = item.dropped[split][first // 8 : -(-(first + count) // 8)]  # a block begins at a whole byte
            kept = np.unpackbits(bits, count=count, bitorder="little") == 0
        yield _Block(first, rows[:count], np.diff(starts), kept)


def _up_to_limit(candidates: list[Kept], stream: Stream) -> tuple[list[Kept], int]:
    if stream.limit is None:
        return candidates, 0
    left, taken = stream.limit, []
    for item in candidates:
        if left <= 0:
            break
        taken.append(item)
        if stream.counted not in item.ends:
            continue
        for block in _blocks(item, stream.counted):
            before = np.cumsum(np.where(block.kept, block.lengths, 0))
            enough = int(np.searchsorted(before, left))
            left -= int(before[min(enough, len(before) - 1)])
            if enough < len(before):
                item.ends[stream.counted] = block.first + enough + 1
                break
    return taken, max(left, 0)


def _drop_copies(before: Sequence[Kept], candidates: Sequence[Kept], folder: Path) -> None:
    """Drop the `candidates` whose text `before` has kept, or that came earlier among the candidates.

    By 128-bit hashes. They are dealt out to files by their value, one after the other in `folder`, and each file is sorted
    by itself: memory is a bit for each document, however many there are, and disk 24 bytes.
    """
    parts = [(item, split) for items in (before, candidates) for item in items for split in item.ends]
    total = sum(item.ends[split] for item, split in parts)
    files = max(-(-total // _SORTED), 1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (item, split) in enumerate(parts):
        for block in _blocks(item, split):
            places = np.flatnonzero(block.kept)
            found = np.empty(len(places), dtype=_HASHES)
            found["hash"], found["part"], found["place"] = block.rows["hash"][places], number, places + block.first
            file = (found["hash"][:, 1] % np.uint64(files)).astype(np.int64)
            found, edges = found[np.argsort(file, kind="stable")], np.cumsum(np.bincount(file, minlength=files))
            for i, (begin, end) in enumerate(zip([0, *edges.tolist()], edges.tolist())):
                if end > begin:
                    with (folder / f"{i:06d}").open("ab") as stream:
                        stream.write(found[begin:end].tobytes())
    for path in sorted(folder.iterdir()):
        for copies in _copies(path):
            edges = np.flatnonzero(np.diff(copies["part"].astype(np.int64), prepend=-1, append=-1)).tolist()
            for begin, end in zip(edges, edges[1:]):
                item, split = parts[int(copies["part"][begin])]
                _drop(item, split, copies["place"][begin:end].astype(np.int64))
    shutil.rmtree(folder)


def _copies(path: Path) -> Iterator[np.ndarray]:
    """Entries of the file, in its order, whose hash an earlier one has; a text with many copies may make it long."""
    different = np.empty((0, 2), dtype=np.uint64)
    for first in range(0, path.stat().st_size // _HASHES.itemsize, _SORTED):
        entries = np.fromfile(path, dtype=_HASHES, count=_SORTED, offset=first * _HASHES.itemsize)
        hashes = np.concatenate([different, entries["hash"]])
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal hashes the earliest document comes first
        ranked = hashes[order]
        again = np.zeros(len(hashes), dtype=bool)
        again[order[1:]] = (ranked[1:] == ranked[:-1]).all(axis=1)
        yield entries[again[len(different) :]]
        different = hashes[~again]


def _drop(item: Kept, split: str, places: np.ndarray) -> None:
    if split not in item.dropped:
        item.dropped[split] = np.zeros(-(-item.ends[split] // 8), dtype=np.uint8)
    np.bitwise_or.at(item.dropped[split], places >> 3, np.left_shift(1, places & 7).astype(np.uint8))


def _write_shard(
    item: Kept, split: str, target: Path, dtype: "np.dtype[Any]", summary: dict[str, Any]
) -> tuple[ShardFile, np.ndarray]:
    """The shard's entry, and its tokens by the number of their label."""
    source, of_task = item.folder / f"{split}.bin", summary["splits"][split]
    whole = split not in item.dropped and item.ends[split] == of_task["documents"]
    digest, docs_digest = hashlib.sha256(), hashlib.sha256()
    tokens = documents = size = 0
    by_label = np.zeros(len(summary["labels"]), dtype=np.int64)
    if whole:
        _link(source, target)
    with target.open("ab") as stream, target.with_suffix(".docs").open("wb") as docs:
        for block in _blocks(item, split):
            rows, lengths = block.rows[block.kept], block.lengths[block.kept]
            if not whole and len(rows):
                _copy_kept(source, stream, digest, rows["start"].astype(np.int64), lengths, dtype)
            starts = (tokens + np.cumsum(lengths) - lengths).astype(DOCS_DTYPE).tobytes()
            docs.write(starts)
            docs_digest.update(starts)
            by_label += np.bincount(rows["label"], weights=lengths, minlength=len(by_label)).astype(np.int64)
            tokens, documents, size = tokens + int(lengths.sum()), documents + len(rows), size + int(rows["bytes"].sum())
    sha256 = of_task["sha256"] if whole else digest.hexdigest()
    shard = ShardFile(target.name, sha256, docs_digest.hexdigest(), tokens, documents, size, item.stream.source)
    return shard, by_label


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _copy_kept(
    source: Path, stream: BinaryIO, digest: "hashlib._Hash", starts: np.ndarray, lengths: np.ndarray, dtype: "np.dtype[Any]"
) -> None:
    """Append the documents at `starts`, neighbours together, to the stream and the sum."""
    with source.open("rb") as tokens:
        for first, last in _runs(starts, starts + lengths):
            tokens.seek(first * dtype.itemsize)
            for begin in range(first, last, _COPY):
                data = tokens.read((min(begin + _COPY, last) - begin) * dtype.itemsize)
                digest.update(data)
                stream.write(data)


def _runs(begins: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches [begin, end) with neighbours joined."""
    breaks = np.flatnonzero(begins[1:] != ends[:-1])
    for first, last in zip([0, *(breaks + 1).tolist()], [*breaks.tolist(), len(begins) - 1]):
        yield int(begins[first]), int(ends[last])
