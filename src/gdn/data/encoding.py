"""Documents to the bytes of their token ids: what `Tokenizer.encode` gives, faster and in bounded memory where that is exact.

Byte-pair merging of a whole document is the same as merging its words one by one if no merge can join two words; then a
word that came before is looked up, not computed. Whether that holds is proved from the tokenizer's definition, in `cuts`.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers

from gdn.data.cuts import piece_cut, piece_ends, word_cut
from gdn.data.tokenizer import Tokenizer
from gdn.errors import DataError, RunError

_CACHED_CHARACTERS = 6_000_000  # of words; some 100 MB with their ids
_SLICE = 1 << 20  # characters of a document in hand at a time
_LONGEST_WORD = 4_000_000  # characters: a longer one would take more than half a gigabyte to merge
_PIECE = 4096  # characters: the fastest, of 300 to a million, by 1.1 to 1.7 times
_LONGEST_PIECE = 2_000_000  # characters: some 200 MB where `tokenizers` gets a text whole

Engine = Literal["tokenizers", "gigatoken"]
_COMPARED = 20_000  # characters: of each call's texts the first that is no longer is compared, or as much of the first


class Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The bytes of each text's ids."""
        ...


def make_encoder(engine: Engine, tokenizer: Tokenizer, dtype: "np.dtype[Any]") -> Encoder:
    return (GigatokenEncoder if engine == "gigatoken" else DocumentEncoder)(tokenizer, dtype)


class DocumentEncoder:
    """Texts to the bytes of their ids, as little-endian `dtype`: the ids of `Tokenizer.encode`, no others."""

    def __init__(self, tokenizer: Tokenizer, dtype: "np.dtype[Any]") -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        definition = json.loads(tokenizer.serialized)
        self._cut = word_cut(definition)
        self._cache: dict[str, bytes] = {}
        self._cached_characters = 0
        if self._cut is None:
            after = piece_cut(definition)
            self._after_cut = Tokenizer(json.dumps(after).encode(), {}) if after is not None else None
        else:
            self._words = tokenizers.Tokenizer.from_str(json.dumps(self._cut.definition))
            self._words.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The bytes of each text's ids; DataError for a text that can be tokenised in bounded memory by no way known."""
        if self._cut is not None:
            return self._encode_by_words(texts)
        return self._encode_whole(texts) if self._after_cut is None else self._encode_by_pieces(texts)

    def _encode_whole(self, texts: Sequence[str]) -> list[bytes]:
        longest = max(map(len, texts), default=0)
        if longest > _LONGEST_PIECE:
            raise DataError(f"{longest} characters, and no cut is exact for this tokenizer; expected at most {_LONGEST_PIECE}")
        return [self._bytes(ids) for ids in self._tokenizer.encode_batch(texts)]

    def _encode_by_pieces(self, texts: Sequence[str]) -> list[bytes]:
        parts: list[list[bytes]] = [[] for _ in texts]
        batch: list[tuple[int, bool, str]] = []  # (text, whether its beginning, piece)
        characters = 0
        for i, text in enumerate(texts):
            start = 0
            while start < len(text):
                end = next(piece_ends(text, start + _PIECE), len(text)) if len(text) - start > _PIECE else len(text)
                if end - start > _LONGEST_PIECE:
                    raise DataError(
                        f"{end - start} characters without a space after a letter; expected at most {_LONGEST_PIECE}"
                    )
                batch.append((i, start == 0, text[start:end]))
                characters += end - start
                if characters >= _SLICE:
                    self._encode_batch(batch, parts)
                    batch, characters = [], 0
                start = end
        self._encode_batch(batch, parts)
        return [b"".join(found) for found in parts]

    def _encode_batch(self, batch: list[tuple[int, bool, str]], parts: list[list[bytes]]) -> None:
        assert self._after_cut is not None
        for tokenizer, of_beginnings in ((self._tokenizer, True), (self._after_cut, False)):
            pieces = [(i, piece) for i, is_beginning, piece in batch if is_beginning is of_beginnings]
            for (i, _), ids in zip(pieces, tokenizer.encode_batch([piece for _, piece in pieces])):
                parts[i].append(self._bytes(ids))

    def _encode_by_words(self, texts: Sequence[str]) -> list[bytes]:
        assert self._cut is not None
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
