"""What a run has to show, as frozen dataclasses, and the HTML page that shows it; measures nothing, writes no file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gdn.report.costs import cost_table, guard_events, use_of_machine
from gdn.report.figures import (
    Bar,
    Histogram,
    Interval,
    Reference,
    Series,
    bar_chart,
    histogram_rows,
    interval_chart,
    line_chart,
)
from gdn.report.pieces import History, figure, history_of, number, prose, smoothed
from gdn.report.style import STYLE


@dataclass(frozen=True)
class Baseline:
    """Another way to predict the same held-out text, and what it costs in bits per byte."""

    name: str
    bits_per_byte: float
    note: str


@dataclass(frozen=True)
class Sample:
    """One prompt and its continuations, shown right behind it: their leading space or newline belongs to them."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class HeadMemory:
    """How long one head remembers: its half-life ln 2 / -g in tokens, as the percentiles 10, 50 and 90 over a text."""

    layer: int
    head: int
    half_life_tokens: tuple[float, float, float]


@dataclass(frozen=True)
class WriteStrengths:
    """How strongly one layer writes: counts of beta between ascending bin edges, all heads together."""

    layer: int
    bin_edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Verdicts:
    """A table of what was measured beside what was expected; the last column says whether they agree."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class BandPoint:
    """Mean loss of a stretch of the run that ends at so many tokens, and the band that it should lie in."""

    tokens: float
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class RunReport:
    """Everything on the page; `metrics` holds the rows of metrics.jsonl: training, held-out ones and the guard's, mixed."""

    title: str
    verdict: str
    facts: list[tuple[str, str]]
    metrics: list[dict[str, object]]
    bits_per_byte: float
    baselines: list[Baseline]
    explanation: list[str]
    heads: list[HeadMemory]
    write_strengths: list[WriteStrengths]
    samples: list[Sample]
    recipe: str
    verdicts: Verdicts | None = None
    band: list[BandPoint] = field(default_factory=list)


def _top(report: RunReport) -> str:
    """The verdict box: one number, the sentence that says what it means, and the bars that it is compared with."""
    ours = Bar("this model", report.bits_per_byte, "", True)
    others = [Bar(b.name, b.bits_per_byte, b.note) for b in report.baselines]
    bars = sorted([ours, *others], key=lambda bar: bar.value if math.isfinite(bar.value) else math.inf)
    chart = bar_chart(bars, "bits per byte of the model and of the baselines")
    number = f"{report.bits_per_byte:.3f}" if math.isfinite(report.bits_per_byte) else "–"
    paragraphs = "".join(f"<p>{prose(p)}</p>" for p in report.explanation)
    return (
        '<section class="card top"><div>'
        f'<p class="big">{number}</p><p class="unit">bits per byte on held-out text; lower is better</p>{paragraphs}'
        f"</div><figure>{chart}<figcaption>Bits per byte: how many bits each byte of unseen text costs to store when "
        "this predictor does the guessing. Uncompressed text costs 8.</figcaption></figure></section>"
    )


