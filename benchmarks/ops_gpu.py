"""The operators on a GPU beside their peers, in one process, and each as a share of what this machine could do.

python benchmarks/ops_gpu.py [--rows bare256,bare128,layer,step,long] [--peers fla,...] [--write [--output FOLDER]]
                             [--accuracy | --profile | --tune-step]

Ceilings of the machine, measured first: bf16 product of 8192 x 8192 matrices of random numbers, and a copy of 2 GiB, counting
bytes read and written. A row's floor is max(bytes / copy rate, flops / matmul rate), with every tensor read or written once and
only the products that any form of the rule has:

    rule, forward               bytes 2 BT (2HK + 2HV) + 8 BTH         flops  6 BTH KV    (k S, q S, k^T x)
    rule, forward + backward    bytes 2 BT (6HK + 5HV) + 24 BTH        flops 18 BTH KV    (and six with S and dS)
    layer path, both            bytes 2 BT (3 projections + 2 outputs) flops as the rule
    step                        bytes 8 BH KV                          the state, float32, once in and once out

Times are medians. The runs of a row alternate, each after the L2 cache was overwritten; a sleep on the GPU lets the host
enqueue all of a run before it starts, so that what is timed is the GPU (`host_ms` is what enqueueing takes). `step` is a CUDA
graph of 21 layers' states in turn, several tokens where the batch is small: at B = 1 these states, 22 MB, lie in the L2 cache.
"""

import argparse
import datetime
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ops_peers as peers
import torch
from ops_peers import Random, Result, Shape, reported, versions, write
from torch import Tensor

Run = Callable[[], object]
RESULTS = Path(__file__).parent / "results"
BARE_256, BARE_128, LONG = Shape(16, 2048, 4, 256, 256), Shape(16, 2048, 8, 128, 128), Shape(1, 32768, 4, 256, 256)
ROWS = ("bare256", "bare128", "layer", "step", "long")
PEERS = ("fla", "fla_activations", "fla_without_cat", "flash_qla", "flashinfer")
LAYERS, STEP_BATCHES = 21, (1, 16, 64, 256)


# --- measuring ------------------------------------------------------------------------------------------------------------


def ceilings() -> dict[str, float]:
    random = Random(0)
    a, b = (random.normal(8192, 8192, dtype=torch.bfloat16) for _ in range(2))
    source = random.normal(1 << 29)
    target = torch.empty_like(source)
    runs = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = {name: result["ms"] for name, result in compare(runs).items()}
    return {"matmul_tflops": 2 * 8192**3 / times["matmul"] / 1e9, "copy_tb_s": 2 * source.nbytes / times["copy"] / 1e9}


def compare(runs: dict[str, Run], repetitions: int = 30) -> dict[str, Result]:
    """Median ms of each; one that raises has its error instead."""
    cache = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    results: dict[str, Result] = {name: {} for name in runs}
    times: dict[str, list[float]] = {}
    for name, run in runs.items():
        with reported(results[name]):
            results[name]["host_ms"] = warm_up(run)
            times[name] = []
    for _ in range(repetitions):
        for name in times:
            cache.zero_()
            torch.cuda._sleep(int(2e6 * (1.5 * results[name]["host_ms"] + 0.5)))  # cycles, at about 2 GHz
            times[name].append(timed(runs[name]))
    for name, values in times.items():
        results[name] |= {"ms": statistics.median(values), "ms_quartiles": statistics.quantiles(values, n=4)[::2]}
    return results


def warm_up(run: Run) -> float:
    """Compiles and tunes; ms of the host for one run."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    host_ms = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    return host_ms


def timed(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_memory(run: Run) -> float:
    """MiB that one run needs beyond its inputs, outputs and gradients included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def captured(run: Run) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


# --- rows -----------------------------------------------------------------------------------------------------------------


def forward_of(call: peers.Call, inputs: list[Tensor]) -> Run:
    def run() -> object:
        with torch.no_grad():
            return call(*inputs)

    return run


