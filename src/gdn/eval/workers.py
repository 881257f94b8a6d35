"""Tasks spread over worker processes that have no model: they ask this process, which alone has it and the device, to score.

Most of a table's time is one core's work in Python, the harness's; so it overlaps with the device's work and with itself, and
nothing shares the device. Nothing here knows what a task is but its name and about how long it takes.
"""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gdn.errors import ConfigError, GDNError, RunError
from gdn.eval import forkserver
from gdn.eval.requests import Likelihood, Request
from gdn.eval.scoring import without_collector
from gdn.model.config import ModelConfig
from gdn.ops.cpu import usable_cores

if TYPE_CHECKING:
    from gdn.eval.harness import Work

Measure = Callable[["Work"], dict[str, Any]]
Opener = Callable[[], Any]  # the model: for more than one process a Scorer, or what has its methods and counts
Progress = Callable[[int, int], None]  # requests done, of how many
# What measures tasks with the model, or with a RemoteScorer. It goes to worker processes: a function of a module, or a partial.
Prepare = Callable[[Any, Progress | None], Measure]
Results = Generator[tuple["Work", dict[str, Any]], None, None]
Show = Callable[[str, int, int], None]  # a task's name, requests done, of how many; 0 of 0: it has begun

# Seconds on an H200, 2026-11-29 (docs/log.md), for their order: the longest begins first, so that none is alone at the end.
_SECONDS = {"hellaswag": 18.6, "arc_easy": 4.2, "lambada_openai": 3.2, "boolq": 2.5, "wikitext": 2.4, "piqa": 2.3}
_SECONDS |= {"arc_challenge": 2.3, "sciq": 1.9, "winogrande": 0.8, "copa": 0.3}
_RULER_SECONDS = 6.3 / 2048  # a token of its prompts' length
_UNKNOWN_SECONDS = 10.0
_MOST = 8  # what was measured (docs/log.md): the longest task takes a quarter of the table's time


