"""RULER's needle tasks with lm-evaluation-harness's text and scoring, from local files, every sample seeded by itself.

The harness draws all samples from one generator, so that they depend on which tasks ran before; and it grows essays 500 words
at a time, so that prompts run short. Here a sample depends on task, length and its number alone. "card" keeps the harness's
sizes, as the published row has them; "exact" fills the asked length to the last word of an essay or the last sentence of noise
(25 tokens), and where the essays are too short they begin again.
"""

import importlib.util
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from gdn.errors import ConfigError, DataError

TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
)
SAMPLES = 500
ANSWER = 128  # tokens left for the answer, within the length
LONGEST = 1 << 20
_ESSAY_STEP, _SHORT_STEP, _STEP = 500, 5, 25  # the harness's, below 4,096 and from there on
Sizing = Literal["card", "exact"]


def dataset(
    task: str, folder: Path, tokenizer: Any, length: int, *, sizing: Sizing = "card", samples: int = SAMPLES
) -> dict[str, Any]:
    """{"test": samples} of a needle task: prompts of `length` tokens, the answer's among them, as the harness wants its data.

    folder holds ruler/PaulGrahamEssays.json. Raises DataError where it is not what it should be, ConfigError for a length
    that cannot be filled.
    """
    if task not in TASKS:
        raise ConfigError(f"{task} is no needle task of RULER; expected one of {', '.join(TASKS)}")
    if not 2 * ANSWER < length <= LONGEST:
        raise ConfigError(f"a RULER length of {length:,} tokens; expected more than {2 * ANSWER} and at most {LONGEST:,}")
    with sentence_tables(folder):
        import datasets

        _import_words("lm_eval.tasks.ruler.prepare_niah")
        from lm_eval.tasks.ruler import niah_utils

        def fill(haystack: Any, **definition: Any) -> list[dict[str, Any]]:
            return list(_fill(task, haystack, definition, tokenizer, length, sizing, samples))

        def haystack(type_haystack: str) -> Any:
            return local_essays(folder) if type_haystack == "essay" else original["get_haystack"](type_haystack)

        replacements = {"generate_samples": fill, "get_haystack": haystack, "get_tokenizer": lambda name: tokenizer}
        original = {name: getattr(niah_utils, name) for name in replacements}
        # The definition of each task is a call in the harness; only what it calls is replaced.
        for name, value in replacements.items():
            setattr(niah_utils, name, value)
        try:
            made: dict[str, datasets.Dataset] = getattr(niah_utils, task)(max_seq_lengths=[length])
        finally:
            for name, value in original.items():
                setattr(niah_utils, name, value)
    return made


def _import_words(name: str) -> None:
    """Import the harness's module, whose `sorted(set(words))` of six million keys is a list without a hash table here.

    The words come nearly sorted, and equal ones lie beside each other then: the same list, seconds earlier in every run.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    vars(module)["set"] = _sorted_unique
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    del vars(module)["set"]


def _sorted_unique(words: list[str]) -> list[str]:
    ordered = sorted(words)
    return ordered[:1] + [word for before, word in pairwise(ordered) if word != before]


@cache
def local_essays(folder: Path) -> list[str]:
    """The words of the essays, in order."""
    path = folder / "ruler" / "PaulGrahamEssays.json"
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file; expected RULER's essays as one JSON object, text") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path}: expected a JSON object with the essays' words under text; the file may be cut short"
        ) from None
    return re.sub(r"\s+", " ", text).split(" ")


@contextmanager
def sentence_tables(folder: Path) -> Iterator[None]:
    """Let nltk find the tables that cut sentences in `folder`, so that importing the harness's module asks for no network."""
    tables = folder / "ruler" / "nltk_punkt_tab_english"
    if not tables.is_dir():
        raise DataError(f"{tables}: no such folder; expected nltk's punkt_tab tables for English")
    import nltk

    with tempfile.TemporaryDirectory() as place:
        language = Path(place) / "tokenizers" / "punkt_tab" / "english"
        shutil.copytree(tables, language)  # no link: nltk opens nothing outside its folders
        nltk.data.path.insert(0, place)
        try:
            yield
        finally:
            nltk.data.path.remove(place)