def forward_backward_of(call: peers.Call, inputs: list[Tensor], do: Tensor) -> Run:
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> object:
        return torch.autograd.grad(call(*leaves), leaves, do)

    return run


Column = tuple[Callable[[], peers.Call], Callable[[], list[Tensor]]]  # makes the call; makes its inputs


def rule_columns(shape: Shape, seed: int) -> dict[str, Column]:
    bare, raw = (lambda: peers.rule_inputs(shape, seed)), (lambda: peers.raw_inputs(shape, seed))
    columns: dict[str, Column] = {
        "gdn": (peers.gdn_rule, bare),
        "fla": (peers.fla_rule, bare),
        "fla_activations": (peers.fla_rule_with_activations, raw),
    }
    if shape.K == shape.V == 128:
        columns |= {"flash_qla": (peers.flash_qla_rule, bare), "flashinfer": (peers.flashinfer_rule, bare)}
    return columns


def layer_columns(shape: Shape, seed: int) -> dict[str, Column]:
    return {
        "gdn": (lambda: peers.gdn_layer_path(shape), lambda: peers.projection_inputs(shape, seed)),
        "fla": (lambda: peers.fla_layer_path(shape, False), lambda: peers.separate_inputs(shape, seed, False)),
        "fla_without_cat": (lambda: peers.fla_layer_path(shape, True), lambda: peers.separate_inputs(shape, seed, True)),
    }


def phases_of(
    shape: Shape, columns: dict[str, Column], floors: dict[str, tuple[float, float]], limits: Result, wanted: set[str]
) -> Result:
    """Forward without gradients, and forward + backward with the memory it takes; floors: bytes and flops of each."""
    columns = {name: column for name, column in columns.items() if name in wanted | {"gdn"}}
    B, T, H, _, V = shape
    do = Random(99).normal(B, T, H, V, dtype=torch.bfloat16)
    row: Result = {}
    for phase, (moved, flops) in floors.items():
        runs: dict[str, Run] = {}
        results: dict[str, Result] = {name: {} for name in columns}
        for name, (make_call, make_inputs) in columns.items():
            if name == "flashinfer" and phase != "forward":
                del results[name]
                continue
            with reported(results[name]):
                call, inputs = make_call(), make_inputs()
                runs[name] = run = forward_of(call, inputs) if phase == "forward" else forward_backward_of(call, inputs, do)
                warm_up(run)
                results[name]["peak_mib"] = peak_memory(run)
        for name, result in compare({name: run for name, run in runs.items() if "error" not in results[name]}).items():
            results[name] |= result
        row[phase] = with_floor(results, moved, flops, limits)
        gc.collect()
        torch.cuda.empty_cache()
    return row


def with_floor(results: dict[str, Result], moved: float, flops: float, limits: Result) -> Result:
    floor_ms = 1e-9 * max(moved / limits["copy_tb_s"], flops / limits["matmul_tflops"])
    for result in results.values():
        if "ms" in result:
            result["share_of_floor"] = floor_ms / result["ms"]
            if "ms" in results["gdn"]:
                result["times_gdn"] = result["ms"] / results["gdn"]["ms"]
    return {"floor_ms": floor_ms, "bytes": moved, "flops": flops} | results


def rule_row(shape: Shape, limits: Result, seed: int, wanted: set[str]) -> Result:
    B, T, H, K, V = shape
    tokens, product = B * T * H, B * T * H * K * V
    floors = {
        "forward": (2 * tokens * (2 * K + 2 * V) + 8 * tokens, 6 * product),
        "forward_backward": (2 * tokens * (6 * K + 5 * V) + 24 * tokens, 18 * product),
    }
    return phases_of(shape, rule_columns(shape, seed), floors, limits, wanted)


