import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from gdn.errors import DataError

SHARED = Path(os.environ.get("GDN_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared"))
MISTRAL = SHARED / "data/tokenizer/mistral-7b-v0.1"
CORPUS = ["def f(x):\n        return x + 1\n" * 30, "the cat sat on the mat. The cat, the dog; ünïcode 漢字\n" * 30]
SMALL = train_bpe(CORPUS, 305)

needs_mistral = pytest.mark.skipif(not MISTRAL.is_dir(), reason=f"{MISTRAL} is absent (set GDN_TEST_DATA)")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   \n\n\t  x",
        " leading",
        "a\r\nb\rc\x00d",
        "é e\u0301 ﬁ \u200d\u202e🏳️‍🌈 漢\U0010ffff\ufeff\ufffe",
        f"a literal {END_OF_TEXT} is text",
        "\u1680\u2028\u00a0 \u3000x",
    ],
    ids=repr,
)
def test_round_trip_is_exact(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_round_trip_of_any_text(text: str) -> None:
    ids = SMALL.encode(text)
    assert SMALL.decode(ids) == text
    assert 0 not in ids and all(i < SMALL.vocab_size for i in ids)


def test_training_is_deterministic_and_merges_indentation() -> None:
    again = train_bpe(iter(CORPUS), 305)
    assert again.sha256 == SMALL.sha256
    assert SMALL.vocab_size == 305
    assert (SMALL.bos_id, SMALL.eos_id) == (0, 0)
    assert len(SMALL.encode("\n       ")) == 1
    assert SMALL.encode_batch(CORPUS) == [SMALL.encode(text) for text in CORPUS]


def test_a_vocabulary_without_all_bytes_is_refused() -> None:
    assert train_bpe([], 257).decode(train_bpe([], 257).encode("ÿ\x00")) == "ÿ\x00"
    with pytest.raises(DataError, match="vocab_size = 256; expected at least 257"):
        train_bpe(CORPUS, 256)


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    SMALL.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert loaded.sha256 == SMALL.sha256
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 0, 305)
    assert loaded.encode(CORPUS[1]) == SMALL.encode(CORPUS[1])
    assert load_tokenizer(tmp_path / "a" / "tokenizer.json").bos_id == 0
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    config |= {"bos_token": {"content": END_OF_TEXT, "special": True}, "eos_token": None, "chat_template": "é{{x}}"}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path / "a")
    assert (loaded.bos_id, loaded.eos_id) == (0, None)
    loaded.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) == config


def test_stored_truncation_does_not_cut_documents(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(tmp_path).encode(CORPUS[0]) == SMALL.encode(CORPUS[0])


def test_special_tokens_map_names_bos(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).bos_id is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": END_OF_TEXT, "pad_token": "x"}))
    assert load_tokenizer(tmp_path).bos_id == 0


def test_bad_tokenizers_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.*no such file"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    for broken in (b"{", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_bytes(broken)
        with pytest.raises(DataError, match=r"^[^\n]*tokenizer\.json: not [^\n]*$"):
            load_tokenizer(tmp_path)
    SMALL.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(DataError, match="bos_token is '<s>', which is not in the vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        load_tokenizer(tmp_path)


@needs_mistral
def test_the_published_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MISTRAL)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32_000, 1, 2)
    assert tokenizer.encode("The capital of France is") == [415, 5565, 302, 4843, 349]
    assert tokenizer.decode([1, 415, 5565, 302, 4843, 349, 2]) == "The capital of France is"
    assert 1 not in tokenizer.encode("an <s>injected</s> boundary")
    tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((MISTRAL / name).read_text())


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    SMALL.save(tmp_path / "small")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    text = "  the cat\n    return 漢 x "
    assert (auto.bos_token_id, auto.eos_token_id) == (0, 0)
    assert auto(text)["input_ids"] == SMALL.encode(text)
    assert auto.decode(SMALL.encode(text)) == text
    if MISTRAL.is_dir():
        tokenizer = load_tokenizer(MISTRAL)
        tokenizer.save(tmp_path / "mistral")
        fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "mistral")
        assert fast(text)["input_ids"] == [1, *tokenizer.encode(text)]
        # AutoTokenizer of transformers 5 takes LlamaTokenizer, which reads spaces at the very beginning in its own way.
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "mistral")
        assert auto(text.strip())["input_ids"] == [1, *tokenizer.encode(text.strip())]