def _training(report: RunReport, history: History) -> str:
    levels = [Reference(b.name, b.bits_per_byte) for b in report.baselines]
    bits = history.series("model", "heldout_bits_per_byte", history.heldout, "dots")
    rate = history.series("learning rate", "lr", history.training)
    norm = history.series("gradient norm", "grad_norm", history.training)
    speed = history.series("tokens per second", "tokens_per_second", history.training)
    loss = history.series("training", "loss", history.training)
    heldout = history.series("held-out", "heldout_loss", history.heldout, "dots")
    x = history.x_name
    cards = [
        figure(
            "Loss, nats per token",
            line_chart([*smoothed(loss), heldout], "training and held-out loss", x),
            "How surprised the model is by each next token. The pale line is single steps, the bold one their running "
            "median; when held-out loss stops following it down, the model has begun to memorise.",
        ),
        figure(
            "Held-out bits per byte",
            line_chart([bits], "held-out bits per byte", x, references=levels),
            "The same surprise counted per byte of text, so that it compares with a compressor; a dashed line is a baseline. "
            "During training it may be of a part of the held-out text; a baseline and the number at the top are of all of it, "
            "up to two million tokens: the curve's end may differ from that number.",
        ),
        figure(
            "Learning rate",
            line_chart([rate], "learning rate", x, from_zero=True),
            "The size of each update: it rises while the optimizer's averages settle, then falls so that the weights "
            "come to rest in a minimum instead of bouncing across it.",
        ),
        figure(
            "Gradient norm",
            line_chart(smoothed(norm), "gradient norm", x, log_y=True),
            "The length of the gradient before clipping, on a logarithmic axis; bold is its running median. Single "
            "spikes are clipped and rarely do harm; a steady climb warns of a run about to diverge.",
        ),
        figure(
            "Speed, tokens per second",
            line_chart(smoothed(speed), "tokens per second", x, from_zero=True),
            "The first steps often include compilation. Later dips are usually a checkpoint written beside the training, or "
            "another program on the machine.",
        ),
        *use_of_machine(history),
        *_tasks(history),
        _heldout_table(history),
        cost_table(history),
        guard_events(report.metrics),
    ]
    return (
        '<h2>Training</h2><p class="lead">What happened, from the first step to the last.</p>'
        f'<div class="grid">{"".join(cards)}</div>'
    )


def _verdicts(report: RunReport) -> str:
    """What was expected, beside what came of it: a band, a table, or nothing."""
    parts = _band(report.band) if report.band else ""
    if report.verdicts is not None:
        table = report.verdicts
        parts += f'<section class="card wide"><h3>{prose(table.title)}</h3>{_table(table.columns, table.rows)}'
        parts += f'<p class="caption">{prose(table.caption)}</p></section>'
    return f"<h2>Verdict</h2>{parts}" if parts else ""


