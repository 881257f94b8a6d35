"""What a run costs beside the bare step: data, guard and logging, checkpoints, sums in a fixed order; in turns, in one process.

    python benchmarks/run_cost.py SHARDS [a.b=value ...] [--recipe TOML] [--device cuda] [--kinds bare,run,...] [--blocks 3]
                                  [--steps 10] [--out FILE]

Blocks of the training loop's own steps, one wait for the device at the end of each. bare: forward, backward and optimizer,
always on one batch. run: that with the loader, the guard, the meter and a row every `log.every` steps, with its wait, to
metrics.jsonl, TensorBoard and W&B if the recipe has them, and the display. saving: that with a checkpoint, from its snapshot to
the end of its writing. unordered: bare, with the embeddings' gradient summed by atomic additions. strict: bare, under
torch.use_deterministic_algorithms. Prints JSON after each round, with shares of the bare step.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from gdn import config as toml
from gdn.distributed.checkpoint import Saver
from gdn.distributed.mesh import ALONE
from gdn.train.guard import Guard
from gdn.train.loop import build_model, open_data, train_step
from gdn.train.meter import Meter, measure_peak
from gdn.train.metrics import Display, Metrics
from gdn.train.micro_batch import MicroBatch
from gdn.train.optim import build_optimizer
from gdn.train.recipe import RunConfig
from gdn.train.state import Progress, take_snapshot, write_state

KINDS = ("bare", "run", "saving", "unordered", "strict")
LR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/gdn_360m_15b.toml"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--blocks", type=int, default=3, help="of each kind")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if not set(kinds) <= set(KINDS) or not {"bare", *(("run",) if "saving" in kinds else ())} <= set(kinds):
        parser.error(f"--kinds {args.kinds}; expected bare and others of {', '.join(KINDS)}; saving is compared with run")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which `strict` asks for; torch's size on Hopper anyway
    recipe = toml.load(RunConfig, args.recipe, [f'data.shards="{args.shards}"', *args.overrides])
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    about = {
        "machine": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "overrides": args.overrides,
        "steps_of_a_block": args.steps,
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        blocks = Blocks(recipe, device, Path(folder), stack)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for kind in seconds:  # warms up
            blocks.measure(kind, 3)
        for _ in range(args.blocks):
            for kind, values in seconds.items():
                values.append(blocks.measure(kind, args.steps))
            text = json.dumps(about | {"seconds_a_step": seconds} | shares(seconds, recipe, args.steps), indent=1)
            print(text, flush=True)
            if args.out is not None:
                args.out.write_text(text + "\n", encoding="utf-8")


def shares(seconds: dict[str, list[float]], recipe: RunConfig, steps: int) -> dict[str, float]:
    """Medians over the bare step's; a checkpoint's seconds spread over the steps between two of the recipe's."""
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    found = {f"{kind}_over_bare": medians[kind] / medians["bare"] for kind in ("run", "strict") if kind in medians}
    if "unordered" in medians:
        found["bare_over_unordered"] = medians["bare"] / medians["unordered"]
    if "saving" in medians:
        found["seconds_a_checkpoint"] = (medians["saving"] - medians["run"]) * steps
        found["checkpoints_over_bare"] = 1 + found["seconds_a_checkpoint"] / recipe.checkpoint.every / medians["bare"]
        found["all_over_bare"] = found["run_over_bare"] + found["checkpoints_over_bare"] - 1
    return found


class Blocks:
    """Blocks of steps of one model; what is open for them closes with `stack`."""

    def __init__(self, run: RunConfig, device: torch.device, folder: Path, stack: ExitStack) -> None:
        self._run, self._device = run, device
        self._loader, _ = open_data(run)
        self._model = build_model(run, device)
        self._optimizer = build_optimizer(self._model, run.optim)
        self._progress = Progress()
        self._metrics = stack.enter_context(Metrics(folder, run))
        self._display = stack.enter_context(Display(Console(file=io.StringIO()), run.train.steps, 0))
        self._saver = stack.enter_context(Saver(folder / "checkpoints", 1, ALONE))
        self._guard = Guard(run.guard, self._progress, folder, lambda step: [], self._metrics.write)
        self._tokens = run.check(1).tokens_per_step
        self._meter = Meter(device, run.model.flops_per_token(run.data.seq_len).total, 1, measure_peak(device))
        self._batches = list(self._loader.micro_batches(0))
        # Each its own, which keeps what it captured.
        self._micro_batches = {kind: MicroBatch(self._model, run.train.cuda_graph) for kind in ("bare", "unordered", "strict")}

    def measure(self, kind: str, steps: int) -> float:
        """Seconds a step of a block of this kind."""
        around: dict[str, Callable[[], AbstractContextManager[None]]] = {"unordered": unordered, "strict": strict}
        step = self._logged if kind in ("run", "saving") else self._bare
        self._wait()
        with around.get(kind, nullcontext)():
            started = time.perf_counter()
            if kind == "saving":
                self._save()
            for _ in range(steps):
                step(self._micro_batches.get(kind, self._micro_batches["bare"]))
            if kind == "saving":
                self._saver.finish()
            self._wait()
            return (time.perf_counter() - started) / steps

    def _bare(self, micro_batch: MicroBatch) -> None:
        train_step(micro_batch, self._optimizer, self._batches, LR, self._run)

    def _logged(self, micro_batch: MicroBatch) -> None:
        """As `gdn.train.loop.train` has it."""
        progress = self._progress
        with self._meter.waiting():
            batches = list(self._loader.micro_batches(progress.step))
        result = train_step(micro_batch, self._optimizer, batches, LR, self._run)
        progress.step += 1
        self._guard.note(progress.step, result)
        self._meter.step(self._tokens)
        if progress.step % self._run.log.every == 0:
            self._guard.read(progress.step)
            row: dict[str, float] = {"step": progress.step, "tokens": 1, "seconds": 1.0, "loss": self._guard.loss}
            row |= {"lr": LR, "grad_norm": self._guard.grad_norm} | self._meter.row(self._run.train.steps - progress.step)
            self._metrics.write(row)
            self._display.update(row)

    def _save(self) -> None:
        """As `gdn.train.loop.train` has it, but for the tokenizer's two megabytes."""
        self._guard.read(self._progress.step)
        weights, moments = take_snapshot(self._model, self._optimizer, ALONE)
        assert weights is not None
        now, recipe, whole = replace(self._progress), toml.dump(self._run), weights
        fingerprint = self._loader.shards.manifest.fingerprint
        self._saver.start(now.step, moments, lambda into: write_state(into, whole, now, recipe, fingerprint))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def strict() -> Iterator[None]:
    """torch's own switch, without its filling of new tensors, which is for finding faults."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def unordered() -> Iterator[None]:
    """The embeddings' gradient by atomic additions, in whatever order they arrive."""
    ordered = functional.embedding
    functional.embedding = lambda ids, weight, *_, **__: _Embedding.apply(ids, weight)
    try:
        yield
    finally:
        functional.embedding = ordered


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2)
        return None, torch.zeros_like(ctx.weight).index_add_(0, ids.flatten(), rows.to(ctx.weight.dtype))


if __name__ == "__main__":
    main()
