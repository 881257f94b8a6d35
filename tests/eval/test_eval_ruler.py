"""RULER's samples: the harness's text, each seeded by itself, sized as the card or to the asked length."""

import bisect
import itertools
import json
import operator
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("nltk")
pytest.importorskip("wonderwords")

from gdn.errors import ConfigError, DataError
from gdn.eval import harness, ruler

LENGTH = 1024


@pytest.fixture(scope="module")
def data(test_data: Callable[[str], Path]) -> Path:
    return test_data("data/ruler/PaulGrahamEssays.json").parents[1]


@pytest.fixture(scope="module")
def tokenizer(test_data: Callable[[str], Path]) -> Any:
    return harness.load_tokenizer(test_data("data/tokenizer/mistral-7b-v0.1"))


def make(task: str, data: Path, tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    return list(ruler.dataset(task, data, tokenizer, options.pop("length", LENGTH), **options)["test"])


def test_a_sample_depends_on_its_number_alone(data: Path, tokenizer: Any) -> None:
    few = make("niah_single_2", data, tokenizer, samples=3)
    make("niah_single_1", data, tokenizer, samples=2)  # another task before
    random.seed(7)
    state = random.getstate()
    many = make("niah_single_2", data, tokenizer, samples=6)
    assert random.getstate() == state  # nobody else's numbers are drawn
    assert many[:3] == few
    assert len({sample["input"] for sample in many}) == 6
    assert make("niah_single_3", data, tokenizer, samples=1)[0]["input"] != few[0]["input"]


@pytest.mark.parametrize("task", ruler.TASKS)
def test_text_and_columns_are_the_harness_own(task: str, data: Path, tokenizer: Any) -> None:
    """The harness's function on its own haystack, its generator seeded as ours, gives the same sample."""
    ours = make(task, data, tokenizer, samples=2)
    with ruler.sentence_tables(data):
        from lm_eval.tasks.ruler import niah_utils, prepare_niah

    seen: list[Any] = []
    original = niah_utils.generate_samples, niah_utils.get_haystack, niah_utils.get_tokenizer

    def theirs(haystack: Any, **definition: Any) -> list[dict[str, Any]]:
        definition |= {"num_samples": 1, "TOKENIZER": tokenizer}
        draw = prepare_niah.generate_input_output

        def seeded(*arguments: Any, **options: Any) -> Any:
            random.seed(f"{task} {LENGTH} 0")
            return draw(*arguments, **options)

        prepare_niah.generate_input_output = seeded
        try:
            seen.extend(prepare_niah.generate_samples(haystack, **definition))
        finally:
            prepare_niah.generate_input_output = draw
        return seen

    niah_utils.generate_samples = theirs
    niah_utils.get_haystack = lambda type_haystack: (
        ruler.local_essays(data) if type_haystack == "essay" else original[1](type_haystack)
    )
    niah_utils.get_tokenizer = lambda name: tokenizer
    try:
        getattr(niah_utils, task)(max_seq_lengths=[LENGTH])
    finally:
        niah_utils.generate_samples, niah_utils.get_haystack, niah_utils.get_tokenizer = original
    assert seen == ours[:1]
    assert all(answer in ours[1]["input"] for answer in ours[1]["outputs"])


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multiquery"])
@pytest.mark.parametrize("length", [2048, 5000])
def test_exact_sizes_fill_the_length(task: str, length: int, data: Path, tokenizer: Any) -> None:
    for sample in make(task, data, tokenizer, length=length, sizing="exact", samples=4):
        tokens = len(tokenizer(sample["input"])["input_ids"]) + ruler.ANSWER
        assert tokens == sample["length"]
        assert 0.98 * length <= tokens <= length


def test_the_keys_are_the_harness_own_sorted_and_unique(data: Path, tokenizer: Any) -> None:
    make("niah_single_1", data, tokenizer, samples=1)
    module = sys.modules["lm_eval.tasks.ruler.prepare_niah"]
    assert "set" not in vars(module)  # it was there while the module was imported
    keys = module.WORDS
    assert all(map(operator.lt, keys, itertools.islice(keys, 1, None)))
    for word in random.Random(0).sample(module.words, 1000):
        assert keys[bisect.bisect_left(keys, word)] == word


def test_short_essays_are_repeated_and_it_is_told(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "nltk_punkt_tab_english").symlink_to(data / "ruler" / "nltk_punkt_tab_english")
    text = " ".join(f"This is sentence {n} of the essay." for n in range(60))
    (tmp_path / "ruler" / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    long, short = (make("niah_single_2", tmp_path, tokenizer, length=n, sizing="exact", samples=1)[0] for n in (2048, 600))
    assert long["repeated"] and long["input"].count("sentence 7 of") == 4 and long["length"] >= 0.98 * 2048
    assert "repeated" not in short and short["input"].count("sentence 7 of") == 1


class Words:
    """A tokenizer of words, in place of a slow one where a million are counted."""

    def __init__(self) -> None:
        self.long_texts = 0

    def __call__(self, text: str | list[str]) -> dict[str, Any]:
        self.long_texts += isinstance(text, str) and len(text) > 1_000_000
        return {"input_ids": [part.split() for part in text] if isinstance(text, list) else text.split()}


def test_a_million_tokens_of_noise_are_filled(data: Path) -> None:
    words = Words()
    for length in (1 << 19, 1 << 20):
        (sample,) = make("niah_single_1", data, words, length=length, sizing="exact", samples=1)
        assert 0.9999 * length <= sample["length"] <= length and "repeated" not in sample
    assert words.long_texts < 15  # a text of a million tokens takes seconds to make


@pytest.mark.soak
def test_the_longest_essays_are_filled_and_begin_again_where_they_end(data: Path, tokenizer: Any) -> None:
    for length, repeated in ((1 << 19, False), (1 << 20, True)):
        (sample,) = make("niah_single_2", data, tokenizer, length=length, sizing="exact", samples=1)
        tokens = len(tokenizer(sample["input"])["input_ids"]) + ruler.ANSWER
        assert tokens == sample["length"] and 0.98 * length <= tokens <= length
        assert sample.get("repeated", False) is repeated


def test_the_cards_essays_run_short(data: Path, tokenizer: Any) -> None:
    (sample,) = make("niah_single_2", data, tokenizer, length=2048, samples=1)
    assert 1300 < sample["length"] < 1700  # 1,000 words, and 500 more would be too many


def test_depth_is_where_the_needle_lies(data: Path, tokenizer: Any) -> None:
    sample = make("niah_single_1", data, tokenizer, samples=1)[0]
    place = sample["input"].index(sample["outputs"][0])
    assert ruler.depth(sample) == pytest.approx(place / len(sample["input"]))


def test_what_cannot_be_made_is_named(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="200 tokens; expected more than 256"):
        make("niah_single_1", data, tokenizer, length=200)
    with pytest.raises(ConfigError, match="2,000,000 tokens"):
        make("niah_single_1", data, tokenizer, length=2_000_000)
    with pytest.raises(ConfigError, match="no room for 4 needle"):
        make("niah_multivalue", data, tokenizer, length=258, sizing="exact", samples=1)
    with pytest.raises(ConfigError, match="qa_squad is no needle task"):
        make("qa_squad", data, tokenizer)
    with pytest.raises(DataError, match="nltk_punkt_tab_english: no such folder"):
        make("niah_single_2", tmp_path, tokenizer)
    (tmp_path / "ruler").mkdir()
    with pytest.raises(DataError, match="no such file; expected RULER's essays"):
        ruler.local_essays(tmp_path)
    (tmp_path / "ruler" / "PaulGrahamEssays.json").write_text('{"text": "one two')
    with pytest.raises(DataError, match="cut short"):
        ruler.local_essays(tmp_path)
