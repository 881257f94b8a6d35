"""One training step of the published model on one GPU: gdn beside flash-linear-attention, and gdn's by part beside its floor.

python benchmarks/train_step.py [--rows kernels,gdn,float8,eager,nothing,blocks,fla] [--micro-batches 16,4,2] [--recipe FILE]
                                [--shards FOLDER] [a.b=value ...] [--write [--output FOLDER]]

Rows: `gdn` is `gdn.train.loop.train_step` as the recipe has it, optimizer and all; `float8` the same with the FFNs in float8,
`eager` without a CUDA graph; `nothing` and `blocks` with that computed again in the backward (the recipe's default: `keys`);
`fla` the peer (`train_models`); `kernels` every kernel around the rule beside torch.compile's for it. A step is one micro
batch, of each of the given sizes.
Times are medians of single steps by CUDA events; memory the largest allocation, and what torch held of the GPU at most, warm-up
and capture included. Floors are bytes over the copying rate, or flops over the rate of a large product, both measured first:
every tensor read or written once.
"""

import argparse
import datetime
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import train_models as models
from ops_gpu import ceilings, compare
from ops_peers import Result, reported, versions, write
from torch import Tensor

from gdn import config as toml
from gdn.data.loader import Batch, Loader
from gdn.data.shards import TRAIN, TokenShards
from gdn.model.load import save_model
from gdn.train.recipe import RunConfig

RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parent.parent / "recipes" / "gdn_360m_15b.toml"
ROWS = ("kernels", "gdn", "float8", "eager", "nothing", "blocks", "fla")
CHANGES: dict[str, dict[str, Any]] = {  # of the recipe's section `train`
    "gdn": {},
    "float8": {"float8_ffn": True},
    "eager": {"cuda_graph": False},
    "nothing": {"recompute": "nothing"},
    "blocks": {"recompute": "blocks"},
}
PARTS = {  # of the device's time: what a kernel's name contains, the first that matches
    "cross-entropy": ("_cross_entropy", "cross_entropy_"),
    "swiglu": ("swiglu",),
    "gated norm": ("_gated_norm", "layer_norm_gated"),
    "norms": ("_norm_forward", "_norm_backward", "layer_norm", "rms"),
    "rule and convolution": (
        "_conv_", "causal_conv", "_intra", "_states", "_gradients", "_finish", "_gates_", "_chain", "delta_rule", "chunk_",
        "l2norm", "recompute_w_u", "gdn_gate", "beta_sigmoid", "kernel_kernel", "prepare_wy",
    ),
    "optimizer": ("FusedOptimizer", "LpNorm", "lpnorm", "BinaryOpScalarTensor"),
    "matmuls": ("nvjet", "gemm", "cutlass", "splitK", "cublas"),
    "embeddings": ("embedding", "grad_weight", "sum_and_scatter", "gather", "index", "radix", "RadixSort", "segment"),
    "copies and casts": ("_cast_rows", "copy", "Memcpy", "Memset", "CatArray", "chunk_cat", "FillFunctor"),
    "sums and others": ("",),
}  # fmt: skip


def step_batches(run: RunConfig, shards: Path | None, steps: int) -> list[list[Batch]]:
    """Micro batches of so many steps: of real text, or of random ids."""
    data = run.data
    if shards is not None:
        loader = Loader(
            TokenShards.open(shards, TRAIN), data.seq_len, data.micro_batch_size, data.global_batch_size, run.train.seed
        )
        return [list(loader.micro_batches(step)) for step in range(steps)]
    generator = torch.Generator().manual_seed(0)
    count = data.global_batch_size // data.micro_batch_size

    def batch() -> Batch:
        ids = torch.randint(run.model.vocab_size, (data.micro_batch_size, data.seq_len + 1), generator=generator)
        return Batch(ids[:, :-1].clone(), ids[:, 1:].clone(), None, torch.arange(data.micro_batch_size))

    return [[batch() for _ in range(count)] for _ in range(steps)]


