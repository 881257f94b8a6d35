"""What a decoded token is made of on a GPU: its bits, its kernels, and what other tiles and chains of them would give.

    python benchmarks/decode_kernels.py --out FILE [--parts bits,times,kernels,chains,tiles] [--rows 1,16,64,256]
                                        [--seconds 120] [--workers 12]

The published sizes, random weights in bf16. bits: logits of nine tokens and states of rows in batches against those of the
row alone. times: ms of the captured token with its draw. kernels: us that each adds, its end after the end of the one before.
chains: ms of a token without its draw, for every choice of kernels that begin beside the one before them. tiles: the same for
one product's tile after another, the best kept, each with a comparison of bits; beyond 16 rows tiles that Hopper's engine
copies. Every finding is in FILE as soon as it is made; neither chains nor tiles go on after so many seconds, compiling not
counted. `workers` processes compile beforehand.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from decode_gpu import events
from torch import Tensor

from gdn.generation.gpu_decoder import GPUDecoder, Stream
from gdn.generation.sampling import Sampling
from gdn.generation.weights import join_projections
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops import triton_chain, triton_layer_step, triton_linear
from gdn.ops.pending import SLOTS
from gdn.ops.triton_configs import shared_memory
from gdn.ops.triton_linear import TILES, Tile, tile_for

KERNELS = ("projections", "middle", "output", "ffn", "down")
PRODUCTS = ("down", "ffn", "projections", "output", "head")
BATCHES = (1, 2, 3, 4, 5, 8, 16, 17, 32, 64, 65, 128, 256)
# Rows of activations, of the weight, columns at a time, stages, warps; for few rows: rows of the weight.
FEW = [Tile(16, n, 0, 1, 4, split) for n in (16, 32) for split in (False, True)] + [Tile(16, 64, 128, 4, 4)]
# Copied by Hopper's engine. What threads copy was tried before, up to 200 KB under way (docs/log.md).
MANY = {
    32: [(32, 16, 256, 4, 4), (32, 32, 256, 4, 4), (32, 32, 256, 6, 4), (32, 64, 256, 4, 4), (32, 64, 128, 6, 4)],
    64: [
        (64, 16, 256, 3, 4),
        (64, 16, 256, 4, 4),
        (64, 32, 256, 3, 4),
        (64, 32, 256, 4, 4),
        (64, 64, 256, 3, 4),
        (64, 64, 128, 6, 4),
        (64, 128, 64, 8, 4),
        (64, 128, 64, 8, 8),
    ],
    256: [
        (64, 32, 256, 4, 4),
        (64, 64, 256, 3, 4),
        (128, 32, 256, 2, 8),
        (128, 64, 256, 2, 8),
        (128, 64, 128, 4, 8),
        (128, 128, 128, 3, 8),
        (128, 128, 64, 6, 8),
        (256, 64, 64, 5, 8),
    ],
}


def variants(product: str, rows: int) -> list[Tile]:
    splits = (False, True) if product in ("output", "down") else (False,)
    if rows <= 16:
        return [tile for tile in FEW if tile.split in splits]
    shapes = MANY[min((most for most in MANY if rows <= most), default=max(MANY))]
    tiles = [Tile(*shape, split, copied=True) for shape in shapes for split in splits]
    own = tile_for(product, rows, 4, 256, 2, 2, shared_memory(torch.device("cuda")))._replace(copied=True)
    return [own, *(tile for tile in tiles if tile != own)]


def build(layers: int) -> GatedDeltaNetLM:
    with torch.device("cuda"):
        config = ModelConfig(
            vocab_size=32000, hidden_size=1024, num_heads=4, head_dim=256, expand_v=1.0, num_hidden_layers=layers
        )
        model = GatedDeltaNetLM(config).eval().requires_grad_(False)
    torch.manual_seed(1)
    for parameter in model.parameters():  # nothing at its neutral value, no matrix that explodes
        parameter.normal_(std=0.03) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    join_projections(model.to(torch.bfloat16))
    return model


def ids_of(model: GatedDeltaNetLM, rows: int) -> Tensor:
    return torch.arange(rows, device="cuda") * 17 % model.config.vocab_size


def some_tokens(model: GatedDeltaNetLM, ids: Tensor, state: DecodeState) -> list[Tensor]:
    decoder = GPUDecoder(model)
    return [decoder.step((ids + n) % model.config.vocab_size, state) for n in range(SLOTS + 1)]


def bits(model: GatedDeltaNetLM, rows: int) -> dict[str, Any]:
    """Which of the first, the middle and the last row differ from the row alone."""
    state, differing = model.new_state(rows), []
    together = some_tokens(model, ids_of(model, rows), state)
    for row in sorted({0, rows // 2, rows - 1}):
        own = model.new_state(1)
        alone = some_tokens(model, ids_of(model, rows)[row : row + 1], own)
        same = all(torch.equal(a[0], b[row]) for a, b in zip(alone, together))
        pairs = zip(own.tensors().values(), state.view(row, row + 1).tensors().values())
        same = same and all(torch.equal(a, b) for a, b in pairs)
        differing += [] if same else [row]
    return {"same": not differing, "rows that differ": differing}


def stream_of(model: GatedDeltaNetLM, rows: int) -> Stream:
    stream = Stream(GPUDecoder(model), model.new_state(rows), Sampling(0.8, None, 0.95, 1))
    logits = torch.randn(1, model.config.vocab_size, device="cuda")
    for row in range(rows):
        stream.start(row, logits, seed=row)
    stream.next([0])
    return stream


def token_ms(model: GatedDeltaNetLM, rows: int) -> float:
    stream = stream_of(model, rows)
    assert stream._graph is not None
    return round(min(events(stream._graph.replay, 50) for _ in range(2)), 4)


def step_ms(model: GatedDeltaNetLM, rows: int) -> float:
    """Without the draw."""
    decoder, state, ids = GPUDecoder(model), model.new_state(rows), ids_of(model, rows)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decoder.step(ids, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step(ids, state)
    return round(min(events(graph.replay, 50) for _ in range(2)), 4)


def kernels(model: GatedDeltaNetLM, rows: int) -> dict[str, float]:
    """us of each kind of kernel: how much later it ends than the one before it."""
    stream, layers = stream_of(model, rows), model.config.num_hidden_layers
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(4):
            stream.next([0])
    found = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA and "emcpy" not in e.name]
    found.sort(key=lambda event: event.time_range.end)
    sums: dict[str, list[float]] = {}
    for start in [i for i, event in enumerate(found) if "_embed" in event.name][1:]:
        for i in range(1, min(5 * layers + 4, len(found) - start)):
            event = found[start + i]
            name = KERNELS[(i - 1) % 5] if i <= 5 * layers else "head" if i == 5 * layers + 1 else event.name
            sums.setdefault(name, []).append(event.time_range.end - found[start + i - 1].time_range.end)
    return {name: round(sum(times) / len(times), 2) for name, times in sums.items()}


@contextmanager
def table(changes: dict[str, Tile]) -> Iterator[None]:
    """These tiles in place of the table's, at any number of rows."""
    kept = dict(TILES)
    TILES.update({product: {1 << 30: tile} for product, tile in changes.items()})
    try:
        yield
    finally:
        TILES.update(kept)


