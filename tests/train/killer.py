"""Runs `gdn train` in a child process again and again, killing it at seeded moments: `killer.py RECIPE OUT SEED N`.

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
from pathlib import Path

import torch

import gdn.cli
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


def main(recipe: str, out: Path, seed: int, kills: int) -> None:
    rng, killed, inside, done = random.Random(seed), 0, 0, 0
    while killed < kills:
        in_save, sync, seconds = killed == 1 or rng.random() < 0.4, rng.randrange(1, 25), rng.uniform(0, 0.2)
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            kill_at_sync(sync) if in_save else kill_after(seconds)
            os.dup2(2, 1)
            os._exit(gdn.cli.main(["--quiet", "train", recipe, "--out", str(out), "--device", "cpu"]))
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            inside += any((out / "checkpoints").glob("*.partial-*"))
        elif os.WEXITSTATUS(status) == 0:
            out.rename(f"{out}-done-{done}")
            done += 1
        else:
            sys.exit(f"exit code {os.WEXITSTATUS(status)} after {killed} kills")
    sys.stdout.write(json.dumps({"killed": killed, "inside": inside, "done": done}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
