"""Results as files: what was measured, locked to what it was measured with; reuse of finished tasks; comparison of two results.

A folder holds results.json (the lock, and each task's numbers) and samples_TASK.jsonl (one line a document).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gdn.errors import ConfigError, DataError
from gdn.eval.card import mean_error, perplexity_error
from gdn.files import write_text

RESULTS = "results.json"
SIGNIFICANT = 0.05
_TASK_LOCK = ("version", "task_sha256", "prompts_sha256", "data_sha256", "num_fewshot", "length", "sizing", "documents")


class Results:
    """The results in one folder, under one lock; each task is written as soon as it is done."""

    def __init__(self, folder: Path, lock: Mapping[str, Any], checkpoint: str, order: Sequence[str] = ()) -> None:
        """Go on with what `folder` holds. ConfigError if it was measured under another lock, naming what differs.

        order: of tasks that are added, in whatever order they come; behind those that are there.
        """
        self.folder = folder
        self.lock = json.loads(json.dumps(lock))
        self.checkpoint = checkpoint
        self.tasks: dict[str, dict[str, Any]] = {}
        if (folder / RESULTS).exists():
            before = read_results(folder)
            changed = differences(before["lock"], self.lock)
            if changed:
                raise ConfigError(f"{folder}: holds results under another lock ({'; '.join(changed)}); choose another --out")
            self.tasks = before["tasks"]
        self._order = list(dict.fromkeys([*self.tasks, *order]))

    def finished(self, name: str, data_sha256: str | None) -> dict[str, Any] | None:
        """The result of a task that was measured on the same data, if its samples are still what they were."""
        result = self.tasks.get(name)
        if result is None or result["data_sha256"] != data_sha256:
            return None
        return result if _samples_sha256(self.folder, name) == result["samples_sha256"] else None

    def add(self, name: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a task's samples, then its numbers; returns what results.json holds of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in result["samples"])
        write_text(_samples_path(self.folder, name), lines)
        kept = {key: value for key, value in result.items() if key != "samples"}
        self.tasks[name] = kept | {"samples_sha256": hashlib.sha256(lines.encode()).hexdigest()}
        if name not in self._order:
            self._order.append(name)
        self.tasks = {known: self.tasks[known] for known in self._order if known in self.tasks}
        content = {"checkpoint": self.checkpoint, "lock": self.lock, "tasks": self.tasks}
        write_text(self.folder / RESULTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return self.tasks[name]


class Comparison(NamedTuple):
    """One task in two results: both values, B's score less A's on the same documents, and how likely noise does as much.

    difference and stderr are means over documents (nats a word for perplexities, where less is better); p of a two-sided test.
    changed: locked items of this task that differ.
    """

    task: str
    metric: str
    a: float
    b: float
    documents: int
    difference: float
    stderr: float
    p: float
    changed: list[str]

    @property
    def noise(self) -> bool:
        return self.p >= SIGNIFICANT


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a folder (or the file itself); DataError if it is missing or no such thing."""
    path = folder / RESULTS if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file; expected results of gdn eval") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or not {"lock", "tasks"} <= content.keys():
        raise DataError(f"{path}: no results of gdn eval: expected lock and tasks")
    return content


def read_samples(folder: Path, name: str, sha256: str) -> list[dict[str, Any]]:
    """The documents of a task; DataError if the file is not the one that results.json speaks of."""
    if _samples_sha256(folder, name) != sha256:
        raise DataError(f"{_samples_path(folder, name)}: missing, or not what {RESULTS} was written with")
    return [json.loads(line) for line in _samples_path(folder, name).read_text(encoding="utf-8").split("\n") if line]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The items of two locks that are not equal, as "key: a, b"."""
    keys = [*a, *(key for key in b if key not in a)]
    return [f"{key}: {_short(a.get(key))}, {_short(b.get(key))}" for key in keys if a.get(key) != b.get(key)]


def compare(a: Path, b: Path) -> tuple[list[Comparison], list[str]]:
    """Every task that both folders hold, and what of the lock is not the same. DataError if they share no task."""
    left, right = read_results(a), read_results(b)
    common = [name for name in left["tasks"] if name in right["tasks"]]
    if not common:
        raise DataError(f"{a} and {b} hold no task in common")
    found = [_compare_task(name, (a, left["tasks"][name]), (b, right["tasks"][name])) for name in common]
    return found, differences(left["lock"], right["lock"])


def _compare_task(name: str, a: tuple[Path, dict[str, Any]], b: tuple[Path, dict[str, Any]]) -> Comparison:
    (folder_a, left), (folder_b, right) = a, b
    metric = left["metric"]
    if metric != right["metric"]:
        raise DataError(f"{name}: {metric} in one result, {right['metric']} in the other")
    before, after = (
        {
            (sample["id"], sample["document"]): _score(sample, metric)
            for sample in read_samples(folder, name, task["samples_sha256"])
        }
        for folder, task in (a, b)
    )
    pairs = [(value, after[key]) for key, value in before.items() if key in after]
    if not pairs:
        raise DataError(f"{name}: {folder_a} and {folder_b} have no document in common")
    changed = differences(*({key: task.get(key) for key in _TASK_LOCK} for task in (left, right)))
    difference, stderr, p = paired(pairs)
    return Comparison(name, metric, left["value"], right["value"], len(pairs), difference, stderr, p, changed)


def paired(pairs: Sequence[tuple[Any, Any]]) -> tuple[float, float, float]:
    """(mean difference b - a, its standard error, two-sided p) of scores of the same documents.

    Scores of 0 and 1: the exact sign test over documents that only one gets right (McNemar). Others: normal. Pairs
    (log-likelihood, words): the difference of nats a word.
    """
    if isinstance(pairs[0][0], list):
        words = [float(a[1]) for a, _ in pairs]
        nats = [float(a[0] - b[0]) for a, b in pairs]
        difference = math.fsum(nats) / math.fsum(words)
        # The error of the rate is that of a perplexity over the perplexity itself.
        relative = perplexity_error([-value for value in nats], words)
        stderr = (relative or 0.0) / math.exp(difference)
    else:
        values = [float(b - a) for a, b in pairs]
        difference, stderr = math.fsum(values) / len(values), mean_error(values) or 0.0
        if {float(score) for pair in pairs for score in pair} <= {0.0, 1.0}:
            better, worse = sum(value > 0 for value in values), sum(value < 0 for value in values)
            return difference, stderr, _sign_test(better, worse)
    if stderr == 0.0:
        return difference, stderr, 1.0 if difference == 0.0 else 0.0
    return difference, stderr, math.erfc(abs(difference) / stderr / math.sqrt(2))


def _sign_test(better: int, worse: int) -> float:
    n, k = better + worse, min(better, worse)
    if 2 * k == n:
        return 1.0
    tail = sum(_binomials(n, k))
    return min(1.0, 2 * tail / 2**n)


def _binomials(n: int, k: int) -> Iterator[int]:
    value = 1
    for i in range(k + 1):
        yield value
        value = value * (n - i) // (i + 1)


def _score(sample: Mapping[str, Any], metric: str) -> Any:
    """The document's score under the name that the harness gives it, without the names of our variants."""
    plain = metric.removesuffix("_harness").removesuffix("_stream").removeprefix("ruler_exact_")
    return sample["metrics"][plain]


def _samples_path(folder: Path, name: str) -> Path:
    return (folder if folder.is_dir() else folder.parent) / f"samples_{name}.jsonl"


def _samples_sha256(folder: Path, name: str) -> str | None:
    path = _samples_path(folder, name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."
