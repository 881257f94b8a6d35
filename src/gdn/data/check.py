"""Whether a folder of shards is what its manifest says: checksums, and the counts that shards and tokenizer can tell."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gdn.data.cuts import ByteLengths, byte_lengths
from gdn.data.documents import is_held_out, text_digest
from gdn.data.shards import DOCS_DTYPE, DTYPES, HELDOUT, MANIFEST, TOKENIZER, Manifest, ShardFile, verify_shards
from gdn.data.tokenizer import Tokenizer, load_tokenizer
from gdn.errors import DataError

_BLOCK = 1 << 22  # tokens, documents
_LOOKED_AT = 8  # documents of a shard whose hash is compared with their split
_LONGEST = 20_000  # tokens of such a document


def check_folder(folder: Path, progress: Callable[[str], None] | None = None) -> Manifest:
    """Verify the checksums, then the manifest's counts, calling `progress` with the files' names.

    Raises DataError: for a file that is not the one recorded at the first, for counts with one line for each that is wrong.
    """
    manifest = verify_shards(folder, progress)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    wrong = [*_of_the_tokenizer(manifest, tokenizer), *_of_the_shards(folder, manifest, tokenizer, progress)]
    if wrong:
        raise DataError("\n".join(f"{folder / MANIFEST}: {line}" for line in wrong))
    return manifest


def _of_the_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> Iterator[str]:
    if manifest.vocab_size != tokenizer.vocab_size:
        yield f"vocab_size is {manifest.vocab_size}; expected {tokenizer.vocab_size}, the tokenizer's"
    for name, policy, got, special in (
        ("bos", manifest.bos_policy, manifest.bos_id, tokenizer.bos_id),
        ("eos", manifest.eos_policy, manifest.eos_id, tokenizer.eos_id),
    ):
        wanted = None if policy == "none" else special
        if got != wanted:
            yield f"{name}_id is {got}; expected {wanted}, by the tokenizer and {name}_policy {policy!r}"


def _of_the_shards(
    folder: Path, manifest: Manifest, tokenizer: Tokenizer, progress: Callable[[str], None] | None
) -> Iterator[str]:
    size = tokenizer.vocab_size
    lengths, specials = byte_lengths(json.loads(tokenizer.serialized), size), {"bos": manifest.bos_id, "eos": manifest.eos_id}
    share: Any = manifest.options.get("holdout_share")
    own_splits: Any = manifest.options.get("own_splits")
    told = isinstance(share, int | float) and isinstance(own_splits, list)  # not by the first versions
    by_hash = {i for i, own in enumerate(own_splits) if not own} if told else set()
    if manifest.source_tokens.keys() != manifest.splits.keys():
        yield f"source_tokens is of {_names(manifest.source_tokens)}; expected {_names(manifest.splits)}, the splits"
    for split, files in manifest.splits.items():
        labels, total = manifest.source_tokens.get(split, {}), manifest.num_tokens(split)
        if not isinstance(labels, dict) or not all(type(count) is int for count in labels.values()):
            yield f"source_tokens.{split} is {labels!r}; expected an object of whole numbers"
        elif split in manifest.source_tokens and sum(labels.values()) != total:
            yield f"source_tokens.{split} sums to {sum(labels.values())}; expected {total}, the tokens of its shards"
        looked: list[bool] = []
        for i, file in enumerate(files):
            if progress is not None:
                progress(file.name)
            tokens = np.memmap(folder / file.name, dtype=DTYPES[manifest.dtype], mode="r")
            starts = np.memmap(folder / file.docs_name, dtype=DOCS_DTYPE, mode="r")
            yield from (f"splits.{split}[{i}]: {line}" for line in _of_a_shard(tokens, starts, file, specials, lengths, size))
            if lengths is not None and file.source in by_hash:
                looked += _held_out(tokens, starts, tokenizer, share)
        yield from _of_the_holdout(split, looked, share)


def _of_a_shard(
    tokens: np.ndarray,
    starts: np.ndarray,
    file: ShardFile,
    specials: Mapping[str, int | None],
    lengths: ByteLengths | None,
    vocab_size: int,
) -> Iterator[str]:
    if starts[0] != 0 or any((begins >= ends).any() for begins, ends in _ranges(starts, file.tokens)):
        yield f"{file.docs_name} does not hold {file.documents} ascending places from 0 to {file.tokens - 1}"
        return
    counts = np.zeros(vocab_size, dtype=np.int64)
    for begin in range(0, file.tokens, _BLOCK):
        block = tokens[begin : begin + _BLOCK]
        if int(block.max()) >= vocab_size:
            yield f"a token {int(block.max())} in {file.name}; expected less than the tokenizer's {vocab_size}"
            return
        counts += np.bincount(block, minlength=vocab_size)
    for name, special in specials.items():
        ranges = _ranges(starts, file.tokens) if special is not None else ()
        lacking = sum(int((tokens[begins if name == "bos" else ends - 1] != special).sum()) for begins, ends in ranges)
        if lacking:
            yield f"{lacking} of {file.documents} documents in {file.name} without {name}_id = {special}"
    if lengths is not None:
        counts[[special for special in specials.values() if special is not None and special < vocab_size]] = 0
        least, most = (int(counts @ table) - own * file.documents for table, own in zip(lengths.tables, lengths.begins))
        if not least <= file.bytes <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            yield f"bytes is {file.bytes}; expected {wanted}, the text of {file.name}"


def _ranges(starts: np.ndarray, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where documents begin and end, int64, some at a time: a shard may have any number."""
    for first in range(0, len(starts), _BLOCK):
        edges = starts[first : first + _BLOCK + 1].astype(np.int64)
        if first + _BLOCK >= len(starts):
            edges = np.append(edges, tokens)
        yield edges[:-1], edges[1:]


def _held_out(tokens: np.ndarray, starts: np.ndarray, tokenizer: Tokenizer, share: float) -> Iterator[bool]:
    """Of some documents of a shard, whether they are held out by the hash of their text."""
    for i in np.unique(np.linspace(0, len(starts) - 1, _LOOKED_AT).astype(np.int64)).tolist():
        begin, end = int(starts[i]), int(starts[i + 1]) if i + 1 < len(starts) else len(tokens)
        if end - begin <= _LONGEST:
            yield is_held_out(text_digest(tokenizer.decode(tokens[begin:end].tolist())), share)


def _of_the_holdout(split: str, looked: list[bool], share: Any) -> Iterator[str]:
    # A text that is decoded with a change counts as any other would: what single ones say proves nothing.
    wrong = sum(held != (split == HELDOUT) for held in looked)
    if looked and wrong > (len(looked) / 2 if split == HELDOUT else max(2, len(looked) * share / 2)):
        yield f"options.holdout_share is {share}; {wrong} of {len(looked)} documents of {split} belong elsewhere by their hash"


def _names(splits: Iterable[str]) -> str:
    return ", ".join(map(repr, splits))
