"""Documents to the bytes of their token ids: what `Tokenizer.encode` gives, faster and in bounded memory where that is exact.

Byte-pair merging of a whole document is the same as merging its words one by one if no merge can join two words; then a
word that came before is looked up, not computed. Whether that holds is proved from the tokenizer's definition, in `word_cut`.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import tokenizers

from gdn.data.tokenizer import Tokenizer
from gdn.errors import DataError, RunError

SPACE = "\u2581"  # what sentencepiece writes for a space
_CACHED_CHARACTERS = 6_000_000  # of words; some 100 MB with their ids
_SLICE = 1 << 20  # characters of a document in hand at a time
_LONGEST_WORD = 4_000_000  # characters: a longer one would take more than half a gigabyte to merge
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


Engine = Literal["tokenizers", "gigatoken"]
_COMPARED = 20_000  # characters: of each call's texts the first that is no longer is compared, or as much of the first


class Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The bytes of each text's ids."""
        ...


def make_encoder(engine: Engine, tokenizer: Tokenizer, dtype: "np.dtype[Any]") -> Encoder:
    return (GigatokenEncoder if engine == "gigatoken" else DocumentEncoder)(tokenizer, dtype)


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


def _words_are_apart(model: dict[str, Any]) -> bool:
    vocabulary = model["vocab"]
    known = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if not known and (model.get("fuse_unk") or not model.get("unk_token")):
        return False
    crossing = re.compile(f"[^{SPACE}]{SPACE}|.\n|\n.", re.DOTALL)
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if crossing.search(left + right) or _BYTE.fullmatch(left) or _BYTE.fullmatch(right):
            return False
    return True


class DocumentEncoder:
    """Texts to the bytes of their ids, as little-endian `dtype`: the ids of `Tokenizer.encode`, no others."""

    def __init__(self, tokenizer: Tokenizer, dtype: "np.dtype[Any]") -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._cut = word_cut(json.loads(tokenizer.serialized))
        self._cache: dict[str, bytes] = {}
        self._cached_characters = 0
        if self._cut is not None:
            self._words = tokenizers.Tokenizer.from_str(json.dumps(self._cut.definition))
            self._words.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The bytes of each text's ids; DataError for a text with a stretch of 4M characters without space or newline."""
        if self._cut is None:
            return [self._bytes(ids) for ids in self._tokenizer.encode_batch(texts)]
        result = [b""] * len(texts)
        batch: list[tuple[int, list[str]]] = []
        characters = 0
        for i, text in enumerate(texts):
            for part in self._parts(text):
                batch.append((i, self._cut.word.findall(part)))
                characters += len(part)
                if characters >= _SLICE:
                    self._flush(batch, result)
                    batch, characters = [], 0
        self._flush(batch, result)
        return result

    def _parts(self, text: str) -> Iterator[str]:
        """The text, normalised, in slices that end where a word does."""
        assert self._cut is not None
        start = 0
        while start < len(text):
            found = self._cut.slice_end.search(text, start + _SLICE) if len(text) > start + _SLICE else None
            end = found.start() if found else len(text)
            yield self._cut.normalize(text[start:end], start == 0)
            start = end

    def _flush(self, batch: list[tuple[int, list[str]]], result: list[bytes]) -> None:
        if self._cached_characters > _CACHED_CHARACTERS:
            self._cache.clear()
            self._cached_characters = 0
        new = list(set().union(*(words for _, words in batch)) - self._cache.keys())
        longest = max(map(len, new), default=0)
        if longest > _LONGEST_WORD:
            raise DataError(f"{longest} characters without a space or newline; expected fewer than {_LONGEST_WORD}")
        self._cache.update(zip(new, self._encode_words(new)))
        self._cached_characters += sum(map(len, new))
        parts: dict[int, list[bytes]] = {}
        for i, words in batch:
            parts.setdefault(i, []).append(b"".join(map(self._cache.__getitem__, words)))
        for i, found in parts.items():
            result[i] = b"".join([result[i], *found])

    def _encode_words(self, words: list[str]) -> Iterator[bytes]:
        # One call and one result for all words: an object for each of them would take longer than its merging.
        encoding = self._words.encode(words, is_pretokenized=True, add_special_tokens=False)
        ids = self._bytes(encoding.ids)
        ends = np.cumsum(np.bincount(np.array(encoding.word_ids, dtype=np.int64), minlength=len(words))) * self._dtype.itemsize
        start = 0
        for end in ends.tolist():
            yield ids[start:end]
            start = end

    def _bytes(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self._dtype).tobytes()


class GigatokenEncoder:
    """The ids of `Tokenizer.encode` by gigatoken, on one thread: some ten times faster, and not proved, but compared.

    Of each call, so of each shard, one text is tokenised by both; RunError if their ids differ.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: "np.dtype[Any]") -> None:
        import gigatoken

        definition = json.loads(tokenizer.serialized)
        if not all(token["special"] for token in definition.get("added_tokens") or []):
            raise DataError("the tokenizer has added tokens that are not special; gigatoken would not find them in texts")
        definition["added_tokens"] = []  # special tokens in a text are text
        self._gigatoken = gigatoken.Tokenizer.from_json(json.dumps(definition))
        self._tokenizer = tokenizer
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        if not texts:
            return []
        import awkward

        found = self._gigatoken.encode_batch(list(texts), parallel=False)
        ids = awkward.to_numpy(awkward.flatten(found)).astype(self._dtype)
        ends = np.cumsum(awkward.to_numpy(awkward.num(found))).tolist()
        result = [ids[start:end].tobytes() for start, end in zip([0, *ends], ends)]
        i = next((i for i, text in enumerate(texts) if len(text) <= _COMPARED), None)
        text = texts[0][:_COMPARED] if i is None else texts[i]  # `tokenizers` would take gigabytes for a whole book
        got = self._gigatoken.encode(text).astype(self._dtype) if i is None else np.frombuffer(result[i], self._dtype)
        wanted = np.array(self._tokenizer.encode(text), self._dtype)
        if not np.array_equal(got, wanted):
            where = next((n for n, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
            raise RunError(
                f"gigatoken's ids differ from the tokenizer's, from the {where + 1}th on, in the text that begins with "
                f"{text[:60]!r}: prepare without --engine gigatoken"
            )
        return result
