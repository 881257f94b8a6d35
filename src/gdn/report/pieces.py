"""What the parts of a run's page share: the metrics by step, text made safe, a figure's frame, smoothing."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gdn.report.figures import Series, Style
from gdn.report.scales import finite_points, running_median

Row = Mapping[str, object]


@dataclass(frozen=True)
class History:
    """The metrics by step: a run that was resumed may have logged a step twice, and the later row counts."""

    training: list[Row]
    heldout: list[Row]
    tasks: list[Row]  # "task/metric" to value
    x_name: str
    tokens_at: dict[float, float]

    def series(self, name: str, key: str, rows: Sequence[Row], style: Style = "line") -> Series:
        """The values under `key` against tokens, or against steps where no row counts tokens."""
        pairs = [(self.x(row), number(row, key)) for row in rows]
        x, y = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
        return Series(name, x, y, style)

    def x(self, row: Row) -> float:
        """Where a row stands on the common axis; a held-out row counts no tokens and takes those of its step."""
        step = number(row, "step")
        if self.x_name == "steps":
            return step
        own = number(row, "tokens")
        if math.isfinite(own) or not self.tokens_at:
            return own
        # Tokens grow by a fixed number a step, so the nearest logged step before or after gives the rate.
        near = min(self.tokens_at, key=lambda known: abs(known - step)) if math.isfinite(step) else math.nan
        return self.tokens_at[near] * (step / near) if math.isfinite(near) and near > 0 else math.nan


def number(row: Row, key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def history_of(metrics: Sequence[Row]) -> History:
    training = {number(r, "step"): r for r in metrics if "loss" in r}
    heldout = {number(r, "step"): r for r in metrics if "heldout_loss" in r or "heldout_bits_per_byte" in r}
    tasks = {number(r, "step"): r for r in metrics if any("/" in key for key in r)}
    known = {step: number(r, "tokens") for step, r in training.items()}
    tokens_at = {step: tokens for step, tokens in known.items() if math.isfinite(step) and math.isfinite(tokens)}
    ordered = [[rows[step] for step in sorted(rows) if math.isfinite(step)] for rows in (training, heldout, tasks)]
    return History(ordered[0], ordered[1], ordered[2], "tokens" if tokens_at else "steps", tokens_at)


def prose(words: str) -> str:
    return html.escape(words, quote=False)


def figure(title: str, chart: str, caption: str) -> str:
    head = f"<h3>{prose(title)}</h3>" if title else ""
    return f'<figure class="card">{head}{chart}<figcaption>{prose(caption)}</figcaption></figure>'


def smoothed(series: Series) -> list[Series]:
    """The series as a faint line, and its running median under its name."""
    points = finite_points(series.x, series.y)
    x, y = tuple(a for a, _ in points), tuple(b for _, b in points)
    # A fortieth of the run is wide enough to hide batch noise and narrow enough to keep the knee of the curve.
    middle = tuple(running_median(y, max(7, len(y) // 40)))
    return [Series(f"{series.name}, each step", x, y, "faint"), Series(series.name, x, middle)]
