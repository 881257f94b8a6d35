"""What a document is, and what is decided by its text alone, wherever it lies."""

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """One text, and where it came from."""

    text: str
    path: str  # of its file, relative to the source's root, with forward slashes
    row: int  # in its file, counted from 0; 0 for a file that is one document
    source: str  # label: `meta.redpajama_set_name` where the row has it, else ""


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space in it, which is left out without being an error."""
    return not text or text.isspace()


def text_digest(text: str) -> bytes:
    """128 bits that stand for the text: the same text is the same document, wherever it lies."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document of this digest is among the `share` that is held out, whatever else is there."""
    return int.from_bytes(digest[:8], "little") < share * 2**64