def depth(document: dict[str, Any]) -> float:
    """Where the first needle lies in a prompt: 0 at its beginning, 1 at its end."""
    text = document["input"]
    return float(text.find(document["outputs"][0]) / max(1, len(text)))


def _fill(
    task: str, haystack: Any, definition: dict[str, Any], tokenizer: Any, length: int, sizing: Sizing, samples: int
) -> Iterator[dict[str, Any]]:
    from lm_eval.tasks.ruler.prepare_niah import generate_input_output

    kind = definition["type_haystack"]
    keys = max(definition.get("num_needle_k", 1), definition.get("num_needle_q", 1))
    needles = keys * definition.get("num_needle_v", 1)
    shape = {name: definition[name] for name in ("template", "type_haystack", "type_needle_k", "type_needle_v")}
    shape |= {"num_needle_k": keys}
    shape |= {name: definition.get(name, 1) for name in ("num_needle_v", "num_needle_q")}
    words = len(haystack)
    if kind == "essay" and sizing == "exact":  # the essays end at about 0.69M tokens: beyond, they begin again
        haystack = haystack * -(-length // words)

    def draw(number: int, units: int) -> tuple[str, list[str], str]:
        random.seed(f"{task} {length} {number}")  # the generator that the harness's function draws from
        text, answers, query = generate_input_output(units, haystack, **shape)
        return text, answers, query

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    before = random.getstate()
    try:
        units, step = _units(draw, count, kind, needles, length, sizing)
        texts = [draw(number, units) for number in range(samples)]
        counts = [len(ids) for ids in tokenizer([text for text, _, _ in texts])["input_ids"]]
        for number, (sample, tokens) in enumerate(zip(texts, counts)):
            used = units
            while tokens + ANSWER > length:  # this one's needles are longer
                used -= step
                if used < needles:
                    raise ConfigError(f"{task}: {length:,} tokens have no room for {needles} needle(s) and the question")
                sample = draw(number, used)
                tokens = count(sample[0])
            again = {"repeated": True} if kind == "essay" and used > words else {}
            yield _document(number, sample, tokens + ANSWER, length, shape) | again
    finally:
        random.setstate(before)


def _units(
    draw: Callable[[int, int], tuple[str, list[str], str]],
    count: Callable[[str], int],
    kind: str,
    needles: int,
    length: int,
    sizing: Sizing,
) -> tuple[int, int]:
    """How many words or sentences make a prompt of this length, and the step to take back where a sample is too long."""

    def tokens(units: int) -> int:
        text, answers, _ = draw(0, units)
        return count(text + " ".join(answers)) + ANSWER

    if sizing == "card":
        step = _ESSAY_STEP if kind == "essay" else _SHORT_STEP if length < 4096 else _STEP
        units = max(step, needles)
        while tokens(units) <= length:
            units += step
        return max(units - step, needles), step
    low, high = max(needles, 1), max(needles, 1) * 2
    below, above = tokens(low), tokens(high)
    if below > length:
        raise ConfigError(f"{length:,} tokens have no room for {needles} needle(s) and the question")
    while above <= length:
        low, high, below = high, high * 2, above
        above = tokens(high)
    while high - low > 1:
        # Tokens grow about evenly with the units, and drawing a long text takes seconds: guess, rather than halve.
        middle = low + (high - low) * (length - below) // (above - below)
        middle = min(max(middle, low + 1), high - 1)
        count_there = tokens(middle)
        if count_there <= length:
            low, below = middle, count_there
        else:
            high, above = middle, count_there
    return low, max(1, low // 500)


def _document(
    number: int, sample: tuple[str, list[str], str], tokens: int, length: int, shape: dict[str, Any]
) -> dict[str, Any]:
    """A sample in the harness's columns; gen_prefix is its wording."""
    text, answers, query = sample
    kind, one = shape["type_needle_v"], shape["num_needle_q"] * shape["num_needle_v"] == 1
    ending = f"{kind[:-1] if one else kind} for {query} mentioned in the provided text {'is' if one else 'are'}"
    columns = {"index": number, "input": text, "outputs": answers, "length": tokens, "max_length": length}
    return columns | {"gen_prefix": f"The special magic {ending}"}
