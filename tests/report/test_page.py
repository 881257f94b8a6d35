"""The whole page: well-formed, self-contained, escaped, complete, small."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from gdn.report.page import BandPoint, Baseline, HeadMemory, RunReport, Sample, Verdicts, WriteStrengths, render

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags balance, and collects the words."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def training_row(step):
    return {
        "step": step,
        "tokens": step * 4096,
        "seconds": step * 0.5,
        "loss": 2 + 8 / (1 + step / 10),
        "lr": 4e-4,
        "grad_norm": 1.0 + (step % 7) / 10,
        "tokens_per_second": 8192.0,
    }


def report(steps=200):
    rows = [training_row(step) for step in range(1, steps + 1)]
    rows += [{"step": s, "heldout_loss": 3 - s / 1e4, "heldout_bits_per_byte": 1.5 - s / 1e4} for s in (50, 100, 150)]
    return RunReport(
        title="demo <run>",
        verdict="Better than gzip & worse than xz.",
        facts=[("Machine", "two cores"), ("Parameters", "357,781,928")],
        metrics=rows,
        bits_per_byte=1.4321,
        baselines=[Baseline("xz -9", 1.25, "long repeats"), Baseline("gzip", 2.5, "32 KB window")],
        explanation=["First paragraph.", "a < b & c"],
        heads=[HeadMemory(layer, head, (3.0, 70.0, 900.0)) for layer in range(3) for head in range(2)],
        write_strengths=[WriteStrengths(layer, (0.0, 0.5, 1.0), (1, 3 + layer)) for layer in range(3)],
        samples=[Sample("if a < b:\n", "<unk>\x00 & noise", "    return a")],
        recipe='name = "demo"\n[model]\n',
    )


def test_scores_of_tasks_have_a_figure_for_each_metric():
    rows = [{"step": s, "heldout_loss": 3.0, "copa/acc": s / 200, "sciq/acc": 0.5, "piqa/acc_norm": 0.6} for s in (50, 150)]
    page = render(replace(report(), metrics=[*report().metrics, *rows]))
    words = read(page).words
    assert words[words.index("Tasks, acc") :].index("piqa, acc_norm") > 0
    assert {"copa 0.75", "sciq 0.5"} <= set(words[words.index("Tasks, acc") : words.index("piqa, acc_norm")])
    assert "Tasks, " not in render(report())


def test_page_is_balanced_and_holds_every_word_and_number_given():
    reader = read(render(report()))
    words = "".join(reader.words)
    given = ["demo <run>", "Better than gzip & worse than xz.", "two cores", "357,781,928", "1.432", "1.250", "2.500"]
    given += ["xz -9", "long repeats", "32 KB window", "First paragraph.", "a < b & c", "if a < b:\n", "& noise"]
    given += ["    return a", 'name = "demo"\n[model]\n', "layer 2, head 1: median 70", "2.9850", "1.4850"]
    assert [g for g in given if g not in words] == []


def test_page_asks_for_nothing_and_runs_nothing():
    page = render(report())
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert {"src", "href", "srcset"}.isdisjoint(read(page).attributes)
    assert not [name for name in read(page).attributes if name.startswith("on")]


def test_hostile_text_stays_text():
    attack = '</pre><script>alert("x")</script><img src=x onerror=y>'
    base = report()
    page = render(
        replace(
            base,
            title=attack,
            verdict=attack,
            facts=[(attack, attack)],
            baselines=[Baseline(attack, 1.3, attack)],
            explanation=[attack],
            samples=[Sample(attack, attack, attack)],
            recipe=attack,
        )
    )
    assert "<script" not in page and "<img" not in page
    assert "src" not in read(page).attributes


def test_rows_not_finite_change_nothing_but_their_own_point():
    clean = report()
    bad = {**training_row(201), "loss": math.nan, "lr": math.inf, "grad_norm": None, "tokens_per_second": "fast"}
    page = render(replace(clean, metrics=[*clean.metrics, bad]))
    assert page == render(clean)
    assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", page)


def test_empty_report_still_renders():
    empty = RunReport("t", "v", [], [], math.nan, [], [], [], [], [], "")
    words = "".join(read(render(empty)).words)
    assert words.count("no data") == 9


def test_a_step_logged_again_after_resuming_counts_once_and_last():
    base = report()
    stale = [{**training_row(step), "loss": 77.0} for step in range(150, 201)]
    rows = [*base.metrics[:149], *stale, *base.metrics[149:]]
    assert render(replace(base, metrics=rows)) == render(base)


def test_heldout_points_stand_at_the_tokens_of_their_step():
    page = render(report())
    # Step 150 of 4,096 tokens each is 614,400 tokens.
    assert "held-out: 2.985 at 614.4k" in page
    without = [{k: v for k, v in row.items() if k != "tokens"} for row in report().metrics]
    assert "held-out: 2.985 at 150" in render(replace(report(), metrics=without))


def test_heldout_row_between_logged_steps_takes_the_rate_of_its_neighbour():
    rows = [training_row(100), training_row(200), {"step": 250, "heldout_loss": 2.5}]
    assert "held-out: 2.5 at 1.024M" in render(replace(report(), metrics=rows))


@pytest.mark.parametrize("steps", [2000, 20_000])
def test_page_stays_small_however_long_the_run(steps):
    full = replace(
        report(steps),
        heads=[HeadMemory(layer, head, (3.3, 71.7, 912.2)) for layer in range(21) for head in range(4)],
        write_strengths=[WriteStrengths(i, tuple(j / 40 for j in range(41)), tuple(range(40))) for i in range(21)],
    )
    assert len(render(full).encode()) < 200_000


def test_verdict_bars_are_ordered_best_first():
    page = render(report())
    order = [page.index(f">{name}</text>") for name in ("xz -9", "this model", "gzip")]
    assert order == sorted(order)


def costly(step):
    return training_row(step) | {
        "mfu": 0.4 + step / 1e6,
        "mfu_measured": 0.5,
        "memory_gib": 31.25 if step == 7 else 30.0,
        "data_wait": 0.25,
        "watts": 640.0,
    }


def test_what_a_run_took_is_shown_where_it_is_known():
    plain = read(render(report())).words
    assert "What it took" in plain and "Waiting for data, percent of the time" not in plain
    page = replace(report(), metrics=[costly(step) for step in range(1, 101)])
    words = read(render(page)).words
    for expected in (
        "Share of the machine's peak, percent",
        "nominal 40.01",
        "measured 50",
        "Waiting for data, percent of the time",
        "8,192",
        "40.0 %",
        "31.25 GiB",
        "25.00 %",
        "640 W",
    ):
        assert expected in words, expected


def test_what_the_guard_saw():
    assert "Every step had a finite loss and gradient, and no loss stood out." in read(render(report())).words
    events = [{"step": 60, "loss_spike": 9.5, "loss_median": 2.25}, {"step": 70, "skipped": 1}, {"step": 70, "skipped": 1}]
    words = read(render(replace(report(), metrics=[*report().metrics, *events]))).words
    assert "spike: loss 9.500, median before 2.250" in words
    assert words.count("not finite: skipped, the weights unchanged") == 1
    assert words.index("70") < words.index("spike: loss 9.500, median before 2.250")  # latest first


def test_verdicts_and_bands():
    assert "Verdict" not in read(render(report())).words
    table = Verdicts("Table <x>", "Within & without.", ("task", "verdict"), [("HellaSwag", "inside"), ("a<b", "outside")])
    band = [BandPoint(1e6, 5.0, 4.75, 5.5), BandPoint(2e6, 4.0, 3.5, 4.25)]
    page = render(replace(report(), verdicts=table, band=band))
    words = read(page).words
    for expected in ("Verdict", "Table <x>", "Within & without.", "a<b", "outside", "2.0M", "3.5000", "4.2500"):
        assert expected in words, expected
    # The band is drawn from its middle: 4.0 lies 0.125 above 3.875.
    assert "this run 0.125" in words and "highest 0.375" in words
