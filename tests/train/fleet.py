"""Runs `gdn train` in several processes as torchrun would, phase after phase: `fleet.py JOBS`.

JOBS is a JSON list of {"recipe", "out", "phases"}; a phase is {"processes": N, "more": [overrides]} and what befalls the last
process: "stop", the step in which it gets a SIGTERM, "full", the save in which its disk is, or "broken", the forward pass whose
loss is not finite. No processes: a plain one.
Prints the exit codes of each job's phases. Children are forked from this process, which has imported everything and
computed nothing, so that a phase takes a second.
"""

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import gdn.cli
import gdn.train.loop


def stop_in(step: int) -> None:
    """Have this process asked to stop in `step`, counted from 0, as a scheduler does."""
    learning_rate = gdn.train.loop.learning_rate

    def interrupted(now: int, *rest) -> float:  # type: ignore[no-untyped-def]
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(now, *rest)

    gdn.train.loop.learning_rate = interrupted


def full_at(save: int) -> None:
    """Have the disk refuse this process's moments in its save number `save`, from 1."""
    write_data, saves = HuggingFaceStorageWriter.write_data, [0]

    def refused(*arguments):  # type: ignore[no-untyped-def]
        saves[0] += 1
        if saves[0] == save:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(*arguments)

    HuggingFaceStorageWriter.write_data = refused


def break_forward(number: int) -> None:
    """Make this process's loss of its forward pass `number`, from 1, not finite."""
    forward, calls = gdn.train.loop.GatedDeltaNetLM.forward, [0]

    def broken(*arguments, **more):  # type: ignore[no-untyped-def]
        out = forward(*arguments, **more)
        calls[0] += 1
        return out._replace(loss_sum=out.loss_sum * float("nan")) if calls[0] == number else out

    gdn.train.loop.GatedDeltaNetLM.forward = broken


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(rank: int, processes: int, port: int, arguments: list[str], first: Callable[[], None] | None = None) -> int:
    """Fork the process `rank` of so many, which does `first` before all else; returns its id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    if processes:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
        os.environ |= {key: str(value) for key, value in place.items()}
    if first is not None:
        first()
    os.dup2(2, 1)
    os._exit(gdn.cli.main(arguments))


def befall(phase: dict[str, Any]) -> None:
    if "stop" in phase:
        stop_in(phase["stop"])
    if "broken" in phase:
        break_forward(phase["broken"])
    if "full" in phase:
        full_at(phase["full"])


def run(recipe: str, out: str, phase: dict[str, Any]) -> list[int]:
    count, port = phase.get("processes", 0), free_port()
    arguments = ["--quiet", "train", recipe, *phase.get("more", []), "--out", out, "--device", "cpu"]
    ranks = range(max(1, count))
    children = [start(rank, count, port, arguments, partial(befall, phase) if rank == ranks[-1] else None) for rank in ranks]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    codes = [[run(job["recipe"], job["out"], phase) for phase in job["phases"]] for job in jobs]
    sys.stdout.write(json.dumps(codes))