@contextmanager
def chained(which: frozenset[str]) -> Iterator[None]:
    """Only these kernels begin before the one before them has ended."""
    product, link, now = triton_linear._product, triton_chain.link, ["projections"]

    def noting(name: str, *arguments: Any, **options: Any) -> None:
        now[0] = name
        product(name, *arguments, **options)

    def choosing(name: str | None) -> Callable[..., dict[str, Any]]:
        return lambda device, start=False, **_: link(device, start) if (name or now[0]) in which else {"CHAINED": False}

    triton_linear._product, triton_linear.link, triton_layer_step.link = noting, choosing(None), choosing("middle")  # type: ignore[assignment]
    try:
        yield
    finally:
        triton_linear._product, triton_linear.link, triton_layer_step.link = product, link, link


class Report:
    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.monotonic()
        self.found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def add(self, part: str, name: object, value: object) -> None:
        self.found.setdefault(part, {})[str(name)] = value
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"{time.monotonic() - self.began:6.1f} s  {part}: {name}: {json.dumps(value)}", flush=True)


def sweep(model: GatedDeltaNetLM, rows: int, report: Report, until: float) -> None:
    part, chosen = f"tiles, {rows} rows", dict[str, Tile]()
    best, wanted = step_ms(model, rows), some_tokens(model, ids_of(model, rows), model.new_state(rows))[-1]
    report.add(part, "table", best)
    for product in PRODUCTS:
        for tile in variants(product, rows):
            if time.monotonic() > until:
                return
            with table(chosen | {product: tile}):
                took = step_ms(model, rows)
                same = torch.equal(some_tokens(model, ids_of(model, rows), model.new_state(rows))[-1], wanted)
            report.add(part, f"{product} {tuple(tile)}", {"ms": took, "same": same})
            if same and took < best - 0.001:
                best, chosen = took, chosen | {product: tile}
    report.add(part, "best", {"ms": best, "tiles": {product: list(tile) for product, tile in chosen.items()}})


def is_chained(product: str, rows: int) -> bool:
    return bool(triton_chain.link(torch.device("cuda"), rows=rows, states=product == "middle")["CHAINED"])


def compile_some(work: list[tuple[int, str | None, Tile | None, bool]]) -> None:
    """In a process of its own: what each launches lies in Triton's cache then."""
    model = build(1)
    for rows, product, tile, chain in work:
        with (
            table({product: tile} if product and tile else {}),
            chained(frozenset((*KERNELS, "head")) if chain else frozenset()),
        ):
            GPUDecoder(model).step(ids_of(model, rows), model.new_state(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="bits,times,kernels,chains,tiles")
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    parts, batches = args.parts.split(","), [int(rows) for rows in args.rows.split(",")]
    report = Report(args.out)
    work: list[tuple[int, str | None, Tile | None, bool]] = [
        (rows, None, None, chain) for rows in batches for chain in (True, False)
    ]
    if "tiles" in parts:
        work += [
            (rows, name, tile, is_chained(name, rows)) for rows in batches for name in PRODUCTS for tile in variants(name, rows)
        ]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_some, [work[i :: args.workers] for i in range(args.workers)]))
    until = time.monotonic() + args.seconds
    with torch.no_grad():
        small = build(3)
        for rows in BATCHES if "bits" in parts else ():
            report.add("bits", rows, bits(small, rows))
        model = build(21)
        for rows in BATCHES if "times" in parts else ():
            report.add("token with its draw, ms", rows, token_ms(model, rows))
        for rows in batches if "kernels" in parts else ():
            report.add("us that a kernel adds", rows, kernels(model, rows))
        every = (*KERNELS, "head")
        for rows in batches if "chains" in parts else ():
            for count in range(len(KERNELS) + 1):
                for free in itertools.combinations(KERNELS, count):
                    if time.monotonic() < until:
                        with chained(frozenset(every) - set(free)):
                            report.add(f"chains, {rows} rows", f"all but {', '.join(free) or 'none'}", step_ms(model, rows))
        for rows in batches if "tiles" in parts else ():
            sweep(model, rows, report, until)


if __name__ == "__main__":
    main()
