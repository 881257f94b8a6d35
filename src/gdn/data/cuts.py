"""Where a tokenizer's texts may be cut so that the ids stay the same, proved from its tokenizer.json.

`word_cut` cuts into words, which can be looked up: for two common forms of tokenizers. `piece_cut` cuts a long text into
pieces, so that memory stays bounded: for many more. What is not known to be exact is None; the caller then does without.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

SPACE = "\u2581"  # what sentencepiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class WordCut(NamedTuple):
    """How a tokenizer's texts may be cut into words that are tokenised one by one."""

    normalize: Callable[[str, bool], str]  # (part of a text, whether it is the first) -> what is cut and tokenised
    word: "re.Pattern[str]"
    slice_end: "re.Pattern[str]"  # where a text may be cut before it is normalised
    definition: dict[str, Any]  # the tokenizer.json of the words


def word_cut(definition: dict[str, Any]) -> WordCut | None:
    """The cut that is exact for this tokenizer.json, with special tokens read as text; None where none is known to be.

    Sentencepiece's form (a space is a character of the words): exact if no vocabulary entry has it after another character,
    none has a newline beside another character, and no character is unknown, so that neighbouring unknowns cannot fuse.
    GPT-2's form (byte level): its pattern never matches across the beginning of white space, whatever the vocabulary.
    """
    model, added = definition["model"], definition.get("added_tokens") or []
    plain = model["type"] == "BPE" and not model.get("dropout") and not definition.get("truncation")
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if not plain or affixes or not all(token["special"] for token in added):
        return None
    bare = definition | {"normalizer": None, "post_processor": None, "added_tokens": added}
    before, normalizer = definition.get("pre_tokenizer"), definition.get("normalizer")
    if before is None and normalizer == _SENTENCEPIECE and not model.get("ignore_merges") and _words_are_apart(model):
        word = re.compile(f"{SPACE}*[^{SPACE}\n]+|{SPACE}+|\n")
        return WordCut(_mark_spaces, word, re.compile(f"(?<=[^ {SPACE}])[ \n]"), bare)
    byte_level = before is not None and before["type"] == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]
    if byte_level and normalizer is None:
        # White space of Python, of which the pattern's is a part: a word ends only where both see it begin.
        word = re.compile(r"\s*\S+(?:[^\S \n]\s*\S+)*(?:[^\S \n]\s*)?|\s+")
        return WordCut(lambda text, first: text, word, re.compile(r"(?<=\S)[ \n]"), bare)
    return None


_SENTENCEPIECE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}


def _mark_spaces(text: str, first: bool) -> str:
    return (SPACE if first else "") + text.replace(" ", SPACE)


def _knows_all_bytes(model: dict[str, Any]) -> bool:
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))


def _words_are_apart(model: dict[str, Any]) -> bool:
    if not _knows_all_bytes(model) and (model.get("fuse_unk") or not model.get("unk_token")):
        return False
    crossing = re.compile(f"[^{SPACE}]{SPACE}|.\n|\n.", re.DOTALL)
    for left, right in _merges(model):
        if crossing.search(left + right) or _BYTE.fullmatch(left) or _BYTE.fullmatch(right):
            return False
    return True


class ByteLengths(NamedTuple):
    """Bounds of the UTF-8 bytes of texts by their ids: the sum over a table, less what each document begins with."""

    tables: tuple[np.ndarray, np.ndarray]  # int64 [vocab_size]: the least and the most that an id stands for
    begins: tuple[int, int]


def byte_lengths(definition: dict[str, Any], vocab_size: int) -> ByteLengths | None:
    """Of this tokenizer.json; None where ids do not tell: a normalizer, or unknown characters, may have changed the text.

    Byte level: a character of an entry is a byte. Sentencepiece's form: its mark of a space may be one of the text, too.
    """
    model, normalizer = definition["model"], definition.get("normalizer")
    splitters = _steps(definition.get("pre_tokenizer"), "pretokenizers")
    if model["type"] != "BPE" or not all(token["special"] for token in definition.get("added_tokens") or []):
        return None
    byte_level = bool(splitters) and splitters[-1]["type"] == "ByteLevel" and not splitters[-1]["add_prefix_space"]
    keeps_all = all(step["type"] == "Digits" or step.get("behavior") == "Isolated" for step in splitters[:-1])
    if byte_level and keeps_all and normalizer is None:
        begins = (0, 0)
    elif not splitters and normalizer == _SENTENCEPIECE and _knows_all_bytes(model):
        begins = (1, 3)
    else:
        return None
    least, most = np.zeros(vocab_size, dtype=np.int64), np.zeros(vocab_size, dtype=np.int64)
    for entry, number in model["vocab"].items():
        most[number] = len(entry) if byte_level else 1 if _BYTE.fullmatch(entry) else len(entry.encode())
        least[number] = most[number] - entry.count(SPACE) * (begins[1] - begins[0])
    return ByteLengths((least, most), begins)


