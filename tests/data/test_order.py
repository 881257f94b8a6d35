import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn.data.order import Order
from gdn.errors import DataError


def test_golden_values() -> None:
    """A run resumed under a changed order would see some text twice and some never: these values are for ever."""
    assert Order(10, 0).windows(0, 20).tolist() == GOLDEN_SMALL
    assert Order(7_340_032, 42).batch(0, 8).tolist() == GOLDEN_FIRST
    assert Order(7_340_032, 42).batch(28_671, 256)[-4:].tolist() == GOLDEN_LAST


GOLDEN_SMALL = [5, 6, 1, 8, 7, 4, 0, 3, 9, 2, 0, 6, 7, 3, 2, 9, 4, 1, 5, 8]
GOLDEN_FIRST = [5615709, 3236158, 7285910, 1534549, 6210348, 3611044, 3947264, 2889023]
GOLDEN_LAST = [1161097, 16842, 5135697, 5199279]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 5))
def test_every_window_exactly_once_per_epoch(num_windows: int, seed: int, epoch: int) -> None:
    windows = Order(num_windows, seed).windows(epoch * num_windows, num_windows)
    assert np.array_equal(np.sort(windows), np.arange(num_windows))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 2000), st.integers(1, 400), st.data())
def test_any_slicing_is_the_same_stream(num_windows: int, seed: int, first: int, count: int, data: st.DataObject) -> None:
    order = Order(num_windows, seed)
    cut = data.draw(st.integers(0, count))
    parts = [order.windows(first, cut), order.windows(first + cut, count - cut)]
    assert np.array_equal(order.windows(first, count), np.concatenate(parts))
    one_by_one = [int(order.windows(first + i, 1)[0]) for i in range(0, count, 37)]
    assert order.windows(first, count)[::37].tolist() == one_by_one


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_and_micro_batches_are_slices(world_size: int) -> None:
    order, size = Order(1000, 3), 64
    share = size // world_size
    parts = [order.windows(7 * size + rank * share, share) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), order.batch(7, size))


def test_epochs_seeds_and_neighbours_are_unrelated() -> None:
    n = 20_000
    first, second = Order(n, 1).windows(0, n), Order(n, 1).windows(n, n)
    other = Order(n, 2).windows(0, n)
    positions = np.arange(n)
    # For independent orders a correlation is N(0, 1/n) and equal places are Poisson(1).
    for a, b in ((first, second), (first, other), (first, positions), (first[1:], first[:-1]), (second, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
        assert np.sum(a == b) < 10
    # Any stretch of the order covers the text evenly: 100 bins of 20 expected, chi-square of 99 degrees.
    for start in (0, 5_000, 18_000):
        counts = np.bincount(first[start : start + 2_000] * 100 // n, minlength=100)
        assert np.sum((counts - 20) ** 2 / 20) < 160


def test_a_batch_of_the_published_run_is_fast() -> None:
    order = Order(7_340_032, 42)
    times = []
    for step in range(50):
        began = time.perf_counter()
        order.batch(step * 500, 256)
        times.append(time.perf_counter() - began)
    assert np.median(times) < 1e-3


def test_no_windows_is_an_error() -> None:
    with pytest.raises(DataError, match="expected at least 1"):
        Order(0, 1)
