"""Tasks spread over worker processes that share one device: most of a table's time is the host's work in Python, one core's.

Nothing here knows what a task is but its name and about how long it takes; `gdn.evaluate` says how a worker measures one.
"""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import torch

from gdn.errors import ConfigError, GDNError, RunError
from gdn.eval.scoring import STATE_BYTES
from gdn.ops.cpu import usable_cores

if TYPE_CHECKING:
    from gdn.eval.harness import Work

Measure = Callable[["Work"], dict[str, Any]]
# Opens a model and returns what measures a task with it, telling the function it is given how many requests are done of how
# many. It goes to worker processes: a function of a module, or a partial of one.
Opener = Callable[[Callable[[int, int], None]], Measure]
Results = Generator[tuple["Work", dict[str, Any]], None, None]
Show = Callable[[str, int, int], None]  # a task's name, requests done, of how many; 0 of 0: it has begun

# Seconds on an H200 (docs/log.md), for their order: the longest begins first, so that none is left alone at the end.
_SECONDS = {"hellaswag": 18.6, "arc_easy": 4.2, "lambada_openai": 3.2, "boolq": 2.5, "wikitext": 2.4, "piqa": 2.3}
_SECONDS |= {"arc_challenge": 2.3, "sciq": 1.9, "winogrande": 0.8, "copa": 0.3}
_RULER_SECONDS = 6.3 / 2048  # a token of its prompts' length
_UNKNOWN_SECONDS = 10.0
_MOST = 4  # the longest task takes a quarter of the table's time
_CONTEXT_BYTES = 1 << 30  # CUDA's own, of a process


def choose_workers(asked: int | None, tasks: int, device: torch.device, weights: int | None) -> int:
    """How many processes measure so many tasks; asked: None to choose. weights: the model's bytes, None if not ours.

    Chosen is one on CPUs, where a single process has work for all cores; on CUDA one for each four cores, at most four, as
    many as the device's free memory has room for. That is not known of a model of another architecture: one. Under torchrun,
    whose processes share out the requests of each task instead, always one.
    """
    if asked is not None and asked < 1:
        raise ConfigError(f"--workers = {asked}; expected at least 1")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if asked is not None and asked > 1:
            raise ConfigError(
                f"--workers = {asked} under torchrun, whose processes share each task; expected 1, or no torchrun"
            )
        return 1
    if asked is None:
        asked = 1
        if device.type == "cuda" and weights is not None:
            # Of one process's 37 GB at the published size (docs/log.md) 32 are states, twice; the rest, 7 times the weights.
            room = (torch.cuda.mem_get_info(device)[0] - 2 * STATE_BYTES["cuda"]) // (8 * weights + _CONTEXT_BYTES)
            asked = min(_MOST, usable_cores(physical=False) // 4, room)
    return max(1, min(asked, tasks))


def measure(works: Sequence["Work"], workers: int, opener: Opener, show: Show) -> Results:
    """Each task with what was measured, as they are done: one after another here, or the longest first in `workers` processes.

    Close the iterator: with it the processes end. An error is that of the first task, in the order given, that has one; it is
    raised when the tasks before that are done, so that what is kept is at least what one process would have kept. RunError
    names the task of a worker that died.
    """
    if not works:
        return
    if workers > 1:
        yield from _spread(works, workers, opener, show)
        return
    work = works[0]
    run = opener(lambda done, total: show(work.name, done, total))
    for work in works:
        show(work.name, 0, 0)
        yield work, run(work)


def _spread(works: Sequence["Work"], workers: int, opener: Opener, show: Show) -> Results:
    waiting = sorted(range(len(works)), key=lambda number: -_seconds(works[number]))  # the next is the first
    failed, error = len(works), None
    team: dict[Connection, BaseProcess] = {}
    running: dict[Connection, int] = {}

    def give(connection: Connection) -> None:
        if waiting:
            work = works[waiting[0]]
            running[connection] = waiting.pop(0)
            show(work.name, 0, 0)
            with suppress(BrokenPipeError):  # a worker that died at its start is noticed where it is waited for
                connection.send(work)

    try:
        _start(team, workers, opener)
        for connection in team:
            give(connection)
        while any(number < failed for number in running.values()):
            ready = wait(list(running))
            for connection in [connection for connection in team if connection in ready]:
                number = running[connection]
                work = works[number]
                try:
                    kind, content = connection.recv()
                except (EOFError, OSError):
                    kind, content = "death", _death(work.name, team[connection])
                if kind == "progress":
                    show(work.name, *content)
                    continue
                if kind == "no model":
                    raise content
                del running[connection]
                if kind != "result" and number < failed:
                    failed, error = number, content
                    waiting[:] = [other for other in waiting if other < failed]
                if kind != "death":
                    give(connection)
                if kind == "result":
                    yield work, content
        if error is not None:
            raise error
    finally:
        for process in team.values():  # they hold nothing but memory
            process.kill()
        for process in team.values():
            process.join()


def _start(team: dict[Connection, BaseProcess], workers: int, opener: Opener) -> None:
    context = multiprocessing.get_context("spawn")  # a fork could not use CUDA
    level = logging.getLogger("lm_eval").level
    resource_tracker.ensure_running()  # else the first start begins it, and it unblocks signals
    with _cores_shared_out(workers), _without_interrupts():
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, opener, level))
            process.start()
            team[ours] = process
            theirs.close()  # so that its end is seen here when the process has gone


@contextmanager
def _cores_shared_out(workers: int) -> Iterator[None]:
    """For processes started within: libraries ask the environment for their threads when they are loaded."""
    threads = {"OMP_NUM_THREADS": torch.get_num_threads(), "RAYON_NUM_THREADS": usable_cores(physical=False)}
    added = {name: str(max(1, count // workers)) for name, count in threads.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which a terminal sends to all: it is this one's to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, opener: Opener, level: int) -> None:
    """A worker: tasks in; progress, results and errors out, until it is killed or its parent is gone."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Libraries start processes and make locks as elsewhere: named semaphores, spawn's, would be left behind by who is killed.
    multiprocessing.set_start_method(None, force=True)
    logging.getLogger("lm_eval").setLevel(level)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        try:
            run = opener(lambda done, total: connection.send(("progress", (done, total))))
        except Exception as error:  # whatever it is: the command is to end with it, not this process alone
            connection.send(("no model", _portable(error)))
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