def choose_workers(asked: int | None, tasks: int, device: torch.device, ours: bool) -> int:
    """How many processes measure so many tasks; asked: None to choose. ours: the model is a `Scorer`'s.

    Chosen is one on CPUs, where the model has work for all cores; on CUDA one for each four cores, at most eight. Always one
    under torchrun, whose processes share out the requests of each task instead, and for models of other architectures.
    """
    if asked is not None and asked < 1:
        raise ConfigError(f"--workers = {asked}; expected at least 1")
    torchrun = torch.distributed.is_available() and torch.distributed.is_initialized()
    if torchrun or not ours:
        if asked is not None and asked > 1:
            why = (
                "under torchrun, whose processes share each task; expected 1, or no torchrun"
                if torchrun
                else "for a model of another architecture, which answers no other process; expected 1"
            )
            raise ConfigError(f"--workers = {asked} {why}")
        return 1
    if asked is None:
        asked = min(_MOST, usable_cores(physical=False) // 4) if device.type == "cuda" else 1
    return max(1, min(asked, tasks))


def measure(
    works: Sequence["Work"], workers: int, opener: Opener, prepare: Prepare, show: Show, config: ModelConfig | None = None
) -> Results:
    """Each task with what was measured, as they are done: one after another here, or the longest first in `workers` processes.

    The model is opened here. config: its own, for workers, which begin before it is there.
    Close the iterator: with it the processes end. An error is that of the first task, in the order given, that has one; it is
    raised when the tasks before that are done, so that what is kept is at least what one process would have kept. RunError
    names the task of a worker that died.
    """
    if not works:
        return
    if workers > 1:
        yield from _spread(works, workers, opener, prepare, show, config)
        return
    work = works[0]
    run = prepare(opener(), lambda done, total: show(work.name, done, total))
    for work in works:
        show(work.name, 0, 0)
        yield work, run(work)


class RemoteScorer:
    """In a worker: a Scorer at the other end of the pipe, whose errors are raised and whose tokens are counted as if here."""

    def __init__(self, connection: Connection, config: Any) -> None:
        self.config: ModelConfig = config
        self.tokens_computed = self.tokens_asked = 0
        self._connection = connection

    def likelihoods(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Likelihood]:
        """As a Scorer's; progress is shown where the model is."""
        found: list[Likelihood] = self._ask("likelihoods", requests)
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_ids: Collection[int],
        stop: Callable[[list[int]], bool] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """As a Scorer's; `stop` goes to the model's process and so must be picklable."""
        found: list[list[int]] = self._ask("generate", prompts, max_new_tokens, eos_ids, stop)
        return found

    def _ask(self, *asked: Any) -> Any:
        self._connection.send(("ask", asked))
        found, content = self._connection.recv()
        if isinstance(content, Exception):
            raise content
        self.tokens_computed += content[0]
        self.tokens_asked += content[1]
        return found


def _spread(
    works: Sequence["Work"], workers: int, opener: Opener, prepare: Prepare, show: Show, config: ModelConfig | None
) -> Results:
    team = _Team(works, show)
    try:
        started = team.start(forkserver.begin(), workers, prepare, config)
        scorer = opener()  # while workers begin, read documents and make requests
        started.result()
        while team.busy():
            team.take(0 if team.asks else None)
            if team.asks:
                team.answer(scorer)
            while team.results:
                yield team.results.popleft()
        if team.error is not None:
            raise team.error
    finally:
        team.end()


class _Team:
    """Worker processes, the task of each, and what came of them so far."""

    def __init__(self, works: Sequence["Work"], show: Show) -> None:
        self.works, self.show = works, show
        self.waiting = sorted(range(len(works)), key=lambda number: -_seconds(works[number]))  # the next is the first
        self.processes: dict[Connection, BaseProcess] = {}
        self.running: dict[Connection, int] = {}
        self.asks: dict[Connection, tuple[Any, ...]] = {}  # one of a worker, which waits for its answer
        self.results: deque[tuple[Work, dict[str, Any]]] = deque()
        self.failed = len(works)  # the first that has; what comes behind it is not wanted any more
        self.error: Exception | None = None
        self.ended = False

    def start(self, context: Any, workers: int, prepare: Prepare, config: ModelConfig | None) -> Future[None]:
        """Begin processes, of multiprocessing's `context`, and give them tasks: a thread waits for what they are copies of."""
        level, settings, started = logging.getLogger("lm_eval").level, _Settings.of(workers), Future[None]()

        def start() -> None:
            try:
                with forkserver.without_interrupts():
                    for _ in range(workers):
                        ours, theirs = context.Pipe()
                        process = context.Process(target=_work, args=(theirs, prepare, config, level, settings))
                        process.start()
                        self.processes[ours] = process
                        theirs.close()  # so that its end is seen here when the process has gone
                        if self.ended:
                            process.kill()
                            return
                for connection in self.processes:
                    self._give(connection)
                started.set_result(None)
            except EOFError:
                started.set_exception(RunError("the process that workers are copies of has died; --workers 1 needs none"))
            except BaseException as error:
                started.set_exception(error)

        threading.Thread(target=start, daemon=True).start()
        return started

    def busy(self) -> bool:
        return any(number < self.failed for number in self.running.values())

    def take(self, timeout: float | None) -> None:
        """Take in the messages that are there, None: as soon as there is one; who has ended a task gets the next at once."""
        ready = wait(list(self.running), timeout)
        for connection in [connection for connection in self.processes if connection in ready]:
            number = self.running[connection]
            try:
                with without_collector():
                    kind, content = connection.recv()
            except (EOFError, OSError):
                kind, content = "death", _death(self.works[number].name, self.processes[connection])
            if kind == "ask":
                self.asks[connection] = content
                continue
            del self.running[connection]
            self.asks.pop(connection, None)  # of one that died
            if kind == "result":
                self.results.append((self.works[number], content))
            elif number < self.failed:
                self.failed, self.error = number, content
                self.waiting = [other for other in self.waiting if other < self.failed]
            if kind in ("result", "error"):
                self._give(connection)

    def answer(self, scorer: Any) -> None:
        """The ask of the longest task, of which most is left to do behind it; between its batches messages are taken in."""
        connection = max(self.asks, key=lambda connection: _seconds(self.works[self.running[connection]]))
        method, *arguments = self.asks.pop(connection)
        number, total = self.running[connection], len(arguments[0])
        computed, asked = scorer.tokens_computed, scorer.tokens_asked

        def progress(done: int) -> None:
            self.show(self.works[number].name, done, total)
            self.take(0)

        answer: tuple[Any, Any]
        try:
            if number > self.failed:
                raise RunError("a task before this one has failed")  # shown to nobody: its worker is free for another
            found = getattr(scorer, method)(*arguments, progress=progress)
            answer = found, (scorer.tokens_computed - computed, scorer.tokens_asked - asked)
        except Exception as error:  # whatever it is: the error of that task, as if the model were there
            answer = None, _portable(error)
        with suppress(OSError):  # a worker that died is noticed where it is waited for
            connection.send(answer)

    def end(self) -> None:
        self.ended = True
        processes = list(self.processes.values())
        for process in processes:  # they hold nothing but memory
            process.kill()
        for process in processes:
            process.join()

    def _give(self, connection: Connection) -> None:
        if self.waiting:
            work = self.works[self.waiting[0]]
            self.running[connection] = self.waiting.pop(0)
            self.show(work.name, 0, 0)
            with suppress(OSError):  # as with answers
                connection.send(work)


class _Settings(NamedTuple):
    """Of each worker: this process's environment but for its GPU, and, unless the user says otherwise, a share of the cores."""

    environment: dict[str, str]
    threads: int

    @classmethod
    def of(cls, workers: int) -> "_Settings":
        share = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": str(max(1, usable_cores(physical=False) // workers))}
        threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1
        return cls(share | dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}, threads)


def _work(connection: Connection, prepare: Prepare, config: ModelConfig | None, level: int, settings: _Settings) -> None:
    """A worker: tasks and answers in; asks, results and errors out, until it is killed or its parent is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which is not so in copies of a process that others began
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.clear()  # of when the process began that this is a copy of
    os.environ.update(settings.environment)
    torch.set_num_threads(settings.threads)
    # Libraries start processes and make locks as elsewhere: named semaphores would be left behind by who is killed.
    multiprocessing.set_start_method(None, force=True)
    logging.getLogger("lm_eval").setLevel(level)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        try:
            run = prepare(RemoteScorer(connection, config), None)
        except Exception as error:  # whatever it is: the command is to end with it, not this process alone
            connection.send(("unprepared", _portable(error)))
            return
        while True:
            work = connection.recv()
            answer: tuple[str, Any]
            try:
                answer = "result", run(work)
            except Exception as error:  # as above
                answer = "error", _portable(error)
            connection.send(answer)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """What a user can mend, in a class that can be sent; a bug with its trace, which an exception loses between processes."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    return error if isinstance(error, GDNError) else RuntimeError(traceback.format_exc())


def _death(name: str, process: BaseProcess) -> RunError:
    process.join(10)
    code = process.exitcode
    how = f"was killed ({signal.Signals(-code).name})" if code is not None and code < 0 else f"ended with code {code}"
    return RunError(
        f"{name}: the worker process that measured it {how}; what is finished is kept, and fewer --workers take less memory"
    )


def _seconds(work: "Work") -> float:
    return _RULER_SECONDS * work.length if work.length else _SECONDS.get(work.task, _UNKNOWN_SECONDS)
