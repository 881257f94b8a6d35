"""The tasks' documents from files: one JSON object a line, checked as they are read, in the columns that the harness expects.

A folder of data holds `eval/` (this table's files) and `ruler/` (see `gdn.eval.ruler`). Which task reads what is said here
alone; the tasks themselves are the harness's.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gdn.errors import DataError

Document = dict[str, Any]
INDEX = "index.json"  # file name -> rows, for folders that hold other than the official sets


class Source(NamedTuple):
    """Where a task's documents lie: the split that the harness evaluates, the file, its official rows, and its columns."""

    split: str
    file: str
    rows: int
    columns: Mapping[str, type]


_ARC = {"question": str, "choices": dict, "answerKey": str}
SOURCES = {
    "hellaswag": Source(
        "validation",
        "hellaswag_val.jsonl",
        10042,
        {"ctx_a": str, "ctx_b": str, "activity_label": str, "endings": list, "label": str},
    ),
    "piqa": Source("validation", "piqa_val.jsonl", 1838, {"goal": str, "sol1": str, "sol2": str, "label": int}),
    "arc_easy": Source("test", "arc_easy_test.jsonl", 2376, _ARC),
    "arc_challenge": Source("test", "arc_challenge_test.jsonl", 1172, _ARC),
    "winogrande": Source(
        "validation", "winogrande_xl_val.jsonl", 1267, {"sentence": str, "option1": str, "option2": str, "answer": str}
    ),
    "lambada_openai": Source("test", "lambada_openai_test.jsonl", 5153, {"text": str}),
    "boolq": Source("validation", "boolq_val.jsonl", 3270, {"passage": str, "question": str, "answer": bool}),
    "copa": Source(
        "validation", "copa_val.jsonl", 100, {"premise": str, "choice1": str, "choice2": str, "question": str, "label": int}
    ),
    "sciq": Source(
        "test",
        "sciq_test.jsonl",
        1000,
        {"question": str, "support": str, "correct_answer": str},  # distractors are null in 116 rows: `usable`
    ),
    "wikitext": Source("test", "wikitext2_test_docs.jsonl", 62, {"page": str}),
}
_DISTRACTORS = ("distractor1", "distractor2", "distractor3")


class Documents(NamedTuple):
    """The documents to score, how many rows were left out as unusable, and the file's SHA-256."""

    rows: list[Document]
    left_out: int
    sha256: str


def path_of(task: str, folder: Path) -> Path | None:
    """The file of a task's documents; None for a task that has none here."""
    return folder / "eval" / SOURCES[task].file if task in SOURCES else None


def read_documents(task: str, folder: Path) -> Documents:
    """The documents of one of SOURCES from `folder`/eval.

    Raises DataError, with file and line, for a file that is missing or cut short and for a row of another shape.
    """
    source = SOURCES[task]
    path = folder / "eval" / source.file
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file; expected the documents of {task}, {source.rows:,} rows") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    rows = [_parse(path, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    wanted = _wanted_rows(path.parent, source)
    if len(rows) != wanted:
        raise DataError(f"{path}: {len(rows):,} rows; expected {wanted:,}: cut short, or another set")
    for number, row in enumerate(rows, 1):
        _check(path, number, row, source.columns)
    if task == "boolq":  # the harness reads SuperGLUE's columns
        rows = [{**row, "label": int(row["answer"])} for row in rows]
    usable = [row for row in rows if task != "sciq" or all(isinstance(row.get(key), str) for key in _DISTRACTORS)]
    return Documents(usable, len(rows) - len(usable), hashlib.sha256(content).hexdigest())


def as_dataset(task: str, documents: Documents, limit: int | None = None) -> Callable[..., dict[str, Any]]:
    """What the harness calls for a task's data: {split: the first `limit` documents}."""
    split = SOURCES[task].split

    def make(**metadata: Any) -> dict[str, Any]:
        return {split: Rows(documents.rows[:limit])}

    return make


class Rows(list[Document]):
    """What the harness uses of a datasets.Dataset, whose conversions of every row at every reading take longer than a GPU does.

    `map` remembers what a function made: the harness prepares HellaSwag's documents five times a run. A function is known by
    its code, for the harness defines it anew each time.
    """

    def __init__(self, rows: Iterable[Document]) -> None:
        super().__init__(rows)
        self._mapped: dict[Any, Rows] = {}

    @property
    def features(self) -> Document:
        return self[0] if self else {}

    def map(self, function: Callable[[Document], Document]) -> "Rows":
        if function.__code__ not in self._mapped:
            self._mapped[function.__code__] = Rows({**row, **function(row)} for row in self)
        return self._mapped[function.__code__]


def _wanted_rows(folder: Path, source: Source) -> int:
    path = folder / INDEX
    if not path.exists():
        return source.rows
    try:
        return int(json.loads(path.read_text(encoding="utf-8")).get(source.file, source.rows))
    except (ValueError, TypeError, AttributeError):
        raise DataError(f"{path}: expected a JSON object of file names and their numbers of rows") from None


def _parse(path: Path, number: int, line: bytes) -> Document:
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError(f"{path}:{number}: not JSON: {line[-40:]!r}; the file may be cut short") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: a {type(row).__name__}; expected a JSON object")
    return row


def _check(path: Path, number: int, row: Document, columns: Mapping[str, type]) -> None:
    for name, kind in columns.items():
        value = row.get(name)
        if not isinstance(value, kind):
            got = "missing" if name not in row else f"{type(value).__name__} {value!r:.40}"
            raise DataError(f"{path}:{number}: column {name!r} is {got}; expected {kind.__name__}")
