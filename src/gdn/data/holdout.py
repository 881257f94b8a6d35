"""Which documents of a small set are held out: whole folders, so that near-copies do not end up on both sides.

`prepare` itself holds out single documents by their hash; the quickstart's text is full of near-copies.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from gdn.data.documents import Document
from gdn.data.readers import is_row_file
from gdn.data.shards import HELDOUT, TRAIN
from gdn.errors import DataError


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
