"""The process that evaluation's workers are copies of: it imports the harness once, before they are wanted.

The standard library alone, so that it can begin before its parent has imported the harness.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext


def begin() -> BaseContext:
    """The context of workers. On Linux the process they are forked from begins now, if it is not there, and lasts as long as
    this one: no fork of this process, whose CUDA they could not use. Elsewhere they are spawned, and import for themselves.

    It is multiprocessing's own: a program's other processes of that kind are its copies too, and if there is one already, with
    other modules, workers are copies of that.
    """
    resource_tracker.ensure_running()  # else the first start begins it, and it unblocks signals
    if sys.platform == "linux":
        from multiprocessing import forkserver

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gdn.eval.preload"])
        # Modules are those of this process, whatever lies in the current folder; and no library's threads, which no copy has.
        path = os.pathsep.join(part for part in sys.path if part)
        began = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        try:
            with without_interrupts(), _environment(began):
                forkserver.ensure_running()
            return context
        except OSError:  # a folder for temporary files whose name is too long for a socket
            pass
    return multiprocessing.get_context("spawn")


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which a terminal sends to all: it is this one's to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    """For a process started within."""
    before = {name: os.environ[name] for name in changed if name in os.environ}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            del os.environ[name]
        os.environ.update(before)
