"""Ticks, numerals, ranges and thinning against cases worked by hand."""

import math
import random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn.report.scales import (
    Scale,
    compact,
    finite_points,
    linear_ticks,
    log_ticks,
    nice_range,
    robust_range,
    running_median,
    thin,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (2.3, 6.1, [3, 4, 5, 6]),
        (0, 4e-4, [0, 1e-4, 2e-4, 3e-4, 4e-4]),
        (0, 11_000, [0, 5000, 10_000]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
    ],
)
def test_linear_ticks_by_hand(low, high, ticks):
    assert linear_ticks(low, high) == ticks


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_linear_ticks_are_few_even_and_inside(low, span):
    ticks = linear_ticks(low, low + span)
    assert len(ticks) <= 6
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert all(low - slack <= t <= low + span + slack for t in ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1, 1e5, [1, 10, 100, 1000, 1e4, 1e5]),
        (0.15, 3, [0.2, 0.5, 1, 2]),
        (0.02, 5, [0.1, 1]),
        (1.1, 1.4, [1.1, 1.2, 1.3, 1.4]),
    ],
)
def test_log_ticks_by_hand(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (0.0004, "4e-4"),
        (0.00025, "2.5e-4"),
        (999, "999"),
        (999.96, "1k"),
        (12_000, "12k"),
        (3_400_000, "3.4M"),
        (15_032_385_536, "15.03B"),
        (-0.5, "−0.5"),
        (math.inf, "∞"),
        (math.nan, "–"),
    ],
)
def test_compact_numerals(value, words):
    assert compact(value) == words


def test_scale_maps_known_values_to_known_positions():
    falling = Scale(2, 6, 210, 18)
    assert (falling.position(2), falling.position(6), falling.position(3)) == (210, 18, 162)
    tokens = Scale(1, 1e5, 50, 450, log=True)
    assert tokens.position(1000) == pytest.approx(290)
    assert (tokens.clamped(0.01), tokens.clamped(math.inf)) == (50, 450)


def test_nice_range_widens_to_whole_steps_and_opens_a_single_value():
    assert nice_range(2.3, 5.6) == (2, 6)
    low, high = nice_range(7, 7)
    assert low < 7 < high
    low, high = nice_range(0, 0)
    assert low < 0 < high


def test_robust_range_ignores_a_few_huge_first_values_but_not_a_quarter_of_the_run():
    tail = [2 + i / 1000 for i in range(990)]
    low, high = robust_range([1000.0] * 10 + tail)
    assert low == 2 and 2.98 < high < 3.4
    assert robust_range([10.0] * 330 + tail)[1] == 10
    assert robust_range([1.0, 50.0]) == (1, 50)


def test_finite_points_drops_what_cannot_be_drawn_and_sorts():
    x, y = (3, 1, 2, math.nan, 5, 6), (30, math.nan, 20, 1, math.inf, -1)
    assert finite_points(x, y) == [(2, 20), (3, 30), (6, -1)]
    assert finite_points(x, y, positive=True) == [(2, 20), (3, 30)]


@pytest.mark.parametrize("window", [1, 2, 7, 40])
def test_running_median_is_the_median_of_its_window(window):
    draw = random.Random(3)
    y = [draw.choice([draw.random(), 0.5, 100.0]) for _ in range(60)]
    half = window // 2
    expected = [median(y[i - min(half, i) : i + min(half, i) + 1]) for i in range(60)]
    assert running_median(y, window) == pytest.approx(expected)


def test_running_median_passes_over_a_spike():
    assert max(running_median([1.0] * 20 + [500.0] + [1.0] * 20, 5)) == 1


def test_thin_keeps_ends_extremes_and_order():
    points = [(float(i), math.sin(i)) for i in range(5000)]
    points[1234] = (1234.0, 99.0)
    points[4321] = (4321.0, -99.0)
    kept = thin(points, 600)
    assert len(kept) <= 600
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert points[1234] in kept and points[4321] in kept
    assert kept == sorted(kept)
    assert thin(points[:600], 600) == points[:600]
