"""What datatrove runs: the step that writes a task's documents as tokens, and its executors for this machine, Slurm and Ray."""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import multiprocess
import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger as datatrove_logger

from gdn.data.assemble import ROWS, TASK, missing_tasks, read_task, task_folder, task_tokens
from gdn.data.documents import is_blank, is_held_out, text_digest
from gdn.data.encoding import Encoder, Engine, make_encoder
from gdn.data.readers import PieceReader, where
from gdn.data.shards import HELDOUT, TOKENIZER, TRAIN
from gdn.data.sources import Stream
from gdn.data.tokenizer import load_tokenizer
from gdn.errors import DataError, RunError
from gdn.files import publish_folder

if TYPE_CHECKING:
    from gdn.data.prepare import Options

_BATCH_DOCUMENTS = 1000
_BATCH_CHARACTERS = 1 << 20


def run_tasks(
    work: Path,
    streams: Sequence[Stream],
    targets: Sequence[int | None],
    text_columns: list[str],
    dtype: "np.dtype[Any]",
    holdout: float,
    options: "Options",
) -> None:
    """Do the tasks that are missing until each stream has its target of tokens; DataError for what a task fails with."""
    tasks = [task for stream, target in zip(streams, targets) for task in missing_tasks(stream, work, target)]
    if not tasks:
        return
    work = work.resolve()
    reader = PieceReader(work / "streams.json", tasks, text_columns, options.skip_bad)
    ends = {stream.first_task: (stream.counted, target) for stream, target in zip(streams, targets)}
    workers = min(options.workers, len(tasks))
    writer = TokenWriter(work, tasks, ends, dtype.str, holdout, options, workers)
    logs = work / "logs" / uuid.uuid4().hex[:8]  # of this run alone: what is done is known by the tasks' folders
    failures = work / "failures"
    for path in failures.glob("*"):
        path.unlink()
    try:
        _execute([reader, writer], len(tasks), workers, logs, options)
    finally:
        reasons = [path.read_text(encoding="utf-8") for path in sorted(failures.glob("*"))]
    left = [task for stream, target in zip(streams, targets) for task in missing_tasks(stream, work, target)]
    if left:
        raise DataError(reasons[0] if reasons else f"{len(left)} tasks were not done; their messages are in {logs}")


