"""What logging costs: blocks of the training loop's own steps, bare and with everything a run logs, in turn in one process.

    python benchmarks/logging_cost.py SHARDS [a.b=value ...] [--recipe TOML] [--device cuda] [--blocks 6] [--steps 20]

Bare: data, forward, backward, optimizer, and one wait for the device at the end of a block. Logged: that, and guard, meter, a
row every `log.every` steps with its wait, metrics.jsonl, TensorBoard and W&B if the recipe asks for them, the display's line.
Prints JSON; what was measured on which machine stands in docs/log.md.
"""

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gdn.config import load
from gdn.train.guard import Guard
from gdn.train.loop import build_model, open_data, train_step
from gdn.train.meter import Meter, measure_peak
from gdn.train.metrics import Display, Metrics
from gdn.train.micro_batch import MicroBatch
from gdn.train.optim import build_optimizer
from gdn.train.recipe import RunConfig
from gdn.train.state import Progress


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/gdn_360m_15b.toml"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=6, help="of each kind")
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    args = parser.parse_args()
    run = load(RunConfig, args.recipe, [f'data.shards="{args.shards}"', *args.overrides])
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(run, device, Path(folder), args.blocks, args.steps)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    about = {
        "machine": machine,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(about | result, indent=1))


def measure(run: RunConfig, device: torch.device, folder: Path, blocks: int, steps: int) -> dict[str, Any]:
    """Seconds a step of the two kinds of blocks, medians and all; and microseconds of the parts that are called alone."""
    loader, _ = open_data(run)
    model = build_model(run, device)
    micro_batch, optimizer = MicroBatch(model, run.train.cuda_graph), build_optimizer(model, run.optim)
    plan, done = run.check(1), 0
    seconds: dict[str, list[float]] = {"bare": [], "logged": []}
    with Metrics(folder, run) as metrics, Display(Console(file=io.StringIO()), run.train.steps, 0) as display:
        guard = Guard(run.guard, Progress(), folder, lambda step: [], metrics.write)
        meter = Meter(device, run.model.flops_per_token(run.data.seq_len).total, 1, measure_peak(device))

        def bare(step: int) -> None:
            train_step(micro_batch, optimizer, list(loader.micro_batches(step)), 1e-4, run)

        def logged(step: int) -> None:
            with meter.waiting():
                batches = list(loader.micro_batches(step))
            guard.note(step + 1, train_step(micro_batch, optimizer, batches, 1e-4, run))
            meter.step(plan.tokens_per_step)
            if (step + 1) % run.log.every == 0:
                guard.read(step + 1)
                row: dict[str, float] = {"step": step + 1, "tokens": 1, "seconds": 1.0, "loss": guard.loss, "lr": 1e-4}
                row |= {"grad_norm": guard.grad_norm} | meter.row(steps - step)
                metrics.write(row)
                display.update(row)

        for block in range(2 * blocks + 1):
            kind: Callable[[int], None] = (bare, logged)[block % 2]
            started = time.perf_counter()
            for step in range(done, done + steps):
                kind(step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if block:  # the first warms up
                seconds[kind.__name__].append((time.perf_counter() - started) / steps)
            done += steps
        parts = {
            "meter.waiting and meter.step": _microseconds(lambda: _count(meter)),
            "meter.row": _microseconds(lambda: meter.row(1)),
            "metrics.write": _microseconds(lambda: metrics.write({"step": 1, "loss": 2.5, "lr": 1e-4, "grad_norm": 1.0})),
        }
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    per_step = parts["meter.waiting and meter.step"] + (parts["meter.row"] + parts["metrics.write"]) / run.log.every
    return {
        "seconds_a_step": medians,
        "blocks": seconds,
        "logged_over_bare": medians["logged"] / medians["bare"],
        "microseconds_a_call": parts,
        "share_of_a_bare_step": per_step * 1e-6 / medians["bare"],
    }


def _count(meter: Meter) -> None:
    with meter.waiting():
        pass
    meter.step(1)


def _microseconds(call: Callable[[], object], times: int = 200) -> float:
    started = time.perf_counter()
    for _ in range(times):
        call()
    return 1e6 * (time.perf_counter() - started) / times


if __name__ == "__main__":
    main()
