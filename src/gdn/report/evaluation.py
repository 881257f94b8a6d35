"""What an evaluation has to show, and its HTML page: bars against published values and chance, needles by depth, examples."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gdn.report.figures import Bar, Cell, bar_chart, heat_map
from gdn.report.style import STYLE


@dataclass(frozen=True)
class Measured:
    """One task: its metric's value and standard error, and what was published and what a model that guesses would have."""

    title: str
    metric: str
    value: float
    stderr: float | None
    published: float | None
    chance: float  # nan: there is none
    documents: int
    left_out: int = 0


@dataclass(frozen=True)
class Example:
    """One document of a task: the end of its prompt, the answers with the model's scores or its text, the right answer."""

    task: str
    prompt: str
    answers: tuple[tuple[str, str], ...]  # text, what the model says to it
    target: str


@dataclass(frozen=True)
class EvaluationReport:
    """Everything on the page; `needles` holds the share found by prompt length and depth."""

    title: str
    verdict: str
    rows: list[Measured]
    needles: list[Cell]
    examples: list[Example]
    facts: list[tuple[str, str]]


def render_evaluation(report: EvaluationReport) -> str:
    """One whole HTML document that asks for no other file and runs no script."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_prose(report.title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f'<header><p class="eyebrow">Gated DeltaNet evaluation</p><h1>{_prose(report.title)}</h1>'
        f'<p class="verdict">{_prose(report.verdict)}</p></header>\n'
        f"{_table(report.rows)}{_bars(report.rows)}{_needles(report.needles)}{_examples(report.examples)}"
        f"{_facts(report.facts)}\n</main></body></html>\n"
    )


def _prose(words: str) -> str:
    return html.escape(words, quote=False)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _table(rows: Sequence[Measured]) -> str:
    body = ""
    for row in rows:
        apart = None if row.published is None or not row.stderr else (row.value - row.published) / row.stderr
        numbers = [_number(row.value), _number(row.stderr), _number(row.published), "–" if apart is None else f"{apart:+.1f}"]
        documents = f"{row.documents:,}" + (f" ({row.left_out} unusable rows left out)" if row.left_out else "")
        cells = [row.title, row.metric, documents, *numbers]
        body += "<tr>" + "".join(f"<td{_word(n)}>{_prose(cell)}</td>" for n, cell in enumerate(cells)) + "</tr>"
    names = ("task", "metric", "documents", "value", "standard error", "published", "difference in standard errors")
    head = "".join(f"<th{_word(n)}>{name}</th>" for n, name in enumerate(names))
    return (
        f'<h2>The table</h2><section class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>'
    )


def _word(column: int) -> str:
    return ' class="word"' if column < 2 else ""


def _bars(rows: Sequence[Measured]) -> str:
    cards = []
    for row in rows:
        bars = [Bar("this model", row.value, "" if row.stderr is None else f"standard error {row.stderr:.2g}", True)]
        if row.published is not None:
            bars.append(Bar("published", row.published))
        if row.chance > 0:
            bars.append(Bar("chance", row.chance))
        if len(bars) > 1:
            chart = bar_chart(bars, f"{row.title}: {row.metric}")
            cards.append(f'<figure class="card"><h3>{_prose(f"{row.title}, {row.metric}")}</h3>{chart}</figure>')
    if not cards:
        return ""
    lead = "Accuracies: longer is better, and chance is what a model that guesses would have. Perplexities: shorter is better."
    return f'<h2>Beside the published values</h2><p class="lead">{lead}</p><div class="grid">{"".join(cards)}</div>'


def _needles(cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    chart = heat_map(cells, "share of needles found by task, prompt length and depth", "depth of the needle in the prompt")
    caption = "Share of the needles found. Depth 0 is the beginning of the prompt, 1 its end. Empty: no sample had it there."
    return f'<h2>Needles</h2><figure class="card">{chart}<figcaption>{caption}</figcaption></figure>'


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    cards = ""
    for example in examples:
        answers = "\n".join(f"{said:>12}  {text}" for text, said in example.answers)
        cards += (
            f'<article class="card"><p class="who">{_prose(example.task)}, right answer: {_prose(example.target)}</p>'
            f'<pre><span class="prompt">{_prose(example.prompt)}</span>\n{_prose(answers)}</pre></article>'
        )
    lead = "The end of each prompt, and what the model made of it."
    return f'<h2>Examples</h2><p class="lead">{lead}</p><div class="samples">{cards}</div>'


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    pairs = "".join(f"<dt>{_prose(name)}</dt><dd>{_prose(value)}</dd>" for name, value in facts)
    return f'<h2>Measured with</h2><dl class="card">{pairs}</dl>' if pairs else ""
