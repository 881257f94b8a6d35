"""The evaluation's page: every number and text on it, escaped; what is not there is left out."""

import math

import pytest

from gdn.report.evaluation import EvaluationReport, Example, Measured, render_evaluation
from gdn.report.figures import Cell, heat_map


def make(**changes: object) -> EvaluationReport:
    values: dict[str, object] = {
        "title": "a <model>",
        "verdict": "two measurements",
        "rows": [
            Measured("SciQ", "acc", 0.75, 0.01, 0.788, 0.25, 884, 116),
            Measured("WikiText-2", "word_perplexity", 31.5, None, None, math.nan, 62),
        ],
        "needles": [Cell("niah_single_1, 2,048", "0.0", 1.0), Cell("niah_single_1, 2,048", "0.8", 0.25)],
        "examples": [Example("SciQ", "Question: 1 < 2?\nAnswer:", ((" yes & no", "-1.25"),), "yes")],
        "facts": [("lm_eval", "0.4.13")],
    }
    return EvaluationReport(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    ["a &lt;model&gt;", "0.75", "-3.8", "884 (116 unusable rows left out)", "31.5", "published", "chance", "0.788"]
    + ["1 &lt; 2?", " yes &amp; no", "-1.25", "0.4.13", "niah_single_1, 2,048", ">25<", ">100<"],
)
def test_the_page_says(words: str) -> None:
    assert words in render_evaluation(make())


def test_sections_without_content_are_left_out() -> None:
    page = render_evaluation(make(needles=[], examples=[], facts=[]))
    assert not any(name in page for name in ("Needles", "Examples", "Measured with"))
    perplexity = make().rows[1]
    assert "Beside the published values" not in render_evaluation(make(rows=[perplexity]))  # nothing to stand beside


def test_a_cell_lies_in_its_row_and_column() -> None:
    cells = [Cell(row, column, 0.5) for row in ("a", "b") for column in ("x", "y", "z")]
    chart = heat_map([*cells[:4], Cell("b", "z", 0.9)], "map", "columns")
    places = [part.split('"')[1:4:2] for part in chart.split("<rect ")[1:]]
    xs, ys = ([float(place[i]) for place in places] for i in (0, 1))
    assert xs[0] == xs[3] < xs[1] < xs[2] == xs[4]
    assert ys[0] == ys[1] == ys[2] < ys[3] == ys[4]
    assert "no data" in heat_map([], "map", "columns")
