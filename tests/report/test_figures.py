"""What the charts draw, read back from the SVG: positions, labels, and what is left out."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from gdn.errors import DataError
from gdn.report.figures import (
    Bar,
    Histogram,
    Interval,
    Reference,
    Series,
    bar_chart,
    histogram_mean,
    histogram_rows,
    interval_chart,
    line_chart,
    spread,
)

NAN, INF = math.nan, math.inf


def texts(svg):
    return [t.text for t in ET.fromstring(svg).iter("text")]


def elements(svg, tag, style):
    return [e for e in ET.fromstring(svg).iter(tag) if style in e.get("class", "").split()]


def path_points(element):
    return [tuple(map(float, p.split(","))) for p in element.get("d")[1:].split("L")]


def test_line_lands_where_its_ticks_say():
    svg = line_chart([Series("loss", (0.0, 50.0, 100.0), (0.0, 2.0, 4.0))], "loss", "steps")
    root = ET.fromstring(svg)
    ticks = {t.text: (float(t.get("x")), float(t.get("y"))) for t in root.iter("text") if t.get("class") == "tick"}
    plot = next(e for e in root.iter("svg") if e.get("class") == "plot")
    (line,) = elements(svg, "path", "line")
    left, top = float(plot.get("x")), float(plot.get("y"))
    first, middle, last = [(left + a, top + b) for a, b in path_points(line)]
    # Tick words sit 4 units below their rule.
    assert middle[1] == pytest.approx(ticks["2"][1] - 4, abs=0.2)
    assert last[0] == pytest.approx(ticks["100"][0], abs=0.2)
    assert first == (46, 210) and last[1] == 18


def test_values_not_finite_are_left_out_of_lines():
    clean = line_chart([Series("a", (1.0, 3.0), (1.0, 2.0))], "a", "x")
    dirty = line_chart([Series("a", (1.0, 2.0, 3.0, NAN, 4.0), (1.0, NAN, 2.0, 7.0, INF))], "a", "x")
    assert dirty == clean


def test_log_axis_leaves_out_zero_and_below():
    svg = line_chart([Series("a", (1.0, 2.0, 3.0, 4.0), (0.0, -1.0, 10.0, 100.0))], "a", "x", log_y=True)
    (line,) = elements(svg, "path", "line")
    assert len(path_points(line)) == 2


def test_end_labels_name_and_value_every_line_and_do_not_touch():
    lines = [Series(name, (0.0, 1.0), (0.0, 1 + i / 1000)) for i, name in enumerate(("one", "two", "three"))]
    svg = line_chart([*lines, Series("raw", (0.0, 1.0), (0.0, 1.0), "faint")], "l", "x")
    labels = elements(svg, "text", "label")
    assert {t.text for t in labels} == {"one 1", "two 1.001", "three 1.002"}
    heights = sorted(float(t.get("y")) for t in labels)
    assert all(b - a >= 13.9 for a, b in pairwise(heights))


def test_a_range_that_cuts_off_says_what_it_cuts():
    x = tuple(float(i) for i in range(200))
    svg = line_chart([Series("loss", x, (900.0, *(3 - i / 200 for i in range(1, 200))))], "l", "x")
    assert "↑ highest 900" in texts(svg)
    assert "500" not in texts(svg)


def test_a_level_near_the_data_is_shown_and_a_far_one_is_not():
    model = Series("model", (0.0, 1.0), (2.0, 1.0))
    svg = line_chart([model], "l", "x", references=[Reference("xz", 0.9), Reference("none", 8.0), Reference("nan", NAN)])
    assert "xz 0.9" in texts(svg)
    assert len(elements(svg, "line", "reference")) == 1


@pytest.mark.parametrize("series", [[], [Series("a", (), ())], [Series("a", (1.0,), (NAN,))]])
def test_charts_without_data_say_so(series):
    assert texts(line_chart(series, "l", "x")) == ["no data"]
    assert texts(bar_chart([Bar("a", NAN)], "l")) == ["no data"]
    assert texts(interval_chart([Interval("0", "h", NAN, 1, 2)], "l", "layer", "t")) == ["no data"]
    assert texts(histogram_rows([Histogram("0", (0.0, 1.0), (0,)), Histogram("1", (), ())], "l", "layer", "b")) == ["no data"]


def test_a_single_point_is_drawn():
    svg = line_chart([Series("a", (5.0,), (2.0,))], "l", "x")
    assert len(elements(svg, "circle", "dot")) == 1


def test_bars_are_proportional_and_the_highlight_is_one():
    svg = bar_chart([Bar("gzip", 2.0, "a note"), Bar("model", 1.0, "", True), Bar("bad", INF)], "l")
    long, short = (float(e.get("width")) for e in elements(svg, "rect", "bar"))
    assert long == pytest.approx(2 * short, abs=0.2)
    (best,) = elements(svg, "rect", "highlight")
    assert float(best.get("width")) == short
    assert {"gzip", "2.000", "a note", "model", "1.000"} <= set(texts(svg))
    assert "bad" not in svg


def test_half_life_of_a_thousand_tokens_stands_at_its_tick_and_infinity_at_the_edge():
    svg = interval_chart(
        [Interval("0", "head 0", 10, 1000, 1e4), Interval("1", "head 1", 50, INF, INF)], "l", "layer", "tokens"
    )
    ticks = {t.text: float(t.get("x")) for t in ET.fromstring(svg).iter("text")}
    inside, beyond = elements(svg, "circle", "dot")
    strip = elements(svg, "line", "strip")[0]
    assert float(inside.get("cx")) == ticks["1k"]
    assert (float(strip.get("x1")), float(strip.get("x2"))) == (ticks["10"], ticks["10k"])
    assert float(beyond.get("cx")) == ticks["≥ 100k"] and "hollow" in beyond.get("class")
    assert "head 1: median ∞" in svg


def test_histogram_mean_by_hand_and_its_mark():
    h = Histogram("3", (0.0, 0.5, 1.0), (1, 3))
    assert histogram_mean(h) == 0.625
    svg = histogram_rows([h], "l", "layer", "beta")
    ticks = {t.text: float(t.get("x")) for t in ET.fromstring(svg).iter("text")}
    (mark,) = elements(svg, "line", "mean")
    assert float(mark.get("x1")) == pytest.approx(ticks["0"] + 0.625 * (ticks["1"] - ticks["0"]), abs=0.1)
    assert "0.62" in texts(svg) and "3" in texts(svg)
    (area,) = elements(svg, "path", "area")
    base, *tops = (float(v) for v in re.findall(r"(?:,|V)([\d.]+)", area.get("d")))
    assert (base - tops[0]) * 3 == pytest.approx(base - tops[1], abs=0.3)


def test_histogram_with_wrong_number_of_edges_is_refused():
    with pytest.raises(DataError, match="2 bin edges for 2 counts"):
        histogram_rows([Histogram("0", (0.0, 1.0), (1, 2))], "l", "layer", "beta")


def test_spread_keeps_order_distance_and_bounds():
    assert spread([10, 100], 14, 0, 200) == [10, 100]
    assert spread([100, 99, 101], 14, 0, 110) == [96, 82, 110]
    assert spread([-5], 14, 0, 100) == [0]


def test_words_are_escaped():
    svg = line_chart([Series('<b>"&', (0.0, 1.0), (1.0, 2.0), "dots"), Series("z", (0.0,), (1.0,))], '<i>"&', "<x>")
    assert '<b>"& 2' in texts(svg) and "<x>" in texts(svg)
    assert ET.fromstring(svg).get("aria-label") == '<i>"&'