def _execute(pipeline: list[PipelineStep], tasks: int, workers: int, logs: Path, options: "Options") -> None:
    datatrove_logger.disable("datatrove")
    kind = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}[options.executor]
    given = _of_the_executor(kind, options)
    given |= {"pipeline": pipeline, "tasks": tasks, "workers": workers, "logging_dir": str(logs)}
    if options.executor == "slurm":
        for key in ("time", "partition"):
            if key not in given:
                raise DataError(f"--executor slurm: no {key}; expected --executor-option {key}=...")
        # --wait: the call ends when the jobs have, so that what they made is assembled by it.
        given |= {"sbatch_args": {"wait": ""}}
        given = {"job_name": "gdn-prepare", "mail_type": "NONE", "venv_path": f"{sys.prefix}/bin/activate"} | given
        executor = kind(**given)
        try:
            executor.run()
        except FileNotFoundError as error:
            raise DataError(f"--executor slurm: {error.filename}: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            if not any(logs.parent.parent.joinpath("failures").glob("*")):  # else a job has said why
                raise DataError(f"--executor slurm: {error}") from None
    elif options.executor == "ray":
        try:
            import ray
        except ImportError:
            raise DataError("--executor ray: Ray is not installed: pip install ray") from None
        executor = kind(**given)
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        executor.run()
    else:
        executor = kind(**given)
        # Said before datatrove forks: else tokenizers prints a warning, as it cannot know that the fork encodes nothing.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        with _forks_die_with_us():
            executor.run()


_OURS = ("pipeline", "tasks", "workers", "logging_dir", "skip_completed", "local_tasks", "local_rank_offset", "start_method")
_PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": ("false", "true").index, "str": str}


def _of_the_executor(kind: type[PipelineExecutor], options: "Options") -> dict[str, Any]:
    """The user's options as values of what datatrove's executor takes; DataError for one that it does not."""
    parsers = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        hint = getattr(parameter.annotation, "__name__", str(parameter.annotation)).removesuffix(" | None")
        if name not in _OURS and hint in _PARSERS:
            parsers[name] = hint
    given = {}
    for name, text in options.executor_options.items():
        if name not in parsers:
            known = ", ".join(parsers)
            raise DataError(f"--executor-option {name}: not one of --executor {options.executor}; expected one of {known}")
        try:
            given[name] = _PARSERS[parsers[name]](text)
        except ValueError:
            wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[parsers[name]]
            raise DataError(f"--executor-option {name}={text}: expected {wanted}") from None
    return given


class TokenWriter(PipelineStep):
    """datatrove's last step: a task's documents to its folder of tokens, published by rename when it is complete."""

    name = "token writer"
    type = "tokens"

    def __init__(
        self,
        work: Path,
        tasks: list[int],
        targets: dict[int, tuple[str, int | None]],
        dtype: str,
        holdout: float,
        options: "Options",
        workers: int,
    ) -> None:
        """`targets` are the tokens wanted of each stream, and of which split, by its first task."""
        super().__init__()
        self._work = work
        self._tasks = tasks
        self._targets = targets
        self._dtype = dtype
        self._holdout = holdout
        self._options = options
        self._workers = workers

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the task of this rank, unless its stream has enough tokens without it."""
        _live_and_die_as_a_worker(self._workers)
        task = self._tasks[rank]
        first = max(number for number in self._targets if number <= task)
        if _has_enough(self._work, first, task, *self._targets[first]):
            return
        target = task_folder(self._work, task)
        try:
            with publish_folder(target) as folder:
                self._write(data, folder)
        except (DataError, RunError, OSError) as error:
            if target.exists():  # a worker that outlived its run has done it meanwhile
                return
            failures = self._work / "failures"
            failures.mkdir(exist_ok=True)
            (failures / f"{task:06d}").write_text(str(error), encoding="utf-8")
            raise

    def _write(self, data: Iterable[Document], folder: Path) -> None:
        options = self._options
        encoder, prefix, suffix = _encoder(self._work / TOKENIZER, self._dtype, options.engine, options.bos, options.eos)
        writers = {split: _SplitWriter(folder, split, np.dtype(self._dtype).itemsize) for split in (TRAIN, HELDOUT)}
        labels: dict[str, int] = {}
        counts = Counts()
        for batch in _batches(data, counts):
            for document, ids in _encode(encoder, batch, counts, options.skip_bad):
                label = labels.setdefault(document.metadata["source"], len(labels))
                digest = text_digest(document.text)
                split = document.metadata["piece"].split or (HELDOUT if is_held_out(digest, self._holdout) else TRAIN)
                writers[split].add(prefix + ids + suffix, len(document.text.encode("utf-8")), label, digest)
        splits = {split: writer.close() for split, writer in writers.items() if writer.tokens}
        summary = {"splits": splits, "labels": list(labels)} | dataclasses.asdict(counts)
        (folder / TASK).write_text(json.dumps(summary), encoding="utf-8")


@dataclasses.dataclass
class Counts:
    """What a task has read, beside its tokens."""

    documents: int = 0  # with text
    blank: int = 0
    first_blank: str = ""
    bad: int = 0
    first_bad: str = ""

    def skip(self, reason: str) -> None:
        self.bad += 1
        self.first_bad = self.first_bad or reason


def _batches(data: Iterable[Document], counts: Counts) -> Iterator[list[Document]]:
    """Documents with text, some thousand or some million characters at a time."""
    batch: list[Document] = []
    characters = 0
    for document in data:
        if "bad" in document.metadata:
            counts.skip(document.metadata["bad"])
        elif is_blank(document.text):
            counts.blank += 1
            counts.first_blank = counts.first_blank or where(document.metadata["piece"], document.metadata["row"])
        else:
            counts.documents += 1
            batch.append(document)
            characters += len(document.text)
            if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    yield batch


def _encode(encoder: Encoder, batch: list[Document], counts: Counts, skip_bad: bool) -> Iterable[tuple[Document, bytes]]:
    try:
        return list(zip(batch, encoder.encode([document.text for document in batch])))
    except DataError as error:
        if len(batch) > 1:  # one of them cannot be tokenised: which?
            return [pair for document in batch for pair in _encode(encoder, [document], counts, skip_bad)]
        reason = f"{where(batch[0].metadata['piece'], batch[0].metadata['row'])}: {error}"
        if not skip_bad:
            raise DataError(reason) from None
        counts.documents -= 1
        counts.skip(reason)
        return []


_ROWS_AT_ONCE = 1 << 16  # documents whose rows are held: in Python 320 bytes each, and a task may have millions


class _SplitWriter:
    """Appends documents to a task's file of one split."""

    def __init__(self, folder: Path, split: str, itemsize: int) -> None:
        self.tokens = 0
        self._path = folder / f"{split}.bin"
        self._itemsize = itemsize
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int, tuple[int, int]]] = []  # not yet written
        self._documents = 0
        self._stream: BinaryIO | None = None

    def add(self, ids: bytes, num_bytes: int, label: int, digest: bytes) -> None:
        if not ids:  # two documents may not begin at the same token
            return
        self._stream = self._stream or self._path.open("wb")
        self._stream.write(ids)
        self._digest.update(ids)
        halves = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        self._rows.append((self.tokens, num_bytes, label, halves))
        self.tokens += len(ids) // self._itemsize
        if len(self._rows) == _ROWS_AT_ONCE:
            self._write_rows()

    def _write_rows(self) -> None:
        with self._path.with_suffix(".rows").open("ab") as stream:
            stream.write(np.array(self._rows, dtype=ROWS).tobytes())
        self._documents += len(self._rows)
        self._rows.clear()

    def close(self) -> dict[str, Any]:
        assert self._stream is not None
        self._stream.close()
        self._write_rows()
        return {"tokens": self.tokens, "documents": self._documents, "sha256": self._digest.hexdigest()}


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path, dtype: str, engine: Engine, bos: bool, eos: bool) -> tuple[Encoder, bytes, bytes]:
    """One a process: its cache of words serves task after task."""
    tokenizer = load_tokenizer(folder)
    before = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if eos and tokenizer.eos_id is not None else []
    kind = np.dtype(dtype)
    return make_encoder(engine, tokenizer, kind), np.array(before, kind).tobytes(), np.array(after, kind).tobytes()


def _has_enough(work: Path, first: int, task: int, split: str, target: int | None) -> bool:
    """Whether the tasks from `first` on that are done, none missing before `task`, hold `target` tokens of `split`."""
    if target is None:
        return False
    tokens = 0
    for number in range(first, task):
        summary = read_task(task_folder(work, number))
        if summary is None:
            return False
        tokens += task_tokens(summary, split)
        if tokens >= target:
            return True
    return False


@functools.lru_cache(maxsize=1)
def _live_and_die_as_a_worker(workers: int) -> None:
    """In a process of the pool: the cores are the pool's, Ctrl-C is the parent's to answer, and without it there is no work."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    parent = multiprocess.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def _forks_die_with_us() -> Iterator[None]:
    """datatrove's queue lives in a fork of this process, which would outlive it, and keep its lock and its terminal."""
    _register_watch()
    _watched.set()
    try:
        yield
    finally:
        _watched.clear()


_watched = threading.Event()


@functools.lru_cache(maxsize=1)
def _register_watch() -> None:
    def watch() -> None:
        if _watched.is_set():
            threading.Thread(target=wait, args=(os.getppid(),), daemon=True).start()

    def wait(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    os.register_at_fork(after_in_child=watch)