def _band(points: Sequence[BandPoint]) -> str:
    x = tuple(point.tokens for point in points)
    # From the band's middle: the fall of the loss itself is fifty times as high as the band.
    middle = [(point.low + point.high) / 2 for point in points]
    lines = [
        Series("this run", x, tuple(point.loss - m for point, m in zip(points, middle)), "dots"),
        Series("highest", x, tuple(point.high - m for point, m in zip(points, middle))),
        Series("lowest", x, tuple(point.low - m for point, m in zip(points, middle))),
    ]
    chart = figure(
        "Loss within the recorded band",
        line_chart(lines, "loss and its band", "tokens"),
        "Mean loss of each stretch of the run, and the band that recorded runs span, both from that band's middle, in nats "
        "per token.",
    )
    rows = [
        (f"{point.tokens / 1e6:,.1f}M", f"{point.loss:.4f}", f"{point.low:.4f}", f"{point.high:.4f}") for point in points[::-1]
    ]
    table = _table(("tokens", "loss", "lowest", "highest"), rows)
    caption = "The same as numbers, latest first."
    return (
        f'<div class="grid">{chart}<section class="card"><h3>Stretches of the run</h3>{table}'
        f'<p class="caption">{caption}</p></section></div>'
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{prose(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{prose(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _tasks(history: History) -> list[str]:
    """A figure for each metric: tasks of one metric have one scale."""
    names = sorted({key for row in history.tasks for key in row if "/" in key})
    figures = []
    for metric in dict.fromkeys(name.split("/", 1)[1] for name in names):
        lines = [
            history.series(name.split("/", 1)[0], name, [row for row in history.tasks if name in row])
            for name in names
            if name.split("/", 1)[1] == metric
        ]
        figures.append(
            figure(
                f"{'Tasks' if len(lines) > 1 else lines[0].name}, {metric}",  # a line alone has no name beside it
                line_chart(lines, f"{metric} of evaluation tasks", history.x_name),
                "Scores on the first documents of each task, always the same ones, by the code of gdn eval. So few documents "
                "make them move by some hundredths without a reason.",
            )
        )
    return figures


def _heldout_table(history: History) -> str:
    rows = history.heldout
    # A hundred rows are enough to read; the last one, the result, is always among them.
    stride = max(1, math.ceil(len(rows) / 100))
    shown = rows[::-1][::stride]
    cells = []
    for row in shown:
        bits, loss = number(row, "heldout_bits_per_byte"), number(row, "heldout_loss")
        words = [f"{number(row, 'step'):,.0f}"]
        words += [f"{value:.4f}" if math.isfinite(value) else "–" for value in (loss, bits)]
        cells.append("<tr>" + "".join(f"<td>{w}</td>" for w in words) + "</tr>")
    body = "".join(cells) or '<tr><td colspan="3">no data</td></tr>'
    return (
        '<section class="card"><h3>Held-out checks, latest first</h3><div class="table"><table>'
        "<thead><tr><th>step</th><th>loss</th><th>bits per byte</th></tr></thead>"
        f'<tbody>{body}</tbody></table></div><p class="caption">Measured on text that training never sees. Loss over '
        "ln 2 is bits per token; over the bytes that a token spans, bits per byte.</p></section>"
    )


def _memory(report: RunReport) -> str:
    heads = sorted(report.heads, key=lambda h: (h.layer, h.head))
    intervals = [Interval(str(h.layer), f"layer {h.layer}, head {h.head}", *h.half_life_tokens) for h in heads]
    layers = sorted(report.write_strengths, key=lambda w: w.layer)
    histograms = [Histogram(str(w.layer), w.bin_edges, w.counts) for w in layers]
    cards = [
        figure(
            "How long each head remembers",
            interval_chart(intervals, "half-life of each head's memory", "layer", "half-life in tokens"),
            "Half-life: the number of tokens after which exp(sum g) has fallen to one half, ln 2 / -g for a steady g. "
            "Each strip is one head, its dot the median and its ends the 10th and 90th percentile over the text; a "
            "hollow dot lies beyond the axis.",
        ),
        figure(
            "How strongly each layer writes",
            histogram_rows(histograms, "write strengths of each layer", "layer", "write strength beta"),
            "Write strength beta: 0 ignores the token, 1 replaces what the key held; between them old and new are "
            "mixed. Each row is drawn to its own peak, so compare shapes and means, not heights.",
        ),
    ]
    return (
        '<h2>Inside the memory</h2><p class="lead">Every head keeps one matrix of fixed size. At each token a gate '
        "decides how much of it fades, and beta how much of the new token is written.</p>"
        f'<div class="grid">{"".join(cards)}</div>'
    )


def _samples(report: RunReport) -> str:
    if not report.samples:
        return ""
    cards = []
    for sample in report.samples:
        sides = (("Before training", "who", sample.before), ("After training", "who after", sample.after))
        columns = "".join(
            f'<div><p class="{style}">{name}</p>'
            f'<pre>\n<span class="prompt">{prose(sample.prompt)}</span>{prose(words)}</pre></div>'
            for name, style, words in sides
        )
        cards.append(f'<article class="card"><div class="grid">{columns}</div></article>')
    return (
        '<h2>Before and after</h2><p class="lead">The same prompts, in grey, continued by the untrained weights '
        f'and by the trained ones.</p><div class="samples">{"".join(cards)}</div>'
    )


def _facts(report: RunReport) -> str:
    pairs = "".join(f"<dt>{prose(name)}</dt><dd>{prose(value)}</dd>" for name, value in report.facts)
    listed = f'<h2>Facts</h2><dl class="card">{pairs}</dl>' if pairs else ""
    recipe = (
        f'<h2>Recipe</h2><details class="card"><summary>Show the resolved recipe (TOML)</summary><pre>\n'
        f"{prose(report.recipe)}</pre></details>"
    )
    return listed + (recipe if report.recipe else "")


def render(report: RunReport) -> str:
    """One whole HTML document that asks for no other file and runs no script; numbers not finite are left out."""
    history = history_of(report.metrics)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{prose(report.title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f'<header><p class="eyebrow">Gated DeltaNet run report</p><h1>{prose(report.title)}</h1>'
        f'<p class="verdict">{prose(report.verdict)}</p></header>\n'
        f"{_top(report)}\n{_verdicts(report)}\n"
        f"{_training(report, history)}\n{_memory(report)}\n{_samples(report)}\n{_facts(report)}\n"
        "</main></body></html>\n"
    )
