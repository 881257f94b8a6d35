"""The published evaluation table, and what is measured beside it: which task, which metric, how far apart."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Published with puigde/gated-deltanet-360M-15B-slimpajama, zero-shot. RULER at 2,048 tokens.
RULER_LENGTH = 2048


class Row(NamedTuple):
    """One line of the table: the task's name here, how people call it, the metric it is published by, and with what value.

    chance: of a model that knows nothing; 0 where guessing never hits, nan for a perplexity.
    """

    task: str
    title: str
    metric: str
    published: float | None
    chance: float


CARD = (
    Row("hellaswag", "HellaSwag", "acc_norm", 0.353, 0.25),
    Row("piqa", "PIQA", "acc_norm", 0.653, 0.5),
    Row("arc_easy", "ARC-Easy", "acc", 0.463, 0.25),
    Row("arc_challenge", "ARC-Challenge", "acc_norm", 0.233, 0.25),
    Row("winogrande", "WinoGrande", "acc", 0.495, 0.5),
    Row("lambada_openai", "LAMBADA (openai)", "acc", 0.323, 0.0),
    Row("boolq", "BoolQ", "acc", 0.579, 0.5),
    Row("copa", "COPA", "acc", 0.700, 0.5),
    Row("sciq", "SciQ", "acc", 0.788, 0.25),
    Row("wikitext", "WikiText-2", "word_perplexity", None, math.nan),
    Row("wikitext_harness", "WikiText-2, ids of the harness", "word_perplexity_harness", 27.6, math.nan),
)
RULER_CARD = (
    Row("niah_single_1", "RULER niah_single_1", str(RULER_LENGTH), 1.00, 0.0),
    Row("niah_single_2", "RULER niah_single_2", str(RULER_LENGTH), 1.00, 0.0),
    Row("niah_single_3", "RULER niah_single_3", str(RULER_LENGTH), 0.66, 0.0),
    Row("niah_multikey_1", "RULER niah_multikey_1", str(RULER_LENGTH), 0.32, 0.0),
)
STREAM = Row("wikitext_stream", "WikiText-2, state carried on", "word_perplexity_stream", None, math.nan)
MEAN = Row("ruler", "RULER, mean of the four", str(RULER_LENGTH), 0.745, 0.0)
_ROWS = {row.task: row for row in (*CARD, *RULER_CARD, MEAN, STREAM)}


def row_of(task: str, metric: str) -> Row:
    """The table's line for a measured task; of a task or metric that was not published, a line without that value."""
    row = _ROWS.get(task)
    return row if row is not None and row.metric == metric else Row(task, task, metric, None, math.nan)


def ruler_mean(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of RULER's four published rows with its standard error; None where one of them was not measured."""
    parts = [results[row.task] for row in RULER_CARD if row.task in results]
    if len(parts) < len(RULER_CARD) or any(part["metric"] != MEAN.metric for part in parts):
        return None
    errors = [part["stderr"] for part in parts]
    stderr = None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(parts)
    value = math.fsum(part["value"] for part in parts) / len(parts)
    counts = {key: sum(part[key] for part in parts) for key in ("documents", "left_out")}
    return {"metric": MEAN.metric, "value": value, "stderr": stderr, "repeated": False} | counts


def in_errors(value: float, stderr: float | None, published: float | None) -> float | None:
    """(value - published) in standard errors of the value; None where one of them is not there."""
    if published is None or not stderr:
        return None
    return (value - published) / stderr


def mean_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def perplexity_error(log_likelihoods: Sequence[float], counts: Sequence[float]) -> float | None:
    """Standard error of exp(-sum ll / sum counts) over independent texts: of a ratio of sums, linearised."""
    n, total = len(counts), math.fsum(counts)
    if n < 2 or total <= 0:
        return None
    rate = -math.fsum(log_likelihoods) / total
    spread = math.fsum((-ll - rate * count) ** 2 for ll, count in zip(log_likelihoods, counts)) * n / (n - 1)
    return math.exp(rate) * math.sqrt(spread) / total
