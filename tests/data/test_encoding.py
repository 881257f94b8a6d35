"""The fast path gives the ids of `tokenizers`, or is not taken."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn.data import encoding
from gdn.data.cuts import _PATTERNS, _SENTENCEPIECE, piece_cut, word_cut
from gdn.data.encoding import DocumentEncoder, GigatokenEncoder, make_encoder
from gdn.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from gdn.errors import DataError, RunError

U2 = np.dtype("<u2")
# Dense in what could go wrong: runs of spaces, the sign that stands for them, white space that regular expressions see
# differently, newlines, contractions, digits, letters outside the vocabulary, halves of emoji, special tokens as text.
ALPHABET = " \u2581\n\r\t\x1c\x85\xa0\u3000ab'stLe1.,!<>é漢\U0001f600\ud7ff\u0301"
TEXTS = st.lists(
    st.one_of(st.sampled_from(["the ", " and", "<s>", "</s>", "<0x0A>", "don't", "  ", "\n\n"]), st.text(ALPHABET))
)


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """A small tokenizer of the published one's form: words learnt from a text, bytes for the rest."""
    symbols = ["\u2581", *"abstheLnd1.,!'"]
    merges = [
        ("\u2581", "t"),
        ("h", "e"),
        ("\u2581t", "he"),
        ("\u2581", "a"),
        ("n", "d"),
        ("\u2581a", "nd"),
        ("\u2581", "\u2581"),
    ]
    merges += [("\u2581\u2581", "\u2581\u2581"), ("'", "t"), (".", "."), ("..", "."), ("s", "t"), ("a", "b"), ("\u2581a", "b")]
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *symbols, *(a + b for a, b in merges)]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    model |= {"vocab": vocabulary, "merges": [list(merge) for merge in merges]}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": entries[i]} | special for i in range(3)]
    definition = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None}
    definition |= {
        "normalizer": copy.deepcopy(_SENTENCEPIECE),
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return definition | changes


def tokenizer(definition: dict[str, Any]) -> Tokenizer:
    return Tokenizer(json.dumps(definition).encode(), {})


SMALL = tokenizer(sentencepiece())
BYTE_LEVEL = train_bpe(["the and don't the 1.1 ,,! the\n\n  and\t漢" * 3], 300)


def same(tokens: Tokenizer, texts: list[str]) -> None:
    got = DocumentEncoder(tokens, U2).encode(texts)
    assert [np.frombuffer(ids, U2).tolist() for ids in got] == [tokens.encode(text) for text in texts]


@pytest.mark.parametrize("tokens", [SMALL, BYTE_LEVEL], ids=["sentencepiece", "byte level"])
@pytest.mark.parametrize("slice_size", [5, 1 << 20])
def test_ids_are_those_of_the_library(tokens: Tokenizer, slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_SLICE", slice_size)
    assert word_cut(json.loads(tokens.serialized)) is not None

    @settings(max_examples=300, deadline=None)
    @given(st.lists(TEXTS.map("".join), max_size=4))
    def check(texts: list[str]) -> None:
        same(tokens, texts)

    check()


def test_a_full_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CACHED_CHARACTERS", 20)
    encoder = DocumentEncoder(SMALL, U2)
    for i in range(50):
        text = f"the {i} and\nthe {i}"
        assert np.frombuffer(encoder.encode([text])[0], U2).tolist() == SMALL.encode(text)
        assert sum(map(len, encoder._cache)) < 60


def with_merge(left: str, right: str) -> Callable[[dict[str, Any]], None]:
    def change(definition: dict[str, Any]) -> None:
        vocabulary = definition["model"]["vocab"]
        for entry in (left, right, left + right):
            vocabulary.setdefault(entry, len(vocabulary))
        definition["model"]["merges"].append([left, right])

    return change


def model_with(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda definition: definition["model"].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        with_merge("t", "\u2581"),
        with_merge(".", "\n"),
        with_merge("\n", "\n"),
        with_merge("<0x0A>", "a"),
        model_with(ignore_merges=True),
        model_with(dropout=0.1),
        model_with(byte_fallback=False),
        lambda d: d["model"]["vocab"].pop("<0x0A>"),
        lambda d: d["added_tokens"].append(d["added_tokens"][0] | {"id": 300, "content": "ab", "special": False}),
        lambda d: d["normalizer"]["normalizers"].append({"type": "NFKC"}),
        lambda d: d.update(normalizer=None),
        lambda d: d.update(pre_tokenizer={"type": "WhitespaceSplit"}),
    ],
)
def test_what_is_not_proved_takes_the_plain_path(change: Callable[[dict[str, Any]], object]) -> None:
    definition = sentencepiece()
    change(definition)
    assert word_cut(definition) is None
    if definition["model"]["dropout"]:  # random: no two encodings are equal
        return
    same(tokenizer(definition), ["the.\n.\nand t t\n\n the ab\U0001f600\U0001f600 tt 1", "", " "])


def test_a_merge_across_words_would_be_seen() -> None:
    """The check is needed: cutting where a merge crosses gives other ids."""
    definition = sentencepiece()
    cut = word_cut(definition)
    with_merge("t", "\u2581")(definition)
    crossing = tokenizer(definition)
    encoder = DocumentEncoder(crossing, U2)
    encoder._cut = cut
    encoder._words = DocumentEncoder(SMALL, U2)._words
    text = "at 1 at 1"
    assert np.frombuffer(encoder.encode([text])[0], U2).tolist() != crossing.encode(text)


def test_byte_level_of_another_pattern_takes_the_plain_path() -> None:
    for key, value in (("use_regex", False), ("add_prefix_space", True)):
        definition = json.loads(BYTE_LEVEL.serialized)
        definition["pre_tokenizer"][key] = value
        assert word_cut(definition) is None


def test_a_word_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_LONGEST_WORD", 100)
    with pytest.raises(DataError, match="101 characters without a space or newline; expected fewer than 100"):
        DocumentEncoder(SMALL, U2).encode(["a " + "b" * 100])


def test_the_published_vocabulary_takes_the_fast_path(test_data: Callable[[str], Path]) -> None:
    published = load_tokenizer(test_data("data/tokenizer/mistral-7b-v0.1"))
    assert word_cut(json.loads(published.serialized)) is not None
    text = test_data("data/eval/wiki.test.raw").read_text(encoding="utf-8")[:300_000]
    code = Path(encoding.__file__).read_text(encoding="utf-8")
    same(published, [text, code, "The capital of France is", "", " ", "\n", "  \u2581 x", "漢字 and 😀😀\n\n\n    x"])


# --- long texts where words cannot be cut ----------------------------------------------------------------------------------

PREPEND, REPLACE = _SENTENCEPIECE["normalizers"]
FOUND = {
    "id": 0,
    "content": "ab",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers" if steps[0]["type"] in ("Prepend", "Replace") else "pretokenizers": list(steps)}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def byte_level(*splitters: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return json.loads(BYTE_LEVEL.serialized) | {"pre_tokenizer": sequence(*splitters)} | changes


def normalized(*kinds: str) -> dict[str, Any]:
    return sentencepiece(normalizer=sequence(PREPEND, REPLACE, *({"type": kind} for kind in kinds)))


def with_found(definition: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """With a token that is found in texts."""
    token = FOUND | {"id": len(definition["model"]["vocab"]) + 1} | changes
    return definition | {"added_tokens": [*definition["added_tokens"], token]}


UNIGRAM = {"type": "Unigram", "unk_id": 0, "byte_fallback": False}
UNIGRAM["vocab"] = [
    ["<unk>", 0.0],
    *([piece, -5.0] for piece in " \u2581abstheLnd1.,!'"),
    ["\u2581the", -6.0],
    ["st", -7.0],
    ["st\u2581", -3.0],
]
CUT = {
    "NFC": normalized("NFC"),
    "NFKD, no accents, lower case": normalized("NFKD", "StripAccents", "Lowercase"),
    "newlines merge": (lambda d: (with_merge("\n", "\n")(d), d)[1])(sentencepiece()),
    "a token in texts": with_found(sentencepiece(normalizer=REPLACE)),
    "a token that begins with a space": with_found(byte_level(BYTES | {"use_regex": True}), content=" a"),
    "GPT-4": byte_level(split(_PATTERNS[0]), BYTES),
    "Qwen 2": byte_level(split(_PATTERNS[1], "Removed", True), BYTES, normalizer={"type": "NFC"}),
    "prefix": byte_level(BYTES | {"use_regex": True, "add_prefix_space": True}),
    "Falcon": byte_level(
        {"type": "Punctuation", "behavior": "Contiguous"}, BYTES | {"use_regex": True}, split("[0-9][0-9][0-9]")
    ),
    "digits": byte_level({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}),
    "Metaspace": sentencepiece(normalizer=None, pre_tokenizer=METASPACE, model=UNIGRAM, added_tokens=[]),
    "T5": sentencepiece(
        normalizer=None,
        pre_tokenizer=sequence({"type": "WhitespaceSplit"}, METASPACE | {"prepend_scheme": "always"}),
        model=UNIGRAM,
    )
    | {"added_tokens": []},
}


@pytest.mark.parametrize("definition", CUT.values(), ids=CUT)
def test_long_texts_in_pieces_have_the_same_ids(definition: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_PIECE", 4)
    monkeypatch.setattr(encoding, "_SLICE", 12)
    tokens = tokenizer(definition)
    assert word_cut(definition) is None and DocumentEncoder(tokens, U2)._after_cut is not None

    @settings(max_examples=150, deadline=None)
    @given(st.lists(TEXTS.map("".join), max_size=3))
    def check(texts: list[str]) -> None:
        same(tokens, texts)

    check()
    same(tokens, ["the and the 1 a. the  and\n the\u00b4 ab e\u0301 t \u2581the \ufdfa the \u037a the abs tst the"])


NOT_CUT = {
    "a merge across": (lambda d: (with_merge("t", "\u2581")(d), d)[1])(normalized("NFC")),
    "no sign for a space": sentencepiece(normalizer=PREPEND),
    "whole words first": normalized("NFC") | {"model": normalized()["model"] | {"ignore_merges": True}},
    "random": normalized("NFC") | {"model": normalized()["model"] | {"dropout": 0.1}},
    "another model": sentencepiece(model=UNIGRAM, added_tokens=[]),
    "Strip": normalized() | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "another replacement": sentencepiece(normalizer=REPLACE | {"pattern": {"Regex": "t "}}),
    "a token after which a sign is prepended": with_found(normalized("NFC")),
    "a token with a space": with_found(sentencepiece(normalizer=REPLACE), content="a t"),
    "a token that takes spaces": with_found(sentencepiece(normalizer=REPLACE), rstrip=True),
    "a token of whole words": with_found(sentencepiece(normalizer=REPLACE), single_word=True),
    "a token that is normalized": with_found(sentencepiece(normalizer=REPLACE), normalized=True),
    "another pattern": byte_level(split("t t|."), BYTES),
    "merged with what is beside": byte_level(split(_PATTERNS[0], "MergedWithNext"), BYTES),
    "no pattern": byte_level(BYTES),
    "spaces replaced before": byte_level(BYTES | {"use_regex": True, "add_prefix_space": True}, normalizer=REPLACE),
    "the sign not split": sentencepiece(
        normalizer=None, pre_tokenizer=METASPACE | {"split": False}, model=UNIGRAM, added_tokens=[]
    ),
    "first after another": byte_level(BYTES | {"use_regex": True}, METASPACE),
}


@pytest.mark.parametrize("definition", NOT_CUT.values(), ids=NOT_CUT)
def test_a_long_text_that_cannot_be_cut_is_refused(definition: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_PIECE", 10)
    monkeypatch.setattr(encoding, "_LONGEST_PIECE", 30)
    assert piece_cut(definition) is None
    encoder = DocumentEncoder(tokenizer(definition), U2)
    if not definition["model"].get("dropout"):
        same(encoder._tokenizer, ["the and the ab t t the 1 the "])
    with pytest.raises(DataError, match="40 characters, and no cut is exact for this tokenizer; expected at most 30"):
        encoder.encode(["ab t" * 10])


def test_a_long_text_without_a_place_to_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_PIECE", 10)
    monkeypatch.setattr(encoding, "_LONGEST_PIECE", 30)
    encoder = DocumentEncoder(tokenizer(normalized("NFC")), U2)
    with pytest.raises(DataError, match="33 characters without a space after a letter; expected at most 30"):
        encoder.encode(["the and the" + " 1" * 16 + "."])


# --- the other engine -----------------------------------------------------------------------------------------------------


def test_gigatoken_gives_the_same_ids(test_data: Callable[[str], Path]) -> None:
    pytest.importorskip("gigatoken")
    published = load_tokenizer(test_data("data/tokenizer/mistral-7b-v0.1"))
    prose = test_data("data/eval/wiki.test.raw").read_text(encoding="utf-8")[:200_000]
    texts = [prose, "", " ", "a</s>b <s> <unk>", "\n\n    x \u2581y", "漢字 and 😀😀", "é\u0301" * 40, "\x00\x1c"]
    encoder = make_encoder("gigatoken", published, U2)
    assert isinstance(encoder, GigatokenEncoder) and encoder.encode([]) == []
    assert [np.frombuffer(ids, U2).tolist() for ids in encoder.encode(texts)] == [published.encode(text) for text in texts]


def test_an_engine_with_other_ids_is_found_out() -> None:
    pytest.importorskip("gigatoken")
    texts = ["long " * 9000, "the and", "the the"]
    encoder = GigatokenEncoder(SMALL, U2)
    encoder.encode(texts)
    other = sentencepiece()
    other["model"]["merges"].pop(2)  # the one that makes " the"
    encoder._gigatoken = GigatokenEncoder(tokenizer(other), U2)._gigatoken
    with pytest.raises(RunError, match="from the 1th on, in the text that begins with 'the and': prepare without --engine"):
        encoder.encode(texts)
    with pytest.raises(RunError, match="in the text that begins with 'long the"):  # of a longer one the beginning
        encoder.encode(["long the " * 9000])


def test_added_tokens_that_texts_may_hold_are_not_for_gigatoken() -> None:
    pytest.importorskip("gigatoken")
    definition = sentencepiece()
    definition["added_tokens"].append(definition["added_tokens"][0] | {"id": 300, "content": "ab", "special": False})
    with pytest.raises(DataError, match="not special; gigatoken"):
        GigatokenEncoder(tokenizer(definition), U2)
