"""Plain data to SVG strings: lines, bars, interval strips, histogram rows; colours and fonts are classes of `style`."""

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gdn.errors import DataError
from gdn.report.scales import (
    Point,
    Scale,
    compact,
    finite_points,
    linear_ticks,
    log_ticks,
    nice_range,
    robust_range,
    thin,
)

WIDTH = 480.0
LINE_HEIGHT = 250.0
# Mean advance of a character, in SVG units at the 13-unit size; system fonts differ, so it errs on the wide side.
CHARACTER = 7.8
LABEL_PITCH = 14.0

Style = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Series:
    """One named line: `faint` is drawn thin and without a label, `dots` marks every point."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: Style = "line"


@dataclass(frozen=True)
class Reference:
    """A level to compare a line with, drawn as a dashed rule where it falls in or near the range of the data."""

    name: str
    value: float


@dataclass(frozen=True)
class Bar:
    """One bar: its name above, its value at its end, its note beneath."""

    name: str
    value: float
    note: str = ""
    highlight: bool = False


@dataclass(frozen=True)
class Interval:
    """A low-middle-high triple in a named row; several may share a row."""

    row: str
    name: str
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Histogram:
    """Counts between ascending `edges` (one more edge than counts), drawn in a row of its own."""

    row: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: a share between 0 and 1 in a named row and column."""

    row: str
    column: str
    share: float


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(x: float, y: float, words: str, style: str = "tick", anchor: str = "start") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}" class="{style}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{style}"/>'


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    box = f"0 0 {_n(WIDTH)} {_n(height)}"
    return f'<svg viewBox="{box}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def no_data(label: str) -> str:
    """The chart that stands where there is nothing to draw."""
    return _svg(90, label, [_text(WIDTH / 2, 50, "no data", "label muted", "middle")])