def layer_row(limits: Result, wanted: set[str]) -> Result:
    B, T, H, K, V = BARE_256
    projection, output, product = H * (2 * K + V + 2), H * V, B * T * H * K * V
    floors = {
        "forward": (2 * B * T * (projection + output), 6 * product),
        "forward_backward": (2 * B * T * (3 * projection + 2 * output), 18 * product),
    }
    return phases_of(BARE_256, layer_columns(BARE_256, 3), floors, limits, wanted)


def step_inputs(B: int) -> list[list[Tensor]]:
    """q, k, v, g, beta, state of each layer."""
    random, H, K = Random(B), BARE_256.H, BARE_256.K
    inputs = [[x[:, 0] for x in peers.rule_inputs(Shape(B, 1, H, K, K), seed=layer)] for layer in range(LAYERS)]
    return [[*tensors, random.normal(B, H, K, K)] for tensors in inputs]


def step_time(call: Callable[..., object], inputs: list[list[Tensor]]) -> float:
    """ms a layer. Holds every layer's results until the token's end, as decoding does."""
    tokens = 4 if inputs[0][0].shape[0] <= 16 else 1

    def run() -> object:
        for _ in range(tokens):
            results = [call(*tensors) for tensors in inputs]
        return results

    graph = captured(run)
    return statistics.median(timed(graph.replay) for _ in range(40)) / (tokens * LAYERS)


def step_row(limits: Result) -> Result:
    row: Result = {}
    for B in STEP_BATCHES:
        results: dict[str, Result] = {"gdn": {}, "fla": {}}
        inputs = step_inputs(B)
        for name, make_call in {"gdn": peers.gdn_step, "fla": peers.fla_step}.items():
            with reported(results[name]):
                results[name]["ms"] = step_time(make_call(), inputs)
        row[f"B{B}"] = with_floor(results, 2 * inputs[0][-1].nbytes, 0, limits)
        del inputs
        torch.cuda.empty_cache()
    return row


def tune_step() -> None:
    """us a layer of every configuration of the step kernel, and each over the floor at 4.24 TB/s, an H200."""
    from gdn.ops.triton_step import CANDIDATES, step

    print(f"{'columns, warps, evict first':30}" + "".join(f"{f'B{B}':>16}" for B in STEP_BATCHES))
    table: dict[str, list[str]] = {str(tuple(config)): [] for config in CANDIDATES}
    for B in STEP_BATCHES:
        inputs = step_inputs(B)
        floor = 2 * inputs[0][-1].nbytes / 4.24e6
        for config in CANDIDATES:
            us = 1e3 * step_time(lambda *tensors, config=config: step(*tensors, BARE_256.K**-0.5, config), inputs)
            table[str(tuple(config))].append(f"{us:9.2f} {us / floor:5.2f}x")
    for name, cells in table.items():
        print(f"{name:30}" + "".join(f"{cell:>16}" for cell in cells))


