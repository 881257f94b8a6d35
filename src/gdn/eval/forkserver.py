"""The process that evaluation's workers are forked from: it imports the harness once, before they are wanted.

The standard library alone, so that it can begin while its parent imports.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext

_PRELOADED = ["gdn.evaluate", "nltk", "wonderwords"]  # what is not there is passed over: those two are RULER's


def begin() -> BaseContext:
    """The context of workers. On Linux the process they are forked from begins now, if it is not there, and lasts as long as
    this one: no fork of this process, whose CUDA they could not use. Elsewhere they are spawned, and import for themselves."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    resource_tracker.ensure_running()  # else the server begins it, and it unblocks signals
    with without_interrupts(), _one_thread():
        forkserver.ensure_running()
    return context


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which a terminal sends to all: it is this one's to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Libraries that are imported by a process started within begin no threads, which a fork would not copy."""
    name = "OMP_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