def spread(wanted: Sequence[float], pitch: float, low: float, high: float) -> list[float]:
    """Positions close to the wanted ones, at least `pitch` apart and inside [low, high] while they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + pitch)
    ceiling = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - pitch
    result = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        result[i] = placed[rank]
    return result


def _shorten(words: str, most: int = 20) -> str:
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def _y_range(values: Sequence[float], levels: Sequence[float], log_y: bool, from_zero: bool) -> tuple[float, float]:
    if log_y:
        low, high = (10**v for v in robust_range([math.log10(v) for v in values]))
        pad = (high / low) ** 0.05 if high > low else 1.5
        return low / pad, high * pad
    low, high = robust_range(values)
    # A level within a quarter of the data is the next one to reach, or the last one passed; farther ones would flatten.
    near = [v for v in levels if 0.8 * low <= v <= 1.25 * high]
    low, high = min([low, *near]), max([high, *near])
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    return nice_range(low, high)


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{_n(x.position(a))},{_n(y.position(b))}" for a, b in points)


def line_chart(
    series: Sequence[Series],
    label: str,
    x_label: str,
    *,
    log_y: bool = False,
    from_zero: bool = False,
    references: Sequence[Reference] = (),
) -> str:
    """Lines over a common x, each named and valued at its right end; a y range that cuts extremes off says so.

    Points that are not finite (or not positive, if `log_y`) are left out; "no data" is drawn if none remain.
    """
    drawn = [(s, thin(points)) for s in series if (points := finite_points(s.x, s.y, log_y))]
    if not drawn:
        return no_data(label)
    named = [(s, points) for s, points in drawn if s.style != "faint"]
    values = [b for _, points in drawn for _, b in points]
    low, high = _y_range(values, [r.value for r in references], log_y, from_zero)
    levels = [r for r in references if low <= r.value <= high]
    single = len(named) + len(levels) == 1
    labels = [compact(p[-1][1]) if single else f"{_shorten(s.name)} {compact(p[-1][1])}" for s, p in named]
    labels += [f"{_shorten(r.name)} {compact(r.value)}" for r in levels]

    margin = 12 + CHARACTER * max((len(words) for words in labels), default=2)
    x_low, x_high = min(p[0][0] for _, p in drawn), max(p[-1][0] for _, p in drawn)
    if x_low > 0 and x_low < 0.5 * x_high:
        x_low = 0.0
    x = Scale(x_low, x_high if x_high > x_low else x_low + 1, 46, WIDTH - margin)
    y = Scale(low, high, LINE_HEIGHT - 40, 18, log_y)

    parts = _line_axes(x, y, x_label)
    if max(values) > high * (1 + 1e-9):
        parts.append(_text(x.end, y.end - 6, f"↑ highest {compact(max(values))}", "tick", "end"))
    if min(values) < low - abs(low) * 1e-9:
        parts.append(_text(x.end - 4, y.start - 6, f"↓ lowest {compact(min(values))}", "tick", "end"))
    parts += [_rule(x.start, y.position(r.value), x.end, y.position(r.value), "reference") for r in levels]
    parts += _lines(drawn, x, y)
    wanted = [y.clamped(p[-1][1]) for _, p in named] + [y.position(r.value) for r in levels]
    styles = [f"label s{i}" for i in range(len(named))] + ["label muted"] * len(levels)
    for at, words, style in zip(spread(wanted, LABEL_PITCH, y.end, y.start), labels, styles):
        parts.append(_text(x.end + 7, at + 4, words, style))
    return _svg(LINE_HEIGHT, label, parts)


def _line_axes(x: Scale, y: Scale, x_label: str) -> list[str]:
    parts = []
    for tick in log_ticks(y.low, y.high) if y.log else linear_ticks(y.low, y.high):
        at = y.position(tick)
        parts.append(_rule(x.start, at, x.end, at, "grid"))
        parts.append(_text(x.start - 7, at + 4, compact(tick), "tick", "end"))
    parts.append(_rule(x.start, y.start, x.end, y.start, "axis"))
    for tick in linear_ticks(x.low, x.high, 6):
        at = x.position(tick)
        parts.append(_rule(at, y.start, at, y.start + 4, "axis"))
        parts.append(_text(at, y.start + 17, compact(tick), "tick", "middle"))
    parts.append(_text(x.end, y.start + 34, x_label, "tick", "end"))
    return parts


def _lines(drawn: Sequence[tuple[Series, Sequence[Point]]], x: Scale, y: Scale) -> list[str]:
    """A nested svg clips what leaves the plot without an id, which would have to be unique on the page."""
    width, height = x.end - x.start, y.start - y.end
    # Dots are three units in radius; the room around keeps those on the frame whole.
    room = 4.0
    inner_x = Scale(x.low, x.high, room, room + width)
    inner_y = Scale(y.low, y.high, room + height, room, y.log)
    size = f'width="{_n(width + 2 * room)}" height="{_n(height + 2 * room)}"'
    parts = [f'<svg x="{_n(x.start - room)}" y="{_n(y.end - room)}" {size} class="plot">']
    rank = 0
    for s, points in drawn:
        style = "faint" if s.style == "faint" else f"line s{rank}"
        parts.append(f'<path d="{_path(points, inner_x, inner_y)}" class="{style}"/>')
        if s.style == "dots" or len(points) == 1:
            for a, b in points:
                note = html.escape(f"{s.name}: {b:.5g} at {compact(a)}")
                at = f'cx="{_n(inner_x.position(a))}" cy="{_n(inner_y.position(b))}"'
                parts.append(f'<circle {at} r="2.2" class="dot s{rank}"><title>{note}</title></circle>')
        rank += s.style != "faint"
    return parts + ["</svg>"]


def bar_chart(bars: Sequence[Bar], label: str, digits: int = 3) -> str:
    """Horizontal bars from zero in the order given, with its value; those not finite or below zero are left out."""
    kept = [b for b in bars if math.isfinite(b.value) and b.value >= 0]
    if not kept:
        return no_data(label)
    room = 14 + CHARACTER * max(len(f"{b.value:.{digits}f}") for b in kept)
    x = Scale(0, max(b.value for b in kept) or 1.0, 0, WIDTH - room)
    parts, top = [], 0.0
    for b in kept:
        strong = " strong" if b.highlight else ""
        for line in textwrap.wrap(b.name, 60) or [""]:
            parts.append(_text(0, top + 14, line, f"label{strong}"))
            top += 16
        width = max(x.position(b.value), 1.0)
        size = f'width="{_n(width)}" height="14" rx="2"'
        fill = "bar highlight" if b.highlight else "bar"
        title = f"<title>{html.escape(f'{b.name}: {b.value}')}</title>"
        parts.append(f'<rect x="0" y="{_n(top + 5)}" {size} class="{fill}">{title}</rect>')
        parts.append(_text(width + 8, top + 16.5, f"{b.value:.{digits}f}", f"label{strong}"))
        top += 22
        for line in textwrap.wrap(b.note, 74):
            parts.append(_text(0, top + 12, line, "tick"))
            top += 15
        top += 11
    return _svg(top, label, parts)


def heat_map(cells: Sequence[Cell], label: str, column_label: str) -> str:
    """Rows and columns in the order of their first cell, shares as depth of colour and as numbers; others stay empty."""
    rows, columns = (list(dict.fromkeys(names)) for names in ((c.row for c in cells), (c.column for c in cells)))
    if not cells:
        return no_data(label)
    left = min(WIDTH / 2, CHARACTER * max(map(len, rows)) + 8)
    width, height = (WIDTH - left) / len(columns), 26.0
    parts = [_text(left, 12, column_label, "tick")]
    parts += [_text(left + width * (i + 0.5), 30, name, "tick", "middle") for i, name in enumerate(columns)]
    parts += [_text(0, 54 + height * i, name, "label") for i, name in enumerate(rows)]
    for c in cells:
        x, y = left + width * columns.index(c.column), 36 + height * rows.index(c.row)
        size = f'width="{_n(width - 2)}" height="{_n(height - 2)}" rx="2"'
        title = f"<title>{html.escape(f'{c.row}, {c.column}: {c.share:.3f}')}</title>"
        parts.append(f'<rect x="{_n(x)}" y="{_n(y)}" {size} class="highlight" opacity="{c.share:.2f}">{title}</rect>')
        parts.append(_text(x + width / 2 - 1, y + 17, f"{100 * c.share:.0f}", "tick", "middle"))
    return _svg(42 + height * len(rows), label, parts)


def _row_pitch(rows: int) -> float:
    """Height of a row: the same function for every chart by layer, so that two of them side by side line up."""
    return min(max(440.0 / rows, 14.0), 40.0)


ROWS_TOP = 26.0
ROWS_BOTTOM = 42.0


def _row_axes(names: Sequence[str], row_label: str, x: Scale, ticks: Sequence[tuple[float, str]], x_label: str) -> list[str]:
    pitch = _row_pitch(len(names))
    bottom = ROWS_TOP + pitch * len(names)
    parts = [_text(x.start - 10, ROWS_TOP - 10, row_label, "tick", "end")]
    for i, name in enumerate(names):
        parts.append(_text(x.start - 10, ROWS_TOP + pitch * (i + 0.5) + 4, _shorten(name, 8), "tick", "end"))
    for value, words in ticks:
        at = x.position(value)
        parts.append(_rule(at, ROWS_TOP, at, bottom, "grid"))
        parts.append(_text(at, bottom + 17, words, "tick", "middle"))
    parts.append(_text(x.end, bottom + 34, x_label, "tick", "end"))
    return parts


def interval_chart(
    intervals: Sequence[Interval], label: str, row_label: str, x_label: str, low: float = 1.0, high: float = 1e5
) -> str:
    """Strips from low to high with a dot at the middle, by row, on a logarithmic axis from `low` to `high`.

    What lies beyond the axis is drawn at its edge, as a hollow dot: infinity is a legal half-life (nothing is ever
    forgotten). Intervals with a NaN or a negative number are left out.
    """
    kept = [i for i in intervals if min(i.low, i.middle, i.high) >= 0 and not math.isnan(i.low + i.middle + i.high)]
    if not kept:
        return no_data(label)
    names = list(dict.fromkeys(i.row for i in kept))
    pitch = _row_pitch(len(names))
    x = Scale(low, high, 46, WIDTH - 22, log=True)
    ticks = [(t, compact(t)) for t in log_ticks(low, high)]
    ticks[0], ticks[-1] = (ticks[0][0], f"≤ {ticks[0][1]}"), (ticks[-1][0], f"≥ {ticks[-1][1]}")
    parts = _row_axes(names, row_label, x, ticks, x_label)
    for r, name in enumerate(names):
        group = [i for i in kept if i.row == name]
        gap = (pitch - 4) / len(group)
        if r % 2 == 0:
            band = f'y="{_n(ROWS_TOP + pitch * r)}" width="{_n(x.end - x.start)}" height="{_n(pitch)}"'
            parts.append(f'<rect x="{_n(x.start)}" {band} class="band"/>')
        for j, i in enumerate(group):
            at = ROWS_TOP + pitch * r + 2 + gap * (j + 0.5)
            note = f"{i.name}: median {compact(i.middle)}, 10% below {compact(i.low)}, 10% above {compact(i.high)}"
            radius = min(2.6, max(1.5, gap * 0.55))
            style = "dot s0" if low <= i.middle <= high else "dot hollow"
            parts.append(f"<g><title>{html.escape(note)}</title>")
            parts.append(_rule(x.clamped(i.low), at, x.clamped(i.high), at, "strip"))
            parts.append(f'<circle cx="{_n(x.clamped(i.middle))}" cy="{_n(at)}" r="{_n(radius)}" class="{style}"/></g>')
    return _svg(ROWS_TOP + pitch * len(names) + ROWS_BOTTOM, label, parts)


def histogram_mean(histogram: Histogram) -> float:
    """The mean of a histogram whose counts sit at the middle of their bins; NaN where it holds nothing."""
    total = sum(histogram.counts)
    middles = [(a + b) / 2 for a, b in zip(histogram.edges, histogram.edges[1:])]
    return sum(m * c for m, c in zip(middles, histogram.counts)) / total if total > 0 else math.nan


def histogram_rows(histograms: Sequence[Histogram], label: str, row_label: str, x_label: str) -> str:
    """One silhouette per row, each as high as its own peak, with its mean marked and written at the right.

    Empty histograms and those with an edge that is not finite are left out; DataError where edges and counts disagree.
    """
    for h in histograms:
        if len(h.edges) != len(h.counts) + 1 and (h.edges or h.counts):
            raise DataError(f"{label}, {h.row}: {len(h.edges)} bin edges for {len(h.counts)} counts, expected one more")
    kept = [h for h in histograms if math.isfinite(histogram_mean(h))]
    if not kept:
        return no_data(label)
    x = Scale(min(h.edges[0] for h in kept), max(h.edges[-1] for h in kept), 46, WIDTH - 52)
    ticks = [(t, compact(t)) for t in linear_ticks(x.low, x.high)]
    parts = _row_axes([h.row for h in kept], row_label, x, ticks, x_label)
    parts.append(_text(WIDTH - 6, ROWS_TOP - 10, "mean", "tick", "end"))
    pitch = _row_pitch(len(kept))
    for r, h in enumerate(kept):
        base = ROWS_TOP + pitch * (r + 1) - 1.5
        tall, peak, mean = pitch - 4, max(h.counts), histogram_mean(h)
        steps = [f"M{_n(x.position(h.edges[0]))},{_n(base)}"]
        for right, count in zip(h.edges[1:], h.counts):
            steps.append(f"V{_n(base - tall * count / peak)}H{_n(x.position(right))}")
        note = html.escape(f"{row_label} {h.row}: mean {compact(mean)} of {sum(h.counts):,} values")
        parts.append(f'<path d="{"".join(steps)}V{_n(base)}Z" class="area"><title>{note}</title></path>')
        parts.append(_rule(x.position(mean), base, x.position(mean), base - tall, "mean"))
        parts.append(_text(WIDTH - 6, ROWS_TOP + pitch * (r + 0.5) + 4, f"{mean:.2f}", "tick", "end"))
    return _svg(ROWS_TOP + pitch * len(kept) + ROWS_BOTTOM, label, parts)
