"""The parts of a run's page that say what it took: use of the machine, cost, and what the guard saw."""

import math
import statistics
from collections.abc import Callable, Sequence

from gdn.report.figures import Series, line_chart
from gdn.report.pieces import History, Row, figure, number, prose, smoothed


def use_of_machine(history: History) -> list[str]:
    """Figures that runs of earlier versions do not have."""
    cards = []
    lines = [history.series(name, key, history.training) for name, key in (("nominal", "mfu"), ("measured", "mfu_measured"))]
    shares = [Series(s.name, s.x, tuple(100 * y for y in s.y)) for s in lines if any(map(math.isfinite, s.y))]
    if shares:
        cards.append(
            figure(
                "Share of the machine's peak, percent",
                line_chart(shares, "share of peak arithmetic", history.x_name, from_zero=True),
                "Arithmetic that the model needs (MFU), forward and backward, over what the device could do in that time: by "
                "its maker's figure for dense bfloat16 (nominal), and by what a plain product of matrices reached (measured).",
            )
        )
    wait = history.series("waiting", "data_wait", history.training)
    if any(map(math.isfinite, wait.y)):
        percent = Series(wait.name, wait.x, tuple(100 * y for y in wait.y))
        cards.append(
            figure(
                "Waiting for data, percent of the time",
                line_chart(smoothed(percent), "time spent waiting for data", history.x_name, from_zero=True),
                "Batches are read while the step before is computed; what is left here is time in which the device had nothing "
                "to do.",
            )
        )
    return cards


def cost_table(history: History) -> str:
    rows: list[tuple[str, str]] = []

    def add(name: str, key: str, form: str, pick: Callable[[list[float]], float], scale: float = 1.0) -> None:
        values = [v for row in history.training if math.isfinite(v := number(row, key))]
        if values:
            rows.append((name, form.format(scale * pick(values))))

    add("tokens per second, median", "tokens_per_second", "{:,.0f}", statistics.median)
    add("share of the nominal peak, median", "mfu", "{:.1f} %", statistics.median, 100)
    add("share of the measured peak, median", "mfu_measured", "{:.1f} %", statistics.median, 100)
    add("peak memory", "memory_gib", "{:.2f} GiB", max)
    add("waiting for data, mean", "data_wait", "{:.2f} %", statistics.fmean, 100)
    add("power of a GPU, median", "watts", "{:,.0f} W", statistics.median)
    add("gradient norm, median", "grad_norm", "{:.3f}", statistics.median)
    add("gradient norm, largest", "grad_norm", "{:.3f}", max)
    if not rows:
        return ""
    body = "".join(f"<tr><td>{prose(name)}</td><td>{value}</td></tr>" for name, value in rows)
    return (
        f'<section class="card"><h3>What it took</h3><div class="table"><table><tbody>{body}</tbody></table></div>'
        '<p class="caption">Over the logged steps; checkpoints and evaluations do not count as time.</p></section>'
    )


def guard_events(metrics: Sequence[Row]) -> str:
    """What the guard saw, latest first. A run that went on from a checkpoint may have seen it twice: the later row counts."""
    found = {}
    for row in metrics:
        step = number(row, "step")
        if "skipped" in row:
            found[step] = "not finite: skipped, the weights unchanged"
        elif "loss_spike" in row:
            found[step] = f"spike: loss {number(row, 'loss_spike'):.3f}, median before {number(row, 'loss_median'):.3f}"
    cells = [f"<tr><td>{step:,.0f}</td><td>{note}</td></tr>" for step, note in sorted(found.items())]
    if not cells:
        body = "<p>Every step had a finite loss and gradient, and no loss stood out.</p>"
    else:
        rows = "".join(cells[::-1][:50])
        head = "<thead><tr><th>step</th><th>what</th></tr></thead>"
        body = f'<div class="table"><table>{head}<tbody>{rows}</tbody></table></div>'
    return (
        f'<section class="card"><h3>Guard</h3>{body}<p class="caption">A step whose loss or gradient is not finite is skipped '
        "and its windows are written down; a loss far above those before it is noted.</p></section>"
    )
