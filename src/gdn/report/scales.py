"""Numbers to positions and words: ranges, ticks, compact numerals, smoothing and thinning; draws nothing."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] of the data onto [start, end] of the drawing, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def position(self, value: float) -> float:
        """Where `value` is drawn; a value outside [low, high] falls outside [start, end]."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def clamped(self, value: float) -> float:
        """Where `value` is drawn once it is moved into [low, high]; infinities are allowed."""
        return self.position(min(max(value, self.low), self.high))


def tick_step(span: float, most: int) -> float:
    """The smallest step of the form 1, 2 or 5 times a power of ten that fits into `span` at most `most` times."""
    power = 10.0 ** math.floor(math.log10(span / most))
    # The slack keeps a span of exactly most * step from rounding up to the next step.
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0, 20.0) if m * power * most >= span * (1 - 1e-9))


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of a 1-2-5 step inside [low, high], ascending, at most `most` + 1 of them."""
    if high <= low:
        return [low]
    step = tick_step(high - low, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high] where it spans two decades or more, else multiples by 1, 2 and 5 (0 < low)."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1,) if high / low >= 100 else (1, 2, 5)
    # float("2e-4") is the nearest number to 0.0002; 2 * 10.0**-4 need not be.
    ticks = [float(f"{m}e{p}") for p in powers for m in multiples]
    inside = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
    return inside if len(inside) >= 2 else linear_ticks(low, high)


def nice_range(low: float, high: float, most: int = 5) -> tuple[float, float]:
    """[low, high] widened to whole tick steps, and to something drawable where it is a single value."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = tick_step(high - low, most)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def robust_range(values: Sequence[float]) -> tuple[float, float]:
    """The range of `values`, less the outermost 2% on a side where those alone would flatten the rest."""
    ordered = sorted(values)
    if len(ordered) < 20:
        return ordered[0], ordered[-1]
    cut = len(ordered) // 50
    low, high = ordered[cut], ordered[-1 - cut]
    slack = (high - low) * 0.3 or abs(high) * 0.1
    # Cutting less than a quarter off the range would gain little and leave the reader without the whole.
    worth = (ordered[-1] - ordered[0]) * 0.25
    low = ordered[0] if low - ordered[0] < worth else max(ordered[0], low - slack)
    high = ordered[-1] if ordered[-1] - high < worth else min(ordered[-1], high + slack)
    return low, high


def compact(value: float) -> str:
    """A number in at most four significant digits: 0.0004 -> 4e-4, 12000 -> 12k, 3400000 -> 3.4M, inf -> ∞."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    sign, size = ("−" if value < 0 else ""), abs(value)
    if size < 0.01:
        mantissa, power = f"{size:.3e}".split("e")
        return f"{sign}{float(mantissa):g}e{int(power)}"
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.96 would be written 1000 in four digits, which belongs to the next unit.
        if size >= unit * 0.99995:
            return f"{sign}{size / unit:.4g}{suffix}"
    return f"{sign}{size:.4g}"


def finite_points(x: Iterable[float], y: Iterable[float], positive: bool = False) -> list[Point]:
    """The pairs whose two numbers are finite (and whose y is above zero, if `positive`), in ascending x."""
    pairs = [(a, b) for a, b in zip(x, y) if math.isfinite(a) and math.isfinite(b) and (b > 0 or not positive)]
    return sorted(pairs, key=lambda pair: pair[0])


def running_median(y: Sequence[float], window: int) -> list[float]:
    """Median over `window` neighbours: narrower at the start, where curves are steep, one-sided at the end.

    Unlike a mean it keeps a single spike from lifting the whole window.
    """
    half, left, right = window // 2, 0, 0
    ordered: list[float] = []
    result = []
    for i in range(len(y)):
        wanted = i - min(half, i), min(i + min(half, i) + 1, len(y))
        while right < wanted[1]:
            insort(ordered, y[right])
            right += 1
        while left < wanted[0]:
            del ordered[bisect_left(ordered, y[left])]
            left += 1
        result.append((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)
    return result


def thin(points: Sequence[Point], most: int = 600) -> list[Point]:
    """At most `most` of the points: the first, the last, and the extremes of equal runs between: spikes stay."""
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    buckets = (most - 2) // 2
    kept = [points[0]]
    for i in range(buckets):
        run = inner[i * len(inner) // buckets : (i + 1) * len(inner) // buckets]
        pair = {min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])}
        kept.extend(sorted(pair))
    return kept + [points[-1]]
