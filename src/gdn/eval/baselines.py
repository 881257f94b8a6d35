"""What a model's bits per byte are held against, on the same bytes: unigram, bigram with back-off, and xz."""

import lzma
import math

import numpy as np

_DISCOUNT = 0.75  # Ney, Essen and Kneser 1994 find 0.7 to 0.8 on text


def unigram_bits(train: np.ndarray, text: np.ndarray, vocab_size: int) -> float:
    """Bits that add-one unigram frequencies of `train` need for `text` (token ids); its first token is taken as known."""
    return float(-np.log2(_unigram(train, vocab_size)[text[1:]]).sum())


def bigram_bits(train: np.ndarray, text: np.ndarray, vocab_size: int) -> float:
    """Bits that an interpolated bigram of `train` needs for `text` (token ids); its first token is taken as known.

    p(b|a) = max(c(ab) - D, 0) / c(a) + D n(a) / c(a) p(b), where n(a) counts the kinds of tokens seen after a: absolute
    discounting with back-off to the unigram (Ney, Essen and Kneser 1994).
    """
    train, text = train.astype(np.int64), text.astype(np.int64)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    totals = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)
    wanted = text[:-1] * vocab_size + text[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place] - _DISCOUNT, 0.0)
    before = text[:-1]
    unigram = _unigram(train, vocab_size)[text[1:]]
    total = np.maximum(totals[before], 1)
    probability = np.where(totals[before] > 0, (seen + _DISCOUNT * followers[before] * unigram) / total, unigram)
    return float(-np.log2(probability).sum())


def xz_bits(text: bytes) -> float:
    """Bits of `text` after `xz -9e`: it sees nothing but this text, and copies from anywhere in what it has read of it."""
    return 8.0 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def _unigram(train: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    result: np.ndarray = counts / counts.sum()
    assert math.isclose(result.sum(), 1.0, rel_tol=1e-9)
    return result
