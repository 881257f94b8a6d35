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
from typing import Any, NamedTuple

import numpy as np

from gdn.data.shards import DOCS_DTYPE, HELDOUT, TRAIN, ShardFile
from gdn.data.sources import Stream

ROWS = np.dtype([("start", "<u8"), ("bytes", "<u8"), ("label", "<u4"), ("hash", "<u8", 2)])
TASK = "task.json"
_AT_ONCE = 1 << 22  # documents whose hashes are sorted together
_COPY = 1 << 24  # tokens


class Kept(NamedTuple):
    """What is taken of one task: for each of its splits a mask over the documents, and how many come before the limit."""

    stream: Stream
    folder: Path
    masks: dict[str, np.ndarray]
    ends: dict[str, int]


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
            # One True, seen once a document: a mask takes memory when something is left out (`_own_mask`).
            masks = {split: np.broadcast_to(True, len(_rows(folder, split))) for split in sorted(summary["splits"])}
            candidates.append(Kept(stream, folder, masks, {split: len(mask) for split, mask in masks.items()}))
        if deduplicate:
            _mark_duplicates(kept, candidates)
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
        for split, mask in item.masks.items():
            duplicates += item.ends[split] - int(mask.sum())
            if mask.any():
                name = f"{split}-{len(splits[split]):05d}.bin"
                shard, tokens = _write_shard(item, split, out / name, dtype, summary)
                splits[split].append(shard)
                for label, count in zip(summary["labels"], tokens.tolist()):
                    source_tokens[split][label] += count
    tokens_by_label = {split: +counts for split, counts in source_tokens.items()}
    totals = Totals(tokens_by_label, duplicates, documents, bad, first_bad, blank, first_blank)
    return {split: tuple(files) for split, files in splits.items() if files}, totals


def _own_mask(item: Kept, split: str) -> np.ndarray:
    """The mask as an array that can be written to."""
    if not item.masks[split].flags.writeable:
        item.masks[split] = item.masks[split].copy()
    return item.masks[split]


def _rows(folder: Path, split: str) -> np.ndarray:
    path = folder / f"{split}.rows"
    return np.memmap(path, dtype=ROWS, mode="r") if path.stat().st_size else np.empty(0, dtype=ROWS)


def _up_to_limit(candidates: list[Kept], stream: Stream) -> tuple[list[Kept], int]:
    if stream.limit is None:
        return candidates, 0
    left, taken = stream.limit, []
    for item in candidates:
        if left <= 0:
            break
        taken.append(item)
        mask = item.masks.get(stream.counted)
        if mask is None:
            continue
        before = np.cumsum(np.where(mask, _lengths(item.folder, stream.counted), 0))
        enough = int(np.searchsorted(before, left))
        if enough < len(mask):
            _own_mask(item, stream.counted)[enough + 1 :] = False
            item.ends[stream.counted] = enough + 1
        left -= int(before[min(enough, len(mask) - 1)])
    return taken, max(left, 0)


def _lengths(folder: Path, split: str) -> np.ndarray:
    """Tokens of each document: int64."""
    summary = read_task(folder)
    assert summary is not None
    return np.diff(_rows(folder, split)["start"].astype(np.int64), append=task_tokens(summary, split))


def _mark_duplicates(before: Sequence[Kept], candidates: Sequence[Kept]) -> None:
    """Clear the masks of `candidates` at texts that `before` has kept, or that came earlier among the candidates.

    By 128-bit hashes, in as many passes as hold the memory down: a pass sorts those of one range of values.
    """
    parts = [(item, split) for items in (before, candidates) for item in items for split in item.masks]
    total = sum(len(item.masks[split]) for item, split in parts)
    passes = -(-total // _AT_ONCE)
    for number in range(passes):
        found = [_in_range(item, split, number, passes) for item, split in parts]
        hashes = np.concatenate([hashes for _, hashes in found])
        owner = np.repeat(np.arange(len(parts)), [len(places) for places, _ in found])
        places = np.concatenate([places for places, _ in found])
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal hashes the earliest document comes first
        ranked = hashes[order]
        again = order[1:][(ranked[1:] == ranked[:-1]).all(axis=1)]
        for i in np.unique(owner[again]):
            item, split = parts[i]
            _own_mask(item, split)[places[again[owner[again] == i]]] = False


def _in_range(item: Kept, split: str, number: int, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the documents that are kept and whose hash falls into pass `number`, and those hashes."""
    hashes = _rows(item.folder, split)["hash"]
    places = np.flatnonzero(item.masks[split] & (hashes[:, 1] % np.uint64(passes) == number))
    return places, np.array(hashes[places])


def _write_shard(
    item: Kept, split: str, target: Path, dtype: "np.dtype[Any]", summary: dict[str, Any]
) -> tuple[ShardFile, np.ndarray]:
    """The shard's entry, and its tokens by the number of their label."""
    mask, rows, lengths = item.masks[split], _rows(item.folder, split), _lengths(item.folder, split)
    source = item.folder / f"{split}.bin"
    if mask.all():
        sha256 = summary["splits"][split]["sha256"]
        _link(source, target)
    else:
        sha256 = _copy_kept(source, target, rows["start"].astype(np.int64)[mask], lengths[mask], dtype)
    starts = np.cumsum(lengths[mask]) - lengths[mask]
    docs = starts.astype(DOCS_DTYPE).tobytes()
    target.with_suffix(".docs").write_bytes(docs)
    counts = np.bincount(rows["label"][mask], weights=lengths[mask], minlength=len(summary["labels"])).astype(np.int64)
    size = int(rows["bytes"][mask].sum())
    docs_sha256 = hashlib.sha256(docs).hexdigest()
    shard = ShardFile(target.name, sha256, docs_sha256, int(lengths[mask].sum()), int(mask.sum()), size, item.stream.source)
    return shard, counts


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _copy_kept(source: Path, target: Path, starts: np.ndarray, lengths: np.ndarray, dtype: "np.dtype[Any]") -> str:
    """Write the documents at `starts`, neighbours together; returns the sum of what was written."""
    tokens = np.memmap(source, dtype=dtype, mode="r")
    digest = hashlib.sha256()
    with target.open("wb") as stream:
        for first, last in _runs(starts, starts + lengths):
            for begin in range(first, last, _COPY):
                data = tokens[begin : min(begin + _COPY, last)].tobytes()
                digest.update(data)
                stream.write(data)
    return digest.hexdigest()


def _runs(begins: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches [begin, end) with neighbours joined."""
    breaks = np.flatnonzero(begins[1:] != ends[:-1])
    for first, last in zip([0, *(breaks + 1).tolist()], [*breaks.tolist(), len(begins) - 1]):
        yield int(begins[first]), int(ends[last])
