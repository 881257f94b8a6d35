"""Runs `gdn train` again and again, killing it at seeded moments: `killer.py RECIPE OUT SEED N PROCESSES` (0: a plain one).

A kill comes at the n-th sync inside an unpublished checkpoint, or at a random time. A run that ends all the same
is kept as OUT-done-<i> and the next begins anew. Prints {"killed", "inside", "done"}: kills, those that left half a
checkpoint, finished runs. Every child is forked from this process, which has imported everything and computed nothing.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from fleet import free_port, start

import gdn.files
import gdn.train.loop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_sync(number: int) -> None:
    sync, left = gdn.files._sync, [number]

    def counted(path: Path) -> None:
        left[0] -= "step-" in str(path) and ".partial-" in str(path)
        if not left[0]:
            die()
        sync(path)

    gdn.files._sync = counted


def kill_after(seconds: float) -> None:
    """The clock starts with the first step."""
    learning_rate, started = gdn.train.loop.learning_rate, []

    def later() -> None:
        time.sleep(seconds)
        die()

    def start_clock(*args):  # type: ignore[no-untyped-def]
        if not started:
            started.append(threading.Thread(target=later, daemon=True))
            started[0].start()
        return learning_rate(*args)

    gdn.train.loop.learning_rate = start_clock


def main(recipe: str, out: Path, seed: int, kills: int, processes: int) -> None:
    rng, killed, inside, done = random.Random(seed), 0, 0, 0
    arguments = ["--quiet", "train", recipe, "--out", str(out), "--device", "cpu"]
    while killed < kills:
        in_save, sync, seconds = killed == 1 or rng.random() < 0.4, rng.randrange(1, 25), rng.uniform(0, 0.2)
        victim, port = 0 if in_save else rng.randrange(max(1, processes)), free_port()
        plan = partial(kill_at_sync, sync) if in_save else partial(kill_after, seconds)
        ranks = range(max(1, processes))
        children = [start(rank, processes, port, arguments, plan if rank == victim else None) for rank in ranks]
        code = os.waitstatus_to_exitcode(os.waitpid(children[victim], 0)[1])
        for child in children[:victim] + children[victim + 1 :]:
            if code:  # torchrun ends the others when one is lost
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if code == -signal.SIGKILL:
            killed += 1
            inside += any((out / "checkpoints").glob("*.partial-*"))
        elif code == 0:
            out.rename(f"{out}-done-{done}")
            done += 1
        else:
            sys.exit(f"exit code {code} after {killed} kills")
    sys.stdout.write(json.dumps({"killed": killed, "inside": inside, "done": done}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