def piece_ends(text: str, start: int) -> Iterator[int]:
    """Positions from `start` on between a letter and a space; a letter that no normalization changes, splits or removes."""
    for match in _LETTER.finditer(text, start):
        if match[0].isalpha() and unicodedata.is_normalized("NFKD", match[0]):
            yield match.end()


_LETTER = re.compile(r"[^\W\d_](?= )")


def piece_cut(definition: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer.json of what follows a cut at one of `piece_ends`; None where cutting is not known to be exact.

    It is exact if each step gives for a text what it gives for its two parts. Of the normalizers those do that look at one
    character, and Unicode's forms: a space never composes with what is before it. Added tokens do that cannot hold the
    letter and the space. Of the pre-tokenizers those do that part the two and look at nothing behind them; the model then
    sees one word at a time. Without a pre-tokenizer no byte-pair merge may join a space to another character before it.
    """
    model = definition["model"]
    normalizers = _steps(definition.get("normalizer"), "normalizers")
    splitters = _steps(definition.get("pre_tokenizer"), "pretokenizers")
    later = [step for step in normalizers if step["type"] != "Prepend"]
    replaces = [step for step in later if step["type"] == "Replace"]
    if model.get("dropout") or not all(step["type"] in _BY_CHARACTER or step == _REPLACE_SPACES for step in later):
        return None
    if not all(_is_apart(token, normalizers) for token in definition.get("added_tokens") or [] if not token["special"]):
        return None
    if splitters and (replaces or not _part_words(splitters)):
        return None
    if not splitters and not _spaces_begin_tokens(model, SPACE if replaces else " "):
        return None
    if later == normalizers:
        return definition
    return definition | {"normalizer": {"type": "Sequence", "normalizers": later}}  # "Prepend" is for the text's beginning


_BY_CHARACTER = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")
_REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# The patterns of GPT-4, Llama 3 and Qwen 2: after a letter no match goes on with a space, and none looks back.
_CONTRACTIONS, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_PATTERNS = (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, _CONTRACTIONS + r"\p{N}" + _REST)


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for part in step[key] for inner in _steps(part, key)] if step["type"] == "Sequence" else [step]


def _is_apart(token: dict[str, Any], normalizers: Sequence[dict[str, Any]]) -> bool:
    """Whether a token that is found in texts cannot hold a letter and a space after it, nor changes what is beside it."""
    if token["lstrip"] or token["rstrip"] or token["single_word"] or (token["normalized"] and normalizers):
        return False
    return " " not in token["content"][1:] and not any(step["type"] == "Prepend" for step in normalizers)


def _part_words(splitters: Sequence[dict[str, Any]]) -> bool:
    for i, step in enumerate(splitters):
        kind = step["type"]
        by_regex = step.get("pattern", {}).get("Regex") in _PATTERNS and (step["behavior"], step["invert"]) in _ISOLATED
        by_space = kind == "Metaspace" and step.get("replacement") == SPACE and step.get("split", True)
        byte_level = kind == "ByteLevel" and step.get("use_regex", True)
        if (
            by_space
            or byte_level
            or (kind == "Split" and by_regex)
            or kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
        ):
            # What comes after sees each side by itself; "first" alone asks where in the text it is.
            return not any(later.get("prepend_scheme") == "first" for later in splitters[i + 1 :])
        if kind not in ("Digits", "Punctuation"):
            return False
    return False


_ISOLATED = (("Isolated", False), ("Removed", True))


def _spaces_begin_tokens(model: dict[str, Any], space: str) -> bool:
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or affixes or model.get("ignore_merges") or space not in model["vocab"]:
        return False
    crossing = re.compile(f"[^{space}]{space}", re.DOTALL)
    return not any(crossing.search("".join(merge)) for merge in _merges(model))


def _merges(model: dict[str, Any]) -> Iterator[Sequence[str]]:
    for merge in model["merges"]:
        yield merge.split(" ") if isinstance(merge, str) else merge
