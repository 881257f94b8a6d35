"""The gated delta rule beside the plain PyTorch one of transformers (Qwen3-Next): time and peak memory in float32 on the CPU.

python benchmarks/ops.py [--threads 2] [--repetitions 15] [--write]
python benchmarks/ops.py --device cuda ...    is `ops_gpu`, with its options
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

Rule = Callable[..., Tensor]
RESULT = Path(__file__).parent / "results" / "ops_cpu.json"


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in self._asdict().items())


HEADLINE = Shape(1, 2048, 4, 256, 256)
SHAPES = (HEADLINE, Shape(8, 256, 4, 64, 64))
# For the headline: theirs / ours for the times, ours / theirs for memory.
GOALS = {"forward": 1.5, "forward_backward": 3.0, "memory": 0.7}


def rules() -> dict[str, Rule]:
    """Both implementations behind one signature (q, k, v, g, beta) -> o, q and k normalised beforehand."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    from gdn.ops import gated_delta_rule

    def theirs(*inputs: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(*inputs)[0]

    return {"gdn": gated_delta_rule, "transformers": theirs}


def inputs_of(shape: Shape, requires_grad: bool) -> list[Tensor]:
    B, T, H, K, V = shape
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1) for _ in "qk")
    v, g, beta = torch.randn(B, T, H, V), -torch.nn.functional.softplus(torch.randn(B, T, H) - 2), torch.rand(B, T, H)
    return [x.requires_grad_(requires_grad) for x in (q, k, v, g, beta)]


def forward(rule: Rule, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        rule(*inputs)


def forward_backward(rule: Rule, inputs: list[Tensor]) -> None:
    o = rule(*inputs)
    torch.autograd.grad(o, inputs, torch.ones_like(o))


def median_times(shape: Shape, repetitions: int) -> dict[str, dict[str, float]]:
    """Milliseconds by phase and rule. The rules alternate within a repetition, so that a busy moment meets both."""
    phases = {"forward": forward, "forward_backward": forward_backward}
    result = {}
    for phase, run in phases.items():
        inputs = inputs_of(shape, requires_grad=run is forward_backward)
        times: dict[str, list[float]] = {name: [] for name in rules()}
        for repetition in range(-2, repetitions):
            for name, rule in rules().items():
                start = time.perf_counter()
                run(rule, inputs)
                if repetition >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
        result[phase] = {name: statistics.median(values) for name, values in times.items()}
    return result


def peak_memory(shape: Shape, name: str) -> float:
    """MiB by which one forward and backward raises this process's peak of resident memory (Linux).

    Called in a process of its own. A small run first loads the libraries and starts the threads; importing frees little, so the
    peak until then is the memory in use, and its rise what the call itself needs, allocator's waste included. Read from /proc:
    ru_maxrss of a child starts at the size of its parent.
    """
    rule = rules()[name]
    forward_backward(rule, inputs_of(shape._replace(B=1, T=65), requires_grad=True))
    inputs = inputs_of(shape, requires_grad=True)
    before = peak_resident()
    forward_backward(rule, inputs)
    return (peak_resident() - before) / 1024


def peak_resident() -> int:
    """Peak of resident memory so far, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def peak_memory_in_child(shape: Shape, name: str, threads: int) -> float:
    command = [sys.executable, __file__, "--threads", str(threads), "--peak-memory", name, *map(str, shape)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(shape: Shape, threads: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Medians by measurement, each with both rules and their ratio, in the direction of GOALS."""
    rows = median_times(shape, repetitions)
    rows["memory"] = {name: statistics.median(peak_memory_in_child(shape, name, threads) for _ in range(3)) for name in rules()}
    for what, row in rows.items():
        ours, theirs = row["gdn"], row["transformers"]
        row["ratio"] = ours / theirs if what == "memory" else theirs / ours
    return rows


def machine() -> dict[str, str | int]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line) if cpuinfo.exists() else {}
    named = {key.strip(): value.strip() for key, value in fields.items()}
    best = torch.backends.cpu.get_cpu_capability()
    cores = int(named.get("processor", "-1")) + 1
    return {"cpu": named.get("model name", model), "cores": cores, "torch_cpu_capability": best, "system": platform.system()}


def show(shape: Shape, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{shape}  float32{'':14} gdn  transformers     ratio")
    for what, row in rows.items():
        unit = "MiB" if what == "memory" else "ms"
        line = f"  {what:18} [{unit:>3}]  {row['gdn']:12.1f}  {row['transformers']:12.1f}  {row['ratio']:8.2f}"
        if shape == HEADLINE:
            met = row["ratio"] <= GOALS[what] if what == "memory" else row["ratio"] >= GOALS[what]
            line += f"   goal {'<=' if what == 'memory' else '>='} {GOALS[what]}: {'met' if met else 'MISSED'}"
        print(line)


def main() -> None:
    if sys.argv[1:3] == ["--device", "cuda"]:
        import ops_gpu

        ops_gpu.main(sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="or cuda, as the first option")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=15, help="timed runs of each rule (default 15)")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument(
        "--peak-memory", nargs=6, metavar=("RULE", *"BTHKV"), help="print one peak in MiB and stop (for the children)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_memory:
        name, *sizes = options.peak_memory
        print(peak_memory(Shape(*map(int, sizes)), name))
        return
    results = {}
    for shape in SHAPES:
        results[str(shape)] = rows = measure(shape, options.threads, options.repetitions)
        show(shape, rows)
    if options.write:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/ops.py", *sys.argv[1:]]),
            "machine": machine() | {"threads": options.threads},
            "versions": {name: version(name) for name in ("gdn", "torch", "transformers")}
            | {"python": platform.python_version()},
            "units": "times: median ms, ratio transformers / gdn; memory: peak MiB, forward + backward, gdn / transformers",
            "repetitions": options.repetitions,
            "goals": {str(HEADLINE): GOALS},
            "results": {
                shape: {k: {n: round(x, 3) for n, x in row.items()} for k, row in rows.items()}
                for shape, rows in results.items()
            },
        }
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\nwritten: {RESULT}")


if __name__ == "__main__":
    main()
