"""Loss of the published model with its FFNs in float8 beside bf16: the same weights, batches and schedule; and what each takes.

python benchmarks/float8_loss.py SHARDS [--arm both|bf16|float8] [--name OTHER] [--steps 300] [--recipe FILE] [--output FOLDER]
                                 [a.b=value ...]
python benchmarks/float8_loss.py --compare BF16.json FLOAT8.json
python benchmarks/float8_loss.py --kernels

Steps of one micro batch of 16 x 2,048 unless told otherwise, learning rates those of the recipe's schedule. Each arm writes
FOLDER/float8_loss_ARM.json: losses, median ms of a step by CUDA events without the first ten, peaks of memory; so two GPUs can
have an arm each. --compare, and both arms together, say by how much the means of the last 50 losses differ, and exit with 1
beyond 0.01. `--kernels`: us of every cast and product at 32,768 rows beside what it takes the place of.
"""

import argparse
import datetime
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import train_models as models
from ops_gpu import compare as time_each
from ops_peers import Result, rounded, versions

from gdn import config as toml
from gdn.data.loader import Loader
from gdn.data.shards import TRAIN, TokenShards
from gdn.train.optim import learning_rate
from gdn.train.recipe import RunConfig

RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parent.parent / "recipes" / "gdn_360m_scaled.toml"
ONE_PASS = ["data.micro_batch_size=16", "data.global_batch_size=16"]
LAST, BOUND, WARM_UP = 50, 0.01, 10
ARMS = {"bf16": False, "float8": True}


def train(run: RunConfig, shards: Path, steps: int) -> Result:
    """Losses, times and memory of so many steps of the recipe from its initial weights."""
    data = run.data
    loader = Loader(
        TokenShards.open(shards, TRAIN), data.seq_len, data.micro_batch_size, data.global_batch_size, run.train.seed
    )
    torch.cuda.reset_peak_memory_stats()
    step = models.gdn_step(run, models.initial_model(run).state_dict(), "cuda")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    losses, norms = [], []
    events[0].record()
    for i in range(steps):
        loss, norm = step(list(loader.micro_batches(i)), learning_rate(i, run.train.steps, run.optim))
        losses.append(loss)
        norms.append(norm)
        events[i + 1].record()
        if i % 50 == 49:
            print(f"step {i + 1}: loss {float(loss):.4f}", flush=True)
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:])][WARM_UP:]
    curve = [float(loss) for loss in losses]
    return {
        "last_mean": statistics.fmean(curve[-LAST:]),
        "ms": statistics.median(times),
        "ms_quartiles": statistics.quantiles(times, n=4)[::2],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "loss": [round(x, 5) for x in curve],
        "grad_norm": [round(float(x), 5) for x in norms],
    }


