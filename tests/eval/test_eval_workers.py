"""Tasks in worker processes: order, errors, deaths, and whom they outlive. What is measured is made up: no model, no tasks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gdn.errors import CheckpointError, ConfigError, DataError, RunError
from gdn.eval import workers


class FakeWork(NamedTuple):
    name: str
    task: str
    length: int | None = None


def opener(progress: Callable[[int, int], None]) -> Callable[[FakeWork], dict[str, Any]]:
    """Measures by name: "killed" dies, "slow" takes long, "bad" and "bug" raise; else the process and what it was given."""

    def measure(work: FakeWork) -> dict[str, Any]:
        progress(1, 2)
        if work.task == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if work.task == "slow":
            time.sleep(1)
        if work.task == "forever":
            os.write(1, f"{work.name} begins\n".encode())
            time.sleep(600)
        if work.task == "bad":
            raise DataError(f"{work.name}: cut short")
        if work.task == "bug":
            raise ZeroDivisionError
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return {"pid": os.getpid(), "threads": [torch.get_num_threads(), os.environ["RAYON_NUM_THREADS"]], "deaf": blocked}

    return measure


def no_model(progress: Callable[[int, int], None]) -> Callable[[FakeWork], dict[str, Any]]:
    raise CheckpointError("weights: not a model")


def measure(names: str, into: dict[str, Any] | None = None, number: int = 2, open_: Any = opener) -> dict[str, Any]:
    """What comes of these tasks, in the order it came; also in `into`, for those that end in an error."""
    found: dict[str, Any] = {} if into is None else into
    works: Any = [FakeWork(name, name.rstrip("0123456789")) for name in names.split()]
    with closing(workers.measure(works, number, open_, lambda *shown: SHOWN.append(shown))) as results:
        for work, result in results:
            found[work.name] = result
    return found


SHOWN: list[tuple[str, int, int]] = []


def test_tasks_run_the_longest_first_in_processes_that_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(workers, "usable_cores", lambda physical: 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    SHOWN.clear()
    found = measure("copa piqa slow hellaswag")
    assert set(found) == {"copa", "piqa", "slow", "hellaswag"} and len({result["pid"] for result in found.values()}) == 2
    assert os.getpid() not in {result["pid"] for result in found.values()}
    assert all(result["threads"] == [2, "3"] and result["deaf"] for result in found.values())
    begun = [name for name, done, total in SHOWN if total == 0]
    assert begun == ["hellaswag", "slow", "piqa", "copa"] and ("slow", 1, 2) in SHOWN
    assert next(iter(found)) == "hellaswag" and "RAYON_NUM_THREADS" not in os.environ


def test_an_error_is_the_first_of_the_plan_and_what_is_before_it_is_done() -> None:
    """ "bug" fails at once, with "slow" begun and "copa" waiting; "piqa" behind it is not begun any more."""
    found: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="raise ZeroDivisionError"):
        measure("slow copa bug bad piqa", found)
    assert set(found) == {"slow", "copa"}
    with pytest.raises(CheckpointError, match=r"^weights: not a model$"):
        measure("copa piqa", open_=no_model)


def test_a_worker_that_is_killed_is_named_by_its_task() -> None:
    found: dict[str, Any] = {}
    with pytest.raises(
        RunError, match=r"^killed: the worker process that measured it was killed \(SIGKILL\); what is finished"
    ):
        measure("slow copa killed", found)
    assert set(found) == {"slow", "copa"}
    with pytest.raises(RunError, match=r"^killed1: the worker"):  # none is left
        measure("killed1 killed2 copa piqa", found)


def test_no_worker_outlives_its_parent() -> None:
    """Killed, it can stop nobody: they must see to it themselves. The pipe's end is seen when nobody holds it any more."""
    script = "import sys; sys.path[:0] = sys.argv[1:]; import test_eval_workers as t; t.measure('forever1 forever2')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert {parent.stdout.readline() for _ in range(2)} == {"forever1 begins\n", "forever2 begins\n"}
        finally:
            parent.kill()
        parent.communicate(timeout=60)


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    free = [140 << 30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], free[0]))
    monkeypatch.setattr(workers, "usable_cores", lambda physical: 16)
    assert [workers.choose_workers(None, tasks, cuda, 1 << 30) for tasks in (0, 1, 3, 15)] == [1, 1, 3, 4]
    assert workers.choose_workers(None, 15, cuda, None) == workers.choose_workers(None, 15, cpu, 1 << 30) == 1
    assert workers.choose_workers(3, 15, cpu, None) == 3 and workers.choose_workers(99, 2, cuda, 1 << 30) == 2
    for gigabytes, number in ((24, 1), (51, 2), (80, 4)):
        free[0] = gigabytes << 30
        assert workers.choose_workers(None, 15, cuda, 1 << 30) == number
    with pytest.raises(ConfigError, match=r"^--workers = 0; expected at least 1$"):
        workers.choose_workers(0, 15, cpu, None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert workers.choose_workers(None, 15, cuda, 1 << 30) == workers.choose_workers(1, 15, cpu, None) == 1
    with pytest.raises(ConfigError, match=r"^--workers = 2 under torchrun, whose processes share each task"):
        workers.choose_workers(2, 15, cpu, None)
