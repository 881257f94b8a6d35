"""The baselines against probabilities worked out by hand."""

import lzma
import math

import numpy as np
import pytest

from gdn.eval.baselines import bigram_bits, unigram_bits, xz_bits


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_unigram_by_hand() -> None:
    # Counts plus one over a vocabulary of 4: 0 -> 4, 1 -> 2, 2 -> 1, 3 -> 1, of 8. The first token of the text is free.
    assert unigram_bits(ids(0, 0, 1, 0), ids(3, 0, 1, 2), 4) == pytest.approx(1 + 2 + 3)


def test_bigram_by_hand() -> None:
    # After 0 come 1 (twice) and 2 (once); unigram of 0 1 0 1 0 2 plus one over 4: 4, 3, 2, 1 of 10.
    train = ids(0, 1, 0, 1, 0, 2)

    def bits(probability: float) -> float:
        return -math.log2(probability)

    kept = 0.75 * 2 / 3  # what discounting takes from the two kinds of followers
    assert bigram_bits(train, ids(0, 1), 4) == pytest.approx(bits((2 - 0.75) / 3 + kept * 0.3))
    assert bigram_bits(train, ids(0, 2), 4) == pytest.approx(bits((1 - 0.75) / 3 + kept * 0.2))
    assert bigram_bits(train, ids(0, 3), 4) == pytest.approx(bits(kept * 0.1))
    # 2 was only seen last and 3 never: nothing is known of what follows them but the unigram.
    assert bigram_bits(train, ids(2, 1), 4) == pytest.approx(bits(0.3))
    assert bigram_bits(train, ids(3, 0), 4) == pytest.approx(bits(0.4))
    both = bits((2 - 0.75) / 3 + kept * 0.3) + bits((2 - 0.75) / 2 + 0.75 / 2 * 0.4)  # after 1 came 0, twice
    assert bigram_bits(train, ids(0, 1, 0), 4) == pytest.approx(both)


def test_bigram_sums_to_one_after_every_context() -> None:
    vocab = 11
    train = np.random.default_rng(0).integers(0, 9, 60).astype(np.uint16)  # 9 and 10 are never seen
    for before in range(vocab):
        total = sum(2 ** -bigram_bits(train, ids(before, after).astype(np.uint16), vocab) for after in range(vocab))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_bigram_of_large_ids_in_a_small_type() -> None:
    """a * vocabulary + b does not fit the shards' uint16."""
    train = np.array([60_000, 5, 60_000, 5, 60_000], dtype=np.uint16)
    wide = train.astype(np.int64)
    assert bigram_bits(train, train, 65_536) == pytest.approx(bigram_bits(wide, wide, 65_536))
    assert bigram_bits(train, train[:2], 65_536) < 1


def test_xz_is_that_of_the_command_line() -> None:
    text = bytes(np.random.default_rng(0).integers(0, 7, 3000, dtype=np.uint8)) * 3
    assert xz_bits(text) == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits(text) < 8 * len(text) / 2