def profile(rows: list[str], wanted: set[str]) -> None:
    """The kernels of a forward and backward: us a run, of those rows that are not of single steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    shapes = {"bare256": BARE_256, "bare128": BARE_128, "layer": BARE_256, "long": LONG}
    for row, shape in shapes.items():
        if row not in rows:
            continue
        do = Random(99).normal(*shape[:3], shape.V, dtype=torch.bfloat16)
        columns = layer_columns(shape, 3) if row == "layer" else rule_columns(shape, 1)
        for name, (make_call, make_inputs) in columns.items():
            if name not in wanted | {"gdn"}:
                continue
            result: Result = {}
            print(f"\n{row}, {name}: us a forward and backward, launches a run, kernel")
            with reported(result):
                run = forward_backward_of(make_call(), make_inputs(), do)
                warm_up(run)
                with torch.profiler.profile(activities=activities) as profiler:
                    for _ in range(5):
                        run()
                    torch.cuda.synchronize()
                kernels = [e for e in profiler.key_averages() if str(e.device_type).endswith("CUDA")]
                kernels.sort(key=lambda event: -event.self_device_time_total)
                for event in kernels[:20]:
                    print(f"  {event.self_device_time_total / 5:9.1f}  {event.count / 5:5.1f}  {event.key[:100]}")
                print(f"  {sum(event.self_device_time_total for event in kernels) / 5:9.1f}  all")
            if "error" in result:
                print(f"  {result['error']}")


# --- the report -----------------------------------------------------------------------------------------------------------


def show(name: str, row: Result) -> None:
    for phase, results in row.items():
        print(f"\n{name} {phase}: floor {1e3 * results['floor_ms']:.1f} us")
        for column, result in results.items():
            if not isinstance(result, dict):
                continue
            if "error" in result:
                print(f"  {column:18} failed: {result['error']}")
                continue
            line = f"  {column:18} {1e3 * result['ms']:10.1f} us   {result['share_of_floor']:6.1%} of the floor's speed"
            line += f"   {result['times_gdn']:5.2f}x gdn" if "times_gdn" in result else ""
            line += f"   peak {result['peak_mib']:7.0f} MiB   host {result['host_ms']:.2f} ms" if "peak_mib" in result else ""
            print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="some of " + ",".join(ROWS))
    parser.add_argument("--peers", default=",".join(PEERS), help="some or none of %(default)s; some tune for minutes")
    parser.add_argument("--write", action="store_true", help="write ops_<gpu>.json, or ops_accuracy_<gpu>.json")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="where to (default benchmarks/results)")
    parser.add_argument("--accuracy", action="store_true", help="errors against float64 instead of times")
    parser.add_argument("--quick", action="store_true", help="with --accuracy: three cases of each size and dtype")
    parser.add_argument("--having", default="", metavar="TEXT", help="with --accuracy: only cases with this in their name")
    parser.add_argument("--sizes", default="256,128,64", help="with --accuracy: some of these K = V (FLA tunes for minutes)")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32", help="with --accuracy: some of these")
    parser.add_argument("--profile", action="store_true", help="tables of kernels instead of times")
    parser.add_argument("--tune-step", action="store_true", help="every configuration of the step kernel instead")
    options = parser.parse_args(arguments)
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))}: expected some of {', '.join(ROWS)}")
    wanted = set(filter(None, options.peers.split(",")))
    if unknown := wanted - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: expected some of {', '.join(PEERS)}")
    gpu = torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    about: Result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name(),
        "versions": versions(),
    }
    if options.accuracy:
        from ops_accuracy import accuracy

        sizes = [int(size) for size in options.sizes.split(",")]
        target = options.output / f"ops_accuracy_{gpu}.json"
        accuracy(
            options.dtypes.split(","),
            sizes,
            options.quick,
            options.having,
            "fla" in wanted,
            lambda results: write(target, about | {"results": results}) if options.write else None,
        )
        return
    if options.profile or options.tune_step:
        if options.profile:
            profile(rows, wanted)
        else:
            tune_step()
        return
    limits = ceilings()
    print(f"bf16 matmul {limits['matmul_tflops']:.0f} TFLOP/s, copy {limits['copy_tb_s']:.2f} TB/s")
    measure: dict[str, Callable[[], Result]] = {
        "bare256": lambda: rule_row(BARE_256, limits, 1, wanted),
        "bare128": lambda: rule_row(BARE_128, limits, 2, wanted),
        "layer": lambda: layer_row(limits, wanted),
        "step": lambda: step_row(limits),
        "long": lambda: rule_row(LONG, limits, 5, wanted),
    }
    units = "median ms; peak MiB beyond the inputs; share_of_floor = floor / time; times_gdn = time / gdn's"
    for name in rows:
        row = measure[name]()
        show(name, row)
        if options.write:  # at once: a peer that tunes for minutes may outlast what the machine is lent for
            about["results"] = {name: {"date": about["date"], "versions": about["versions"], "ceilings": limits} | row}
            write(options.output / f"ops_{gpu}.json", about | {"units": units, "ceilings": limits})


if __name__ == "__main__":
    main()