def measure_step(run: RunConfig, step: models.Step, batches: list[list[Batch]], warm_up: int, repetitions: int) -> Result:
    """Median milliseconds of a step, tokens a second, what the host takes to enqueue one, and peaks of memory."""
    # Before the warm-up, which captures: a replayed graph allocates nothing that a counter would see.
    torch.cuda.reset_peak_memory_stats()
    for i in range(warm_up):
        step(batches[i % len(batches)], run.optim.lr)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    events[0].record()
    start, losses = time.perf_counter(), []
    for i in range(repetitions):
        losses.append(step(batches[i % len(batches)], run.optim.lr)[0])
        events[i + 1].record()
    enqueued = time.perf_counter() - start
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    tokens = run.data.global_batch_size * run.data.seq_len
    return {
        "ms": statistics.median(times),
        "ms_quartiles": statistics.quantiles(times, n=4)[::2],
        "ms_wall": 1e3 * wall / repetitions,
        "host_ms": 1e3 * enqueued / repetitions,
        "tokens_per_second": 1e3 * tokens / statistics.median(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "last_loss": float(losses[-1]),
    }


def profile_step(run: RunConfig, step: models.Step, batches: list[list[Batch]], steps: int = 3) -> dict[str, Any]:
    """Milliseconds of the device by part in one step, launches, and the kernels that take most."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(steps):
            step(batches[i % len(batches)], run.optim.lr)
        torch.cuda.synchronize()
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    kernels: list[tuple[float, float, str]] = []
    for event in profile.key_averages():
        ms = event.self_device_time_total / 1e3 / steps
        if ms <= 0:
            continue
        part = next(name for name, words in PARTS.items() if any(word in event.key for word in words))
        parts[part] += ms
        kernels.append((ms, event.count / steps, f"{part}: {event.key[:90]}"))
    kernels.sort(reverse=True)
    top = [f"{1e3 * ms:9.1f} us  n {count:6.1f}  {name}" for ms, count, name in kernels[:60]]
    return {"busy_ms": sum(parts.values()), "launches": sum(k[1] for k in kernels), "parts_ms": parts, "kernels": top}


def floors(run: RunConfig, limits: Result) -> dict[str, float]:
    """Milliseconds of each part of gdn's step on one micro batch, none of it done twice."""
    m, tokens = run.model, run.data.micro_batch_size * run.data.seq_len
    hidden = 2.0 * tokens * m.hidden_size  # bytes of one residual
    values, keys, ffn = 2.0 * tokens * m.value_dim, 2.0 * tokens * m.key_dim, 2.0 * tokens * m.ffn_size
    logits, weights = 2.0 * tokens * m.vocab_size, m.num_parameters()
    layers, flops = m.num_hidden_layers, m.flops_per_token(run.data.seq_len)
    rule_flops = 18.0 * tokens * m.value_heads * m.head_dim * m.head_v_dim
    rule = 3 * (2 * keys + values) + 2 * values
    moved = {
        "norms": layers * (2 + 4) * 2 * hidden + 6 * hidden,  # behind a sum: x, branch, both out; d, x, residual's, dx
        "gated norm": layers * (3 + 5) * values,
        "swiglu": layers * (3 + 5) * ffn,
        "cross-entropy": 2 * logits,
        "optimizer": (4 + 28.0) * weights,
        "copies and casts": 6.0 * weights,
    }
    result = {name: 1e-9 * size / limits["copy_tb_s"] for name, size in moved.items()}
    products = 3.0 * tokens * (flops.projections + flops.ffn + flops.head)
    result["matmuls"] = 1e-9 * products / limits["matmul_tflops"]
    result["rule and convolution"] = 1e-9 * layers * max(rule / limits["copy_tb_s"], rule_flops / limits["matmul_tflops"])
    return result


# --- kernels beside torch.compile ------------------------------------------------------------------------------------------


def sum_and_norm(x: Tensor, branch: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x = x + branch
    return x, F.rms_norm(x.float(), (x.shape[-1],), w, 1e-6).to(x.dtype)


def norm_gradients(d: Tensor, x: Tensor, w: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide, d = x.float(), d.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    hat, inner = wide * scale, d * w
    dx = scale * (inner - hat * (inner * hat).mean(-1, keepdim=True)) + residual.float()
    return dx.to(x.dtype), (d * hat).sum((0, 1)), (hat * w).to(x.dtype)


def gated(o: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return (F.rms_norm(o.float(), (o.shape[-1],), w, 1e-6) * F.silu(gate.float())).to(o.dtype)


def gated_gradients(dy: Tensor, o: Tensor, gate: Tensor, w: Tensor, dproj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide, dy, gate = o.float(), dy.float(), gate.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    hat, s = wide * scale, gate.sigmoid()
    silu = gate * s
    dproj.copy_((dy * hat * w * (s + silu * (1 - s))).to(o.dtype))
    inner = dy * silu * w
    do = scale * (inner - hat * (inner * hat).mean(-1, keepdim=True))
    return do.to(o.dtype), (dy * hat * silu).sum((0, 1, 2)), (hat * w * silu).to(o.dtype)


def swiglu(joined: Tensor) -> Tensor:
    gate, up = joined.float().chunk(2, -1)
    return (F.silu(gate) * up).to(joined.dtype)


def swiglu_gradients(d: Tensor, joined: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = joined.float().chunk(2, -1)
    s, d = gate.sigmoid(), d.float()
    silu = gate * s
    return torch.cat([d * up * (s + silu * (1 - s)), d * silu], -1).to(joined.dtype), (silu * up).to(joined.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(logits.float(), -1)
    loss = -log_p.gather(-1, labels[:, None]).squeeze(-1)
    hot = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]
    return loss, (log_p.exp() - hot.float()).to(logits.dtype)


def kernel_rows(run: RunConfig, limits: Result) -> Result:
    """Each kernel around the rule, torch.compile's for what it computes, and the floor of its bytes, at the step's shape."""
    from gdn.ops import triton_cross_entropy, triton_norm, triton_swiglu

    m, B, T = run.model, run.data.micro_batch_size, run.data.seq_len
    D, HV, V, ffn = m.hidden_size, m.value_heads, m.head_v_dim, m.ffn_size
    column, P = 2 * m.key_dim + m.value_dim + 2 * HV, 2 * m.key_dim + 2 * m.value_dim + 2 * HV
    rows = min(8192, B * T)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, y, d, w, wv = tensor(B, T, D), tensor(B, T, D), tensor(B, T, D), tensor(D).float(), tensor(V).float()
    proj, dproj, o, dy = tensor(B, T, P), tensor(B, T, P), tensor(B, T, HV, V), tensor(B, T, HV, V)
    joined, d_ffn, logits = tensor(B, T, 2 * ffn), tensor(B, T, ffn), tensor(rows, m.vocab_size)
    labels = torch.randint(m.vocab_size, (rows,), device="cuda")
    gate, d_gate = (p[..., column:].unflatten(-1, (HV, V)) for p in (proj, dproj))
    norm, n = triton_norm, 2.0 * B * T
    table: dict[str, tuple[float, Callable[[], Any], Callable[..., Any], tuple[Tensor, ...]]] = {
        "sum and norm": (5 * n * D, lambda: norm.norm_forward(x, y, w, 1e-6), sum_and_norm, (x, y, w)),
        "its gradients": (5 * n * D, lambda: norm.norm_backward(d, x, w, 1e-6, y), norm_gradients, (d, x, w, y)),
        "gated norm": (3 * n * HV * V, lambda: norm.gated_norm_forward(o, proj, column, wv, 1e-6), gated, (o, gate, wv)),
        "its gradients ": (
            6 * n * HV * V,
            lambda: norm.gated_norm_backward(dy, o, proj, column, wv, 1e-6, dproj),
            gated_gradients,
            (dy, o, gate, wv, d_gate),
        ),
        "swiglu": (3 * n * ffn, lambda: triton_swiglu.swiglu_forward(joined), swiglu, (joined,)),
        "its gradients  ": (
            6 * n * ffn,
            lambda: triton_swiglu.swiglu_backward(d_ffn, joined),
            swiglu_gradients,
            (d_ffn, joined),
        ),
        f"cross-entropy of {rows} rows": (
            4.0 * rows * m.vocab_size,
            lambda: triton_cross_entropy.cross_entropy_in_place(logits, labels, -100, True),
            cross_entropy,
            (logits, labels),
        ),
    }
    result: Result = {}
    for name, (moved, ours, plain, arguments) in table.items():
        compiled = torch.compile(plain, dynamic=False)
        with torch.no_grad():
            times = compare({"gdn": ours, "compiled": lambda c=compiled, a=arguments: c(*a)}, 20)
        floor = 1e-9 * moved / limits["copy_tb_s"]
        result[name.strip() if name.strip() not in result else name] = {"floor_ms": floor} | times
        parts = [f"{key} {1e3 * value['ms']:7.1f}" if "ms" in value else f"{key} {value}" for key, value in times.items()]
        print(f"{name:26} floor {1e3 * floor:6.1f} us  {'  '.join(parts)}", flush=True)
    return result


# --- rows ----------------------------------------------------------------------------------------------------------------


def step_row(name: str, run: RunConfig, batches: list[list[Batch]], folder: Path, options: argparse.Namespace) -> Result:
    result: Result = {}
    with reported(result):
        start = time.perf_counter()
        if name == "fla":
            step = models.fla_step(run, folder)
        else:
            from safetensors.torch import load_file

            run = replace(run, train=replace(run.train, **CHANGES[name]))
            step = models.gdn_step(run, load_file(folder / "model.safetensors"), "cuda")
        step(batches[0], run.optim.lr)
        torch.cuda.synchronize()
        result["first_step_s"] = time.perf_counter() - start
        result |= measure_step(run, step, batches, 4, options.repetitions)
        if name == "gdn" or options.profile:
            result["profile"] = profile_step(run, step, batches)
    return result


def show(name: str, row: Result, floor: dict[str, float]) -> None:
    if "ms" not in row:
        print(f"{name}: {row}", flush=True)
        return
    print(
        f"{name}: {row['ms']:.1f} ms (wall {row['ms_wall']:.1f}, host {row['host_ms']:.1f}), {row['tokens_per_second']:.0f} "
        f"tokens/s, peak {row['peak_gib']:.2f} GiB (held {row['peak_reserved_gib']:.2f}), "
        f"first step {row['first_step_s']:.0f} s, loss {row['last_loss']:.3f}",
        flush=True,
    )
    if "profile" in row:
        profile = row["profile"]
        print(f"  device busy {profile['busy_ms']:.1f} ms, {profile['launches']:.0f} launches")
        for part, ms in profile["parts_ms"].items():
            print(f"  {part:22} {ms:7.2f} ms" + (f"   floor {floor[part]:6.2f}" if part in floor and name != "fla" else ""))
        print("  " + "\n  ".join(profile["kernels"][:45]), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help=",".join(ROWS))
    parser.add_argument("--micro-batches", default="16", help="sequences of a step: 16,4,2")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--shards", type=Path, help="folder made by `gdn prepare`; random ids without")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="every row by part, not gdn's alone")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    options = parser.parse_args(arguments)
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))}; expected some of {', '.join(ROWS)}")
    runs = []
    for size in options.micro_batches.split(","):
        one_pass = [f"data.micro_batch_size={size}", f"data.global_batch_size={size}", *options.overrides]
        runs.append(toml.load(RunConfig, options.recipe, one_pass))
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    limits = ceilings()
    print(f"{torch.cuda.get_device_name()}: {limits['matmul_tflops']:.0f} TFLOP/s, copy {limits['copy_tb_s']:.2f} TB/s")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    folder = Path(torch.hub.get_dir()) / "train_step"
    if set(rows) - {"kernels"}:
        folder.mkdir(parents=True, exist_ok=True)
        save_model(models.initial_model(runs[0]), folder)
    for run in runs:
        size, floor = run.data.micro_batch_size, floors(run, limits)
        parts = ", ".join(f"{k} {v:.2f}" for k, v in floor.items())
        print(f"micro batch {size} x {run.data.seq_len}; floors, ms: {parts}; sum {sum(floor.values()):.1f}", flush=True)
        batches = step_batches(run, options.shards, 8)
        for name in rows:
            if name == "kernels":
                row = kernel_rows(run, limits)
            else:
                row = step_row(name, run, batches, folder, options)
                gc.collect()
                torch.cuda.empty_cache()  # with the row's model, its graphs' memory too
                show(name, row, floor)
            if options.write:
                about = {"date": datetime.date.today().isoformat(), "versions": versions(), "ceilings": limits}
                about |= {"data": "real text" if options.shards else "random ids", "floors_ms": floor}
                key = name if size == 16 else f"{name}, micro batch {size}"
                write(options.output / f"train_step_{gpu}.json", {"results": {key: about | row}})


if __name__ == "__main__":
    main()
