"""Sources of text to a published folder of token shards: tasks run by datatrove, then one assembly of what they made.

Everything unfinished lies in OUT.work: the plan, and a folder for each task that is done, published by rename. So a call that
was killed anywhere goes on from there, and ends in the same bytes; `assemble` decides what of the tasks is taken.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

import gdn
from gdn.data.assemble import Totals, assemble, missing_tasks, read_task, select, task_folder, task_tokens
from gdn.data.documents import is_held_out, text_digest
from gdn.data.encoding import Engine
from gdn.data.executors import run_tasks
from gdn.data.readers import find_text_column, read_piece
from gdn.data.shards import (
    DTYPES,
    FORMAT_VERSION,
    HELDOUT,
    MANIFEST,
    TOKENIZER,
    TRAIN,
    Manifest,
    SourceRecord,
    dtype_for,
    read_manifest,
    write_manifest,
)
from gdn.data.sources import TASK_BYTES, Piece, Source, Stream, find_files, group, write_streams
from gdn.data.tokenizer import Tokenizer
from gdn.errors import DataError
from gdn.files import lock_folder, publish_folder, remove_partials, write_text

log = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]  # tasks done, tasks in all, tokens so far
_HOLDOUT = 0.01


@dataclass(frozen=True)
class Options:
    """What decides the shards, and, from `skip_bad` on, how they are made."""

    text_column: str | None = None  # None: found, see `find_text_column`
    holdout: float | None = None  # share of the documents, by their hash; None: 0.01, or 0 where a source has its own split
    max_tokens: int | None = None  # of the train split
    deduplicate: bool = False  # leave out exact copies of an earlier text
    bos: bool = True  # before each document: the published policy
    eos: bool = False  # after each document
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    task_bytes: int = TASK_BYTES  # of files, that are one task and one shard
    record: Mapping[str, Any] = field(default_factory=dict)  # what else the manifest shall say
    skip_bad: bool = False
    engine: Engine = "tokenizers"  # what makes the same ids
    executor: Literal["local", "slurm", "ray"] = "local"
    workers: int = 1
    executor_options: Mapping[str, str] = field(default_factory=dict)  # of datatrove's executor


_DECIDING = ("text_column", "holdout", "max_tokens", "deduplicate", "bos", "eos", "dtype", "task_bytes", "record")


def prepare(
    sources: Sequence[Source], tokenizer: Tokenizer, out: Path, options: Options, progress: Progress | None = None
) -> Manifest:
    """Tokenise `sources` into the new folder `out`, which appears complete or not at all; called again, it goes on.

    Raises DataError for sources, rows, options or an `out` that do not serve, RunError while another process is at it.
    """
    _check(sources, options)
    dtype = _token_type(tokenizer, options)
    decided = {key: getattr(options, key) for key in _DECIDING} | {"record": dict(options.record)}
    decided |= {"sources": [dataclasses.asdict(source) for source in sources], "tokenizer": tokenizer.sha256}
    work = out.with_name(out.name + ".work")
    try:
        if out.exists():
            return _finished(out, work, decided)
        with lock_folder(work):
            try:
                return _run(sources, tokenizer, out, work, options, decided, dtype, progress)
            finally:
                if out.exists() or not any((work / "tasks").glob("*")):
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None


def training_texts(sources: Sequence[Source], options: Options, max_bytes: int = 256 << 20) -> Iterator[str]:
    """Texts to train a tokenizer on: about `max_bytes` of each source, from its first file on, none that is held out."""
    _check(sources, options)
    for source in sources:
        found = find_files(source.spec).files
        own = any(file.split == HELDOUT for file in found)
        share = options.holdout if options.holdout is not None else (0.0 if own else _HOLDOUT)
        column, left = options.text_column or find_text_column(found), max_bytes
        for item in (item for file in found if file.split != HELDOUT for item in read_piece(file, column)):
            if left <= 0:
                break
            if isinstance(item, DataError):
                if not options.skip_bad:
                    raise item
            elif not is_held_out(text_digest(item.text), share):
                left -= len(item.text)
                yield item.text


def _run(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    out: Path,
    work: Path,
    options: Options,
    decided: dict[str, Any],
    dtype: str,
    progress: Progress | None,
) -> Manifest:
    (work / "tasks").mkdir(exist_ok=True)
    remove_partials(work / "tasks")
    for path in out.parent.glob(f"{out.name}.partial-*"):
        shutil.rmtree(path, ignore_errors=True)
    plan = _plan(sources, options, work, decided)
    streams, columns = [Stream(**row) for row in plan["streams"]], plan["text_columns"]
    write_streams(work / "streams.json", streams)
    tokenizer.save(work / TOKENIZER)
    targets = [stream.limit for stream in streams]
    while True:
        with _watched(streams, work, progress):
            run_tasks(work, streams, targets, columns, DTYPES[dtype], plan["holdout_share"], options)
        kept, lacking = select(streams, work, options.deduplicate)
        short = [i for i, left in lacking.items() if left and missing_tasks(streams[i], work, None)]
        if not short:
            break
        # Copies were left out: what is lacking is looked for in the tasks after those.
        targets = [_raised(streams[i], work, lacking[i]) if i in short else target for i, target in enumerate(targets)]
    with publish_folder(out) as folder:
        splits, totals = assemble(kept, folder, DTYPES[dtype])
        if TRAIN not in splits:
            shutil.rmtree(work / "tasks")  # there is nothing in them to go on with
            raise DataError(f"{', '.join(source.spec for source in sources)}: empty: no text to train on{_why(totals)}")
        if totals.bad and not options.skip_bad:  # an earlier call skipped it
            raise DataError(totals.first_bad)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            bos_policy="before_each_document" if options.bos else "none",
            bos_id=tokenizer.bos_id if options.bos else None,
            eos_policy="after_each_document" if options.eos else "none",
            eos_id=tokenizer.eos_id if options.eos else None,
            splits=splits,
            source_tokens={split: dict(sorted(totals.source_tokens[split].items())) for split in splits},
            duplicates=totals.duplicates,
            skipped=totals.bad,
            skipped_share=totals.bad / max(totals.bad + totals.documents, 1),
            options=decided | {key: plan[key] for key in ("text_columns", "own_splits", "holdout_share")} | _left_out(totals),
            sources=tuple(
                SourceRecord(source.name or source.spec, revision, source.weight)
                for source, revision in zip(sources, plan["revisions"])
            ),
            versions=_versions(options.engine),
        )
        tokenizer.save(folder / TOKENIZER)
        write_manifest(manifest, folder)
    return manifest


def _why(totals: Totals) -> str:
    bad = f"; {totals.bad} bad files or rows skipped, the first: {totals.first_bad}" if totals.bad else ""
    return bad + (f"; {totals.blank} without text, the first: {totals.first_blank}" if totals.blank else "")


def _left_out(totals: Totals) -> dict[str, Any]:
    return {"first_skipped": totals.first_bad, "blank": totals.blank, "first_blank": totals.first_blank}


def _check(sources: Sequence[Source], options: Options) -> None:
    weights = [source.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if not sources or len(given) not in (0, len(weights)) or not all(0 < weight < float("inf") for weight in given):
        raise DataError(f"{len(sources)} sources with weights {given}; expected none, or one above 0 for each source")
    if options.max_tokens is not None and len(sources) > 1 and not given:
        raise DataError(f"max_tokens of {len(sources)} sources; expected weights, which say how many from each")
    if options.holdout is not None and not 0 <= options.holdout < 1:
        raise DataError(f"holdout = {options.holdout}; expected a share of at least 0 and less than 1")
    for name in ("max_tokens", "task_bytes", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DataError(f"{name} = {value}; expected at least 1")


def _token_type(tokenizer: Tokenizer, options: Options) -> str:
    """Its name; DataError where the tokenizer lacks what the options ask for."""
    for wanted, special, key in ((options.bos, tokenizer.bos_id, "bos"), (options.eos, tokenizer.eos_id, "eos")):
        if wanted and special is None:
            raise DataError(
                f"the tokenizer has no {key.upper()}; name {key}_token in its tokenizer_config.json, or prepare without"
            )
    dtype = dtype_for(tokenizer.vocab_size) if options.dtype == "auto" else options.dtype
    if tokenizer.vocab_size > np.iinfo(DTYPES[dtype]).max + 1:
        raise DataError(f"the tokenizer's vocabulary of {tokenizer.vocab_size} does not fit {dtype}; expected uint32")
    return dtype


def _plan(sources: Sequence[Source], options: Options, work: Path, decided: dict[str, Any]) -> dict[str, Any]:
    """The tasks, as first planned: a Hub dataset stays at its commit, and files must still be those."""
    path = work / "plan.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if before is not None:
        _same_options(work, before["decided"], decided)
    revisions, streams, columns, first = [], [], [], 0
    layouts = []
    for i, source in enumerate(sources):
        found = find_files(source.spec, revision=before["revisions"][i] if before is not None else "")
        revisions.append(found.revision)
        columns.append(options.text_column or find_text_column(found.files))
        layouts.append({split: [file for file in found.files if file.split == split] for split in (None, TRAIN, HELDOUT)})
    own = any(layout[HELDOUT] for layout in layouts)
    holdout = options.holdout if options.holdout is not None else (0.0 if own else _HOLDOUT)
    whole = sum(source.weight or 1.0 for source in sources)
    # Held-out streams last: of a text in both, it is their copy that is left out.
    for split in (None, TRAIN, HELDOUT):
        for i, source in enumerate(sources):
            if files := layouts[i][split]:
                limit = options.max_tokens
                if limit is not None:
                    limit = max(round(limit * (source.weight or 1.0) / whole), 1)
                    limit = limit if split != HELDOUT else max(round(limit * (holdout or _HOLDOUT)), 1)
                tasks = group(files, options.task_bytes)
                streams.append(Stream(i, split, limit, first, tasks))
                first += len(tasks)
    plan = {
        "decided": decided,
        "revisions": revisions,
        "text_columns": columns,
        "own_splits": [not layout[None] for layout in layouts],
        "holdout_share": holdout,
        "streams": [stream.__dict__ for stream in streams],
    }
    text = json.dumps(plan)
    if before is not None:
        if _without_versions(json.loads(text)) != _without_versions(before):
            raise DataError(f"{work}: the files of the source have changed since this preparation began; delete that folder")
        _forget_changed(work, before["streams"], json.loads(text)["streams"])
    write_text(path, text)
    return plan


def _without_versions(plan: dict[str, Any]) -> dict[str, Any]:
    fields = Piece._fields.index("version")
    streams = [
        stream | {"tasks": [[piece[:fields] for piece in task] for task in stream["tasks"]]} for stream in plan["streams"]
    ]
    return plan | {"streams": streams}


def _forget_changed(work: Path, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """Remove what was made of files that have been written to since: those tasks are done again."""
    for old, new in zip(before, now):
        for i, (then, task) in enumerate(zip(old["tasks"], new["tasks"])):
            if then != task:
                shutil.rmtree(task_folder(work, new["first_task"] + i), ignore_errors=True)


def _same_options(where: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    ours = json.loads(json.dumps(ours))
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise DataError(
                f"{where} is of other options: {key} = {theirs.get(key)!r} there, {ours[key]!r} now; "
                "choose another --out or delete it"
            )


def _finished(out: Path, work: Path, decided: dict[str, Any]) -> Manifest:
    """What an earlier call left complete."""
    if not (out / MANIFEST).exists():
        raise DataError(f"{out}: exists already; expected a new folder")
    manifest = read_manifest(out)
    _same_options(out, manifest.options, decided)
    shutil.rmtree(work, ignore_errors=True)
    log.info("%s is complete already", out)
    return manifest


def _raised(stream: Stream, work: Path, lacking: int) -> int:
    """A target beyond what the tasks done from the first on hold, by what is lacking and some."""
    tokens = 0
    for task in range(stream.first_task, stream.first_task + len(stream.tasks)):
        summary = read_task(task_folder(work, task))
        if summary is None:
            break
        tokens += task_tokens(summary, stream.counted)
    return tokens + lacking + lacking // 8


@contextmanager
def _watched(streams: Sequence[Stream], work: Path, progress: Progress | None) -> Iterator[None]:
    """Call `progress` every second of the block, from a thread."""
    if progress is None:
        yield
        return
    done = threading.Event()
    total = sum(len(stream.tasks) for stream in streams)
    seen: dict[str, int] = {}

    def watch() -> None:
        while not done.wait(1.0):
            for name in os.listdir(work / "tasks"):
                if name not in seen and (summary := read_task(work / "tasks" / name)) is not None:
                    seen[name] = sum(split["tokens"] for split in summary["splits"].values())
            progress(len(seen), total, sum(seen.values()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _versions(engine: Engine) -> dict[str, str]:
    names = ["datatrove", *(["gigatoken"] if engine == "gigatoken" else [])]
    own = {"gdn": gdn.__version__, "tokenizers": tokenizers.__version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in names}
