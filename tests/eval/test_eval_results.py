"""Results on disk under their lock, and comparisons that tell noise from a difference."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from gdn.errors import ConfigError, DataError
from gdn.eval.card import RULER_CARD, in_errors, mean_error, perplexity_error, row_of, ruler_mean
from gdn.eval.results import Results, compare, paired, read_results, read_samples

LOCK = {"lm_eval": "0.4.13", "model": "a" * 64, "limit": None}


def result(scores: list[Any], metric: str = "acc", **changes: Any) -> dict[str, Any]:
    samples = [
        {"id": i, "document": f"d{i}", "metrics": {metric.removesuffix("_harness"): score}} for i, score in enumerate(scores)
    ]
    plain: dict[str, Any] = {"metric": metric, "value": 0.5, "stderr": 0.1, "data_sha256": "d", "prompts_sha256": "p"}
    return plain | changes | {"samples": samples}


def test_finished_tasks_are_found_again(tmp_path: Path) -> None:
    first = Results(tmp_path / "out", LOCK, "runs/x")
    assert first.finished("copa", "d") is None
    kept = first.add("copa", result([0.0, 1.0]))
    first.add("piqa", result([1.0, 1.0]))
    again = Results(tmp_path / "out", LOCK, "runs/x")
    assert again.finished("copa", "d") == kept and again.finished("piqa", "d") is not None
    assert again.finished("copa", "other data") is None
    assert len(read_samples(tmp_path / "out", "copa", kept["samples_sha256"])) == 2
    (tmp_path / "out" / "samples_copa.jsonl").write_text("{}\n")
    assert again.finished("copa", "d") is None
    with pytest.raises(DataError, match=r"samples_copa\.jsonl: missing, or not what"):
        read_samples(tmp_path / "out", "copa", kept["samples_sha256"])
    assert read_results(tmp_path / "out")["checkpoint"] == "runs/x"


def test_another_lock_is_refused(tmp_path: Path) -> None:
    Results(tmp_path, LOCK, "x").add("copa", result([0.0]))
    with pytest.raises(ConfigError, match=r"another lock \(limit: none, 50\); choose another --out"):
        Results(tmp_path, LOCK | {"limit": 50}, "x")


def test_broken_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; expected results of gdn eval"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match="expected lock and tasks"):
        read_results(tmp_path)


def test_comparison_tells_noise_from_a_difference(tmp_path: Path) -> None:
    rng = random.Random(0)
    scores = [float(rng.random() < 0.5) for _ in range(200)]
    noisy = [1 - score if i < 6 else score for i, score in enumerate(scores)]
    better = [1.0 if i < 60 else score for i, score in enumerate(scores)]
    for name, copa, piqa in (("a", scores, scores), ("b", noisy, better)):
        results = Results(tmp_path / name, LOCK | {"model": name}, name)
        results.add("copa", result(copa))
        results.add("piqa", result(piqa, prompts_sha256=name))
    (copa, piqa), changed = compare(tmp_path / "a", tmp_path / "b")
    assert changed == ["model: a, b"]
    assert copa.noise and copa.documents == 200 and copa.changed == []
    assert not piqa.noise and piqa.difference == pytest.approx(sum(better) / 200 - sum(scores) / 200)
    assert piqa.changed == ["prompts_sha256: a, b"]


def test_only_common_documents_are_compared(tmp_path: Path) -> None:
    for name, scores in (("a", [1.0, 0.0, 1.0]), ("b", [1.0, 0.0])):
        Results(tmp_path / name, LOCK, name).add("copa", result(scores))
    ((copa,), changed) = compare(tmp_path / "a", tmp_path / "b")
    assert (copa.documents, copa.difference, copa.p, changed) == (2, 0.0, 1.0, [])
    Results(tmp_path / "c", LOCK, "c").add("piqa", result([1.0]))
    with pytest.raises(DataError, match="no task in common"):
        compare(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(("better", "worse"), [(0, 5), (3, 9), (4, 4), (10, 1)])
def test_the_sign_test_counts_all_outcomes(better: int, worse: int) -> None:
    pairs = [(0.0, 1.0)] * better + [(1.0, 0.0)] * worse + [(1.0, 1.0)] * 7
    n = better + worse
    outcomes = [abs(2 * sum(signs) - n) >= abs(better - worse) for signs in itertools.product((0, 1), repeat=n)]
    assert paired(pairs)[2] == pytest.approx(sum(outcomes) / 2**n)


def test_perplexities_are_compared_in_nats_a_word() -> None:
    rng = random.Random(1)
    pages = [[-rng.uniform(300, 400), 100] for _ in range(30)]
    worse = [[ll - 10 + rng.gauss(0, 1), words] for ll, words in pages]
    difference, stderr, p = paired(list(zip(pages, worse)))
    assert difference == pytest.approx(0.1, abs=0.01) and p < 1e-6
    spread = [a[0] - b[0] - difference * 100 for a, b in zip(pages, worse)]
    assert stderr == pytest.approx(math.sqrt(sum(x * x for x in spread) / 29 * 30) / 3000)
    mixed = [[ll + rng.gauss(0, 30), words] for ll, words in pages]
    assert paired(list(zip(pages, mixed)))[2] > 0.01


def test_standard_errors_are_those_of_resampling() -> None:
    rng = random.Random(2)
    scores = [float(rng.random() < 0.3) for _ in range(300)]
    pages = [(-rng.uniform(2, 4) * n, float(n)) for n in (rng.randrange(50, 500) for _ in range(60))]

    def perplexity(chosen: list[tuple[float, float]]) -> float:
        return math.exp(-sum(ll for ll, _ in chosen) / sum(n for _, n in chosen))

    def spread(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))

    means = [sum(rng.choices(scores, k=300)) / 300 for _ in range(2000)]
    perplexities = [perplexity(rng.choices(pages, k=60)) for _ in range(2000)]
    assert mean_error(scores) == pytest.approx(spread(means), rel=0.08)
    assert perplexity_error(*zip(*pages)) == pytest.approx(spread(perplexities), rel=0.08)
    assert mean_error([1.0]) is None and perplexity_error([1.0], [1.0]) is None


def test_the_table_knows_its_rows() -> None:
    row = row_of("arc_easy", "acc")
    assert (row.title, row.published) == ("ARC-Easy", 0.463)
    assert row_of("arc_easy", "acc_norm").published is None  # published by another metric
    assert in_errors(0.483, 0.01, 0.463) == pytest.approx(2.0)
    assert in_errors(0.483, 0.0, 0.463) is None and in_errors(0.483, 0.01, None) is None


def test_results_are_readable_json(tmp_path: Path) -> None:
    Results(tmp_path, LOCK, "x").add("copa", result([0.0]))
    content = json.loads((tmp_path / "results.json").read_text())
    assert "samples" not in content["tasks"]["copa"] and content["lock"] == LOCK


def test_the_mean_of_the_needles_is_beside_the_published_one() -> None:
    part = {"metric": "2048", "stderr": 0.02, "documents": 500, "left_out": 0}
    values = zip(RULER_CARD, (1.0, 0.9, 0.5, 0.4))
    results = {row.task: part | {"value": value} for row, value in values}
    mean = ruler_mean(results)
    assert mean is not None and mean["value"] == pytest.approx(0.7) and mean["stderr"] == pytest.approx(0.01)
    assert mean["documents"] == 2000 and row_of("ruler", mean["metric"]).published == 0.745
    assert ruler_mean({**results, "niah_single_1": part | {"value": 1.0, "stderr": None}})["stderr"] is None
    del results["niah_single_3"]
    assert ruler_mean(results) is None
