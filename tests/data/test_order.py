import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn.data.order import Mixture, Order
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


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_and_micro_batches_are_slices(world_size: int) -> None:
    order, size = Order(1000, 3), 48
    share = size // world_size
    parts = [order.windows(7 * size + rank * share, share) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), order.batch(7, size))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))
def test_the_union_over_ranks_is_the_global_batch_at_any_world_size(
    num_windows: int, seed: int, step: int, micro_batch_size: int, grad_accum_steps: int
) -> None:
    """At world sizes 1, 2, 3 and 8, by whatever accumulation: the same windows in the same places."""
    order, size = Order(num_windows, seed), 24 * micro_batch_size * grad_accum_steps
    whole = order.batch(step, size).tolist()
    for world_size in (1, 2, 3, 8):
        share = size // world_size
        ranks = [order.windows(step * size + rank * share, share) for rank in range(world_size)]
        micro_batches = [part for rank in ranks for part in np.split(rank, share // micro_batch_size)]
        assert np.concatenate(micro_batches).tolist() == whole


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


SOURCES = st.lists(st.tuples(st.integers(1, 400), st.floats(1e-3, 1e3)), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(SOURCES, st.integers(0, 2**63), st.integers(0, 10**6), st.integers(0, 500))
def test_a_mixture_draws_each_source_in_its_own_order(
    sources: list[tuple[int, float]], seed: int, first: int, count: int
) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    windows = Mixture(sizes, weights, seed).windows(first, count)
    edges = np.cumsum([0, *sizes])
    owner = np.searchsorted(edges, windows, side="right") - 1
    for i, weight in enumerate(weights):
        mine = windows[owner == i] - edges[i]
        wanted = count * weight / sum(weights)
        assert abs(len(mine) - wanted) <= len(weights) + count * 1e-5
        around = int(first * weight / sum(weights))  # where in its own order the source stands, to within the rounding
        slack = len(weights) + 2 + int(first * 1e-5)
        begin = max(around - slack, 0)
        stretch = Order(sizes[i], seed + (i << 64)).windows(begin, around - begin + len(mine) + slack)
        found = np.lib.stride_tricks.sliding_window_view(stretch, len(mine)) == mine if len(mine) else np.array([[True]])
        assert found.all(axis=1).any()


@settings(max_examples=60, deadline=None)
@given(SOURCES, st.integers(0, 2**40), st.integers(0, 300), st.data())
def test_any_slicing_of_a_mixture_is_the_same_stream(
    sources: list[tuple[int, float]], first: int, count: int, data: st.DataObject
) -> None:
    mixture = Mixture([size for size, _ in sources], [weight for _, weight in sources], 3)
    cut = data.draw(st.integers(0, count))
    parts = [mixture.windows(first, cut), mixture.windows(first + cut, count - cut)]
    assert np.array_equal(mixture.windows(first, count), np.concatenate(parts))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.floats(0.01, 100), st.integers(0, 2**63), st.integers(0, 3))
def test_one_source_is_its_order(num_windows: int, weight: float, seed: int, epoch: int) -> None:
    mixture = Mixture([num_windows], [weight], seed)
    windows = mixture.windows(epoch * num_windows, num_windows)
    assert np.array_equal(windows, Order(num_windows, seed).windows(epoch * num_windows, num_windows))
    assert np.array_equal(np.sort(windows), np.arange(num_windows))


def test_golden_values_of_a_mixture() -> None:
    assert Mixture([10, 10, 1000], [1, 2, 1], 0).windows(0, 16).tolist() == GOLDEN_MIXTURE


GOLDEN_MIXTURE = [777, 11, 15, 5, 776, 18, 19, 6, 594, 16, 13, 1, 974, 14, 12, 8]


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(DataError, match="expected 2 numbers above 0, one for each source"):
        Mixture([5, 5], weights, 0)


def test_no_windows_is_an_error() -> None:
    with pytest.raises(DataError, match="expected at least 1"):
        Order(0, 1)