def arm(name: str, options: argparse.Namespace, overrides: list[str]) -> Path:
    switch = f"train.float8_ffn={str(ARMS[name]).lower()}"
    run = toml.load(RunConfig, options.recipe, [*ONE_PASS, *overrides, switch])
    about = {"date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "versions": versions()}
    row = about | {"recipe": toml.to_dict(run)} | train(run, options.shards, options.steps)
    path: Path = options.output / f"float8_loss_{options.name or name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(row)) + "\n")
    print(f"{name}: {row['ms']:.1f} ms a step, peak {row['peak_gib']:.2f} GiB, mean of the last {LAST} {row['last_mean']:.4f}")
    print(f"written: {path}", flush=True)
    return path


def difference(first: Path, second: Path) -> int:
    one, other = (json.loads(path.read_text()) for path in (first, second))
    if len(one["loss"]) != len(other["loss"]):
        sys.exit(f"{first} has {len(one['loss'])} steps, {second} {len(other['loss'])}; expected as many")
    means = [statistics.fmean(curve["loss"][-LAST:]) for curve in (one, other)]
    by = means[1] - means[0]
    print(f"mean of the last {LAST} of {len(one['loss'])} losses: {means[0]:.4f} and {means[1]:.4f}, {by:+.4f}")
    for i in range(LAST, len(one["loss"]) + 1, LAST):
        parts = [statistics.fmean(curve["loss"][i - LAST : i]) for curve in (one, other)]
        print(f"  steps {i - LAST + 1} to {i}: {parts[0]:.4f} and {parts[1]:.4f}, {parts[1] - parts[0]:+.4f}")
    print(f"ms a step {one['ms']:.1f} and {other['ms']:.1f}; GiB {one['peak_gib']:.2f} and {other['peak_gib']:.2f}")
    print("within" if abs(by) <= BOUND else "OUTSIDE", f"{BOUND:g}")
    return int(abs(by) > BOUND)


def kernels() -> None:
    """Casts and products of the published FFN at 16 x 2,048."""
    from gdn.ops import triton_norm as norm
    from gdn.ops import triton_swiglu as swiglu
    from gdn.ops.triton_float8 import cast_rows, product

    rows, hidden, F = 32768, 1024, 2816

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, branch, w, joined, d = (
        tensor(rows, hidden),
        tensor(rows, hidden),
        tensor(hidden).float(),
        tensor(rows, 2 * F),
        tensor(rows, F),
    )
    gate_up, down, residual = tensor(2 * F, hidden), tensor(hidden, F), tensor(rows, hidden)
    table: dict[str, Callable[[], Any]] = {
        "sum and norm": lambda: norm.norm_forward(x, branch, w, 1e-6),
        "sum and norm, float8": lambda: norm.norm_forward_float8(x, branch, w, 1e-6),
        "swiglu": lambda: swiglu.swiglu_forward(joined),
        "swiglu, float8": lambda: swiglu.swiglu_forward_float8(joined),
        "swiglu backward": lambda: swiglu.swiglu_backward(d, joined),
        "swiglu backward, float8": lambda: swiglu.swiglu_backward_float8(d, joined),
        "cast of d_out": lambda: cast_rows(x),
        "casts of weights, forward": lambda: (cast_rows(gate_up), cast_rows(down)),
        "casts of weights, backward": lambda: (cast_rows(down.t().contiguous()), cast_rows(gate_up.t().contiguous())),
        "residual's sum": lambda: residual.add_(x),
        "down into the residual, bf16": lambda: residual.addmm_(d, down.t()),
    }
    matrices = {"gate|up": (x, gate_up), "down": (d, down), "d_activated": (x, down.t()), "d_normed": (joined, gate_up.t())}
    for name, (a, b) in matrices.items():
        left, right = cast_rows(a), cast_rows(b.contiguous())
        table[f"{name}, bf16"] = lambda a=a, b=b: a @ b.t()  # type: ignore[misc]
        table[f"{name}, float8"] = lambda p=left, q=right: product(p, q, torch.bfloat16)  # type: ignore[misc]
    for name, result in time_each(table).items():
        print(f"{name:32} {1e3 * result['ms']:8.1f} us" if "ms" in result else f"{name}: {result}", flush=True)
    for warps in (4, 8, 16):
        swiglu.FLOAT8_WARPS = warps
        both = {name: table[name] for name in ("swiglu, float8", "swiglu backward, float8")}
        print(f"{warps} warps:", {name: round(1e3 * result["ms"], 1) for name, result in time_each(both).items()}, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="?", help="folder made by `gdn prepare`")
    parser.add_argument("--arm", choices=("both", *ARMS), default="both")
    parser.add_argument("--name", help="of the file of one arm, if not the arm's: another seed's, say")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BF16", "FLOAT8"))
    parser.add_argument("--kernels", action="store_true")
    options, overrides = parser.parse_known_args(arguments)
    if unknown := [x for x in overrides if "=" not in x or x.startswith("-")]:
        parser.error(f"{' '.join(unknown)}: expected a.b=value")
    if options.compare:
        return difference(*options.compare)
    if options.kernels:
        kernels()
        return 0
    if options.shards is None:
        parser.error("SHARDS: expected a folder made by `gdn prepare`")
    paths = []
    for name in ARMS if options.arm == "both" else (options.arm,):
        paths.append(arm(name, options, overrides))
        gc.collect()
        torch.cuda.empty_cache()
    return difference(*paths) if len(paths) == 2 else 0


if __name__ == "__main__":
    sys.exit(main())
