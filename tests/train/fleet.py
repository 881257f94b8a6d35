"""Runs `gdn train` in several processes as torchrun would, phase after phase: `fleet.py RECIPE OUT PHASES`.

PHASES is a JSON list of {"processes": N, "stop": step at which the last process gets a SIGTERM, "more": [overrides]}; no
processes: a plain one. Prints the exit codes of each phase. Children are forked from this process, which has imported
everything and computed nothing, so that a phase takes a second.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

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


def main(recipe: str, out: Path, phases: list[dict]) -> None:  # type: ignore[type-arg]
    codes = []
    for phase in phases:
        count, port = phase.get("processes", 0), free_port()
        arguments = ["--quiet", "train", recipe, *phase.get("more", []), "--out", str(out), "--device", "cpu"]
        ranks, stop = range(max(1, count)), partial(stop_in, phase["stop"]) if "stop" in phase else None
        children = [start(rank, count, port, arguments, stop if rank == ranks[-1] else None) for rank in ranks]
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    sys.stdout.write(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
