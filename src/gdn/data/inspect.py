"""Looking into token shards: the text that a step trains on, and what the shards share with evaluation sets."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gdn.data.loader import Loader
from gdn.data.shards import TokenShards
from gdn.data.tokenizer import Tokenizer
from gdn.errors import DataError

NGRAM = 13  # words: the length that GPT-3's authors and most after them count overlap by
_BLOCK = 1 << 20  # tokens
_FILTER = 1 << 24
_WORD = re.compile(r"\w+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)


class Window(NamedTuple):
    """One sample of training: seq_len + 1 tokens."""

    window: int
    start: int  # in the split's stream of tokens
    documents: list[str]  # its text, cut where documents begin


def windows_of(loader: Loader, tokenizer: Tokenizer, windows: Sequence[int]) -> Iterator[Window]:
    """The text of the given windows, as the loader numbers them; DataError for one that there is not."""
    for window in windows:
        if not 0 <= window < loader.order.num_windows:
            raise DataError(f"window {window}; expected 0 to {loader.order.num_windows - 1}")
        start = int(loader.starts(np.array([window]))[0])
        tokens = loader.shards.read(start, loader.seq_len + 1)
        cuts = loader.shards.document_starts(start, loader.seq_len + 1)
        parts = np.split(tokens, cuts[cuts > 0])
        yield Window(window, start, [tokenizer.decode(part.tolist()) for part in parts])


def dumped_windows(file: Path) -> list[int]:
    """The windows in the file that training writes at a step that was not finite; DataError for a file that is none."""
    try:
        windows = json.loads(file.read_text(encoding="utf-8"))["windows"]
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        windows = None
    if not isinstance(windows, list) or not all(type(window) is int for window in windows):
        raise DataError(f"{file}: expected a nonfinite-step-*.json of a run: a JSON object with a list of 'windows'")
    return windows


class Overlap(NamedTuple):
    """What one evaluation task shares with the training text."""

    task: str
    rows: int  # of at least 13 words
    rows_hit: int  # of which some 13 words in a row are in the training text
    ngrams: int  # different ones
    ngrams_hit: int


def overlaps(
    shards: TokenShards, tokenizer: Tokenizer, folder: Path, progress: Callable[[int, int], None] | None = None
) -> list[Overlap]:
    """Count the 13-grams of each evaluation file in `folder` (jsonl, txt, raw) that occur in the split's documents.

    Words are runs of letters and digits, lower case; a row's are those of all its strings, each by itself. `progress` gets
    the documents done and in all. Compared are 64-bit hashes. Raises DataError for a folder without such files.
    """
    tasks = sorted(path for path in folder.iterdir() if path.suffix in (".jsonl", ".txt", ".raw")) if folder.is_dir() else []
    if not tasks:
        raise DataError(f"{folder}: no evaluation files; expected a folder of .jsonl, .txt or .raw")
    hasher = _NgramHasher()
    rows = [[hasher.ngrams(texts) for texts in _rows(path)] for path in tasks]
    wanted = np.unique(np.concatenate([ngrams for task in rows for ngrams in task] or [np.empty(0, np.uint64)]))
    found = np.zeros(len(wanted), dtype=bool)
    maybe = np.zeros(_FILTER, dtype=bool)  # by the lowest bits: a look here spares most 13-grams the search
    maybe[wanted % np.uint64(_FILTER)] = True
    total = shards.manifest.num_documents(shards.split)
    for number, text in enumerate(_documents(shards, tokenizer)):
        ngrams = hasher.ngrams([text])
        ngrams = ngrams[maybe[ngrams % np.uint64(_FILTER)]]
        if len(ngrams):  # then the table is not empty
            places = np.minimum(np.searchsorted(wanted, ngrams), len(wanted) - 1)
            found[places[wanted[places] == ngrams]] = True
        if progress is not None and number % 1000 == 0:
            progress(number, total)
    return [_overlap(path.stem, task, wanted, found) for path, task in zip(tasks, rows)]


def _overlap(name: str, rows: list[np.ndarray], wanted: np.ndarray, found: np.ndarray) -> Overlap:
    rows = [row for row in rows if len(row)]
    hits = [found[np.searchsorted(wanted, row)] for row in rows]
    mine = np.unique(np.concatenate(rows)) if rows else np.empty(0, dtype=np.uint64)
    hit = found[np.searchsorted(wanted, mine)] if len(mine) else mine
    return Overlap(name, len(rows), sum(bool(row.any()) for row in hits), len(mine), int(hit.sum()))


class _NgramHasher:
    """13-grams of words as 64-bit hashes, a polynomial of the words' own."""

    def __init__(self) -> None:
        self._words: dict[str, int] = {}

    def ngrams(self, texts: Iterable[str]) -> np.ndarray:
        """Hashes of the 13-grams of each text: uint64 [any]."""
        found = [self._of_text(text) for text in texts]
        return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)

    def _of_text(self, text: str) -> np.ndarray:
        if len(self._words) > 1_000_000:
            self._words.clear()
        words = _WORD.findall(text.lower())
        hashes = np.fromiter(map(self._hash, words), dtype=np.uint64, count=len(words))
        if len(words) < NGRAM:
            return np.empty(0, dtype=np.uint64)
        count = len(words) - NGRAM + 1
        result = np.zeros(count, dtype=np.uint64)
        for i in range(NGRAM):
            result = result * _PRIME + hashes[i : i + count]
        return result

    def _hash(self, word: str) -> int:
        value = self._words.get(word)
        if value is None:
            value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
            self._words[word] = value
        return value


def _rows(path: Path) -> Iterator[list[str]]:
    """The strings of each row; a text file is one row."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: broken UTF-8 at byte {error.start}") from None
    if path.suffix != ".jsonl":
        yield [text]
        return
    for number, line in enumerate(text.split("\n")):
        if line.strip():
            try:
                yield list(_strings(json.loads(line)))
            except ValueError as error:
                raise DataError(f"{path}: row {number} (line {number + 1}): broken JSON: {error}") from None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _documents(shards: TokenShards, tokenizer: Tokenizer) -> Iterator[str]:
    """Text of every document, some at a time."""
    rest = np.empty(0, dtype=np.int64)
    for first in range(0, shards.num_tokens, _BLOCK):
        count = min(_BLOCK, shards.num_tokens - first)
        tokens = shards.read(first, count)
        begin, *parts = np.split(tokens, shards.document_starts(first, count))
        rest = np.concatenate([rest, begin])
        for part in parts:
            if len(rest):
                yield tokenizer.decode(rest.tolist())
            rest = part
    yield tokenizer.decode(rest.tolist())
