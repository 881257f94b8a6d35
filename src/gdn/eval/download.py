"""The folder that `--data` reads, made where there is a network: each task's documents from where the harness has them."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import nltk
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from gdn.errors import DataError
from gdn.eval.harness import task_folder
from gdn.eval.local import INDEX, SOURCES, read_documents
from gdn.files import write_text

ESSAYS = "baber/paul_graham_essays"  # where the harness's RULER has them
_TABLES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")


def download(folder: Path) -> Iterator[str]:
    """Fill `folder` with eval/ and ruler/; yields each file as it is there. What is there already is kept.

    Raises DataError for what cannot be had, or comes in other columns than the harness reads.
    """
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "ruler").mkdir(exist_ok=True)
    index = folder / "eval" / INDEX
    counts: dict[str, int] = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    for task, source in SOURCES.items():
        path = folder / "eval" / source.file
        if not (path.exists() and source.file in counts):
            rows = [_as_file(task, row) for row in _documents(task, source.split)]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            counts[source.file] = len(rows)
            write_text(index, json.dumps(counts, indent=1) + "\n")
        read_documents(task, folder)
        yield f"{path}: {counts[source.file]:,} rows"
    essays = folder / "ruler" / "PaulGrahamEssays.json"
    if not essays.exists():
        text = " ".join(row["text"] for row in _load(ESSAYS, None, "train"))
        write_text(essays, json.dumps({"text": text}, ensure_ascii=False))
    yield str(essays)
    tables = folder / "ruler" / "nltk_punkt_tab_english"
    if not tables.exists():
        _sentence_tables(tables)
    yield str(tables)


def _documents(task: str, split: str) -> Any:
    manager = TaskManager(include_defaults=False, include_path=str(task_folder(task)))
    definition = load_yaml(manager.task_index[task].yaml_path, resolve_func=False)
    return _load(definition["dataset_path"], definition.get("dataset_name"), split)


def _load(path: str, name: str | None, split: str) -> Any:
    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(f"{path}: cannot be downloaded: {str(error).splitlines()[0]}") from None


def _as_file(task: str, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "answer": bool(row["label"])} if task == "boolq" else dict(row)


def _sentence_tables(target: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "tokenizers" / "punkt_tab" / "english"
        if not nltk.download("punkt_tab", download_dir=place, quiet=True) or not found.is_dir():
            raise DataError("nltk's punkt_tab cannot be downloaded")
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in _TABLES:
            shutil.copy(found / name, partial / name)
        partial.rename(target)
